"""Slots of tokens sorted by the block of keys that each chose, every block's filled up to whole tiles.

A counting sort: counts of stretches, their running sums, ranks within a stretch. `ops/block_groups.py` attends over it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

ROWS = 128  # queries of a tile
STRETCH = 128  # slots that are ranked among each other


class Groups(NamedTuple):
    """Slots sorted by block, for each row and key head; n tiles of `tile` tokens."""

    row: jax.Array  # [B, J, T, c] int32: where a slot went, -1 where it holds no block
    token: jax.Array  # [B, J, n * tile] int32; what fills up a tile repeats its first
    real: jax.Array  # [B, J, n * tile] bool: not filling up
    block: jax.Array  # [B, J, n] int32 of a tile, -1 for tiles that are left over


def grouped(index, blocks: int, tile: int) -> Groups:
    """`Groups` of index [B, J, T, c]; what is not from 0 to blocks - 1, or is there already, is no block."""
    batch, heads, time, slots = index.shape
    twice = jnp.any((index[..., None] == index[..., None, :]) & jnp.tri(slots, k=-1, dtype=bool), axis=-1)
    block = jnp.where((index >= 0) & (index < blocks) & ~twice, index, -1).astype(jnp.int32)
    size = time * slots
    total = tiles(size, blocks, tile)
    stretch = min(STRETCH, size)
    cells = jnp.pad(block.reshape(batch, heads, size), ((0, 0), (0, 0), (0, -size % stretch)), constant_values=-1)
    cells = cells.reshape(batch, heads, -1, stretch)
    count = jnp.sum(cells[..., None] == jnp.arange(blocks), axis=-2, dtype=jnp.int32)
    ends = jnp.cumsum(count, axis=2)
    whole = -(-ends[:, :, -1] // tile)
    last = jnp.cumsum(whole, axis=-1)
    first = ((last - whole) * tile)[:, :, None] + ends - count
    same = cells[..., None] == cells[..., None, :]
    rank = jnp.sum(same & jnp.tri(stretch, k=-1, dtype=bool), axis=-1, dtype=jnp.int32)
    row = take(first, jnp.maximum(cells, 0), 3) + rank
    row = jnp.where(cells >= 0, row, -1).reshape(batch, heads, -1)[..., :size]
    # What has no block goes past the end, where a scatter drops it.
    slot = jnp.arange(size, dtype=jnp.int32)
    place = lambda at: jnp.full(total * tile, -1, jnp.int32).at[at].set(slot // slots, mode="drop", unique_indices=True)
    token = jax.vmap(jax.vmap(place))(jnp.where(row < 0, total * tile + slot, row))
    opening = jnp.repeat(jnp.maximum(token[..., ::tile], 0), tile, axis=-1)
    owner = jnp.sum(last[..., None, :] <= jnp.arange(total)[:, None], axis=-1, dtype=jnp.int32)
    owner = jnp.where(owner < blocks, owner, -1)
    return Groups(row.reshape(index.shape), jnp.where(token < 0, opening, token), token >= 0, owner)


def tile_rows(slots, group, blocks) -> int:
    """Rows of a tile of the chunked form: near what a block has of them."""
    return min(ROWS, max(16, 1 << (slots * group // blocks).bit_length()))


def tile_tokens(rows, group) -> int:
    """The fewest tokens whose `group` rows each fill whole tiles of `rows`."""
    return rows // math.gcd(rows, group)


def tiles(slots, blocks, tile) -> int:
    """Tiles of `tile` tokens that hold so many slots, each block's filled up: as many as there can be."""
    return (slots + min(blocks, slots) * (tile - 1)) // tile


def take(x, index, axis):
    """x at index along the axis."""
    return jnp.take_along_axis(x, index, axis, mode="clip")  # no index is out of bounds; clipped, none is looked for
