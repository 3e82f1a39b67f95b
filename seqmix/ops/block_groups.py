"""Attention where each token chooses its blocks of keys: tokens are sorted by block, and every block meets its own.

A token of T with c chosen blocks has c slots. The slots of a (row, key head) are sorted by block (`ops/block_sort.py`),
each block's group filled up to whole tiles. Queries are gathered into that order, a tile of them meets the one block
that it chose, and the partial (y, lse) are gathered back to the slots and merged by lse, an exact softmax over the
union (MoBA, arXiv 2502.13189, section 2.3):

    lse_i = log sum_s exp(lse_is),    y_i = sum_s exp(lse_is - lse_i) y_is

Backward, with lse_i and delta_i = dy_i . y_i - dlse_i of the union, p_ij = exp(s_ij - lse_i) needs nothing of a slot:
q and dy are gathered once more, and dq is the sum over a token's slots, so that nothing is added by atomics.

Where a list is shared by the R query heads of a key head, all R rows of a token travel together.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmix.ops import block_lists, block_sparse_chunked, block_sparse_kernels
from seqmix.ops.block_lists import Lists
from seqmix.ops.block_sort import ROWS, Groups, grouped, take, tile_rows, tile_tokens, tiles
from seqmix.ops.block_sparse_chunked import Config
from seqmix.ops.mask_algebra import Mask
from seqmix.ops.mesh import on_shares

LEAST = 64  # tokens; below it each gathers its own blocks, which reads no more
TOKEN = "token of a row"  # input of the mask of gathered rows


@dataclass(frozen=True)
class _Gathered(Mask):
    """A mask of gathered queries, whose tokens are data."""

    mask: Mask

    @property
    def inputs(self):
        return self.mask.inputs | {TOKEN: "queries"}

    def visible(self, i, j, data=None):
        return self.mask.visible(data[TOKEN], j, data)

    def over(self, rows, columns, spans=None):
        return self.mask.over(spans[TOKEN], columns, spans)


class Call(NamedTuple):
    """The static half of a call."""

    config: Config
    size: int  # keys of a block
    name: str  # "gpu" or "chunked"
    group: int  # query heads to a key head
    rows: int  # a divisor of the queries of a tile

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return tile_tokens(self.rows, self.group)


def reason(lay, q, k, v, *, mask, data, size, scale, slopes) -> str | None:
    """Why the kernels cannot run this call here, in a few words; None if they can."""
    if slopes is not None:
        return "has no form for slopes where each token chooses blocks"
    if size % 64:
        return f"needs blocks of a multiple of 64 keys where each token chooses them, got {size}"
    mask, data = (None, {}) if mask is None else (_Gathered(mask), data | {TOKEN: None})
    return block_sparse_kernels.reason(lay, q, k, v, mask=mask, data=data, sizes=_sizes(size), scale=scale)


def takes(lay, time, slopes) -> bool:
    """Whether the chunked form sorts a call: slopes need the distances, and a cut time all tokens."""
    return slopes is None and time >= LEAST and (lay is None or not lay.time)


def _sizes(size):
    return ROWS, 64 if size % 128 else 128


def computed_rows(time: int, count: int, blocks: int, group: int = 1) -> int:
    """Rows that meet a block in the chunked form, for each row and key head; time tokens choose count of the blocks."""
    slots = time * count
    rows = tile_rows(slots, group, blocks)
    tile = tile_tokens(rows, group) if time >= LEAST else 1
    return tiles(slots, blocks, tile) * tile * group


def run(lay, config: Config, q, k, v, data: dict, index, size: int, name: str):
    """(y [B, T, H, V], lse [B, H, T]); as `block_sparse_chunked.chunked`, of index [b, h, T, c] for blocks (1, size).

    A block that a list names twice counts once.
    """
    group = q.shape[2] // k.shape[2]
    rows = ROWS if name == "gpu" else tile_rows(math.prod(index.shape[2:]), group, -(-k.shape[1] // size))
    call = Call(config, size, name, group, rows)
    index = jax.lax.optimization_barrier(jnp.asarray(index))  # else what is known is sorted while compiling
    if lay is None:
        return _attend(call, q, k, v, data, index)
    batch, heads = q.shape[0], k.shape[2]
    lead = ("batch" if len(index) == batch else None), ("key_heads" if index.shape[1] == heads else None)

    def local(q, k, v, data, index):
        k, v = (lay.local_key_heads(x, heads) for x in (k, v))
        if lead[1]:
            index = lay.local_key_heads(index, heads, axis=1)
        return _attend(call._replace(group=q.shape[2] // k.shape[2]), q, k, v, data, index)

    queries, keys = ("batch", None, "heads", None), ("batch", None, "key_heads", None)
    data_names = {name: ("batch" if len(x) == batch else None, None) for name, x in data.items()}
    names = queries, keys, keys, data_names, (*lead, None, None)
    return on_shares(lay, local, (q, k, v, data, index), names, (queries, ("batch", "heads", None)))


class _Rows:
    """A call's arrays in the order of its groups, L = N R rows; with a mask, whose data differ by head, B is B J."""

    def __init__(self, call: Call, groups: Groups, data: dict, batch: int):
        self.call, self.groups = call, groups
        self.heads, tokens = groups.token.shape[1:]
        self.length = tokens * call.group
        self.sizes = _sizes(call.size) if call.name == "gpu" else (call.tile * call.group, call.size)
        mask = call.config.mask
        self.folds, self.data = mask is not None, {}
        if self.folds:
            self.data[TOKEN] = self._folded_numbers(groups.token)
            for name, x in data.items():
                x = jnp.broadcast_to(x, (batch, x.shape[1]))[:, None]
                of_queries = mask.inputs[name] == "queries"
                x = take(x, groups.token, axis=2) if of_queries else jnp.repeat(x, self.heads, 1)
                self.data[name] = self._folded_numbers(x) if of_queries else x.reshape(-1, x.shape[2])
            mask = _Gathered(mask)
        self.config = call.config._replace(mask=mask, time=self.length)
        self.lists = self._lists()

    def _folded_numbers(self, x):
        """[B, J, N] as [B J, L]."""
        return jnp.repeat(x.reshape(-1, x.shape[2]), self.call.group, axis=1)

    def _lists(self) -> Lists:
        block, (rows, keys) = self.groups.block, self.sizes
        parts = -(-self.call.size // keys)
        block = jnp.repeat(block, self.call.tile * self.call.group // rows, axis=2)[..., None]
        index = jnp.where(block >= 0, block * parts + jnp.arange(parts, dtype=jnp.int32), -1)
        index = index.reshape(-1, 1, *index.shape[2:]) if self.folds else index
        return block_lists.lists(self.config.mask, index, self.sizes, self.length, self.config.keys, self.data)

    def folded(self, x):
        """[B, L or S, J, K] as the inner form takes it."""
        return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], 1, x.shape[3]) if self.folds else x

    def unfolded(self, x):
        return jnp.swapaxes(x.reshape(-1, self.heads, x.shape[1], x.shape[3]), 1, 2) if self.folds else x

    def gather(self, x):
        """What the rows hold of [B, T, H, K]."""
        x = x.reshape(*x.shape[:2], self.heads, self.call.group, -1)
        x = take(x, jnp.swapaxes(self.groups.token, 1, 2)[..., None, None], 1)
        return self.folded(jnp.swapaxes(x, 2, 3).reshape(x.shape[0], self.length, self.heads, -1))

    def gather_numbers(self, x, filling):
        """What the rows hold of [B, H, T], `filling` where they fill up a tile."""
        x = x.reshape(x.shape[0], self.heads, self.call.group, -1)
        x = take(x, self.groups.token[:, :, None], 3)
        x = jnp.swapaxes(jnp.where(self.groups.real[:, :, None], x, filling), 2, 3)
        return x.reshape(*((-1, 1) if self.folds else x.shape[:2]), self.length)

    def slots(self, x):
        """What a token's slots hold of the rows' x, [B, T, H, K] each; of a slot without a block, anything."""
        x = self.unfolded(x)
        x = x.reshape(x.shape[0], -1, self.call.group, *x.shape[2:])
        row = jnp.moveaxis(jnp.maximum(self.groups.row, 0), 3, 0)
        for at in jnp.swapaxes(row, 2, 3)[..., None, None]:
            found = take(jnp.swapaxes(x, 2, 3), at, 1)
            yield found.reshape(*found.shape[:2], -1, found.shape[4])

    def slot_numbers(self, x):
        """What a token's slots hold of the rows' x, [c, B, H, T]; -inf without a block."""
        x = x.reshape(-1, self.heads, 1, self.length // self.call.group, self.call.group)
        row = self.groups.row
        at = jnp.moveaxis(jnp.maximum(row, 0), 3, 0)
        held = jnp.moveaxis(row >= 0, 3, 0)
        found = [take(x[:, :, 0], one[..., None], 2) for one in at]
        found = jnp.where(held[..., None], jnp.stack(found), -jnp.inf)
        return jnp.swapaxes(found, 3, 4).reshape(len(found), row.shape[0], -1, row.shape[2])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call, q, k, v, data, index):
    return _forward(call, q, k, v, data, index)[0]


def _forward(call, q, k, v, data, index):
    """((y, lse), groups)."""
    batch, heads = k.shape[0], k.shape[2]
    index = jnp.broadcast_to(index, (batch, heads, *index.shape[2:]))
    groups = grouped(index, -(-k.shape[1] // call.size), call.tile)
    rows = _Rows(call, groups, data, batch)
    form = partial(block_sparse_kernels.run, None) if call.name == "gpu" else block_sparse_chunked.chunked
    given = rows.gather(q), rows.folded(k), rows.folded(v)
    part, part_lse = form(rows.config, *given, None, rows.data, rows.lists, rows.sizes)
    lses = rows.slot_numbers(part_lse)
    top = jnp.max(lses, axis=0)
    top = jnp.where(top > -jnp.inf, top, 0)
    total = jnp.sum(jnp.exp(lses - top), axis=0)
    lse = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)
    shares = jnp.swapaxes(jnp.exp(lses - top) / jnp.where(total > 0, total, 1), 2, 3)[..., None]
    y = sum(jnp.where(share > 0, share * x, 0) for share, x in zip(shares, rows.slots(part)))
    return (y.astype(v.dtype), lse), groups


def _attend_forward(call, q, k, v, data, index):
    (y, lse), groups = _forward(call, q, k, v, data, index)
    return (y, lse), (q, k, v, data, groups, y, lse)


def _attend_backward(call, saved, cotangents):
    q, k, v, data, groups, y, lse = saved
    dy, dlse = cotangents
    rows = _Rows(call, groups, data, q.shape[0])
    delta = block_sparse_kernels.row_sums(call.name, y, dy, lse, dlse)[:, :, 1, : q.shape[1]]
    base = jnp.where(lse > -jnp.inf, lse, jnp.inf)
    numbers = rows.gather_numbers(base, jnp.inf), rows.gather_numbers(delta, 0)
    given = rows.gather(q), rows.folded(k), rows.folded(v)
    form = block_sparse_kernels.gradients if call.name == "gpu" else _chunked_gradients
    part, dk, dv = form(rows.config, *given, rows.data, rows.lists, rows.sizes, *numbers, rows.gather(dy))
    held = jnp.moveaxis(groups.row >= 0, 3, 0)
    held = jnp.repeat(jnp.swapaxes(held, 2, 3), call.group, axis=3)[..., None]
    dq = sum(jnp.where(one, x, 0).astype(lse.dtype) for one, x in zip(held, rows.slots(part)))
    return dq.astype(q.dtype), rows.unfolded(dk), rows.unfolded(dv), None, None


def _chunked_gradients(config, q, k, v, data, lists, sizes, lse, delta, dy):
    """`block_sparse_chunked.gradients` of q, k and v, for delta that is known."""
    walks = block_lists.forward(lists), block_lists.transposed(lists, -(-k.shape[1] // sizes[1]))
    given = config, q, k, v, None, data, walks, sizes
    return block_sparse_chunked.gradients(*given, jnp.zeros_like(dy), lse, dy, -delta)[:3]


_attend.defvjp(_attend_forward, _attend_backward)
