"""GateLoop against its complex recurrence, the two ops that it runs on, and what it reduces to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.recurrent.gateloop import GateLoop, _angles
from seqmix.ops.linear_reference import linear_mixing_matrix
from tests.mixers.equations import agrees_with, compiled, scan, sigmoid, silu, tokens, weights

SCALAR = GateLoop(d_model=6, chunk=4)
MATRIX = dataclasses.replace(SCALAR, heads=2)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def by_the_equations(mixer, p, x):
    q, k, v, gate, mag, phase = (
        jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("q", "k", "v", "gate", "mag", "phase")
    )
    if mixer.transition == "complex":
        z = mag + 1j * phase
        a = sigmoid(jnp.abs(z)) * z / jnp.abs(z)
    else:
        a = sigmoid(mag) * jnp.exp(1j * phase)

    def step(s, q, k, v, a):
        s = a[..., None] * s + k[..., None] * v[..., None, :]
        return s, jnp.sum(q[..., None] * s, axis=-2).real

    heads, size = mixer.sizes
    mixed = scan(step, jnp.zeros((len(x), heads, size, size), complex), q, k, v, a)
    return jnp.einsum("bthv,hvd->btd", mixed * silu(gate), p["out"])


@pytest.mark.parametrize("mixer", [SCALAR, MATRIX], ids=["scalar", "matrix"])
@pytest.mark.parametrize("transition", ["separate", "complex"])
def test_forward_and_its_gradients_are_those_of_the_complex_recurrence(mixer, transition):
    mixer = dataclasses.replace(mixer, transition=transition)
    agrees_with(mixer, lambda p, x: by_the_equations(mixer, p, x))


def test_the_real_op_of_twice_the_width_is_the_complex_scan():
    """On scalar states, where both can run: outputs and states, from a state, over segments and padding."""
    p, x = weights(SCALAR), tokens(SCALAR, 9)
    ids = jnp.array([[0, 3, 3, 0, 3, 1, 1, 0, 1], [2, 2, 2, 2, 2, 2, 0, 2, 2]])

    @compiled
    def run(p, x):
        arrays = [jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("q", "k", "v")]
        parts = jnp.moveaxis(tokens(SCALAR, 2)[..., None], 1, 0)[..., None]
        args = (*arrays, *SCALAR._transition(p, x), {"re": parts[0], "im": parts[1]}, {"segment_ids": ids, "chunk": 4})
        return SCALAR._scan(*args), SCALAR._matrix(*args)

    for a, b in zip(*map(jax.tree.leaves, run(p, x)), strict=True):
        assert np.max(np.abs(a)) > 0.1
        np.testing.assert_allclose(a, b, atol=1e-12)


def test_without_phases_it_is_gated_linear_attention_and_without_decay_linear_attention():
    p = weights(MATRIX)
    x = tokens(MATRIX, 9).at[..., 0].set(1.0)
    constant = lambda value: jnp.zeros_like(p["mag"]).at[0].set(value)  # whatever the other channels are

    @compiled
    def run(p, x):
        q, k, mag = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("q", "k", "mag"))
        real = MATRIX.mixing_matrix(p | {"phase": constant(0.0)}, x)
        still = MATRIX.mixing_matrix(p | {"phase": constant(0.0), "mag": constant(50.0)}, x)
        turning = MATRIX.mixing_matrix(p | {"phase": constant(0.7), "mag": constant(50.0)}, x)
        decay = jax.nn.log_sigmoid(mag)
        return (real, still, turning), (linear_mixing_matrix(q, k, decay), linear_mixing_matrix(q, k))

    (real, still, turning), (gated, plain) = run(p, x)
    np.testing.assert_allclose(real, gated, atol=1e-12)
    np.testing.assert_allclose(still, plain, atol=1e-12)
    # A constant phase and no decay: the linear recurrent unit's rotation, a cosine of the distance.
    distance = np.arange(9)[:, None] - np.arange(9)
    np.testing.assert_allclose(turning, plain * np.cos(0.7 * distance), atol=1e-12)


def test_the_complex_transition_forgets_at_most_half_and_is_smooth_enough_at_zero():
    mixer = dataclasses.replace(SCALAR, transition="complex")
    p, x = weights(mixer), tokens(mixer, 9)
    log_mag, _ = compiled(mixer._transition)(p, x)
    assert np.all(np.exp(log_mag) >= 0.5) and np.min(np.exp(log_mag)) < 0.6
    grads = compiled(jax.grad(lambda p, x: jnp.sum(mixer.forward(p, x)[0] ** 2), (0, 1)))(p, x.at[:, 3].set(0.0))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize("low, high", [(-10, 30), (2.5, 2.5)])
def test_angles_of_long_sequences_lose_no_precision_in_float32(low, high):
    """Sums of 50,000 phases, some 1e5 or 1e6, whose float32 spacing is 1/128 or 1/16."""
    phase = np.random.default_rng(0).uniform(low, high, (1, 50_000, 1, 1)).astype(np.float32)
    angles = np.asarray(compiled(_angles)(phase), np.float64)
    exact = np.cumsum(phase.astype(np.float64), axis=1)
    # Rests are up to 0.003, and sum up to 150 where they are all equal: 17 roundings of 2^-17 in a tree of sums.
    assert np.max(np.abs(np.exp(1j * angles) - np.exp(1j * exact))) < 1e-4


def test_the_weights_are_declared():
    mixer = GateLoop(d_model=64, a_lr_scale=0.5)
    tree = mixer.params()
    assert param.count(tree) == 7 * 64**2 and tree["q"].shape == (64, 64, 1)
    assert {name for name, p in param.entries(tree) if p.lr_scale == 0.5} == {"mag", "phase"}
    assert mixer.state_size(1) == 128 and dataclasses.replace(mixer, heads=8).state_size(1) == 1024


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(d_model=6, heads=4), "GateLoop.heads: expected a divisor of d_model=6, got 4"),
        (dict(transition="real"), "GateLoop.transition: expected one of separate, complex"),
        (dict(a_lr_scale=0.0), "GateLoop.a_lr_scale: expected a positive number"),
        (dict(chunk=12), "GateLoop.chunk: expected a power of two"),
    ],
)
def test_bad_fields_are_named_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        GateLoop(**fields)
    assert "\n" not in str(error.value)
