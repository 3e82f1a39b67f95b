"""Lists of the blocks of keys that each block of queries sees, from masks, from data, and transposed.

A list is an index [b, h, nq, n] of key blocks, -1 where there is none, beside flags `full`; b is B or 1, h the
number of key heads or 1. What is known while tracing stays numpy.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.ops.mask_algebra import EMPTY, FULL, Mask, library, ranges, span

_COMPARED = 1 << 22  # pairs of entries and blocks, below which all are compared
_RANKED = 64  # longest lists whose entries are brought forward without a sort


class Lists(NamedTuple):
    """The key blocks of each query block; the entries that are none stand last."""

    index: jax.Array  # [b, h, nq, n] int32, -1 for none
    full: jax.Array  # [b, h, nq, n] bool: every pair of the tile exists and is visible


class Walk(NamedTuple):
    """Lists laid end to end: owner o reads other[begin[o] : begin[o] + count[o]]."""

    begin: jax.Array  # [b, h, owners] int32
    count: jax.Array  # [b, h, owners] int32
    other: jax.Array  # [b, h, P] int32
    full: jax.Array  # [b, h, P] bool


@lru_cache(maxsize=64)
def of_mask(mask: Mask, sizes: tuple[int, int], time: int, keys: int) -> np.ndarray:
    """Index [1, 1, nq, n] of the tiles that may hold a visible pair, whatever the data."""
    live = mask.tiles(*sizes, time, keys) != EMPTY
    width = max(1, int(live.sum(1).max()))
    order = np.argsort(~live, axis=1, kind="stable")[:, :width].astype(np.int32)
    index = np.where(np.take_along_axis(live, order, 1), order, -1)[None, None]
    index.flags.writeable = False
    return index


def lists(mask: Mask | None, index, sizes: tuple[int, int], time: int, keys: int, data: dict) -> Lists:
    """`Lists` of the tiles of index [b, h, nq, n] in which the mask, with data [b, T] and [b, S], may see."""
    (q0, q1), (k0, k1) = ranges(time, sizes[0]), ranges(keys, sizes[1])
    xp = library(index)
    index = xp.where((index >= 0) & (index < k0.size), index, -1)
    at = xp.maximum(index, 0)
    first, last = xp.asarray(k0)[at], xp.asarray(k1)[at]
    whole = (last - first + 1 == sizes[1]) & (q1 - q0 + 1 == sizes[0])[:, None]
    if mask is None:
        return _compact(index, whole)
    spans = {}
    for name, values in data.items():
        if mask.inputs[name] == "queries":
            spans[name] = tuple(x[:, None, :, None] for x in span(values, sizes[0]))
        else:
            spans[name] = tuple(_along(x[:, None], at) for x in span(values, sizes[1]))
    grades = mask.over((q0[:, None], q1[:, None]), (first, last), spans)
    return _compact(library(grades, index).where(grades == EMPTY, -1, index), (grades == FULL) & whole)


def _along(values, index):
    """values [b, 1, nk] at index [b', h, nq, n]."""
    xp = library(values, index)
    lead = np.broadcast_shapes(values.shape[:2], index.shape[:2])
    values, index = (
        xp.broadcast_to(values, (*lead, values.shape[-1])),
        xp.broadcast_to(index, (*lead, *index.shape[2:])),
    )
    return xp.take_along_axis(values, index.reshape(*lead, -1), axis=-1).reshape(index.shape)


def _compact(index, full) -> Lists:
    xp = library(index, full)
    index, full = xp.broadcast_arrays(index, full)
    if xp is jnp and index.shape[-1] <= _RANKED:
        # Each entry is added up where its rank is: sums in place of a sort and two gathers.
        live = index >= 0
        rank = jnp.cumsum(live, axis=-1, dtype=np.int32)
        entry = jnp.where(live, 2 * index + full + 1, 0)
        here = live[..., None, :] & (rank[..., None, :] == np.arange(1, index.shape[-1] + 1)[:, None])
        entry = jnp.sum(jnp.where(here, entry[..., None, :], 0), axis=-1, dtype=np.int32) - 1
        return Lists(entry >> 1, (entry >= 0) & (entry & 1 == 1))
    order = xp.argsort(index < 0, axis=-1, stable=True)
    index, full = (xp.take_along_axis(x, order, axis=-1) for x in (index, full))
    if xp is np:
        width = max(1, int((index >= 0).sum(-1).max()))
        index, full = index[..., :width], full[..., :width]
    return Lists(index.astype(np.int32), full & (index >= 0))


def forward(lists: Lists) -> Walk:
    """Query blocks read their key blocks."""
    index, full = lists
    xp = library(index)
    b, h, rows, n = index.shape
    begin = np.broadcast_to(np.arange(rows, dtype=np.int32) * n, (b, h, rows))
    count = xp.sum(index >= 0, axis=-1, dtype=np.int32)
    return Walk(begin, count, index.reshape(b, h, -1), full.reshape(b, h, -1))


def transposed(lists: Lists, owners: int) -> Walk:
    """Key blocks, `owners` of them, read the query blocks that list them."""
    index, full = lists
    xp = library(index)
    b, h, _, n = index.shape
    flat = index.reshape(b, h, -1)
    key = xp.where(flat < 0, owners, flat)
    order = xp.argsort(key, axis=-1, stable=True)
    key, full = (xp.take_along_axis(x, order, axis=-1) for x in (key, full.reshape(b, h, -1)))
    bounds = np.arange(owners + 1, dtype=np.int32)
    rows = key.reshape(b * h, -1)
    if xp is np:
        ends = np.stack([np.searchsorted(row, bounds) for row in rows]).astype(np.int32)
    else:
        method = "compare_all" if rows.shape[1] * owners <= _COMPARED else "scan"  # the latter is a loop
        ends = jax.vmap(partial(jnp.searchsorted, v=bounds, method=method))(rows).astype(np.int32)
    ends = ends.reshape(b, h, -1)
    return Walk(ends[..., :-1], ends[..., 1:] - ends[..., :-1], (order // n).astype(np.int32), full)


def turned(lists: Lists, owners: int) -> Walk:
    """As `transposed`; where lists are traced and short, with gaps between those of key blocks, and without a sort."""
    index, full = lists
    b, h, rows, n = index.shape
    if library(index) is np or rows > _RANKED or b * h * owners * rows * n > _COMPARED:
        return transposed(lists, owners)
    listed = index[:, :, None] == np.arange(owners, dtype=np.int32)[:, None, None]
    found = jnp.max(jnp.where(listed, full[:, :, None] + np.int32(1), 0), axis=-1)  # [b, h, owners, rows]
    return forward(_compact(jnp.where(found > 0, np.arange(rows, dtype=np.int32), -1), found > 1))
