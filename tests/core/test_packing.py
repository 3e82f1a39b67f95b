"""Segment ids against loops over the tokens."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmix.core import packing

ROWS = st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=2, max_size=2)


def loop(row, start=0):
    """(runs, starts, positions) of one row, token by token."""
    number, last, place, out = 0, 0, 0, []
    for i in row:
        if i == 0:
            out.append((0, False, 0))
            continue
        opens = i != last
        if opens:
            number, last = number + 1, i
            place = start if number == 1 else 0
        out.append((number, opens and number > 1, place))
        place += 1
    return [list(column) for column in zip(*out, strict=True)]


@settings(max_examples=60)
@given(ROWS, st.integers(0, 5))
def test_runs_starts_and_positions_are_the_loops(rows, start):
    ids = jnp.array(rows, jnp.int32)
    runs = packing.runs(ids)
    got = runs, packing.starts(runs), packing.positions(runs, jnp.array([start, 0]))
    for b, want in enumerate((loop(rows[0], start), loop(rows[1]))):
        for g, w in zip(got, want, strict=True):
            assert g[b].tolist() == w
    np.testing.assert_array_equal(packing.positions(runs, jnp.zeros(2, jnp.int32)), packing.positions(runs))
    assert packing.last_run(runs).tolist() == [max(loop(row)[0]) for row in rows]
    np.testing.assert_array_equal(packing.runs(runs), runs)


def test_padding_inside_a_segment_does_not_split_it():
    runs = packing.runs(jnp.array([[0, 7, 0, 7, 3, 0, 7, 0]]))
    assert runs.tolist() == [[0, 1, 0, 1, 2, 0, 3, 0]]
    assert packing.starts(runs).tolist() == [[False] * 4 + [True, False, True, False]]
    assert packing.positions(runs).tolist() == [[0, 0, 0, 1, 0, 0, 0, 0]]


def test_a_row_of_padding_has_no_segment():
    runs = packing.runs(jnp.zeros((1, 4), jnp.int32))
    assert packing.last_run(runs).tolist() == [0] and not packing.starts(runs).any()
    assert packing.positions(runs, jnp.array([9])).tolist() == [[0] * 4]


def test_cu_seqlens_become_ids():
    assert packing.from_cu_seqlens([0, 2, 2, 5]).tolist() == [[1, 1, 3, 3, 3]]
    assert packing.from_cu_seqlens([0, 2, 5], length=7).tolist() == [[1, 1, 2, 2, 2, 0, 0]]
    assert packing.from_cu_seqlens([0], length=2).tolist() == [[0, 0]]
    assert packing.from_cu_seqlens([0, 3]).dtype == np.int32


@pytest.mark.parametrize("ends, length", [([1, 2], None), ([0, 3, 2], None), ([], None), ([[0, 1]], None)])
def test_cu_seqlens_that_make_no_sense_are_refused(ends, length):
    with pytest.raises(ValueError, match="cu_seqlens"):
        packing.from_cu_seqlens(ends, length)


def test_a_length_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="length: .*5.*4"):
        packing.from_cu_seqlens([0, 5], length=4)


def test_check_names_the_argument():
    packing.check(jnp.ones((2, 3), jnp.int32), 2, 3)
    with pytest.raises(ValueError, match=r"kv_ids: expected shape \(B=2, T=4\), got \(2, 3\)"):
        packing.check(jnp.ones((2, 3), jnp.int32), 2, 4, name="kv_ids")
    with pytest.raises(ValueError, match="segment_ids: .*float32"):
        packing.check(jnp.ones((2, 3)), 2, 3)
