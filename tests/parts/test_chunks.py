"""Where tokens stand among the chunks of their segments."""

import jax.numpy as jnp

from seqmix.parts.chunks import chunk_ids, token_places


def test_chunks_are_counted_within_segments_and_go_on_from_the_length():
    ids = jnp.array([[0, 7, 7, 0, 7, 3, 3, 3, 3], [5, 5, 5, 5, 5, 5, 5, 0, 0], [0] * 9])
    runs, place, after = token_places(jnp.ones((3, 9, 1)), ids, jnp.array([2, 3, 4]))
    assert place.tolist() == [[0, 2, 3, 0, 4, 0, 1, 2, 3], [3, 4, 5, 6, 7, 8, 9, 0, 0], [0] * 9]
    assert after.tolist() == [4, 10, 4]
    assert chunk_ids(runs, place, 3).tolist() == [[0, 1, 2, 0, 2, 3, 3, 3, 4], [2, 2, 2, 3, 3, 3, 4, 0, 0], [0] * 9]


def test_without_ids_a_row_is_one_segment():
    runs, place, after = token_places(jnp.ones((2, 5, 1)))
    assert runs.tolist() == [[1] * 5] * 2 and place.tolist() == [[0, 1, 2, 3, 4]] * 2 and after is None
    assert chunk_ids(runs, place, 2).tolist() == [[2, 2, 3, 3, 4]] * 2
