"""What the Hopper kernels need not compute of tiles that a mask grades for halves of their blocks, of 64 tokens.

Marks of a tile are numbers, added up: 1 and 2 if it is full to the first and to the second half of its owner, 4 and 8
if these see nothing of its first half, or of all of it where it has 64 tokens, 16 and 32 likewise of its second half.
All is known while tracing: the lists are numpy arrays, and the mask asks for no data. Marks of lists that data make,
of what the mask hides whatever the data, gained nothing on an H100 (documents: 0.99 ms either way).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from seqmix.ops import block_lists
from seqmix.ops.block_lists import Lists, Walk
from seqmix.ops.mask_algebra import EMPTY, FULL, PARTIAL, Mask

HALF = 64  # tokens, the work of a warpgroup
MOST = 1 << 18  # entries of lists of halves, beyond which they are not made


class Halves(NamedTuple):
    """How kernels walk the lists; the first two are None where each half sees some of every tile."""

    own: dict | None  # forward, `plan.own_lists`
    marks: np.ndarray | None  # of the walk's entries, in place of `full`
    turned: Walk  # of blocks of keys over the halves of blocks of queries, with marks, or flags where none is 4 or 8


@lru_cache(maxsize=16)
def _grades(mask: Mask, time: int, keys: int) -> np.ndarray:
    """Grades [T / 64, S / 64] of pairs of halves; full are those alone whose keys all exist."""
    table = mask.tiles(HALF, HALF, time, keys)
    return np.where(np.arange(table.shape[1]) < keys // HALF, table, np.minimum(table, PARTIAL))


def halves(mask: Mask | None, lists: Lists, walk: Walk, sizes, time: int, keys: int) -> Halves | None:
    """`Halves` of lists and of the walk along them; None where there is nothing to gain, or too much to list."""
    from pallas_kernels.block_sparse_attention import plan

    of_queries, of_keys = (size // HALF for size in sizes)
    if mask is None or mask.inputs or of_queries * lists.index.size > MOST:
        return None
    grades, blocks = _grades(mask, time, keys), -(-keys // sizes[1])
    time, rows = len(grades), lists.index.shape[2] * of_queries
    grades = np.pad(grades, ((0, rows - len(grades)), (0, blocks * of_keys - grades.shape[1])), constant_values=EMPTY)
    grades = grades.reshape(rows, blocks, of_keys)
    index = np.repeat(lists.index, of_queries, axis=2)
    found = np.stack([np.take_along_axis(grades[None, None, :, :, n], np.maximum(index, 0), 3) for n in range(of_keys)])
    index = np.where((index >= 0) & (found != EMPTY).any(0), index, -1)
    marks = _marks([found], index >= 0)
    turned = block_lists.transposed(Lists(index, marks if (marks >= 4).any() else (found == FULL).all(0)), blocks)
    if of_queries == 1:
        return Halves(None, None, turned)
    found[:, :, :, time:] = PARTIAL  # queries that fill up the last block are no reason to pass over tiles
    whole = np.where(found.min(0) == FULL, FULL, np.minimum(found.max(0), PARTIAL))
    own, marks = (
        _marks([[x[:, :, n::2] for n in range(2)] for x in parts], lists.index >= 0).reshape(*walk.other.shape)
        for parts in ([whole], found)
    )
    own = plan.own_lists(walk, own) if (own >= 4).any() else None
    return Halves(own, marks if (marks >= 4).any() else None, turned)


def _marks(parts, listed):
    """Of grades of tiles' parts for the halves of their owners, [1 or 2][1 or 2, ...]; 0 where nothing is listed."""
    full = sum((np.min(grades, axis=0) == FULL) * (1 << n) for n, grades in enumerate(zip(*parts)))
    empty = sum((grade == EMPTY) * (4 << 2 * m + n) for m, grades in enumerate(parts) for n, grade in enumerate(grades))
    return (listed * (full + empty)).astype(np.int32)
