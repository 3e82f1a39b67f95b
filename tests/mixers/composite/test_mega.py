"""Mega against its equations; its average as a convolution; chunks; what a closed gate leaves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.composite.mega import Mega, _log_decay
from seqmix.ops.fft_conv import long_conv
from tests.mixers.equations import agrees_with, compiled, scan, sigmoid, silu, tokens, weights

SMALL = Mega(d_model=4, d_state=3, key_dim=4, value_dim=6, chunk=4)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def turned(vector, place):
    """[T, K]: the halves of a vector turned by position times 1 and 0.01."""
    angle = place[:, None] * np.array([1, 0.01])
    first, second = vector[:2], vector[2:]
    cos, sin = np.cos(angle), np.sin(angle)
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


def averages(p, x):
    decay = 1 - sigmoid(p["delta"]) * sigmoid(p["alpha"])
    s = scan(
        lambda s, u: (decay * s + u,) * 2, jnp.zeros((len(x), 4, 3)), sigmoid(p["delta"]) * p["beta"] * x[..., None]
    )
    return jnp.sum(p["eta"] * s, -1) / 3**0.5


def by_the_equations(p, x):
    linear = lambda y, name: y @ p[name] + p[f"{name}_bias"]
    m = silu(averages(p, x) + p["omega"] * x)
    z, v = silu(linear(m, "z")), silu(linear(x, "v"))
    q, k = (p["gamma"][i] * z + p["gamma_bias"][i] for i in range(2))
    place = np.arange(x.shape[1])
    score = q @ jnp.swapaxes(k, 1, 2) / 2 + turned(p["position"][0], place) @ turned(p["position"][1], place).T
    seen = (place[:, None] >= place) & (place[:, None] // 4 == place // 4)
    weight = jnp.where(seen, jnp.exp(score), 0)
    mixed = weight / jnp.sum(weight, -1, keepdims=True) @ v
    h = silu(linear(m, "h") + (mixed * silu(linear(m, "r"))) @ p["out"])
    return sigmoid(linear(m, "u")) * (h - x)


def test_forward_and_its_gradients_are_those_of_the_equations():
    agrees_with(SMALL, by_the_equations, time=10)


def test_the_average_is_a_convolution():
    p, x = weights(SMALL), tokens(SMALL, 9)
    decay = np.exp(_log_decay(p["delta"], p["alpha"]))[..., None] ** np.arange(9)
    kernel = jnp.einsum("dn,dnj->dj", sigmoid(p["delta"]) * p["beta"] * p["eta"], decay) / 3**0.5
    want = silu(compiled(long_conv)(x, kernel, skip=p["omega"]))
    np.testing.assert_allclose(compiled(lambda p, x: SMALL._average(p, x, None, None)[0])(p, x), want, atol=1e-12)
    np.testing.assert_allclose(silu(averages(p, x) + p["omega"] * x), want, atol=1e-12)


def test_decays_at_their_ends_are_finite():
    ends = jnp.array([-200.0, 0.0, 200.0], jnp.float32)
    delta, alpha = (g.ravel() for g in jnp.meshgrid(ends, ends))
    value, grads = jax.value_and_grad(lambda d, a: jnp.sum(_log_decay(d, a)), (0, 1))(delta, alpha)
    assert np.isfinite(value) and np.all(np.isfinite(grads)) and np.all(_log_decay(delta, alpha) <= 0)


def test_a_chunk_as_long_as_the_sequence_sees_all_of_it():
    p, x = weights(SMALL), tokens(SMALL, 9)
    full = [dataclasses.replace(SMALL, chunk=chunk) for chunk in (9, 64)]
    matrices = [compiled(m.mixing_matrix)(p, x) for m in (SMALL, *full)]
    np.testing.assert_array_equal(matrices[1], matrices[2])
    assert np.all((matrices[1] > 0) == np.tri(9, dtype=bool))
    blocks = np.kron(np.eye(3), np.ones((4, 4)))[:9, :9] * np.tri(9)
    assert np.all((matrices[0] > 0) == (blocks > 0))
    assert [m.state_size(1000) for m in (SMALL, full[0])] == [4 * 10 + 12 + 1, 9 * 10 + 12 + 1]


def test_a_closed_gate_leaves_the_stream_as_it_is():
    p, x = weights(SMALL), tokens(SMALL, 9)
    p |= {"u": 0 * p["u"], "u_bias": 0 * p["u_bias"] - 1e4}
    assert np.all(compiled(SMALL.forward)(p, x)[0] == 0)


def test_the_weights_are_declared():
    tree = Mega(d_model=32, d_state=16, key_dim=8).params()
    dense = 32 * (2 * 64 + 2 * 32 + 8) + 64 * 32
    assert param.count(tree) == dense + 4 * 32 * 16 + 32 + (2 * 64 + 2 * 32 + 8) + 6 * 8
    assert {name for name, p in param.entries(tree) if p.decay} == {"v", "r", "u", "h", "z", "out"}
    beta = param.materialise({"beta": tree["beta"]}, jax.random.key(0))["beta"]
    assert np.all(np.abs(beta - np.tile([1, -1], 8)) < 0.2)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(key_dim=3), "Mega.key_dim: expected an even number, got 3"),
        (dict(chunk=0), "Mega.chunk: expected a positive integer"),
        (dict(value_dim=0), "Mega.value_dim: expected a positive integer"),
    ],
)
def test_bad_fields_are_named_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        Mega(**fields)
    assert "\n" not in str(error.value)
