"""Masks that depend on data: their rules written out, and tables that are never wrong, with the data and without."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmix.ops import masks
from seqmix.ops.mask_algebra import span
from seqmix.ops.masks import EMPTY, FULL, PARTIAL
from tests.ops.test_masks import LEAVES, table_of

TIME, KEYS = 11, 14


def data_cases(rng, static):
    """(data of two rows, {mask of the data: its matrix})."""
    data = {
        "segment_ids": np.sort(rng.integers(0, 3, (2, TIME)), axis=1),
        "kv_segment_ids": np.sort(rng.integers(0, 3, (2, KEYS)), axis=1),
        "starts": rng.integers(-2, TIME, (2, KEYS)),
        "ends": rng.integers(0, TIME + 2, (2, KEYS)),
        "q_positions": rng.integers(0, 30, (2, TIME)),
        "kv_positions": rng.integers(0, 30, (2, KEYS)),
    }
    i, j = np.arange(TIME)[:, None], np.arange(KEYS)
    q, k = data["segment_ids"][..., None], data["kv_segment_ids"][:, None]
    segments = (q == k) & (q != 0)
    intervals = (data["starts"][:, None] <= i) & (data["ends"][:, None] > i)
    at = static.dense(30)[data["q_positions"][:, :, None], data["kv_positions"][:, None]]
    return data, {
        masks.Segments(): segments,
        masks.Intervals(): intervals,
        masks.Positions(static): at,
        masks.Segments() & ~masks.Intervals() | masks.Sinks(2): segments & ~intervals | (j < 2),
    }


def check_data_case(mask, seen, data, bq, bk):
    assert np.array_equal(mask.dense(TIME, KEYS, data), seen)
    want = np.stack([table_of(x, bq, bk) for x in seen])
    got = np.broadcast_to(mask.tiles(bq, bk, TIME, KEYS, data=data), want.shape)
    assert np.array_equal(got[got != PARTIAL], want[got != PARTIAL])
    blind = mask.tiles(bq, bk, TIME, KEYS)
    assert ((blind == PARTIAL) | (blind == want)).all()


@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), static=LEAVES, bq=st.integers(1, 6), bk=st.integers(1, 6))
def test_masks_of_data_are_their_rules_and_their_tiles_never_wrong(seed, static, bq, bk):
    data, cases = data_cases(np.random.default_rng(seed), static)
    for mask, seen in cases.items():
        check_data_case(mask, seen, data, bq, bk)


@pytest.mark.parametrize("static", [masks.Window(5), masks.Neighbourhood((5, 6), (3, 2))], ids=["window", "grid"])
def test_data_may_be_jax_arrays(static):
    data, cases = data_cases(np.random.default_rng(1), static)
    data = {name: jnp.asarray(x) for name, x in data.items()}
    for mask, seen in cases.items():
        check_data_case(mask, seen, data, 4, 5)


def test_tiles_of_sorted_segments_are_found_from_their_ends():
    ids = np.repeat([1, 2, 0], 4)[None]
    table = masks.Segments().tiles(4, 4, 12, data={"segment_ids": ids, "kv_segment_ids": ids})[0]
    assert table.tolist() == [[FULL, EMPTY, EMPTY], [EMPTY, FULL, EMPTY], [EMPTY, EMPTY, EMPTY]]
    low, high = span(np.array([3, 1, 2]), 2)
    assert low.tolist() == [1, 2] and high.tolist() == [3, 2]
