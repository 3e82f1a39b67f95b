"""Softmax attention to blocks of keys that each query chooses among those of its past: what such mixers share.

Blocks of `size` tokens are counted from the start of each segment, so that segments, padding and splits may fall
anywhere. A query sees its own block up to itself, and of the whole blocks before it those that are chosen. Whole
blocks are gathered into a row of their own: of T tokens there are at most T / size, whatever the segments.

Rows of 64 tokens and more are sorted by the blocks that tokens choose (`ops/block_groups.py`); in shorter ones each
token gathers its own. On a CPU (seconds of it, forward and with gradients; layers of 4 heads of 64 channels, float32,
one row), blocks of 512, 3 of them (MoBA): 0.050 and 0.21 at 2048 tokens, where dense attention takes 0.035 and 0.18 and
gathering took 0.65 and 1.58; 0.30 and 1.16 at 8192, dense 0.40 and 1.93. Blocks of 64, 16 of them, one key head (native
sparse attention): 0.16 and 0.72 at 2048, gathering 0.24 and 0.69; 1.05 and 4.13 at 8192. So MoBA is faster than dense
attention from somewhere between those lengths on; native sparse attention is slower at both.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmix.ops import token_block_kernels
from seqmix.ops.block_sparse import block_sparse_attention
from seqmix.ops.mask_algebra import grade
from seqmix.ops.masks import Causal, Mask
from seqmix.ops.mesh import layout
from seqmix.ops.softmax import attention, merge
from seqmix.ops.topk_blocks import best_blocks, best_in_ranges, forced_first
from seqmix.parts.chunks import chunk_ids


class Tokens(NamedTuple):
    """The tokens of a call, behind the last `held` ones of the row's first segment, which its state kept."""

    k: jax.Array  # [B, held + T, Hk, K]
    v: jax.Array  # [B, held + T, Hk, V]
    runs: jax.Array  # [B, held + T] segments as `packing.runs` counts them, 0 for padding
    place: jax.Array  # [B, held + T] positions in the segment
    held: int
    alone: bool = False  # rows are one segment each, without padding and without a state


class Blocks(NamedTuple):
    """Whole blocks in the order in which they end."""

    k: jax.Array  # [B, n, length, Hk, K]
    v: jax.Array  # [B, n, length, Hk, V]
    runs: jax.Array  # [B, n] segment of a block, 0 where there is none
    number: jax.Array  # [B, n] of a block in its segment


@dataclass(frozen=True)
class Ended(Mask):
    """Of blocks of `length` tokens, which begin every `stride` tokens of a row, those that have ended by a query."""

    length: int
    stride: int

    def visible(self, i, j, data=None):
        return j * self.stride <= i - (self.length - 1)

    def over(self, rows, columns, spans=None):
        (first, last), (low, high) = rows, columns
        return grade(low * self.stride + self.length <= last + 1, high * self.stride + self.length <= first + 1)


def after(cache, count: int, k, v, runs, place, segment_ids=None) -> Tokens:
    """Tokens k, v of the segments `runs` at `place`, behind the last `count` of a `parts.kv_cache`, or None.

    segment_ids: those of which the runs are, or None for rows of one segment.
    """
    if cache is None or not count:
        return Tokens(k, v, runs, place, 0, cache is None and segment_ids is None)
    at = cache["length"][:, None] - count + jnp.arange(count)
    slot = (at % cache["k"].shape[1])[..., None, None]
    k, v = (
        jnp.concatenate([jnp.take_along_axis(cache[name], slot, axis=1).astype(x.dtype), x], axis=1)
        for name, x in (("k", k), ("v", v))
    )
    there = (at >= 0).astype(runs.dtype)
    return Tokens(k, v, *(jnp.concatenate(pair, axis=1) for pair in ((there, runs), (at, place))), count)


def whole(tokens: Tokens, length: int, stride: int) -> Blocks:
    """The blocks that end among the new tokens: block c holds the positions from c stride on, length >= stride."""
    if tokens.alone and length % stride == 0:
        return _regular(tokens, length, stride)
    runs, place, held = tokens.runs, tokens.place, tokens.held
    (batch, time), real = runs.shape, runs != 0
    n = max(1, (time - held + (stride - 1 if held else 0)) // stride)  # only a held block is begun already
    number = (place - length + 1) // stride
    ends = real & (number >= 0) & ((place - length + 1) % stride == 0) & (jnp.arange(time) >= held)
    slot = jnp.where(ends, jnp.cumsum(ends, axis=1) - 1, n)  # n is past the end, where a scatter drops it
    index = jnp.broadcast_to(jnp.arange(time), runs.shape)
    end = jnp.zeros((batch, n), index.dtype).at[jnp.arange(batch)[:, None], slot].set(index, mode="drop")
    filled = jnp.arange(n) < jnp.sum(ends, axis=1, keepdims=True)
    # Among the real tokens alone, those of a segment are neighbours.
    order = jnp.argsort(~real, axis=1, stable=True)
    rank = jnp.take_along_axis(jnp.cumsum(real, axis=1), end, axis=1)[..., None] - length + jnp.arange(length)
    at = jnp.take_along_axis(order, jnp.maximum(rank, 0).reshape(batch, -1), axis=1)
    k, v = (
        jnp.take_along_axis(x, at[..., None, None], axis=1).reshape(batch, n, length, *x.shape[2:])
        for x in (tokens.k, tokens.v)
    )
    runs, number = (jnp.take_along_axis(x, end, axis=1) for x in (runs, number))
    return Blocks(k, v, jnp.where(filled, runs, 0), number)


def _regular(tokens: Tokens, length: int, stride: int) -> Blocks:
    """`whole` where blocks begin at the same places of every row: nothing is gathered, no gradient scattered."""
    batch, time = tokens.runs.shape
    n = max(1, time // stride)
    number = jnp.broadcast_to(jnp.arange(n), (batch, n))

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, max(0, (n - 1) * stride + length - time)), (0, 0), (0, 0)])
        parts = [x[:, at : at + n * stride].reshape(batch, n, stride, *x.shape[2:]) for at in range(0, length, stride)]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)

    return Blocks(cut(tokens.k), cut(tokens.v), (number * stride + length <= time).astype(jnp.int32), number)


def held_blocks(length, slots: int, size: int, stride: int):
    """(runs, numbers) [B, slots] of the whole blocks in a state of rows of `length` [B] tokens."""
    number = jnp.broadcast_to(jnp.arange(slots), (length.shape[0], slots))
    return (number < ((length - size) // stride + 1)[:, None]).astype(jnp.int32), number


def keep_blocks(held, new, blocks: Blocks, last_run):
    """held [B, slots, ...] with what `new` [B, n, ...] says of the blocks of each row's last segment [B]."""
    slots, n = held.shape[1], new.shape[1]
    mine = (blocks.runs != 0) & (blocks.runs == last_run[:, None]) & (blocks.number < slots)
    slot = jnp.where(mine, blocks.number, slots + jnp.arange(n))
    row = jnp.arange(held.shape[0])[:, None]
    return held.at[row, slot].set(new.astype(held.dtype), mode="drop", unique_indices=True)


def past(runs, place, block_runs, number, size: int):
    """Whether a query sees a whole block, [B, T, n]: one of its segment, before its own block."""
    same = (runs[:, :, None] == block_runs[:, None]) & (runs != 0)[:, :, None]
    return same & (number[:, None] < place[:, :, None] // size)


def choose(scores, seen, count: int, forced=None):
    """The `count` blocks with the best scores [B, h, T, n], as an index [B, h, T, min(count, n)], -1 for none.

    seen [B, T, n] are the candidates, of which those `forced` [B, T, n] come first. No gradient passes.
    """
    scores = jax.lax.stop_gradient(scores) if forced is None else forced_first(scores, forced[:, None])
    return best_blocks(jnp.where(seen[:, None], scores, -jnp.inf), min(count, scores.shape[-1]))


def choose_in_ranges(scores, runs, place, size: int, count: int, first: int, local: int, implementation="gpu"):
    """`choose` of scores [B, h, n, T], for calls without a cache, by `best_in_ranges`.

    Forced are the first `first` blocks of a segment and the last local - 1 before a token's own, at most `count`.
    """
    before = jnp.where(runs != 0, place // size, 0)  # whole blocks of the segment before the token's own
    ends = (runs != 0) & (place % size == size - 1)
    high = jnp.cumsum(ends, axis=1, dtype=jnp.int32) - ends
    low = (high - before).astype(jnp.int32)
    at = jnp.arange(first + local - 1, dtype=jnp.int32)
    skipped = jnp.where(at < first, 0, jnp.maximum(before[..., None] - len(at), 0))
    forced = jnp.where(at < before[..., None], low[..., None] + at + skipped, -1)
    lists = jnp.broadcast_to(forced[:, None], (*scores.shape[:2], *forced.shape[1:]))
    if count > len(at):
        others = low + first, high - (local - 1), count - len(at)
        found = best_in_ranges(jax.lax.stop_gradient(scores), *others, implementation)
        lists = jnp.concatenate([lists, found], axis=-1)
    return lists[..., : min(count, scores.shape[2])]


def by_stretches(function, length: int, *arrays):
    """function(*arrays) [B, h, T, c] of arrays [B, T, ...], for `length` tokens at a time where there are more."""
    batch, time = arrays[0].shape[:2]
    if time <= length:
        return function(*arrays)

    def cut(x):
        x = jnp.pad(x, [(0, 0), (0, -time % length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, length, *x.shape[2:]), 1, 0)

    found = jnp.moveaxis(jax.lax.map(lambda cuts: function(*cuts), tuple(map(cut, arrays))), 0, 2)
    return found.reshape(*found.shape[:2], -1, found.shape[-1])[:, :, :time]


def attend(q, tokens: Tokens, blocks: Blocks, index, size: int, cache=None, **options):
    """Mixed values [B, T, H, V] of queries q [B, T, H, K], the new ones among the tokens, joined by LSE.

    index [B, Hk or H, T, c], from `choose`, counts the blocks in the cache (slots / size, where there is one), and then
    `blocks`. A head of its own list reads keys and values repeated. options: block and implementation of the ops.
    """
    held, block = tokens.held, options.pop("block")
    if tokens.alone and index.shape[-1] and _joins(q, tokens, index, size, **options):
        own = jnp.arange(q.shape[1], dtype=index.dtype)[:, None] // size
        index = jnp.concatenate([index, jnp.broadcast_to(own, (*index.shape[:3], 1))], axis=-1)
        lists = {"mask": Causal(), "blocks": index, "sizes": (1, size)}
        return block_sparse_attention(q, tokens.k, tokens.v, **lists, **options)
    ids = chunk_ids(tokens.runs, tokens.place, size)
    near = {"segment_ids": ids[:, held:]}
    if held:
        near |= {"kv_segment_ids": ids, "q_positions": tokens.place[:, held:], "kv_positions": tokens.place}
    parts = [attention(q, tokens.k, tokens.v, block=block, return_lse=True, **near, **options)]
    first = 0
    if cache is not None and index.shape[-1]:
        k, v = (cache[name].astype(x.dtype) for name, x in (("k", tokens.k), ("v", tokens.v)))
        first = k.shape[1] // size
        listed = jnp.where(index < first, index, -1)
        if q.shape[1] == 1:
            parts.append(_gathered(q, k, v, listed, size, block=block, **options))
        else:
            parts.append(_listed(q, k, v, listed, size, **options))
    if index.shape[-1] and (cache is None or q.shape[1] > 1):  # no block ends before the first token of a call
        k, v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in blocks[:2])
        parts.append(_listed(q, k, v, jnp.where(index < first, -1, index - first), size, **options))
    return merge(parts)[0] if len(parts) > 1 else parts[0][0]


def _joins(q, tokens, index, size, implementation):
    """Whether one kernel takes own and listed blocks."""
    if implementation not in (None, "gpu") or not token_block_kernels.takes((1, size), index):
        return False
    k, v = tokens.k, tokens.v
    lay, scale = layout(q.shape[0], q.shape[1], q.shape[2], k.shape[2]), q.shape[-1] ** -0.5
    given = {"mask": Causal(), "soft_cap": None, "slopes": None, "scale": scale}
    return index.shape[1] == k.shape[2] == v.shape[2] and None is token_block_kernels.reason(lay, q, k, v, **given)


def _listed(q, k, v, index, size, **options):
    """(mixed, lse) by `block_sparse_attention`."""
    k, v = (jnp.repeat(x, index.shape[1] // x.shape[2], axis=2) for x in (k, v))
    return block_sparse_attention(q, k, v, blocks=index, sizes=(1, size), return_lse=True, **options)


def _gathered(q, k, v, index, size, **options):
    """(mixed, lse) of one query a row: it reads the blocks in its lists, and nothing else of the keys."""
    batch, heads = index.shape[:2]
    at = (jnp.maximum(index[:, :, 0, :, None], 0) * size + jnp.arange(size)).reshape(batch, heads, -1)
    row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None] * k.shape[2] // heads
    k, v = (jnp.moveaxis(x[row, at, head], 1, 2) for x in (k, v))
    # A query's heads choose equally many, and what they do not choose stands last.
    there = jnp.repeat((index[:, 0, 0] >= 0).astype(jnp.int32), size, axis=-1)
    ids = {"segment_ids": jnp.ones((batch, 1), jnp.int32), "kv_segment_ids": there}
    return attention(q, k, v, causal=False, return_lse=True, **ids, **options)
