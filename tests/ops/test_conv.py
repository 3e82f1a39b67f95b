"""short_conv against a loop over tokens: values, gradients, state, segments with padding anywhere."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmix.core import packing
from seqmix.ops import conv
from seqmix.ops.conv import short_conv, short_conv_flops, short_conv_reference

TIGHT = dict(rtol=0, atol=1e-12)  # float64 sums of at most six terms of order one

# Contiguous, returning ids, padding left, right, between and inside, alone.
ROWS = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [1, 2, 2, 2, 1, 1, 3, 4, 4, 4, 4],
        [0, 0, 5, 5, 5, 0, 2, 2, 0, 0, 0],
        [0, 7, 0, 7, 7, 0, 0, 7, 7, 2, 0],
        [3, 0, 0, 0, 0, 3, 4, 0, 4, 0, 4],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    np.int32,
)
PACKED = ROWS[[0, 1, 2, 5]]  # no padding inside a segment: the shifts


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def data(batch, time, width, rest=(3,), seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    make = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return make(batch, time, *rest), make(width, *rest), make(*rest), make(batch, width - 1, *rest)


def by_hand(x, weight, bias, state, ids):
    """The definition, token by token: a list of each segment's tokens, the first one's begun by the state."""
    x, weight, bias, state = (np.asarray(a) for a in (x, weight, bias, state))
    width = len(weight)
    y, last = np.zeros_like(x), np.zeros_like(state)
    for b in range(len(x)):
        history, current = list(state[b]), 0
        for t, i in enumerate(np.asarray(ids)[b]):
            if i == 0:
                continue
            if current not in (0, i):
                history = [np.zeros_like(bias)] * (width - 1)
            history.append(x[b, t])
            current = i
            y[b, t] = bias + sum(weight[width - 1 - j] * history[-1 - j] for j in range(width))
        last[b] = np.reshape(history[len(history) - (width - 1) :], last[b].shape)
    return y, last


@pytest.mark.parametrize("width", [1, 2, 4])
def test_both_forms_and_the_reference_follow_the_definition(width):
    for ids, with_state, ops in (
        (PACKED, False, (short_conv,)),
        (ROWS, False, (short_conv, short_conv_reference)),
        (ROWS, True, (short_conv, short_conv_reference)),
    ):
        x, weight, bias, state = data(*ids.shape, width)
        y, last = by_hand(x, weight, bias, state if with_state else 0 * state, ids)
        for op in ops:
            got = jax.jit(op)(x, weight, bias, state=state if with_state else None, segment_ids=ids)
            np.testing.assert_allclose(got[0], y, **TIGHT)
            np.testing.assert_allclose(got[1], last, **TIGHT)
            assert np.all(np.asarray(got[0])[ids == 0] == 0)
    assert np.all(got[1][5] == state[5])  # a row of padding alone keeps its state


@pytest.mark.parametrize("time", [1, 2, 11])
def test_without_segments_it_is_one_segment(time):
    x, weight, bias, state = data(2, time, 4)
    y, last = jax.jit(short_conv)(x, weight, bias, state=state)
    expected, expected_last = by_hand(x, weight, bias, state, np.ones((2, time)))
    np.testing.assert_allclose(y, expected, **TIGHT)
    np.testing.assert_allclose(last, expected_last, **TIGHT)


@pytest.mark.parametrize(
    "ids, with_state",
    [(None, True), (None, False), (PACKED, False), (ROWS, False), (ROWS, True)],
    ids=["plain", "plain-zero", "shifts", "moved", "moved-state"],
)
def test_all_gradients_are_those_of_the_loop(ids, with_state):
    batch = 2 if ids is None else len(ids)
    x, weight, bias, state = data(batch, 11, 4)
    cotangent, last_cotangent, _, _ = data(batch, 11, 4, seed=1)
    last_cotangent = data(batch, 3, 4, seed=2)[0]
    args = (x, weight, bias, state) if with_state else (x, weight, bias)

    def loss(op):
        def run(x, weight, bias, state=None):
            y, last = op(x, weight, bias, state=state, segment_ids=ids)
            return jnp.sum(y * cotangent) + jnp.sum(last * last_cotangent)

        return jax.jit(jax.grad(run, argnums=tuple(range(len(args)))))

    for got, expected in zip(loss(short_conv)(*args), loss(short_conv_reference)(*args), strict=True):
        assert float(jnp.max(jnp.abs(expected))) > 0.1
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-11)  # weight gradients sum 66 terms


@settings(max_examples=12, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 2), min_size=12, max_size=12), min_size=3, max_size=3),
    cut=st.sampled_from([1, 5, 11]),
)
def test_any_split_over_calls_equals_one_pass(rows, cut):
    """Segments drawn with padding everywhere; the later part's ids go on from the earlier's."""
    ids, time = np.array(rows), 12
    # A call's first segment continues the state, so the tokens around the cut must be of one segment.
    for row in ids:
        left, right = np.flatnonzero(row[:cut]), cut + np.flatnonzero(row[cut:])
        if len(left) and len(right):
            row[right[0]] = row[left[-1]]
    x, weight, bias, state = data(3, time, 4)
    run = jax.jit(short_conv)
    y, last = run(x, weight, bias, state=state, segment_ids=ids)
    first, state = run(x[:, :cut], weight, bias, state=state, segment_ids=ids[:, :cut])
    second, state = run(x[:, cut:], weight, bias, state=state, segment_ids=ids[:, cut:])
    np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), y, **TIGHT)
    np.testing.assert_allclose(state, last, **TIGHT)


@pytest.mark.parametrize(
    "state, moved", [(False, [False, False, False, True, True, False]), (True, [False, False, True, True, True, False])]
)
def test_padding_is_moved_only_where_it_stands_inside_a_segment(state, moved):
    inside = [bool(conv._padding_inside(packing.runs(jnp.asarray(row[None])), state)) for row in ROWS]
    assert inside == moved


def test_a_tree_is_its_leaves():
    ids = ROWS
    pairs = zip(data(6, 11, 4, (2, 3)), data(6, 11, 2, ()))
    # Of integers every sum is exact, in whatever order a program takes it.
    trees = [{key: jnp.round(4 * a) for key, a in zip("ab", pair)} for pair in pairs]
    x, weight, bias, state = trees
    run = jax.jit(short_conv)
    for kwargs in ({"state": state}, {"segment_ids": ids}):
        y, last = run(x, weight, bias, **kwargs)
        for key in "ab":
            alone = kwargs | ({"state": state[key]} if "state" in kwargs else {})
            one = run(x[key], weight[key], bias[key], **alone)
            np.testing.assert_array_equal(y[key], one[0])
            np.testing.assert_array_equal(last[key], one[1])


def test_an_activation_and_a_second_use():
    x, weight, bias, _ = data(len(PACKED), PACKED.shape[1], 4)

    def composed(x, weight, bias):
        y = jax.nn.silu(short_conv(x, weight, bias, segment_ids=PACKED)[0])
        y = jnp.where(PACKED[..., None] != 0, y, 0)
        return jnp.sum(jnp.sin(y) + y**2)

    def in_one(x, weight, bias):
        options = dict(segment_ids=PACKED, activation=jax.nn.silu, twice=True)
        (one, two), _ = short_conv(x, weight, bias, **options)
        return jnp.sum(jnp.sin(one) + two**2)

    want, got = (jax.value_and_grad(f, argnums=(0, 1, 2))(x, weight, bias) for f in (composed, in_one))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_low_precision_sums_are_rounded_once():
    exact = data(2, 11, 4)
    x, weight, bias, state = (a.astype(jnp.bfloat16) for a in exact)
    y, last = jax.jit(short_conv)(x, weight, bias, state=state.astype(jnp.float32))
    assert y.dtype == jnp.bfloat16 and last.dtype == jnp.float32
    wide = [a.astype(jnp.float64) for a in (x, weight, bias, state)]
    expected, _ = jax.jit(short_conv_reference)(*wide[:3], state=wide[3])
    # One rounding to 8 significant bits, 2^-8 at most, after float32 sums.
    np.testing.assert_allclose(y.astype(jnp.float64), expected, rtol=2**-8, atol=1e-6)


def test_the_backward_pass_keeps_nothing_wider_than_x():
    """Per tap, autodiff alone would save a float32 copy; where padding is moved, x before and after."""
    x, weight, bias, _ = data(4, 11, 4, dtype=jnp.bfloat16)
    for ids in (None, PACKED):
        op = functools.partial(short_conv, segment_ids=ids)
        pullback = jax.eval_shape(lambda *a, op=op: jax.vjp(op, *a, has_aux=True)[1], x, weight, bias)
        kept = [a for a in jax.tree.leaves(pullback) if a.size >= x.size and a.dtype != jnp.int32]
        assert kept and all(a.dtype == jnp.bfloat16 for a in kept) and len(kept) <= 2


def test_flops_are_those_that_xla_counts():
    with jax.enable_x64(False):
        x, weight, bias, _ = data(2, 64, 4, (8,), dtype=np.float32)
        for b in (None, bias):
            run = jax.jit(lambda x, w, b: short_conv(x, w, b)[0])
            counted = run.lower(x, weight, b).compile().cost_analysis()["flops"]
            assert abs(short_conv_flops(2, 64, 8, 4, bias=b is not None) / counted - 1) < 0.02


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(weight=jnp.ones((4, 2))), "weight: expected shape"),
        (dict(weight=jnp.ones((0, 3))), "weight: expected at least one tap"),
        (dict(bias=jnp.ones(2)), "bias: expected shape"),
        (dict(state=jnp.ones((2, 4, 3))), "state: expected shape"),
        (dict(segment_ids=jnp.ones((2, 4), jnp.int32)), "segment_ids: expected shape"),
        (dict(weight={"a": jnp.ones((4, 3))}), "weight: expected an array, got dict"),
    ],
)
def test_bad_shapes_are_named_in_one_line(change, message):
    x, weight, bias, state = data(2, 5, 4)
    call = dict(weight=weight, bias=bias, state=state) | change
    with pytest.raises(ValueError, match=message) as error:
        short_conv(x, call.pop("weight"), call.pop("bias"), **call)
    assert "\n" not in str(error.value)
