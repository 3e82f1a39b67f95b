"""Decays by time steps, log_decay = -exp(A_log) softplus(logits + dt_bias), and how they start (Mamba, 2312.00752)."""

import math

import jax
import jax.numpy as jnp


def log_decay(logits, a_log, dt_bias):
    """-exp(A_log) softplus(logits + dt_bias), <= 0, in promote(dtype of logits, float32).

    logits [B, T, H] or [B, T, H, K]; dt_bias [H] or [H, K], A_log [H], [H, K] or, beside K, [H, 1].
    """
    acc = jnp.promote_types(logits.dtype, jnp.float32)
    return -jnp.exp(a_log.astype(acc)) * jax.nn.softplus(logits.astype(acc) + dt_bias.astype(acc))


def dt_bias_init(low: float, high: float, floor: float = 1e-4):
    """Initialiser of dt_bias: softplus of it is log-uniform from `low` to `high`, and at least `floor`."""

    def init(key, shape, dtype):
        dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(low), math.log(high)))
        dt = jnp.maximum(dt, floor)
        return dt + jnp.log(-jnp.expm1(-dt))  # the inverse of softplus

    return init


def a_log_init(low: float, high: float):
    """Initialiser of A_log: exp of it is uniform from `low` to `high`."""
    return lambda key, shape, dtype: jnp.log(jax.random.uniform(key, shape, dtype, low, high))


def check_ranges(mixer, *pairs):
    """Raises ValueError naming the field unless 0 < low <= high for each pair of a mixer's fields."""
    for low, high in pairs:
        values = getattr(mixer, low), getattr(mixer, high)
        if not 0 < values[0] <= values[1]:
            got = f"{values[0]} and {values[1]}"
            raise ValueError(f"{type(mixer).__name__}.{low}: expected 0 < {low} <= {high}, got {got}")
