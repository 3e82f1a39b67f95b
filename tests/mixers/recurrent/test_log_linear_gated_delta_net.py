"""Log-linear Gated DeltaNet: its definition, its limit, its state, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.recurrent.gated_delta_net import GatedDeltaNet
from seqmix.mixers.recurrent.log_linear_gated_delta_net import LogLinearGatedDeltaNet
from tests.mixers.equations import agrees_with, compiled, silu, tokens, weights
from tests.mixers.recurrent.delta_loops import heads, normed
from tests.mixers.recurrent.level_loops import by_sources, scales, unit_scales

FIELDS = dict(d_model=6, heads=2, key_dim=4, value_dim=3, conv_width=3, chunk=4)
SMALL = LogLinearGatedDeltaNet(max_len=16, **FIELDS)


def test_forward_and_its_gradients_are_those_of_the_definition(x64):
    def equations(p, x):
        d = p["decay"]
        decay = jnp.exp(-jnp.exp(d["A_log"]) * jnp.log1p(jnp.exp(x @ d["weight"] + d["dt_bias"])))
        q, k, v, beta = heads(p, x)
        mixed = by_sources(q / 2, k, v, decay, scales(p, x), beta)
        gate = silu(jnp.einsum("btd,dhv->bthv", x, p["gate"]))
        return jnp.einsum("bthv,hvd->btd", normed(p, mixed) * gate, p["out"])

    agrees_with(SMALL, equations, time=9)


def test_where_all_levels_weigh_1_it_is_gated_delta_net(x64):
    plain = GatedDeltaNet(**FIELDS)
    p, x = unit_scales(weights(SMALL), tokens(SMALL, 13))
    want, _ = compiled(plain.forward)({name: p[name] for name in plain.params()}, x)
    run = compiled(SMALL.forward)
    np.testing.assert_allclose(run(p, x)[0], want, rtol=0, atol=1e-12)
    assert float(jnp.max(jnp.abs(run(weights(SMALL), x)[0] - want))) > 1e-2


def test_weights_and_state_grow_with_the_logarithm_of_the_length():
    mixer = LogLinearGatedDeltaNet(d_model=1536)
    more = param.count(mixer.params()) - param.count(GatedDeltaNet(d_model=1536).params())
    assert more == 6 * 15 * 1537  # 15 levels for 16384
    assert mixer.state_size(16384) - mixer.state_size(8192) == 6 * 192 * 384
    state = jax.eval_shape(lambda: mixer.init_state(None, 2, 100))
    assert state["levels"].shape == (2, 6, 7, 192, 384)


def test_longer_contexts_are_refused_in_one_line():
    p, x = weights(SMALL, jnp.float32), jnp.zeros((1, 17, 6))
    with pytest.raises(ValueError, match="x: expected at most max_len=16 tokens for LogLinearGatedDeltaNet, got 17"):
        jax.eval_shape(SMALL.forward, p, x)
    with pytest.raises(ValueError, match="max_len: expected at most LogLinearGatedDeltaNet's max_len=16"):
        SMALL.init_state(p, 1, 17)
    with pytest.raises(ValueError, match="LogLinearGatedDeltaNet.max_len: expected an integer, got 1.5"):
        LogLinearGatedDeltaNet(max_len=1.5)
