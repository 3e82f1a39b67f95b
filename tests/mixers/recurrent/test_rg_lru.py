"""Griffin's recurrent block against its equations; that its inputs keep the state's variance; gates at their ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.recurrent.rg_lru import RGLRU
from tests.mixers.equations import agrees_with, compiled, scan, sigmoid, tokens, weights

SMALL = RGLRU(d_model=4, width=6, heads=2, conv_width=3, chunk=4)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def by_the_equations(p, x):
    u, gate = (jnp.einsum("btd,dhp->bthp", x, p[name]) for name in ("x", "gate"))
    taps = [jnp.pad(u, ((0, 0), (j, 0), (0, 0), (0, 0)))[:, : x.shape[1]] for j in range(3)]
    u = sum(p["conv"][2 - j] * taps[j] for j in range(3)) + p["conv_bias"]
    r, i = (sigmoid(jnp.einsum("bthi,hij->bthj", u, p[n]["weight"]) + p[n]["bias"]) for n in ("a", "i"))
    a = sigmoid(p["Lambda"]) ** (8 * r)

    def step(h, a, z):
        h = a * h + jnp.sqrt(1 - a**2) * z
        return h, h

    h = scan(step, jnp.zeros((len(x), 2, 3)), a, i * u)
    gelu = 0.5 * gate * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
    return jnp.einsum("bthp,hpd->btd", h * gelu, p["out"])


def test_forward_and_its_gradients_are_those_of_the_equations():
    agrees_with(SMALL, by_the_equations)


def test_white_inputs_leave_a_state_of_their_variance():
    """Where a and i are constant, squares of a row of the matrix sum to i^2 (1 - a^(2 t + 2))."""
    p, x = weights(SMALL), tokens(SMALL, 9)
    p |= {name: p[name] | {"weight": 0 * p[name]["weight"]} for name in ("a", "i")}
    matrix = compiled(SMALL.mixing_matrix)(p, x)
    a = sigmoid(p["Lambda"]) ** (8 * sigmoid(p["a"]["bias"]))
    t = np.arange(9)
    want = sigmoid(p["i"]["bias"])[..., None] ** 2 * (1 - a[..., None] ** (2 * t + 2))
    np.testing.assert_allclose(jnp.sum(matrix**2, -1), jnp.broadcast_to(want.reshape(6, 9), (2, 6, 9)), rtol=1e-12)


def test_gates_at_their_ends_give_finite_values_and_gradients():
    """Recurrence gates that underflow to 0 keep the state and take nothing in; open ones with a small a forget it."""
    p, x = weights(SMALL, np.float32), tokens(SMALL, 9).astype(jnp.float32)
    run = compiled(jax.value_and_grad(lambda p, x: jnp.sum(SMALL.forward(p, x)[0] ** 2), (0, 1)))
    with jax.enable_x64(False):
        for bias, rate in ((-200.0, 0.0), (200.0, -1e4), (-200.0, 1e4), (0.0, 100.0)):
            q = p | {"a": p["a"] | {"bias": p["a"]["bias"] * 0 + bias}, "Lambda": p["Lambda"] * 0 + rate}
            for leaf in jax.tree.leaves(run(q, x)):
                assert np.all(np.isfinite(leaf)), (bias, rate)
            log_a, weight = SMALL._gates(q, jnp.ones((1, 1, 2, 3), jnp.float32))
            assert np.all(log_a <= 0) and (np.all(weight < 1e-9) if bias < 0 else True)


def test_inputs_of_slow_channels_keep_their_scale_in_float32():
    """sqrt(1 - a^2) at log a = -1e-9: 1 - a^2 would be 0."""
    with jax.enable_x64(False):
        p = weights(SMALL, np.float32)
        log_a = jnp.float32(-1e-9)
        p |= {"Lambda": p["Lambda"] * 0 + 20.0, "i": p["i"] | {"bias": p["i"]["bias"] * 0 + 100.0}}
        r = float(log_a) / (8 * float(jax.nn.log_sigmoid(jnp.float32(20.0))))
        p["a"] = {"weight": 0 * p["a"]["weight"], "bias": p["a"]["bias"] * 0 + np.log(r / (1 - r))}
        _, weight = SMALL._gates(p, jnp.zeros((1, 1, 2, 3), jnp.float32))
        np.testing.assert_allclose(weight, np.sqrt(2e-9), rtol=1e-4)


def test_decays_start_uniform_between_the_radii():
    mixer = RGLRU(d_model=4096)
    declared = {"Lambda": mixer.params()["Lambda"]}
    lam = param.materialise(declared, jax.random.key(0))["Lambda"].astype(jnp.float64)
    at_full_gate = np.asarray(sigmoid(lam) ** 8)
    assert 0.8999 < at_full_gate.min() < 0.901 and 0.998 < at_full_gate.max() < 0.9991
    assert abs(at_full_gate.mean() - 0.9495) < 0.0018  # 4 standard errors


def test_the_weights_are_declared():
    mixer = RGLRU(d_model=2048, width=2560, heads=10)
    tree = mixer.params()
    assert param.count(tree) == 3 * 2048 * 2560 + 2 * (256 * 2560 + 2560) + 5 * 2560 + 2560
    assert mixer.state_size(1) == 4 * 2560
    decayed = {name for name, p in param.entries(tree) if p.decay}
    assert decayed == {"x", "gate", "conv", "a/weight", "i/weight", "out"}


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(d_model=6, heads=4), "RGLRU.heads: expected a divisor of the width 6, got 4"),
        (dict(width=0), "RGLRU.width: expected a positive integer"),
        (dict(c=0.0), "RGLRU.c: expected a positive number"),
        (dict(rad_max=1.0), "RGLRU.rad_min: expected 0 < rad_min <= rad_max < 1"),
    ],
)
def test_bad_fields_are_named_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        RGLRU(**fields)
    assert "\n" not in str(error.value)
