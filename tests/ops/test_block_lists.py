"""Lists of blocks against the tables they come from, numpy beside JAX."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.ops import block_lists, masks
from seqmix.ops.masks import EMPTY, FULL

MASKS = {
    "causal": masks.Causal(),
    "window and sinks": masks.Causal() & (masks.Window(5) | masks.Sinks(2)),
    "grid": masks.Neighbourhood((4, 5), (3, 2)),
    "nothing": masks.Sinks(0),
}


def pairs_of(walk, owner_first):
    """{(query block, key block): full} of a walk of one batch row and head."""
    out = {}
    for owner, (begin, count) in enumerate(zip(walk.begin[0, 0], walk.count[0, 0], strict=True)):
        for at in range(int(begin), int(begin + count)):
            other = int(walk.other[0, 0, at])
            pair = (owner, other) if owner_first else (other, owner)
            assert pair not in out
            out[pair] = bool(walk.full[0, 0, at])
    return out


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", [(20, 20), (17, 23), (1, 9)], ids=str)
def test_both_walks_visit_the_tiles_of_a_mask_once(name, shape):
    mask, sizes = MASKS[name], (4, 3)
    table = mask.tiles(*sizes, *shape)
    index = block_lists.of_mask(mask, sizes, *shape)
    found = block_lists.lists(mask, index, sizes, *shape, {})
    whole = np.ones(table.shape, bool)  # a ragged tile is never full: its missing pairs have to be hidden
    whole[shape[0] // 4 :], whole[:, shape[1] // 3 :] = False, False
    want = {(i, j): bool(table[i, j] == FULL and whole[i, j]) for i, j in np.argwhere(table != EMPTY)}
    assert pairs_of(block_lists.forward(found), True) == want
    back = block_lists.transposed(found, table.shape[1])
    assert pairs_of(back, False) == want
    traced = block_lists.transposed(block_lists.Lists(*map(jnp.asarray, found)), table.shape[1])
    for got, expected in zip(traced[:2], back[:2], strict=True):
        assert np.array_equal(got, expected)
    assert pairs_of(traced, False) == want
    assert pairs_of(block_lists.turned(block_lists.Lists(*map(jnp.asarray, found)), table.shape[1]), False) == want


def test_data_shortens_the_lists():
    ids = jnp.asarray(np.repeat([[1, 2, 3, 0], [1, 1, 1, 1]], 4, axis=1))
    mask, sizes = masks.Causal() & masks.Segments(), (4, 4)
    data = {"segment_ids": ids, "kv_segment_ids": ids}
    index = block_lists.of_mask(mask, sizes, 16, 16)
    assert index.shape == (1, 1, 4, 4)
    found = block_lists.lists(mask, index, sizes, 16, 16, data)
    count = (found.index >= 0).sum(-1)[:, 0]
    assert count.tolist() == [[1, 1, 1, 0], [1, 2, 3, 4]]
    assert found.index[1, 0, 2].tolist() == [0, 1, 2, -1] and found.full[1, 0, 2].tolist() == [True, True, False, False]


def test_blocks_outside_the_keys_and_blocks_that_the_mask_hides_are_dropped():
    index = np.array([[[[3, 9, 0, -7, 1], [-1, 2, 0, 3, 1]]]], np.int32)
    found = block_lists.lists(masks.Causal(), index, (4, 4), 8, 16, {})
    assert found.index[0, 0].tolist() == [[0, -1], [0, 1]]
    assert found.full[0, 0].tolist() == [[False, False], [True, False]]
