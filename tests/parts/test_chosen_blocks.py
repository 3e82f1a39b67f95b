"""Chosen blocks: what rows of one segment, and calls without a state, do in other ways gives the same."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.parts import chosen_blocks
from seqmix.parts.chunks import token_places

TIME = 75


def tokens(ids, segment_ids):
    runs, place, _ = token_places(jnp.zeros((*ids.shape, 1)), ids)
    k, v = (jnp.asarray(np.random.default_rng(n).normal(size=(*ids.shape, 1, 2))) for n in range(2))
    return chosen_blocks.after(None, 0, k, v, runs, place, segment_ids)


@pytest.mark.parametrize("time, length, stride", [(TIME, 8, 8), (TIME, 12, 4), (5, 8, 8), (8, 8, 4)])
def test_blocks_of_rows_of_one_segment_are_cut_as_they_would_be_gathered(time, length, stride):
    ids = jnp.ones((2, time), jnp.int32)
    got, want = (chosen_blocks.whole(tokens(ids, given), length, stride) for given in (None, ids))
    there = np.asarray(want.runs) != 0
    assert there.sum() == 2 * max(0, (time - length) // stride + 1)
    assert np.array_equal(got.runs, want.runs)
    for name in ("k", "v", "number"):
        assert np.array_equal(getattr(got, name)[there], getattr(want, name)[there])


@pytest.mark.parametrize("count, first, local", [(5, 1, 2), (3, 2, 2), (4, 0, 1), (12, 1, 1)])
def test_ranges_choose_what_masks_choose(count, first, local, size=8):
    ids = np.ones((2, TIME), np.int32)
    ids[0, :3], ids[0, 30:40], ids[0, 40:44], ids[1, 50:] = 0, 2, 0, 3
    given = tokens(jnp.asarray(ids), jnp.asarray(ids))
    blocks = chosen_blocks.whole(given, size, size)
    number, place = blocks.number, given.place
    scores = np.random.default_rng(2).integers(0, 4, (2, 2, number.shape[1], TIME)).astype(np.float32)  # with ties
    forced = (number[:, None] > place[..., None] // size - local) | (number[:, None] < first)
    seen = chosen_blocks.past(given.runs, place, blocks.runs, number, size)
    want = chosen_blocks.choose(jnp.swapaxes(scores, 2, 3), seen, count, forced)
    fields = given.runs, place, size, count, first, local
    got = chosen_blocks.choose_in_ranges(jnp.asarray(scores), *fields, implementation=None)
    assert (np.asarray(want) >= 0).any() and np.array_equal(got, want)


def test_blocks_that_have_ended_are_graded_as_their_pairs_are():
    mask = chosen_blocks.Ended(12, 4)
    seen = np.arange(16) * 4 + 11 <= np.arange(TIME)[:, None]
    assert np.array_equal(mask.dense(TIME, 16), seen)
    assert np.array_equal(mask.tiles(8, 3, TIME, 16), mask.tiles(8, 3, TIME, 16, refine=True))
