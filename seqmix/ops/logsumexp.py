"""A running softmax average: softmax over everything so far, as a recurrence with a state of constant size."""

import jax.numpy as jnp
from jax import lax

from seqmix.core import packing
from seqmix.core.shapes import check_arrays, dims, filled, floating
from seqmix.ops.scan import linear_scan

_LOWEST = -1e30  # the greatest of no scores: exp of it less any score is 0, and nothing overflows


def empty_logsumexp_state(batch: int, heads: int, width: int, dtype=jnp.float32):
    """The state of `logsumexp_scan` before the first token."""
    zero = jnp.zeros((batch, heads), dtype)
    return jnp.full_like(zero, _LOWEST), jnp.zeros((batch, heads, width), dtype), zero


def logsumexp_scan(scores, values, *, state=None, segment_ids=None, chunk: int = 32, implementation: str | None = None):
    """y_t = sum_s exp(scores_s) values_s / sum_s exp(scores_s) over s <= t in the segment of t.

    Args:
      scores: [B, T, H], any finite size; best left in float32.
      values: [B, T, H, V].
      state: (m [B, H], num [B, H, V], den [B, H]): the greatest score so far, and both sums times exp(-m);
        default `empty_logsumexp_state`.
      segment_ids: [B, T] int, 0 for padding, where y is 0. Segments begin empty, a row's first from `state`.
      chunk, implementation: as of `linear_scan`, which runs it: num and den decay by exp(m_{t-1} - m_t).
    Returns:
      (y [B, T, H, V] in the dtype of values, state in that of both, at least float32). No gradient flows through m,
      which cancels in whatever is made of a state.
    Raises:
      ValueError for shapes that disagree, and as `linear_scan`.

    Source: Aaren (arXiv 2405.13956, section 3.2).
    """
    d = dims({"scores": "B T H", "values": "B T H V"}, scores=scores, values=values)
    floating(scores=scores, values=values)
    filled(scores=scores, values=values)
    if segment_ids is not None:
        packing.check(segment_ids, d.B, d.T)
    acc = jnp.promote_types(jnp.promote_types(scores.dtype, values.dtype), jnp.float32)
    state = empty_logsumexp_state(d.B, d.H, d.V, acc) if state is None else state
    if not isinstance(state, tuple | list) or len(state) != 3:
        raise ValueError(f"state: expected three arrays (m, num, den), got {type(state).__name__}")
    for held in state:
        check_arrays(state=held)
    m, num, den = (a.astype(acc) for a in state)
    dims({"v": "B T H V", "m": "B H", "num": "B H V", "den": "B H"}, v=values, m=m, num=num, den=den)

    dtype, scores, values = values.dtype, scores.astype(acc), values.astype(acc)
    opened = None
    if segment_ids is not None:
        scores = jnp.where((segment_ids != 0)[..., None], scores, _LOWEST)
        values = jnp.where((segment_ids != 0)[..., None, None], values, 0)
        opened = packing.starts(packing.runs(segment_ids))[..., None]
    fixed = lax.stop_gradient(m)
    gauge = jnp.exp(m - fixed)  # is 1, and hands the gradient of m to the sums that are scaled by it
    m = _running_maximum(lax.stop_gradient(scores), fixed, opened)
    log_decay = jnp.concatenate([fixed[:, None], m[:, :-1]], 1) - m
    log_decay = log_decay if opened is None else jnp.where(opened, 0, log_decay)
    weight = jnp.exp(scores - m)[..., None]
    sums, last = linear_scan(
        jnp.concatenate([weight * values, weight], -1),
        log_decay[..., None],
        state=jnp.concatenate([num, den[..., None]], -1) * gauge[..., None],
        segment_ids=segment_ids,
        chunk=chunk,
        implementation=implementation,
    )
    num, den = sums[..., :-1], sums[..., -1:]
    y = num / (den if segment_ids is None else jnp.where((segment_ids != 0)[..., None, None], den, 1))
    return y.astype(dtype), (m[:, -1], last[..., :-1], last[..., -1])


def _running_maximum(scores, first, opened):
    """The greatest score since a segment opened, or since `first` [B, H]: [B, T, H]."""
    scores = jnp.concatenate([jnp.maximum(scores[:, :1], first[:, None]), scores[:, 1:]], 1)
    if opened is None:
        return lax.cummax(scores, axis=1)

    def later(a, b):
        return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

    return lax.associative_scan(later, (jnp.broadcast_to(opened, scores.shape), scores), axis=1)[1]
