"""The delta rule and its relatives as loops over time.

Everything is computed in float32 (float64 for float64 inputs); heads of keys are repeated for their group.
"""

import jax
import jax.numpy as jnp

from seqmix.core import packing

_HIGHEST = jax.lax.Precision.HIGHEST


def delta_rule_reference(q, k, v, beta, log_decay, erase, *, scale, state, run_ids, halves=False):
    """Arguments as `delta_rule` hands them on: k, v, beta, erase [B, T, n, ...] with their steps, log_decay
    [B, T, H, 1 or K] or None, state [B, H, K, V], run_ids [B, T] or None. A state may have more columns than v: nothing
    is written to the last of them. halves: gives a function too that makes y of outputs like y, here none.
    """
    heads, acc = v.shape[-2], state.dtype

    def step(s, token):
        q, k, v, beta, decay, erase = token
        s = s * decay[..., None]
        for i in range(k.shape[1]):
            error = v[:, i] - _read(erase[:, i], s)
            s = s + _outer(k[:, i], beta[:, i, :, None] * error)
        return s, scale * _read(q, s)

    decay = jnp.ones((1, 1, 1, 1), acc) if log_decay is None else jnp.exp(log_decay)
    q, k, erase = (_per_head(x, heads, acc) for x in (q, k, erase))
    tokens = q, k, _written(v, state), beta.astype(acc), decay, erase
    return _loop(step, tokens, state, run_ids, v.dtype, halves)


def rank_one_reference(q, k, v, left, right, log_decay, *, scale, state, run_ids, halves=False):
    """Arguments as `diagonal_plus_rank_one` hands them on: log_decay [B, T, H, 1 or K] or None, state
    [B, H, K, V], run_ids [B, T] or None.
    """
    heads, acc = v.shape[-2], state.dtype

    def step(s, token):
        q, k, v, left, right, decay = token
        s = decay[..., None] * s + _outer(left, _read(right, s)) + _outer(k, v)
        return s, scale * _read(q, s)

    decay = jnp.ones((1, 1, 1, 1), acc) if log_decay is None else jnp.exp(log_decay)
    q, k, left, right = (_per_head(x, heads, acc) for x in (q, k, left, right))
    return _loop(step, (q, k, _written(v, state), left, right, decay), state, run_ids, v.dtype, halves)


def _written(v, state):
    """v in the dtype and with as many columns as the state."""
    return jnp.pad(v.astype(state.dtype), [(0, 0)] * (v.ndim - 1) + [(0, state.shape[-1] - v.shape[-1])])


def _loop(step, tokens, state, run_ids, dtype, halves):
    """y [B, T, H, V] and the last state of a scan of `step` over time."""
    batch, time = tokens[0].shape[:2]
    run_ids = jnp.ones((batch, time), jnp.int32) if run_ids is None else run_ids
    tokens = [jnp.broadcast_to(x, (batch, time, *x.shape[2:])) for x in tokens]

    def advance(s, at):
        token, opens, real = at
        fresh = jnp.where(opens[:, None, None, None], 0, s)
        new, y = step(fresh, token)
        keep = real[:, None, None]
        return jnp.where(keep[..., None], new, s), jnp.where(keep, y, 0).astype(dtype)

    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (tokens, packing.starts(run_ids), run_ids != 0))
    state, y = jax.lax.scan(advance, state, xs)
    y = jnp.moveaxis(y, 0, 1)
    return (y, state, lambda y: y.astype(dtype)) if halves else (y, state)


def _per_head(x, heads, acc):
    return jnp.repeat(x.astype(acc), heads // x.shape[-2], axis=-2)


def _read(x, s):
    return jnp.einsum("bhk,bhkv->bhv", x, s, precision=_HIGHEST)


def _outer(x, u):
    return x[..., :, None] * u[..., None, :]
