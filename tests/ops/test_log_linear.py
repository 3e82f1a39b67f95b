"""Log-linear attention: the loop against the paper's merged states, chunks against the loop, states, packing, cost."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.ops import delta_rule, linear_attention, linear_chunked, log_linear_attention, log_linear_delta_rule
from seqmix.ops.delta_matrix import delta_mixing_matrix
from seqmix.ops.linear_reference import linear_mixing_matrix
from seqmix.ops.log_linear import log_linear_flops
from seqmix.ops.log_linear_reference import level_matrix
from tests.conformance.cases import documents
from tests.ops.delta_cases import GATES, HK, SMALL, B, H, K, V, assert_close, draw, jit, relative

OPS = {"linear": log_linear_attention, "delta": log_linear_delta_rule}
PLAIN = {"linear": linear_attention, "delta": delta_rule}
NL = 9  # positions below 256


def arguments(op, time, kind="head", seed=0, size=(B, HK, H, K, V), gates=GATES):
    """Float64, with level scales of both signs and a state."""
    arrays = draw(kind, time, seed, size=size, gates=gates)
    b, _, h, k, v = size
    rng = np.random.default_rng(seed + 9)
    arrays |= dict(level_scales=rng.normal(size=(b, time, h, NL)), state=rng.normal(size=(b, h, NL - 1, k, v)))
    return arrays if op == "delta" else {name: x for name, x in arrays.items() if name != "beta"}


def call(op, arrays, length=None, ids=None, **options):
    arrays = dict(arrays)
    state = arrays.pop("state", None)
    state = None if length is None else (state, length)
    return OPS[op](**arrays, state=state, segment_ids=ids, **options)


@functools.cache
def forward(op, **options):
    return jit(lambda arrays, length=None, ids=None: call(op, arrays, length, ids, **options))


@functools.cache
def pullback(op, **options):
    """(arrays, weights of y and the levels' states, length, ids) -> (y and state, gradients of all arrays)."""

    def run(arrays, weights, length=None, ids=None):
        def outputs(arrays):
            y, (levels, length_after) = call(op, arrays, length, ids, **options)
            return (y, levels), length_after

        out, vjp, length_after = jax.vjp(outputs, arrays, has_aux=True)
        return (*out, length_after), vjp(weights)[0]

    return jit(run)


def cotangents(arrays, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=arrays["v"].shape), rng.normal(size=arrays["state"].shape)


def merged_states(q, k, v, level_scales, log_decay=None, beta=None):
    """y of one row and head as the paper decodes: states of levels 0 .. NL - 1, merged where a block ends."""
    states, ys = np.zeros((level_scales.shape[-1], k.shape[-1], v.shape[-1])), []
    for t in range(len(q)):
        if t > 0:
            carry = (t & -t).bit_length()  # trailing zeros of t, and one
            states[carry] = states[:carry].sum(0)
            states[:carry] = 0
        erase = np.eye(k.shape[-1]) - (0 if beta is None else beta[t]) * np.outer(k[t], k[t])
        states = erase @ (np.exp(0 if log_decay is None else log_decay[t]) * states)
        states[0] = (1 if beta is None else beta[t]) * np.outer(k[t], v[t])
        ys.append(np.einsum("l,k,lkv->v", level_scales[t], q[t], states))
    return np.array(ys)


@pytest.mark.parametrize("op", OPS)
def test_the_loop_and_the_matrix_are_the_papers_decoding(op, x64):
    arrays = arguments(op, 21)
    del arrays["state"]
    y, _ = forward(op, implementation="reference")(arrays)
    for b, h in np.ndindex(B, H):
        heads = {name: x[b, :, h if x.shape[2] == H else h // (H // HK)] for name, x in arrays.items()}
        np.testing.assert_allclose(y[b, :, h], merged_states(**heads), rtol=0, atol=1e-13)
    rest = {name: x for name, x in arrays.items() if name not in ("v", "level_scales")}
    matrix = (delta_mixing_matrix if op == "delta" else linear_mixing_matrix)(**rest)
    weighted = matrix * level_matrix(jnp.asarray(arrays["level_scales"]))
    np.testing.assert_allclose(jnp.einsum("bhts,bshv->bthv", weighted, arrays["v"]), y, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "op, kind, times",
    [
        ("linear", "head", (1, 65, 200)),
        ("delta", "head", (63, 200)),
        ("linear", "none", (64,)),
        ("delta", "channel", (65,)),
    ],
)
def test_chunks_equal_the_loop_in_values_and_all_gradients(op, kind, times, x64):
    """Rows that start at 0 (positions aligned with chunks) and rows that go on, with a cotangent on the state."""
    arrays = arguments(op, 200, kind)
    weights = cotangents(arrays)
    loop, chunks = pullback(op, implementation="reference", scale=0.7), pullback(op, scale=0.7)
    zeros = np.zeros(B, np.int32)
    for time in times:
        cut = lambda tree, time=time: {n: x if n == "state" else x[:, :time] for n, x in tree.items()}
        ids = np.broadcast_to(np.arange(200) < time, (B, 200)).astype(np.int32)
        padded = (weights[0] * ids[..., None, None], weights[1])
        for length in (None, np.array([3, 40], np.int32)):
            used = arrays | (dict(state=0 * arrays["state"]) if length is None else {})
            (y, levels, after), grads = loop(used, padded, zeros if length is None else length, ids)
            got, got_grads = chunks(cut(used), (weights[0][:, :time], weights[1]), length)
            if length is None:
                grads |= dict(state=0 * grads["state"])
            np.testing.assert_array_equal(got[2], after)
            assert_close(got[:2], (y[:, :time], levels), 1e-11, f"T={time}, from {length}")
            assert_close(got_grads, cut(grads), 1e-11, f"T={time}, from {length}")


def test_chunks_packing_and_blocks_change_nothing(monkeypatch, x64):
    """Segments that start anywhere in a chunk, the first of them going on from earlier tokens, padding anywhere."""
    arrays, length = arguments("delta", 37), np.array([5, 64], np.int32)
    weights = cotangents(arrays)
    ids = jnp.asarray(np.repeat([[1, 0, 1, 2, 0, 3], [0, 4, 4, 4, 5, 5]], [3, 2, 9, 12, 1, 10], axis=1))
    expected = pullback("delta", implementation="reference")(arrays, weights, length, ids)
    assert_close(forward("delta", chunk=64)(arrays, length, ids)[0], expected[0][0], 1e-12)
    monkeypatch.setattr(linear_chunked, "_TILES", 1)
    monkeypatch.setattr(linear_chunked, "_FEWEST", 4)
    assert linear_chunked.plan(37, 4, B * H)[0] == 3
    got = pullback("delta", chunk=4)(arrays, weights, length, ids)
    np.testing.assert_array_equal(got[0][2], expected[0][2])
    assert_close((got[0][:2], got[1]), (expected[0][:2], expected[1]), 1e-12)


@pytest.mark.parametrize("op", OPS)
def test_levels_that_weigh_alike_are_the_plain_op(op, x64):
    arrays = arguments(op, 65)
    del arrays["state"]
    scales = arrays.pop("level_scales")
    want, _ = jit(PLAIN[op])(**arrays)
    run = forward(op)
    y, (_, length) = run(arrays | dict(level_scales=np.ones_like(scales)))
    assert_close(y, want, 1e-13)
    assert np.array_equal(length, [65] * B) and np.abs(run(arrays | dict(level_scales=scales))[0] - want).max() > 0.1


@pytest.mark.parametrize("op", OPS)
def test_states_join_the_parts_of_a_sequence_cut_anywhere(op, x64):
    """Both rows end in the segment that every part but the first begins with; a new call could not know otherwise."""
    arrays = arguments(op, 24)
    levels, length = np.zeros((B, H, NL - 1, K, V)), np.zeros(B, np.int32)
    ids = jnp.asarray(np.repeat([[7, 7, 7, 7, 7], [1, 0, 2, 0, 2]], [5, 2, 8, 5, 4], axis=1))
    run, parts, state = forward(op, chunk=8), [], (levels, length)
    for start, stop in ((0, 11), (11, 12), (12, 24)):
        part = {name: x[:, start:stop] for name, x in arrays.items() if name != "state"}
        y, state = run(part | dict(state=state[0]), state[1], ids[:, start:stop])
        parts.append(y)
    want, last = forward(op, implementation="reference")(arrays | dict(state=levels), length, ids)
    assert_close((np.concatenate(parts, 1), state), (want, last), 1e-13)
    assert np.array_equal(last[1], [24, 12])
    _, aligned = run({name: x for name, x in arrays.items() if name != "state"})
    assert_close(aligned, run(arrays | dict(state=levels), length)[1], 1e-13)


@hypothesis.settings(max_examples=10)
@hypothesis.given(st.lists(st.sampled_from([0, 1, 1, 1, 2]), min_size=26, max_size=26))
def test_packed_rows_equal_separate_sequences_with_padding_anywhere(drawn):
    with jax.enable_x64(True):
        arrays, ids = arguments("linear", 13), np.array(drawn, np.int32).reshape(B, 13)
        del arrays["state"]
        y, _ = forward("linear", chunk=4)(arrays, ids=ids)
        assert not np.asarray(y)[ids == 0].any()
        for row, times in documents(ids):
            for h in range(H):
                at = lambda x: x[row, times, h if x.shape[2] == H else h // (H // HK)]  # noqa: B023
                want = merged_states(**{name: at(x) for name, x in arrays.items()})
                np.testing.assert_allclose(y[row, times, h], want, rtol=0, atol=1e-13)


def test_a_state_of_fewer_levels_serves_the_positions_it_has(x64):
    arrays = arguments("linear", 8)
    few = arrays | dict(state=0 * arrays["state"][:, :, :3])  # positions below 8
    want, _ = forward("linear")({name: x for name, x in arrays.items() if name != "state"})
    y, (levels, _) = forward("linear", chunk=4)(few, np.zeros(B, np.int32))
    assert levels.shape == (B, H, 3, K, V)
    assert_close(y, want, 1e-13)


# Precision and cost


@pytest.mark.parametrize(
    "op, dtype, bound",
    [
        ("linear", jnp.bfloat16, 0.005),
        ("delta", jnp.bfloat16, 0.008),
        ("linear", jnp.float32, 1e-5),
        ("delta", jnp.float32, 1e-5),
    ],
)
def test_it_keeps_the_bounds_of_the_plain_ops_for_every_decay(op, dtype, bound):
    """RMS errors against float64 on the same rounded inputs: of y and the state, and in float32 of gradients."""
    arrays = arguments(op, 150, size=SMALL)
    weights = cotangents(arrays)
    kept = ("beta", "log_decay", "state", "level_scales")
    arrays = {name: jnp.asarray(x, jnp.float32 if name in kept else dtype) for name, x in arrays.items()}
    weights = jnp.asarray(weights[0], dtype), jnp.asarray(weights[1], jnp.float32)
    length = np.array([3], np.int32)
    run, loop = pullback(op), pullback(op, implementation="reference")
    for gate in (None, 0.0, -1e-4, -5.0, -20.0):
        if gate is not None:
            arrays["log_decay"] = jnp.full_like(arrays["log_decay"], gate)
        (y, levels, _), grads = run(arrays, weights, length)
        with jax.enable_x64(True):
            exact = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), tree)
            (want, want_levels, _), want_grads = loop(exact(arrays), exact(weights), length)
        errors = dict(y=relative(y, want), state=relative(levels, want_levels))
        if dtype == jnp.float32:
            errors |= {name: relative(g, want_grads[name]) for name, g in grads.items()}
        assert max(errors.values()) < bound, (gate, errors)


@pytest.mark.parametrize("op", OPS)
def test_cost_grows_as_t_log_t(op, monkeypatch):
    """As XLA counts it, its loops unrolled, before fusion; without the last state, whose levels none reads."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    sizes = dict(heads=2, key_heads=1, key_dim=32, value_dim=32, chunk=16, delta=op == "delta")
    for time in (64, 256):
        arrays = {name: x for name, x in arguments(op, time, size=SMALL).items() if name != "state"}
        shapes = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in arrays.items()}
        lowered = jax.jit(lambda arrays: call(op, arrays, chunk=16)[0]).lower(shapes)
        assert log_linear_flops(1, time, **sizes) == pytest.approx(lowered.cost_analysis()["flops"], rel=0.03)
    growth = [
        log_linear_flops(1, 2 * time, **sizes) / log_linear_flops(1, time, **sizes) for time in (1 << 12, 1 << 20)
    ]
    assert 2 < growth[1] < growth[0] < 2.3


def test_bad_arguments_are_named_in_one_line():
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arguments("linear", 8).items()}
    zero = jnp.zeros(B, jnp.int32)
    for message, change, length in (
        (
            "level_scales: expected at least 4 levels for T=8, got 3",
            dict(level_scales=arrays["level_scales"][..., :3]),
            None,
        ),
        ("level_scales: expected between 2 and 31", dict(level_scales=arrays["level_scales"][..., :1]), None),
        ("level_scales: expected shape", dict(level_scales=arrays["level_scales"][:, :, :2]), None),
        ("log_decay: expected a floating dtype", dict(log_decay=jnp.zeros((B, 8, H), int)), None),
        ("state: expected at least 1 and less than NL=9", dict(state=jnp.zeros((B, H, 9, K, V))), zero),
        ("state: expected integer lengths", {}, zero[:1]),
        ("state: expected integer lengths", {}, zero.astype(float)),
    ):
        with pytest.raises(ValueError, match=message) as error:
            jax.eval_shape(lambda: call("linear", arrays | change, length))  # noqa: B023
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="state: expected the pair"):
        log_linear_attention(**arrays)
    with pytest.raises(ValueError, match="beta: expected an array"):
        log_linear_delta_rule(**arrays | dict(state=None), beta=None)
