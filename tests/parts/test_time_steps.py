"""Decays by time steps: their range, their start."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.parts.time_steps import a_log_init, check_ranges, dt_bias_init, log_decay


def test_decays_are_those_of_the_formula_and_finite_for_any_logits(x64):
    logits = jnp.array([[[-1e4, -3.0, 0.0, 3.0, 1e4]]])
    a_log, bias = jnp.linspace(-1.0, 1.0, 5), jnp.linspace(0.5, -0.5, 5)
    got = log_decay(logits, a_log, bias)
    want = -np.exp(a_log) * np.log1p(np.exp(np.minimum(logits + bias, 700)))
    np.testing.assert_allclose(got[..., :4], want[..., :4], rtol=1e-12, atol=0)
    assert jnp.all(got <= 0) and jnp.all(jnp.isfinite(got)) and got[0, 0, 4] < -1e4
    grads = jax.grad(lambda *args: jnp.sum(log_decay(*args)), (0, 1, 2))(logits, a_log, bias)
    assert all(jnp.all(jnp.isfinite(g)) for g in grads)
    per_channel = log_decay(jnp.ones((1, 1, 5, 2)), a_log[:, None], jnp.zeros((5, 2)))
    np.testing.assert_allclose(per_channel[0, 0, :, 1], -np.exp(a_log) * np.log1p(np.e), rtol=1e-12)
    assert log_decay(logits.astype(jnp.bfloat16), a_log, bias).dtype == jnp.float32


def test_initial_values_are_spread_over_their_ranges():
    draw = lambda init: init(jax.random.key(0), (4000,), jnp.float32)
    dt = jax.nn.softplus(draw(dt_bias_init(1e-3, 0.1)))
    assert 0.99e-3 < float(jnp.min(dt)) < 1.1e-3 and 0.09 < float(jnp.max(dt)) < 0.101
    assert abs(float(jnp.mean(jnp.log(dt))) - np.log(1e-2)) < 0.1  # log-uniform
    floored = jax.nn.softplus(draw(dt_bias_init(1e-6, 0.1, floor=1e-3)))
    assert abs(float(jnp.min(floored)) / 1e-3 - 1) < 0.01
    a = jnp.exp(draw(a_log_init(1.0, 16.0)))
    assert float(jnp.min(a)) > 0.999 and float(jnp.max(a)) < 16.01 and abs(float(jnp.mean(a)) - 8.5) < 0.3


def test_ranges_are_checked():
    with pytest.raises(ValueError, match="SimpleNamespace.low: expected 0 < low <= high, got 2 and 1"):
        check_ranges(SimpleNamespace(low=2, high=1), ("low", "high"))
    check_ranges(SimpleNamespace(low=1, high=1), ("low", "high"))
