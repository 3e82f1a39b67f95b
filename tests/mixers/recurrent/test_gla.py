"""GLA against its equations, and against retention, to which it reduces under constant gates."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.recurrent.gla import GLA
from seqmix.mixers.recurrent.retnet import RetNet
from tests.mixers.equations import agrees_with, compiled, scan, sigmoid, silu, tokens, weights

SMALL = GLA(d_model=6, heads=2, key_dim=4, value_dim=3, gate_rank=2, conv_width=3, chunk=4, tau=2.0)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def by_the_equations(p, x):
    q, k, v, gate = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("q", "k", "v", "gate"))
    if "conv" in p:
        time = x.shape[1]
        before = lambda z, j: jnp.pad(z, ((0, 0), (j, 0), (0, 0), (0, 0)))[:, :time]
        conv = lambda z, w: silu(sum(w[2 - j] * before(z, j) for j in range(3)))
        q, k, v = (conv(z, p["conv"][name]) for name, z in (("q", q), ("k", k), ("v", v)))
    d = p["decay"]
    alpha = sigmoid(jnp.einsum("btd,dr,rhk->bthk", x, d["down"], d["up"]) + d["bias"]) ** (1 / 2.0)

    def step(s, q, k, v, alpha):
        s = alpha[..., None] * s + k[..., None] * v[..., None, :]
        return s, jnp.sum(q[..., None] * s, axis=-2) / 2

    mixed = scan(step, jnp.zeros((len(x), 2, 4, 3)), q, k, v, alpha)
    mixed = mixed / jnp.sqrt((mixed**2).mean(-1, keepdims=True) + 1e-5) * p["norm"]["scale"]
    return jnp.einsum("bthv,hvd->btd", mixed * silu(gate), p["out"])


@pytest.mark.parametrize("conv_width", [0, 3])
def test_forward_and_its_gradients_are_those_of_the_equations(conv_width):
    agrees_with(dataclasses.replace(SMALL, conv_width=conv_width), by_the_equations)


def test_constant_gates_make_it_retention():
    """W_up = 0 and the bias that gives gamma: RetNet's matrix where nothing is rotated, all positions being 0."""
    gla = GLA(d_model=6, heads=3, key_dim=4, value_dim=4, gate_rank=2, chunk=4)
    retnet = RetNet(d_model=6, heads=3, key_dim=4, value_dim=4, norm="rms", chunk=4)
    p, x = weights(gla), tokens(gla, 9)
    log_gate = gla.tau * np.log1p(-(2.0 ** (-5 - np.arange(3))))
    bias = log_gate - np.log(-np.expm1(log_gate))  # log_sigmoid(bias) = log_gate
    p["decay"] |= {"up": 0 * p["decay"]["up"], "bias": jnp.asarray(bias)[:, None].repeat(4, 1)}
    p["norm"]["scale"] = jnp.ones(4)

    @compiled
    def run(p, x):
        here = {"positions": jnp.zeros((2, 9), int)}
        plain = {name: p[name] for name in retnet.params()}
        calls = (gla, p, {}), (retnet, plain, here)
        return [(m.mixing_matrix(p, x, **where), m.forward(p, x, **where)[0]) for m, p, where in calls]

    (matrix, y), (retained, want) = run(p, x)
    np.testing.assert_allclose(matrix, retained, atol=1e-12)
    np.testing.assert_allclose(y, want, atol=1e-11)


def test_decays_are_slow_at_first():
    """log_sigmoid(0) / 16 a token: a half after 16 tokens, whatever the input is like up to a few units."""
    mixer = GLA(d_model=256)
    declared = mixer.params()["decay"]
    p = {"decay": param.materialise(declared, jax.random.key(0))}
    log_decay = mixer._log_decay(p, tokens(mixer, 50).astype(jnp.float32))
    assert log_decay.dtype == jnp.float32 and log_decay.shape == (2, 50, 4, 32)
    assert 0.5 < jnp.exp(16 * jnp.mean(log_decay)) * 1.15 < 0.6
    assert not declared["bias"].decay


def test_the_weights_are_the_published_ones_in_number():
    """4 d^2, as softmax attention, and the two thin matrices of the gate."""
    mixer = GLA(d_model=1024)
    assert mixer.sizes == (128, 256)
    assert param.count(mixer.params()) == 4 * 1024**2 + 16 * (1024 + 512) + 512 + 256
    convolved = dataclasses.replace(mixer, conv_width=4)
    assert param.count(convolved.params()) - param.count(mixer.params()) == 4 * 2048
    assert convolved.state_size(1) - mixer.state_size(1) == 3 * 2048


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(d_model=6, heads=2), "GLA.key_dim: expected a value, or a number of heads that divides 0.5 \\* d_model"),
        (dict(gate_rank=0), "GLA.gate_rank: expected a positive integer"),
        (dict(conv_width=-1), "GLA.conv_width: expected an integer >= 0"),
        (dict(tau=0.0), "GLA.tau: expected a positive number"),
    ],
)
def test_bad_fields_are_named_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        GLA(**fields)
    assert "\n" not in str(error.value)
