"""Gated DeltaNet: its equations, its limits, its size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.recurrent.delta_net import DeltaNet
from seqmix.mixers.recurrent.gated_delta_net import GatedDeltaNet
from tests.mixers.equations import agrees_with, compiled, tokens, weights
from tests.mixers.recurrent.delta_loops import heads, normed, recurrence

FIELDS = dict(d_model=6, heads=2, key_dim=4, value_dim=3, conv_width=3, chunk=4)
SMALL = GatedDeltaNet(**FIELDS)


def test_forward_and_its_gradients_are_those_of_the_equations(x64):
    def equations(p, x):
        d = p["decay"]
        dt = jnp.log1p(jnp.exp(x @ d["weight"] + d["dt_bias"]))
        mixed = recurrence(*heads(p, x), jnp.exp(-jnp.exp(d["A_log"]) * dt)[..., None])
        gate = jnp.einsum("btd,dhv->bthv", x, p["gate"])
        return jnp.einsum("bthv,hvd->btd", normed(p, mixed) * gate / (1 + jnp.exp(-gate)), p["out"])

    agrees_with(SMALL, equations)


def test_without_decay_it_is_delta_net(x64):
    """exp(A_log) = 0, so that alpha = 1."""
    p, x, plain = weights(SMALL), tokens(SMALL, 7), DeltaNet(gate=True, **FIELDS)
    kept = p | {"decay": p["decay"] | {"A_log": jnp.full(2, -1e4)}}
    want = compiled(plain.forward)({name: p[name] for name in plain.params()}, x)[0]
    run = compiled(SMALL.forward)
    np.testing.assert_allclose(run(kept, x)[0], want, rtol=0, atol=1e-12)
    assert float(jnp.max(jnp.abs(run(p, x)[0] - want))) > 1e-2


def test_a_strong_decay_leaves_the_token_itself(x64):
    """alpha = 0: S_t = beta_t k_t v_t^T, whatever came before."""
    p, x = weights(SMALL), tokens(SMALL, 5, batch=1)
    p |= {"decay": p["decay"] | {"A_log": jnp.full(2, 9.0), "dt_bias": jnp.full(2, 9.0)}}
    matrix = compiled(SMALL.mixing_matrix)(p, x)
    off = jnp.where(jnp.eye(5, dtype=bool), 0, matrix)
    assert float(jnp.max(jnp.abs(off))) < 1e-300 < float(jnp.min(jnp.abs(jnp.diagonal(matrix, 0, 2, 3))))


def test_the_published_size():
    """Some 6 D^2 weights by default, and a state of 9/8 D^2 / H numbers beside the convolutions'."""
    mixer = GatedDeltaNet(d_model=1536)
    count = param.count(mixer.params())
    assert abs(count / (6 * 1536**2) - 1) < 0.01
    assert mixer.sizes == (192, 384) and mixer.state_size(1) == 6 * 192 * 384 + 3 * 6 * (192 + 192 + 384)


def test_decays_start_slow(x64):
    mixer = GatedDeltaNet(d_model=8, heads=4, key_dim=2, value_dim=2)
    start = compiled(functools.partial(param.materialise, mixer.params()))(jax.random.key(0))["decay"]
    dt, a = jax.nn.softplus(start["dt_bias"]), jnp.exp(start["A_log"])
    assert jnp.all((dt > 0.99e-3) & (dt < 0.101)) and jnp.all((a >= 0.999) & (a <= 16.001))


def test_fields_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="GatedDeltaNet.dt_min: expected 0 < dt_min <= dt_max, got 0.5 and 0.1"):
        GatedDeltaNet(dt_min=0.5)
    with pytest.raises(ValueError, match="GatedDeltaNet.a_min"):
        GatedDeltaNet(a_min=0.0)
    with pytest.raises(ValueError, match="GatedDeltaNet.key_dim: expected a value"):
        GatedDeltaNet(d_model=9, heads=2)
