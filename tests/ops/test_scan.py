"""The elementwise scan: both forms against a loop in float64, states, packing, both directions, refusals."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads

from seqmix.core.sharding import make_mesh
from seqmix.ops import dispatch
from seqmix.ops.scan import linear_scan

GATES = (0.0, -1e-4, -0.1, -0.5, -5.0, -20.0, -1e4)
B, H, K = 2, 3, 2
LONGEST = 200
KINDS = {
    "full": lambda time: (B, time, H, K),
    "head": lambda time: (B, time, H, 1),
    "constant": lambda time: (K,),
    "complex": lambda time: (B, time, H, K),
}


def draw(kind, time, seed=0):
    """x, log_a of mixed gates, and a state, in float64 or complex128."""
    rng = np.random.default_rng(seed)
    x, state = rng.normal(size=(B, time, H, K)), rng.normal(size=(B, H, K))
    log_a = rng.choice(GATES, size=KINDS[kind](time))
    if kind == "complex":
        log_a = log_a + 1j * rng.normal(size=log_a.shape)
        state = state + 1j * rng.normal(size=state.shape)
    return x, log_a, state


def packed(time, seed=0):
    """Segment ids: runs of random ids that come back, with padding at both ends, inside and between them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 4, size=(B, time // 9 + 1)).repeat(9, axis=1)[:, :time]
    return np.where(rng.random((B, time)) < 0.2, 0, ids).astype(np.int32)


def definition(x, log_a, state, ids=None):
    """(h, state), token by token, from left to right."""
    a = np.broadcast_to(np.exp(log_a), x.shape)
    h, out = np.array(state), np.zeros(x.shape, np.result_type(x, log_a))
    for b in range(x.shape[0]):
        last = 0
        for t in range(x.shape[1]):
            name = 1 if ids is None else ids[b, t]
            if name == 0:
                continue
            if last not in (0, name):
                h[b] = 0
            last = name
            out[b, t] = h[b] = a[b, t] * h[b] + x[b, t]
    return out, h


@functools.cache
def compiled(**options):
    def run(arrays, ids, seeds):
        out, pull = jax.vjp(lambda x, a, s: linear_scan(x, a, state=s, segment_ids=ids, **options), *arrays)
        return out, pull(jax.tree.map(lambda y, g: g.astype(y.dtype), out, seeds))

    return jax.jit(run)


def run(arrays, ids=None, **options):
    """((h, state), gradients of x, log_a and the state) for drawn cotangents of h and of the outgoing state."""
    rng = np.random.default_rng(9)
    seeds = [rng.normal(size=s) for s in 2 * [(B, LONGEST, H, K), (B, H, K)]]
    if np.iscomplexobj(arrays[1]):
        seeds = [seeds[0] + 1j * seeds[2], seeds[1] + 1j * seeds[3]]
    seeds = seeds[0][:, : arrays[0].shape[1]], seeds[1]
    return compiled(**options)(jax.tree.map(jnp.asarray, arrays), ids, seeds)


def rms(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want)
    return np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))


def value_and_gradients(f, arrays):
    """Gradients of a drawn weighing of h and the state, and (h, state)."""
    weights = [np.random.default_rng(4).normal(size=a.shape) for a in (arrays[0], arrays[2])]

    def total(*a):
        out = f(*a)
        return sum(jnp.sum(w * y) for w, y in zip(weights, out, strict=True)).real, out

    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*arrays)


def close(got, want):
    # Rounding of float64 over at most 200 terms of size one; a gradient that is a sum over time can be 100.
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-11, atol=1e-11), got, want)


@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_both_forms_are_the_loop_and_share_all_gradients(x64, time):
    (x, log_a, state), ids = draw("full", time), packed(time)
    # The reference takes every length as one of 200 that ends in padding: one compilation.
    after = lambda a: np.pad(a, [(0, 0), (0, LONGEST - time)] + [(0, 0)] * (a.ndim - 2))
    (h, last), grads = run((after(x), after(log_a), state), after(ids), implementation="reference")
    want = (h[:, :time], last), (grads[0][:, :time], grads[1][:, :time], grads[2])
    close(want[0], definition(x, log_a, state, ids))
    close(run((x, log_a, state), ids, chunk=16), want)
    assert all(np.abs(g).max() > 0 for g in want[1])


@pytest.mark.parametrize("kind", ["head", "constant", "complex"])
def test_every_kind_of_decay(x64, kind):
    arrays, ids = draw(kind, 65, seed=1), packed(65, seed=1)
    want = run(arrays, ids, implementation="reference")
    close(run(arrays, ids, chunk=8), want)
    close(want[0], definition(*arrays, ids))
    assert want[1][1].shape == arrays[1].shape and np.abs(want[1][1]).max() > 0


@pytest.mark.parametrize(
    ("kind", "implementation"), [("complex", "chunked"), ("head", "chunked"), ("head", "reference")]
)
def test_reverse_is_the_scan_of_the_flipped_arrays(x64, kind, implementation):
    arrays, ids = draw(kind, 65, seed=1), packed(65, seed=1)
    flipped = lambda tree: jax.tree.map(lambda a: a[:, ::-1] if a.shape[1:2] == (65,) else a, tree)
    f = lambda *a, **options: linear_scan(*a[:2], state=a[2], chunk=8, implementation=implementation, **options)

    got = value_and_gradients(lambda *a: f(*a, segment_ids=ids, reverse=True), arrays)
    close(got, value_and_gradients(lambda *a: flipped(f(*flipped(a), segment_ids=ids[:, ::-1])), arrays))
    close(got[1], flipped(definition(*flipped(arrays), ids[:, ::-1])))


def test_gradients_agree_with_finite_differences(x64):
    x, log_a, state = draw("head", 9)
    log_a = np.maximum(log_a, -2.0)
    f = jax.jit(lambda *a: jnp.sum(jnp.sin(linear_scan(*a[:2], state=a[2], chunk=4)[0])))
    check_grads(f, (x, log_a, state), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


def test_the_chunk_changes_nothing(x64):
    arrays, ids = draw("full", 65, seed=2), packed(65, seed=2)
    close(run(arrays, ids, chunk=1), run(arrays, ids, chunk=100))


@pytest.mark.parametrize("reverse", [False, True])
def test_state_passing_equals_one_pass(x64, reverse):
    arrays, ids = draw("full", 28, seed=3), packed(28, seed=3)
    ids[:, 15:25] = 2  # the split falls inside a segment

    def whole(x, log_a, state):
        return linear_scan(x, log_a, state=state, segment_ids=ids, reverse=reverse, chunk=4)

    def split(x, log_a, state):
        parts = [slice(0, 19), slice(19, 28)]
        out = {}
        for i in (1, 0) if reverse else (0, 1):
            now = parts[i]
            out[i], state = linear_scan(
                x[:, now], log_a[:, now], state=state, segment_ids=ids[:, now], reverse=reverse, chunk=4
            )
        return jnp.concatenate([out[0], out[1]], 1), state

    close(value_and_gradients(split, arrays), value_and_gradients(whole, arrays))


@hypothesis.given(st.lists(st.integers(0, 3), min_size=2 * B * 12, max_size=2 * B * 12), st.integers(0, 99))
@hypothesis.settings(max_examples=10)
def test_packed_equals_separate_wherever_padding_stands(ids, seed):
    ids = np.array(ids, np.int32).reshape(B, -1)
    with jax.enable_x64(True):
        arrays = draw("full", 24, seed)
        got = run(arrays, ids, chunk=4)
        close(got[0], definition(*arrays, ids))
        close(got[1], run(arrays, ids, implementation="reference")[1])


def test_padding_is_never_read_and_passes_the_state_on(x64):
    x, log_a, state = draw("full", 33, seed=5)
    ids = packed(33, seed=5)
    ids[1] = 0
    hole = (ids == 0)[..., None, None]
    spoilt = np.where(hole, np.nan, x), np.where(hole, np.nan, log_a), state
    (h, last), grads = run(spoilt, ids, chunk=8)
    close(((h, last), grads), run((x, log_a, state), ids, chunk=8))
    np.testing.assert_array_equal(last[1], state[1])
    assert not np.any(np.where(hole, h, 0)) and not np.any(np.where(hole, grads[0], 0))


@pytest.mark.parametrize("gate", [0.0, -1e-4, -5.0, -20.0, -1e4, -np.inf])
def test_gradients_are_finite_and_right_for_any_decay_in_float32(gate):
    x, _, state = (a.astype(np.float32) for a in draw("head", 70))
    log_a = np.full((B, 70, H, 1), gate, np.float32)
    got = run((x, log_a, state), chunk=8)
    with jax.enable_x64(True):
        # At -inf autodiff of the plain exponential is right as well: its derivative is exp(-inf) = 0.
        want = run(tuple(np.float64(a) for a in (x, log_a, state)), implementation="reference")
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.all(np.isfinite(g))
        # Sums of 70 terms, and for a decay of 0 the gradient of log_a sums 70 of those.
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6 * max(1.0, np.abs(w).max()))


def test_slow_decays_keep_their_time_constant_in_float32():
    # Half a unit in the last place below 1, a decay that a float32 factor per token would round to 1 or twice as far.
    time, log_a = 8192, np.float32(-3e-8)
    zeros, ones = jnp.zeros((1, time, 1)), jnp.ones((1, 1))
    _, state = linear_scan(zeros, jnp.full((1, time, 1), log_a), state=ones)
    np.testing.assert_allclose(1 - state[0, 0], -np.expm1(time * np.float64(log_a)), rtol=0.05)


def test_bfloat16_is_within_half_a_percent_and_states_are_float32():
    x, log_a, state = draw("head", 70, seed=6)
    x, log_a = jnp.asarray(x, jnp.bfloat16), jnp.asarray(np.maximum(log_a, -5), jnp.bfloat16)
    (h, last), grads = run((x, log_a, jnp.asarray(state, jnp.float32)), chunk=16)
    assert (h.dtype, last.dtype, grads[0].dtype, grads[1].dtype) == (x.dtype, jnp.float32, x.dtype, log_a.dtype)
    with jax.enable_x64(True):
        exact = jnp.asarray(np.asarray(x, np.float64)), jnp.asarray(np.asarray(log_a, np.float64))
        want = run((*exact, state.astype(np.float32).astype(np.float64)), implementation="reference")
    for g, w in zip(jax.tree.leaves(((h, last), grads)), jax.tree.leaves(want), strict=True):
        assert rms(g, w) < 0.005


def test_a_complex_decay_of_phase_zero_is_the_real_one(x64):
    x, log_a, state = draw("full", 20)
    scan = jax.jit(lambda x, log_a: linear_scan(x, log_a, state=state, chunk=4))
    h, last = scan(x, log_a + 0j)
    assert h.dtype == last.dtype == jnp.complex128
    close((h, last), scan(x, log_a))
    both, _ = scan(x + 1j * x[:, ::-1], log_a)
    close(both.real, h.real)
    close(both, h + 1j * (scan(x[:, ::-1], log_a)[0] - scan(0 * x, log_a)[0]))


def test_it_maps_over_a_batch_of_models(x64):
    arrays = [draw("full", 20, seed) for seed in range(3)]
    stacked = [np.stack(a) for a in zip(*arrays, strict=True)]
    f = lambda x, log_a, state: linear_scan(x, log_a, state=state, chunk=4)
    f = jax.jit(f)
    close(jax.jit(jax.vmap(f))(*stacked), jax.tree.map(lambda *a: np.stack(a), *[f(*a) for a in arrays]))


def test_over_a_sharded_time_axis_only_states_of_chunks_travel():
    mesh = make_mesh(context=4, devices=jax.devices()[:4])
    x, log_a, _ = (a.astype(np.float32) for a in draw("full", 256))
    place = NamedSharding(mesh, PartitionSpec(None, "context"))
    grad = jax.grad(lambda x, a: jnp.sum(linear_scan(x, a, chunk=16)[0] ** 2), (0, 1))
    sharded = jax.jit(grad, in_shardings=(place, place), out_shardings=(place, place))
    program = sharded.lower(x, log_a).compile()
    moved = re.findall(r"= \w+\[([\d,]*)\]\S* (?:all-|collective-)[\w-]+\(", program.as_text())
    sizes = [np.prod([int(n) for n in shape.split(",") if n]) for shape in moved]
    assert sizes and max(sizes) <= x.size // 16
    for got, want in zip(program(x, log_a), jax.jit(grad)(x, log_a), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_bad_input_is_named():
    x = jnp.ones((2, 5, 3))
    for message, call in {
        "log_a: expected a shape that broadcasts to": lambda: linear_scan(x, jnp.ones((2, 5))),
        r"x: expected shape \(B, T, ...\)": lambda: linear_scan(x[:, :0], x[:, :0]),
        "x: expected a floating": lambda: linear_scan(jnp.ones((2, 5), int), jnp.ones(5)),
        r"state: expected shape \(2, 3\)": lambda: linear_scan(x, -x, state=jnp.ones((2, 5))),
        "state: expected a real dtype": lambda: linear_scan(x, -x, state=jnp.ones((2, 3), complex)),
        r"segment_ids: expected shape \(B=2, T=5\)": lambda: linear_scan(x, -x, segment_ids=jnp.ones((2, 4), int)),
        "chunk: expected an integer >= 1": lambda: linear_scan(x, -x, chunk=0),
        "implementation: expected one of gpu, tpu, triton, chunked": lambda: linear_scan(x, -x, implementation="chunk"),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    linear_scan(x, -x)
    assert "chunked" in dispatch.chosen("linear_scan")
