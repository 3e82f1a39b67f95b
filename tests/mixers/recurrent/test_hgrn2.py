"""HGRN2 against its equations, and its state against HGRN's elementwise recurrence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.recurrent.hgrn2 import HGRN2
from seqmix.ops.scan import linear_scan
from tests.mixers.equations import agrees_with, compiled, scan, sigmoid, silu, tokens, weights

SMALL = HGRN2(d_model=6, heads=2, key_dim=4, value_dim=3, chunk=4, lower_bound=0.3)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def gates(p, x, bound):
    q, f, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("q", "f", "v"))
    return sigmoid(q), bound + (1 - bound) * sigmoid(f), silu(v)


def by_the_equations(p, x):
    q, f, v = gates(p, x, sigmoid(p["bound"]) if "bound" in p else 0.3)

    def step(s, q, f, v):
        s = f[..., None] * s + (1 - f)[..., None] * v[..., None, :]
        return s, jnp.sum(q[..., None] * s, axis=-2)

    mixed = scan(step, jnp.zeros((len(x), 2, 4, 3)), q, f, v)
    rms = jnp.sqrt((mixed**2).mean((-2, -1), keepdims=True) + 1e-5)
    return jnp.einsum("bthv,hvd->btd", mixed / rms * p["norm"]["scale"], p["out"])


@pytest.mark.parametrize("learned_bound", [False, True])
def test_forward_and_its_gradients_are_those_of_the_equations(learned_bound):
    agrees_with(dataclasses.replace(SMALL, learned_bound=learned_bound), by_the_equations)


def test_each_entry_of_the_state_is_a_cell_of_hgrn_and_never_exceeds_its_inputs():
    """h = f h + (1 - f) v for every pair of a forget gate and a value (2311.04823): a moving average of values."""
    p, x = weights(SMALL), tokens(SMALL, 9)

    @compiled
    def run(p, x):
        _, f, v = gates(p, x, 0.3)
        cells, log_f = jnp.broadcast_arrays((1 - f)[..., None] * v[..., None, :], jnp.log(f)[..., None])
        state = SMALL.prefill(p, x, SMALL.init_state(p, 2, 9, jnp.float64))[1]
        return state, linear_scan(cells, log_f, implementation="reference")[1], jnp.max(jnp.abs(v), axis=1)

    state, cells, bound = run(p, x)
    np.testing.assert_allclose(state, cells, atol=1e-12)
    assert np.all(np.abs(state) <= bound[:, :, None]) and np.max(np.abs(state)) > 0.1


def test_gates_stay_above_the_bound_and_keys_keep_their_small_values():
    """In float32, at logits from -40 to 40, where 1 - f as a difference would be 0."""
    mixer = HGRN2(d_model=2, heads=1, key_dim=1, value_dim=1, lower_bound=0.25)
    p = {name: jnp.asarray([[[0.0]], [[w]]], jnp.float32) for name, w in (("q", 0.0), ("f", 1.0))}
    logits = np.array([-40.0, -20, 0, 20, 40])
    x = jnp.asarray(np.stack([logits, logits], -1)[None], jnp.float32)
    _, k, log_f = (np.asarray(a)[0, :, 0, 0] for a in compiled(mixer._gates)(p, x))
    small = 0.75 * sigmoid(-logits)  # 3e-18 at the end
    assert np.all(np.exp(log_f) >= 0.25 * (1 - 1e-6)) and log_f.dtype == k.dtype == np.float32
    np.testing.assert_allclose(k, small, rtol=1e-5)
    np.testing.assert_allclose(log_f, np.log1p(-small), rtol=1e-5)


def test_a_learned_bound_starts_at_the_field():
    learned = dataclasses.replace(SMALL, learned_bound=True)
    bound = param.materialise({"bound": learned.params()["bound"]}, jax.random.key(0))["bound"]
    np.testing.assert_allclose(sigmoid(bound), 0.3, rtol=1e-6)
    assert "bound" not in SMALL.params()


def test_the_weights_are_the_published_ones_in_number():
    mixer = HGRN2(d_model=1024)
    assert mixer.sizes == (128, 128) and param.count(mixer.params()) == 4 * 1024**2 + 1024
    assert mixer.state_size(1) == 1024 * 128


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(d_model=6, heads=4), "HGRN2.key_dim: expected a value, or a number of heads that divides d_model"),
        (dict(lower_bound=1.0), "HGRN2.lower_bound: expected a number in \\[0, 1\\), got 1.0"),
        (dict(learned_bound=True), "HGRN2.lower_bound: expected a number in \\(0, 1\\) for learned_bound"),
    ],
)
def test_bad_fields_are_named_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        HGRN2(**fields)
    assert "\n" not in str(error.value)
