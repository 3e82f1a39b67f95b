"""Kimi Delta Attention: its equations, and Gated DeltaNet as the case of equal channels."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.mixers.recurrent.gated_delta_net import GatedDeltaNet
from seqmix.mixers.recurrent.kimi_delta import KimiDeltaAttention
from tests.mixers.equations import agrees_with, compiled, tokens, weights
from tests.mixers.recurrent.delta_loops import heads, normed, recurrence

FIELDS = dict(d_model=6, heads=2, key_dim=4, value_dim=3, conv_width=3, chunk=4)
SMALL = KimiDeltaAttention(gate_rank=5, **FIELDS)


def test_forward_and_its_gradients_are_those_of_the_equations(x64):
    def equations(p, x):
        d, g = p["decay"], p["gate"]
        low = jnp.einsum("btr,rhk->bthk", x @ d["down"], d["up"]) + d["dt_bias"]
        decay = jnp.exp(-jnp.exp(d["A_log"])[:, None] * jnp.log1p(jnp.exp(low)))
        gate = 1 / (1 + jnp.exp(-jnp.einsum("btr,rhv->bthv", x @ g["down"], g["up"]) - g["bias"]))
        mixed = recurrence(*heads(p, x), decay)
        return jnp.einsum("bthv,hvd->btd", normed(p, mixed) * gate, p["out"])

    agrees_with(SMALL, equations)


def test_with_equal_channels_it_mixes_as_gated_delta_net(x64):
    gated = GatedDeltaNet(**FIELDS)
    p, mine, x = weights(gated), weights(SMALL), tokens(SMALL, 7)
    d = p["decay"]
    every = lambda v: jnp.broadcast_to(v[..., None], (*v.shape, 4))
    down = jnp.pad(d["weight"], ((0, 0), (0, 3)))  # through the first two of the five channels
    decay = {"down": down, "up": every(jnp.eye(5, 2)), "A_log": d["A_log"], "dt_bias": every(d["dt_bias"])}
    equal = mine | {name: p[name] for name in ("q", "k", "v", "conv", "beta")} | {"decay": decay}
    want = compiled(gated.mixing_matrix)(p, x)
    run = compiled(SMALL.mixing_matrix)
    np.testing.assert_allclose(run(equal, x), want, rtol=0, atol=1e-12)
    uneven = equal | {"decay": decay | {"dt_bias": decay["dt_bias"] + jnp.arange(4)}}
    assert float(jnp.max(jnp.abs(run(uneven, x) - want))) > 1e-3
    # The ops agree as well: the states after the same tokens are one.
    states = [
        compiled(mixer.prefill)(w, x, mixer.init_state(w, 2, 7, jnp.float64))[1]["kv"]
        for mixer, w in ((gated, p), (SMALL, equal))
    ]
    np.testing.assert_allclose(states[0], states[1], rtol=0, atol=1e-12)


def test_a_channel_can_forget_while_another_keeps(x64):
    """One head whose even channels are kept as they are and whose odd ones last for one token."""
    p, x = weights(SMALL), tokens(SMALL, 2, batch=1)
    bias = jnp.where(jnp.arange(4) % 2 == 0, -200.0, 200.0)
    p |= {"decay": p["decay"] | {"dt_bias": jnp.broadcast_to(bias, (2, 4)), "A_log": jnp.full(2, 2.0)}}
    prefill = compiled(SMALL.prefill)
    _, first = prefill(p, x[:, :1], SMALL.init_state(p, 1, 2, jnp.float64))
    _, k, v, beta = heads(p, x[:, :1])
    written = beta[:, 0][..., None, None] * k[:, 0][..., None] * v[:, 0][:, :, None]
    np.testing.assert_allclose(first["kv"], written, rtol=0, atol=1e-12)
    # The second token writes nothing: its beta is 0.
    silent = p | {"beta": jnp.broadcast_to(-1000 * x[0, 1][:, None] / jnp.sum(x[0, 1] ** 2), (6, 2))}
    _, second = prefill(silent, x[:, 1:], first)
    np.testing.assert_allclose(second["kv"][:, :, ::2], written[:, :, ::2], rtol=0, atol=1e-12)
    assert float(jnp.max(jnp.abs(second["kv"][:, :, 1::2]))) < 1e-300 < float(jnp.min(jnp.abs(written)))


def test_fields_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="KimiDeltaAttention.gate_rank: expected a positive integer, got 0"):
        KimiDeltaAttention(gate_rank=0)
    with pytest.raises(ValueError, match="KimiDeltaAttention.a_min"):
        KimiDeltaAttention(a_min=20.0)
    with pytest.raises(ValueError, match="KimiDeltaAttention.beta_max"):
        KimiDeltaAttention(beta_max=0.0)
