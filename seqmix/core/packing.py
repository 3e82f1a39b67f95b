"""Several documents in one row: segment ids [B, T] int32, where 0 is padding.

A segment is the tokens of one row between two changes of non-zero id; padding inside it is skipped, and an id
that comes back after another is a new segment. An incoming state belongs to a row's first segment, the outgoing
one to its last; a row of padding alone passes the state on.
"""

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.core.shapes import is_array


def _last_nonzero(ids):
    """ids with every 0 replaced by the nearest non-zero id before it (0 where there is none)."""
    index = jnp.where(ids != 0, jnp.arange(ids.shape[1]), -1)
    last = jax.lax.cummax(index, axis=1)
    filled = jnp.take_along_axis(ids, jnp.maximum(last, 0), axis=1)
    return jnp.where(last >= 0, filled, 0)


def runs(segment_ids):
    """Segments renumbered 1, 2, ... in each row, padding 0: [B, T] int32. Equal numbers mean one segment."""
    filled = _last_nonzero(segment_ids)
    before = jnp.pad(filled[:, :-1], ((0, 0), (1, 0)))
    started = (segment_ids != 0) & (filled != before)
    return jnp.where(segment_ids != 0, jnp.cumsum(started, axis=1, dtype=jnp.int32), 0)


def starts(run_ids):
    """Whether a token opens a segment other than its row's first: [B, T] bool, from the result of `runs`."""
    before = jax.lax.cummax(jnp.pad(run_ids[:, :-1], ((0, 0), (1, 0))), axis=1)
    return (run_ids > before) & (before > 0)


def positions(run_ids, start=None):
    """Index of each token within its segment, padding not counted: [B, T] int32, 0 at padding.

    `run_ids` are the result of `runs`; the first segment of a row goes on from `start` [B] (default 0).
    """
    real = run_ids != 0
    count = jnp.cumsum(real, axis=1, dtype=jnp.int32) - 1  # tokens before this one
    opened = starts(run_ids)
    # The count at the latest opening; openings only grow it, so a running maximum finds the latest.
    base = jax.lax.cummax(jnp.where(opened, count, 0), axis=1)
    place = count - base
    if start is not None:
        place = place + jnp.where(run_ids == 1, start[:, None], 0)
    return jnp.where(real, place, 0)


def last_run(run_ids):
    """Number of each row's last segment, [B] int32; 0 in a row of padding alone."""
    return jnp.max(run_ids, axis=1)


def from_cu_seqlens(cu_seqlens, length: int | None = None) -> np.ndarray:
    """Segment ids [1, length] int32 of sequences laid end to end, as varlen kernels describe them.

    cu_seqlens: 0 and then the end of each sequence, not decreasing (empty sequences get no tokens); `length`
    (default: the last end) pads on the right. Works on the host. Raises ValueError for ends that decrease,
    do not start at 0, or do not fit.
    """
    ends = np.asarray(cu_seqlens)
    if ends.ndim != 1 or ends.size < 1 or ends[0] != 0 or np.any(np.diff(ends) < 0):
        raise ValueError(f"cu_seqlens: expected 0 and then ends that do not decrease, got {ends.tolist()}")
    total = int(ends[-1]) if length is None else length
    if ends[-1] > total:
        raise ValueError(f"length: expected at least {ends[-1]}, the last end, got {length}")
    index = np.searchsorted(ends, np.arange(total), side="right")
    return np.where(np.arange(total) < ends[-1], index, 0).astype(np.int32)[None]


def check(segment_ids, batch: int, time: int, name: str = "segment_ids"):
    """Raises ValueError unless segment ids are an array of integers of shape [batch, time]."""
    if not is_array(segment_ids):
        raise ValueError(f"{name}: expected an array, got {type(segment_ids).__name__}")
    if segment_ids.shape != (batch, time):
        raise ValueError(f"{name}: expected shape (B={batch}, T={time}), got {tuple(segment_ids.shape)}")
    if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
        raise ValueError(f"{name}: expected integers, 0 for padding, got {segment_ids.dtype}")
