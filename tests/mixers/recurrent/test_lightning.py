"""Lightning attention against its equations, with both published decays, learned angles and neither."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.recurrent.lightning import Lightning
from tests.mixers.equations import agrees_with, compiled, scan, silu, tokens, weights

SMALL = Lightning(d_model=6, heads=2, key_dim=3, value_dim=5, depth=0.25, chunk=4)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def by_the_equations(p, x, lam):
    """Token by token; with p["theta"] a complex state, k turned back by its position and q forward (LRPE-d)."""
    q, k, v, u = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("q", "k", "v", "gate"))
    q, k = silu(q), silu(k)
    theta = p.get("theta", jnp.zeros(k.shape[2:]))

    def step(s, q, k, v):
        s = (lam[:, None] * jnp.exp(1j * theta))[..., None] * s + k[..., None] * v[..., None, :]
        return s, jnp.sum(q[..., None] * s, axis=-2).real

    mixed = scan(step, jnp.zeros((len(x), 2, 3, 5), complex), q, k, v)
    rms = jnp.sqrt((mixed**2).mean((-2, -1), keepdims=True) + 1e-5)
    return jnp.einsum("bthv,hvd->btd", mixed / rms * u, p["out"])


@pytest.mark.parametrize("lrpe", [False, True])
def test_forward_and_its_gradients_are_those_of_the_equations(lrpe):
    """With the decays that the released code runs."""
    lam = np.exp(-np.array([2.0**-4, 2.0**-8]) * (0.75 + 1e-5))
    agrees_with(dataclasses.replace(SMALL, lrpe=lrpe), lambda p, x: by_the_equations(p, x, lam))


def test_the_two_published_decays_are_far_apart():
    exponents = lambda **kw: -np.asarray(Lightning(d_model=64, **kw)._log_decay(jnp.float64))
    np.testing.assert_allclose(exponents(decay="paper"), np.arange(8))
    alibi = exponents(decay="alibi")
    np.testing.assert_allclose(alibi, 2.0 ** -np.arange(1, 9) * (1 + 1e-5), rtol=1e-12)
    assert 0.5 < alibi[0] < 0.50001 and 0.0039 < alibi[-1] < 0.00391
    np.testing.assert_allclose(exponents(decay="paper", depth=0.5), np.arange(8) / 2)
    assert np.all(exponents(decay="paper", depth=1.0) == 0)
    np.testing.assert_allclose(exponents(decay="alibi", depth=1.0), 2.0 ** -np.arange(1, 9) * 1e-5, rtol=1e-6)


def test_without_decay_it_is_plain_linear_attention():
    mixer = dataclasses.replace(SMALL, decay="none")
    p, x = weights(mixer), tokens(mixer, 9)

    @compiled
    def run(p, x):
        values, context = mixer.project(p, x)
        q, k = (silu(jnp.einsum("btd,dhk->bthk", x, p[name])) for name in ("q", "k"))
        scores = jnp.tril(jnp.einsum("bthk,bshk->bhts", q, k))
        plain = mixer.merge(p, context, jnp.einsum("bhts,bshv->bthv", scores, values))
        return scores, mixer.mixing_matrix(p, x), plain, mixer.forward(p, x)[0]

    scores, matrix, plain, y = run(p, x)
    np.testing.assert_allclose(matrix, scores, atol=1e-12)
    np.testing.assert_allclose(y, plain, atol=1e-12)


def test_learned_angles_depend_on_distances_alone():
    mixer = dataclasses.replace(SMALL, lrpe=True)
    p, x = weights(mixer), tokens(mixer, 6)
    run = compiled(lambda p, place: mixer.mixing_matrix(p, x, positions=place))
    place = np.tile(np.arange(6), (2, 1))
    moved, still = run(p, place + 1000), run(p | {"theta": 0 * p["theta"]}, place)
    np.testing.assert_allclose(moved, run(p, place), atol=1e-10)
    plain = {name: p[name] for name in SMALL.params()}
    np.testing.assert_allclose(still, compiled(SMALL.mixing_matrix)(plain, x), atol=1e-12)
    assert np.max(np.abs(still - moved)) > 0.1


def test_angles_start_over_the_channels_of_all_heads():
    declared = Lightning(d_model=32, heads=4, lrpe=True).params()
    theta = param.materialise({"theta": declared["theta"]}, jax.random.key(0))["theta"]
    assert theta.shape == (4, 8) and theta[0, 0] == 1
    np.testing.assert_allclose(theta[1, 0] / theta[0, 7], theta[3, 7] / theta[3, 6], rtol=1e-6)
    stacked = param.materialise(param.stack({"theta": declared["theta"]}, 3), jax.random.key(0))["theta"]
    np.testing.assert_array_equal(stacked, np.broadcast_to(theta, (3, 4, 8)))


def test_only_learned_angles_need_a_position_in_the_state():
    turned = dataclasses.replace(SMALL, lrpe=True)
    assert set(SMALL.init_state(None, 1, 4)) == {"kv"} and set(turned.init_state(None, 1, 4)) == {"kv", "length"}
    assert turned.state_size(9) == 2 * SMALL.state_size(9) + 1


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(d_model=6, heads=4), "Lightning.key_dim: expected a value, or a number of heads that divides d_model"),
        (dict(decay="slow"), "Lightning.decay: expected one of alibi, paper, none"),
        (dict(depth=2.0), "Lightning.depth: expected a number from 0 to 1"),
        (dict(chunk=3), "Lightning.chunk: expected a power of two"),
    ],
)
def test_bad_fields_are_named_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        Lightning(**fields)
    assert "\n" not in str(error.value)
