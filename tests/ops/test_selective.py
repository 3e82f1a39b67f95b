"""The selective scan: both forms against a loop in float64, states, packing, memory, costs, refusals."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.ops.selective import selective_scan, selective_scan_flops

BATCH, D, N, G = 2, 4, 3, 2
LONGEST = 200
OVER_TIME = ("u", "dt", "B", "C")


def draw(time, seed=0, groups=G):
    """Arguments by name, in float64; dt A runs from about -1e-4 to -1e4."""
    rng = np.random.default_rng(seed)
    return dict(
        u=rng.normal(size=(BATCH, time, D)),
        dt=rng.choice([1e-4, 0.05, 0.5, 3.0, 100.0], size=(BATCH, time, D)) * rng.uniform(0.5, 1, (BATCH, time, D)),
        A=-rng.choice([1.0, 2.0, 100.0], size=(D, N)),
        B=rng.normal(size=(BATCH, time, groups, N)),
        C=rng.normal(size=(BATCH, time, groups, N)),
        D=rng.normal(size=D),
        state=rng.normal(size=(BATCH, D, N)),
    )


def packed(time, seed=0):
    """Segment ids: runs of random ids that come back, with padding at both ends, inside and between them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 4, size=(BATCH, time // 9 + 1)).repeat(9, axis=1)[:, :time]
    return np.where(rng.random((BATCH, time)) < 0.2, 0, ids).astype(np.int32)


def definition(u, dt, A, B, C, D, state, ids=None):
    """(y, state), token by token and channel by channel."""
    y, h = np.zeros(u.shape), np.array(state)
    group = np.arange(u.shape[2]) // (u.shape[2] // B.shape[2])
    for b in range(u.shape[0]):
        last = 0
        for t in range(u.shape[1]):
            name = 1 if ids is None else ids[b, t]
            if name == 0:
                continue
            if last not in (0, name):
                h[b] = 0
            last = name
            for d in range(u.shape[2]):
                h[b, d] = np.exp(dt[b, t, d] * A[d]) * h[b, d] + dt[b, t, d] * u[b, t, d] * B[b, t, group[d]]
                y[b, t, d] = C[b, t, group[d]] @ h[b, d] + D[d] * u[b, t, d]
    return y, h


@functools.cache
def compiled(**options):
    def run(arrays, ids, seeds):
        out, pull = jax.vjp(lambda a: selective_scan(**a, segment_ids=ids, **options), arrays)
        return out, pull(jax.tree.map(lambda y, g: g.astype(y.dtype), out, seeds))[0]

    return jax.jit(run)


def run(arrays, ids=None, **options):
    """((y, state), gradients by name) for drawn cotangents of y and of the outgoing state."""
    rng = np.random.default_rng(9)
    seeds = rng.normal(size=(BATCH, LONGEST, D))[:, : arrays["u"].shape[1]], rng.normal(size=(BATCH, D, N))
    return compiled(**options)(jax.tree.map(jnp.asarray, arrays), ids, seeds)


def rms(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want)
    return np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))


def close(got, want):
    # Rounding of float64, relative to the largest entry: steps of 100 make some gradients 1e4.
    def one(g, w):
        np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-12 * max(1.0, np.abs(w).max()))

    jax.tree.map(one, got, want)


@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_both_forms_are_the_loop_and_share_all_gradients(x64, time):
    arrays, ids = draw(time), packed(time)
    # The reference takes every length as one of 200 that ends in padding: one compilation.
    after = lambda a: np.pad(a, [(0, 0), (0, LONGEST - time)] + [(0, 0)] * (a.ndim - 2))
    padded = {k: after(v) if k in OVER_TIME else v for k, v in arrays.items()}
    (y, state), grads = run(padded, after(ids), implementation="reference")
    want = (y[:, :time], state), {k: v[:, :time] if k in OVER_TIME else v for k, v in grads.items()}
    close(want[0], definition(**arrays, ids=ids))
    close(run(arrays, ids, chunk=16), want)
    assert all(np.abs(g).max() > 0 for g in want[1].values())


def test_any_number_of_groups_without_segments(x64):
    arrays = draw(40, groups=1)
    want = run(arrays, implementation="reference")
    close(want[0], definition(**arrays))
    close(run(arrays, chunk=8), want)
    forward = jax.jit(functools.partial(selective_scan, chunk=8))
    close(forward(**arrays | dict(B=arrays["B"][:, :, 0], C=arrays["C"][:, :, 0])), want[0])
    arrays = draw(40, groups=4)
    close(forward(**arrays), definition(**arrays))


def test_the_chunk_changes_nothing(x64):
    # Backward, 140 tokens are two turns in chunks of 1, and one in a chunk of 200.
    arrays, ids = draw(140, seed=2), packed(140, seed=2)
    close(run(arrays, ids, chunk=1), run(arrays, ids, chunk=200))


def test_state_passing_equals_one_pass(x64):
    arrays, ids = draw(28, seed=3), packed(28, seed=3)
    ids[:, 15:25] = 2  # the split falls inside a segment

    def whole(arrays):
        return selective_scan(**arrays, segment_ids=ids, chunk=4)

    def split(arrays):
        ys, state = [], arrays["state"]
        for now in (slice(0, 19), slice(19, 28)):
            part = {k: v[:, now] if k in OVER_TIME else v for k, v in arrays.items()}
            y, state = selective_scan(**part | dict(state=state), segment_ids=ids[:, now], chunk=4)
            ys.append(y)
        return jnp.concatenate(ys, 1), state

    weights = [np.random.default_rng(4).normal(size=arrays[k].shape) for k in ("u", "state")]

    def value_and_gradients(f):
        def total(arrays):
            out = f(arrays)
            return sum(jnp.sum(w * y) for w, y in zip(weights, out, strict=True)), out

        return jax.jit(jax.grad(total, has_aux=True))(arrays)

    close(value_and_gradients(split), value_and_gradients(whole))


@hypothesis.given(st.lists(st.integers(0, 3), min_size=2 * 24, max_size=2 * 24), st.integers(0, 99))
@hypothesis.settings(max_examples=10)
def test_packed_equals_separate_wherever_padding_stands(ids, seed):
    ids = np.array(ids, np.int32).reshape(BATCH, -1)
    with jax.enable_x64(True):
        arrays = draw(24, seed)
        got = run(arrays, ids, chunk=4)
        close(got[0], definition(**arrays, ids=ids))
        close(got[1], run(arrays, ids, implementation="reference")[1])


def test_padding_is_never_read_and_passes_the_state_on(x64):
    arrays, ids = draw(33, seed=5), packed(33, seed=5)
    ids[1] = 0
    hole = ids == 0
    spoilt = dict(arrays)
    for name in OVER_TIME:
        spoilt[name] = np.where(hole.reshape(*hole.shape, *[1] * (arrays[name].ndim - 2)), np.nan, arrays[name])
    (y, state), grads = run(spoilt, ids, chunk=8)
    close(((y, state), grads), run(arrays, ids, chunk=8))
    np.testing.assert_array_equal(state[1], arrays["state"][1])
    assert not np.any(y[hole]) and not any(np.any(grads[k][hole]) for k in OVER_TIME)


@pytest.mark.parametrize("log_decay", [0.0, -1e-4, -5.0, -20.0, -1e4])
def test_gradients_are_finite_and_right_for_any_decay_in_float32(log_decay):
    arrays = {k: v.astype(np.float32) for k, v in draw(70, seed=7).items()}
    arrays["dt"] = np.full_like(arrays["dt"], 0.5)
    arrays["A"] = np.full_like(arrays["A"], 2 * log_decay)
    got = run(arrays, chunk=8)
    with jax.enable_x64(True):
        want = run({k: np.float64(v) for k, v in arrays.items()}, implementation="reference")
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Sums of up to B T N terms, themselves sums of up to 70.
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-6 * max(1.0, np.abs(w).max()))


def test_bfloat16_is_within_half_a_percent_and_states_are_float32():
    arrays = draw(70, seed=6)
    arrays["dt"] = np.minimum(arrays["dt"], 0.5)
    low = {k: jnp.asarray(v, jnp.float32 if k in ("A", "D", "state") else jnp.bfloat16) for k, v in arrays.items()}
    got = run(low, chunk=16)
    assert (got[0][0].dtype, got[0][1].dtype) == (jnp.bfloat16, jnp.float32)
    assert all(got[1][k].dtype == low[k].dtype for k in low)
    with jax.enable_x64(True):
        want = run({k: np.asarray(v, np.float64) for k, v in low.items()}, implementation="reference")
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert rms(g, w) < 0.005


def largest(jaxpr):
    """Elements of the largest array that a jaxpr computes, at any depth."""
    sizes = [var.aval.size for eqn in jaxpr.eqns for var in eqn.outvars]
    inner = [v for eqn in jaxpr.eqns for p in eqn.params.values() for v in (p if isinstance(p, tuple) else (p,))]
    inner = [getattr(v, "jaxpr", v) for v in inner if hasattr(getattr(v, "jaxpr", v), "eqns")]
    return max(sizes + [largest(v) for v in inner], default=0)


def test_no_pass_holds_the_states_of_all_tokens():
    time = 1024
    shapes = dict(u=(1, time, 8), dt=(1, time, 8), A=(8, 16), B=(1, time, 16), C=(1, time, 16))
    args = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    everything = time * 8 * 16

    def grad(**options):
        return jax.grad(lambda a: jnp.sum(selective_scan(**a, **options)[0]))

    assert largest(jax.make_jaxpr(grad(implementation="reference"))(args).jaxpr) >= everything
    # 128 tokens at a time; the incoming states of 32 chunks are a quarter of that.
    assert largest(jax.make_jaxpr(grad())(args).jaxpr) == everything // 8


def test_flops_are_what_xla_counts_at_one_token():
    # XLA counts the body of a loop once, so one token is the case in which it counts all.
    shapes = dict(u=(2, 1, 32), dt=(2, 1, 32), A=(32, 16), B=(2, 1, 16), C=(2, 1, 16), D=(32,))
    args = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    counted = jax.jit(lambda a: selective_scan(**a)[0]).lower(args).compile().cost_analysis()["flops"]
    assert abs(selective_scan_flops(2, 1, 32, 16) / counted - 1) < 0.05
    assert selective_scan_flops(2, 64, 32, 16, chunk=64) == 64 * selective_scan_flops(2, 1, 32, 16)


def test_bad_input_is_named():
    good = {k: jnp.asarray(v, jnp.float32) for k, v in draw(5).items()}
    for message, change in {
        r"dt: expected shape \(B=2, T=5, D=4\)": dict(dt=good["dt"][:, :4]),
        r"C: expected shape \(B=2, T=5, G=2, N=3\)": dict(C=good["C"][..., :2]),
        "B: expected groups that divide D=4, got 3": dict(B=jnp.ones((2, 5, 3, 3)), C=jnp.ones((2, 5, 3, 3))),
        r"state: expected shape \(B=2, D=4, N=3\)": dict(state=good["state"][:1]),
        "u: expected at least one of every dimension": {k: good[k][:, :0] for k in ("u", "dt", "B", "C")},
        "A: expected a floating dtype": dict(A=good["A"] + 1j),
        "segment_ids: expected integers": dict(segment_ids=jnp.ones((2, 5))),
        "chunk: expected an integer >= 1": dict(chunk=0),
        "implementation: expected one of chunked": dict(implementation="gpu"),
    }.items():
        with pytest.raises(ValueError, match=message):
            selective_scan(**good | change)
