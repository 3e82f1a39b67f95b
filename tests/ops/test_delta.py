"""The delta rule: both forms against its equation in float64, gradients, chunks, states, packing, precision."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.ops import linear_chunked
from tests.ops.delta_cases import (
    BOUNDS,
    GATES,
    HK,
    SMALL,
    B,
    H,
    against_float64,
    assert_close,
    cotangents,
    definition,
    draw,
    forward,
    in_bfloat16,
    pullback,
    to_time,
)

CASES = {
    "none": ("none", (), None),
    "erase of the heads": ("head", (), H),
    "erase of the groups": ("channel", (), HK),
    "steps": ("constant", (3,), HK),
}


@pytest.mark.parametrize("case", CASES)
def test_the_loop_is_the_equation(case, x64):
    kind, steps, erase = CASES[case]
    arrays = draw(kind, 9, steps=steps, erase=erase)
    ids = np.array([[1, 1, 0, 1, 2, 2, 0, 0, 3], [0, 0, 5, 5, 5, 5, 5, 5, 5]])
    run = forward(implementation="reference", steps=3 if steps else 1)
    for used in (None, ids):
        got = run(arrays, None if used is None else jnp.asarray(used))
        assert_close(got, definition(**arrays, ids=used), 1e-13)


TIMES = {"head": (1, 65), "channel": (200,), "constant": (63,), "none": (64,)}


@pytest.mark.parametrize("kind", TIMES)
def test_chunks_equal_the_loop_in_values_and_all_gradients(kind, x64):
    arrays = draw(kind, 200)
    weights = cotangents(arrays)
    loop, chunks = pullback(implementation="reference", scale=0.7), pullback(implementation="chunked", scale=0.7)
    for time in TIMES[kind]:
        # Padding behind the last token serves the loop for all lengths, with one compilation.
        ids = np.broadcast_to(np.arange(200) < time, (B, 200)).astype(np.int32)
        (y, state), grads = loop(arrays, (weights[0] * ids[..., None, None], weights[1]), ids)
        got = chunks(to_time(arrays, time), (weights[0][:, :time], weights[1]))
        expected = (y[:, :time], state), to_time(grads, time)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))
        assert_close(got, expected, 1e-11, f"T={time}")  # 200 steps, each within some 1e-15


def test_any_chunk_and_any_number_of_blocks_give_the_same(monkeypatch, x64):
    arrays = draw("channel", 37, erase=H)
    weights = cotangents(arrays)
    ids = jnp.asarray(np.repeat([[1, 0, 1, 2, 0, 3], [0, 4, 4, 4, 5, 5]], [3, 2, 9, 12, 1, 10], axis=1))
    expected = pullback(implementation="reference")(arrays, weights, ids)
    assert_close(forward(chunk=64)(arrays, ids), expected[0], 1e-12)
    monkeypatch.setattr(linear_chunked, "_TILES", 1)
    monkeypatch.setattr(linear_chunked, "_FEWEST", 4)
    assert linear_chunked.plan(37, 4, B * H)[0] == 3
    assert_close(pullback(chunk=4)(arrays, weights, ids), expected, 1e-12)
    assert_close(forward(chunk=1)(arrays, ids), expected[0], 1e-12)


def test_states_join_the_parts_of_a_sequence(x64):
    # Both rows end in the segment that every part but the first begins with; a new call could not know otherwise.
    arrays = draw("head", 24)
    ids = jnp.asarray(np.repeat([[7, 7, 7, 7, 7], [1, 0, 2, 0, 2]], [5, 2, 8, 5, 4], axis=1))
    run, parts, carried = forward(chunk=8), [], arrays["state"]
    for start, stop in ((0, 11), (11, 12), (12, 24)):
        part = {name: x[:, start:stop] for name, x in arrays.items() if name != "state"}
        y, carried = run(part | dict(state=carried), ids[:, start:stop])
        parts.append(y)
    assert_close((np.concatenate(parts, 1), carried), run(arrays, ids), 1e-13)


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.lists(st.sampled_from([0, 1, 1, 2, 3]), min_size=26, max_size=26))
def test_packed_rows_equal_separate_sequences_with_padding_anywhere(drawn):
    with jax.enable_x64(True):
        arrays, ids = draw("channel", 13), np.array(drawn, np.int32).reshape(B, 13)
        y, state = forward(chunk=4)(arrays, ids)
        assert_close((y, state), definition(**arrays, ids=ids), 1e-13)
        assert not np.asarray(y)[ids == 0].any()


def test_a_row_of_padding_alone_keeps_its_state_and_moves_no_gradient(x64):
    arrays = draw("head", 6)
    weights = cotangents(arrays)
    ids = jnp.asarray([[0] * 6, [1] * 6])
    (y, state), grads = pullback()(arrays, weights, ids)
    np.testing.assert_array_equal(state[0], arrays["state"][0])
    np.testing.assert_array_equal(grads["state"][0], weights[1][0])
    assert not np.asarray(y[0]).any() and np.asarray(y[1]).all()
    assert not any(np.asarray(x)[0].any() for name, x in grads.items() if name != "state")


def test_steps_are_corrections_after_one_decay(x64):
    arrays = draw("head", 11, steps=(3,), erase=HK)
    weights = cotangents(arrays)
    ids = jnp.asarray(np.repeat([[0, 1, 2], [1, 0, 1]], [3, 4, 4], axis=1))
    got = pullback(steps=3, chunk=8)(arrays, weights, ids)
    assert_close(got[0], definition(**arrays, ids=np.asarray(ids)), 1e-13)
    assert_close(got, pullback(steps=3, implementation="reference")(arrays, weights, ids), 1e-12)


# Precision


BF16 = {
    "slow gates per head": ("head", 2.0, (0.0, -1e-4, -1e-2)),
    "all gates per head": ("head", 2.0, GATES),
    "all gates per channel": ("channel", 1.0, GATES),
    "slow gates per channel": ("channel", 1.0, (0.0, -1e-4, -1e-2)),
}


@pytest.mark.parametrize("case", BF16)
def test_bfloat16_keeps_the_bounds(case):
    kind, beta, gates = BF16[case]
    arrays, weights = in_bfloat16(draw(kind, 150, size=SMALL, beta=beta, gates=gates))
    errors = against_float64(pullback(), pullback(implementation="reference"), arrays, weights)
    assert all(error <= BOUNDS.get(name, 0.008) for name, error in errors.items()), errors


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_float32_is_right_for_every_decay(kind):
    # Also where a decay of -1e4 stands beside one of -1e-4, whose digits a plain cumulative sum would lose, and
    # where nothing but -20 is there: its gradients, of 2e-9, must not drown in the roundings of others.
    arrays = draw(kind, 150, size=SMALL)
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    weights = tuple(jnp.asarray(x, jnp.float32) for x in cotangents(arrays))
    run, loop = pullback(), pullback(implementation="reference")
    for gate in (None, 0.0, -1e-4, -5.0, -20.0, -1e4):
        if gate is not None:
            arrays["log_decay"] = jnp.full_like(arrays["log_decay"], gate)
        errors = against_float64(run, loop, arrays, weights)
        assert max(errors.values()) < 1e-5, (gate, errors)
