"""Log-linear Mamba-2: its definition, its limit, its state, what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.recurrent.log_linear_mamba2 import LogLinearMamba2
from seqmix.mixers.recurrent.mamba2 import Mamba2
from tests.mixers.equations import agrees_with, compiled, silu, tokens, weights
from tests.mixers.recurrent.level_loops import by_sources, scales, unit_scales

FIELDS = dict(d_model=6, d_state=5, head_dim=3, n_groups=2, conv_width=2, chunk=4)  # 4 heads
SMALL = LogLinearMamba2(max_len=16, **FIELDS)


def test_forward_and_its_gradients_are_those_of_the_definition(x64):
    def equations(p, x):
        def branch(name):
            u = jnp.einsum("btd,dhp->bthp", x, p["in"][name])
            before = jnp.pad(u, ((0, 0), (1, 0), (0, 0), (0, 0)))[:, :-1]
            return silu(p["conv"][name][0] * before + p["conv"][name][1] * u + p["conv_bias"][name])

        dt = jnp.log1p(jnp.exp(x @ p["in"]["dt"] + p["dt_bias"]))
        values, (keys, queries) = branch("x"), (jnp.repeat(branch(name), 2, axis=2) for name in "BC")
        decay = jnp.exp(-jnp.exp(p["A_log"]) * dt)
        y = by_sources(queries, keys, dt[..., None] * values, decay, scales(p, x)) + p["D"][:, None] * values
        y = y * silu(jnp.einsum("btd,dhp->bthp", x, p["in"]["z"]))
        groups = y.reshape(*y.shape[:2], 2, -1)
        y = (groups / jnp.sqrt(jnp.mean(groups**2, -1, keepdims=True) + 1e-5)).reshape(y.shape)
        return jnp.einsum("bthp,hpd->btd", y * p["norm"]["scale"], p["out"])

    agrees_with(SMALL, equations, time=9)


def test_where_all_levels_weigh_1_it_is_mamba2(x64):
    plain = Mamba2(**FIELDS)
    p, x = unit_scales(weights(SMALL), tokens(SMALL, 13))
    want, _ = compiled(plain.forward)({name: p[name] for name in plain.params()}, x)
    run = compiled(SMALL.forward)
    np.testing.assert_allclose(run(p, x)[0], want, rtol=0, atol=1e-12)
    assert float(jnp.max(jnp.abs(run(weights(SMALL), x)[0] - want))) > 1e-2


def test_weights_and_state_grow_with_the_logarithm_of_the_length():
    mixer = LogLinearMamba2(d_model=2048)
    level = mixer.params()["level"]
    assert level["weight"].shape == (2048, 64, 15) and not level["scale"].decay  # 15 levels for 16384, as published
    more = param.count(mixer.params()) - param.count(Mamba2(d_model=2048).params())
    assert more == param.count(level) == 64 * 15 * 2049
    matrices = 4096 * 128  # of one level
    assert (
        mixer.state_size(2048) - mixer.state_size(1024) == mixer.state_size(16384) - mixer.state_size(8192) == matrices
    )
    state = jax.eval_shape(lambda: mixer.init_state(None, 1, 1025))
    assert state["levels"].shape == (1, 64, 11, 128, 64)


def test_longer_contexts_are_refused_in_one_line():
    p, x = weights(SMALL, jnp.float32), jnp.zeros((1, 17, 6))
    for call in (SMALL.forward, SMALL.project, SMALL.mixing_matrix):
        with pytest.raises(ValueError, match="x: expected at most max_len=16 tokens for LogLinearMamba2, got 17"):
            jax.eval_shape(call, p, x)
    with pytest.raises(ValueError, match="max_len: expected at most LogLinearMamba2's max_len=16 tokens, got 17"):
        SMALL.init_state(p, 1, 17)
    with pytest.raises(ValueError, match="LogLinearMamba2.max_len: expected an integer from 2"):
        LogLinearMamba2(max_len=1)
    with pytest.raises(ValueError, match="LogLinearMamba2.head_dim: expected a divisor"):
        LogLinearMamba2(d_model=6, head_dim=5)
