"""Linear attention by its definition: a scan over time, and the dense matrix that it multiplies the values by.

The functions without validation take what `ops/linear.py` prepares: q, k [B, T, Hk, K]; values, a tuple of
[B, T, H, V]; decay None, [B or 1, T, H] or [B, T, H, K] in the accumulating dtype; states, one [B, H, K, V] for
each of the values; runs [B, T] from `core/packing`, or None. At padding q, k, values and decay are 0.
"""

import functools

import jax
import jax.numpy as jnp

from seqmix.core import packing
from seqmix.core.shapes import dims


def decay_spec(log_decay):
    """The named dimensions of a decay, for `dims`; raises ValueError if it can have none."""
    specs = {1: "H", 3: "B T H", 4: "B T H K"}
    if log_decay is not None and not hasattr(log_decay, "ndim"):
        raise ValueError(f"log_decay: expected an array or None, got {type(log_decay).__name__}")
    if log_decay is None or log_decay.ndim in specs:
        return None if log_decay is None else specs[log_decay.ndim]
    raise ValueError(f"log_decay: expected shape (H), (B, T, H) or (B, T, H, K), got {tuple(log_decay.shape)}")


def step(q, k, values, decay, states):
    """One token, without a time axis: (outputs of [B, H, V], states), all in the states' dtype."""
    acc, heads = states[0].dtype, states[0].shape[1]
    q, k = (jnp.repeat(x.astype(acc), heads // x.shape[1], axis=1) for x in (q, k))
    if decay is not None:
        factor = jnp.exp(decay)[..., None]
        factor = factor if factor.ndim == 4 else factor[..., None]
        states = tuple(state * factor for state in states)
    states = tuple(s + k[..., :, None] * v[..., None, :].astype(acc) for s, v in zip(states, values))
    return tuple(jnp.sum(q[..., :, None] * s, axis=-2) for s in states), states


def recurrence(q, k, values, decay, states, runs, finish):
    """`step` over the tokens, from a zero state where a segment starts: (finish(outputs), states)."""

    def body(states, token):
        q, k, values, decay, fresh = token
        if fresh is not None:
            states = tuple(jnp.where(fresh[:, None, None, None], 0, s) for s in states)
        outputs, states = step(q, k, values, decay, states)
        return states, outputs

    fresh = None if runs is None else packing.starts(runs)
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, values, decay, fresh))
    states, outputs = jax.lax.scan(body, states, tokens)
    return finish(tuple(jnp.moveaxis(y, 0, 1) for y in outputs)), states


def bidirectional(q, k, values, states, runs, finish):
    """Each token reads the whole of its segment: (finish(outputs), the last segment's sums of k v^T)."""
    acc, heads = states[0].dtype, values[0].shape[2]
    q, k = (jnp.repeat(x.astype(acc), heads // x.shape[2], axis=2) for x in (q, k))
    values = tuple(v.astype(acc) for v in values)
    if runs is None:
        runs = jnp.ones(q.shape[:2], jnp.int32)
    real = (runs != 0)[:, None, :]
    same = (runs[:, :, None] == runs[:, None, :]) & real
    last = (packing.last_run(runs)[:, None, None] == runs[:, None, :]) & real
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.where(same[:, None], einsum("bthk,bshk->bhts", q, k), 0)
    sums = tuple(einsum("bshk,bshv->bhkv", jnp.where(jnp.swapaxes(last, 1, 2)[..., None], k, 0), v) for v in values)
    return finish(tuple(einsum("bhts,bshv->bthv", scores, v) for v in values)), sums


def linear_mixing_matrix(q, k, log_decay=None, *, scale=1.0, segment_ids=None, causal=True):
    """The matrix M of linear attention, y[b, t, h] = sum_s M[b, h, t, s] v[b, s, h], from its closed form.

        M[t, s] = scale * sum_k q[t, k] k[s, k] exp(sum of log_decay over s < u <= t),   0 where s > t

    Args:
      q, k: [B, T, Hk, K], floating.
      log_decay: <= 0; None, [H], [B, T, H] or [B, T, H, K], where Hk divides H; without it H is Hk.
      scale: factor on q.
      segment_ids: [B, T] integers; tokens of different segments, and padding (0), do not meet.
      causal: False fills both triangles (without a decay only).

    Returns: [B, H, T, T] in promote(dtype, float32). Row by row: memory grows with B H T (T + K).
    Raises: ValueError for shapes that disagree, or causal=False with a decay.
    """
    specs = {"q": "B T Hk K", "k": "B T Hk K", "log_decay": decay_spec(log_decay)}
    d = dims(specs, q=q, k=k, log_decay=log_decay)
    heads = d.Hk if log_decay is None else d.H
    if heads % d.Hk:
        raise ValueError(f"log_decay: expected heads divisible by Hk={d.Hk}, got {tuple(log_decay.shape)}")
    if not causal and log_decay is not None:
        raise ValueError("causal: expected True with log_decay, got False")
    acc = jnp.promote_types(jnp.result_type(q, k), jnp.float32)
    q, k = (jnp.repeat(x.astype(acc), heads // d.Hk, axis=2) for x in (q, k))
    if segment_ids is None:
        segment_ids = jnp.ones((d.B, d.T), jnp.int32)
    packing.check(segment_ids, d.B, d.T)
    runs = packing.runs(segment_ids)
    if log_decay is None:
        log_decay = jnp.zeros(heads)
    decay = log_decay.astype(acc) if log_decay.ndim == 4 else log_decay.astype(acc)[..., None]
    decay = jnp.where((runs != 0)[..., None, None], decay, 0)
    index = jnp.arange(d.T)

    def row(t):
        # Sums over s < u <= t as they stand, so that nothing cancels, and never of a u after t.
        inside = jnp.where((index <= t)[:, None, None], decay, 0)
        after = jnp.pad(inside[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
        exponent = jnp.flip(jnp.cumsum(jnp.flip(after, 1), axis=1), 1)
        scores = jnp.sum(q[:, t][:, None] * k * jnp.exp(exponent), axis=-1)
        visible = (runs == runs[:, t][:, None]) & (runs != 0) & ((index <= t) | (not causal))
        return scale * jnp.where(visible[..., None], scores, 0)

    return jnp.transpose(jax.lax.map(row, index), (1, 3, 0, 2))
