"""How many queries and keys the blocks of the TPU kernels have, where the call does not list blocks."""

from functools import lru_cache
from itertools import product

import numpy as np

from seqmix.ops.mask_algebra import EMPTY, PARTIAL, Mask

SIZES = 128, 256, 512  # of queries or keys
MOST = 1 << 22  # tiles that are looked at


@lru_cache(maxsize=64)
def whole(mask: Mask, sizes: tuple[int, int], time: int, keys: int) -> bool:
    """Whether every pair of every tile exists and a mask leaves all or none of them, whatever the data."""
    if mask.inputs or time % sizes[0] or keys % sizes[1]:
        return False
    return not (mask.tiles(*sizes, time, keys) == PARTIAL).any()


def bundles(sizes: tuple[int, int]) -> int:
    """Of the three kernels, for a tile of a head on a v5e, about as `tools.tpu_bundles --tile` counts them.

    Of the first term a half is what a grid step takes by itself, which is reckoned.
    """
    return 1000 + sizes[0] + sizes[0] * sizes[1] // 60


def steps(index, blocks: int) -> tuple[int, int] | None:
    """How many steps the lists of index [b, h, nq, n] take, and those transposed, of `blocks` of keys; None if traced.

    Every entry takes one, and every empty list.
    """
    if not isinstance(index, np.ndarray):
        return None
    rows = index.reshape(-1, *index.shape[2:])
    listed = [row[(row >= 0) & (row < blocks)] for row in rows]
    forward = max(int(np.maximum((row >= 0).sum(1), 1).sum()) for row in rows)
    return forward, max(int(np.maximum(np.bincount(row, minlength=blocks), 1).sum()) for row in listed)


@lru_cache(maxsize=64)
def choose(mask: Mask, time: int, keys: int) -> tuple[int, int]:
    """The sizes for which a mask's tiles take the fewest bundles; one that kernels cannot evaluate is left whole."""
    from pallas_kernels.block_sparse_attention.plan import Visibility

    sides = [[name for name, side in mask.inputs.items() if side == wanted] for wanted in ("queries", "keys")]
    foreign = Visibility(mask.visible, *sides).wrong() is not None
    costs = {}
    for sizes in product(SIZES, repeat=2):
        tiles = -(-time // sizes[0]) * -(-keys // sizes[1])
        if tiles > MOST or (foreign and not whole(mask, sizes, time, keys)):
            continue
        costs[sizes] = int((mask.tiles(*sizes, time, keys) != EMPTY).sum()) * bundles(sizes)
    return min(costs, key=costs.get, default=(SIZES[-1],) * 2)
