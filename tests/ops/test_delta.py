"""The delta rule: both forms against its equation in float64, gradients, chunks, states, packing, precision."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.ops import linear_chunked
from seqmix.ops.delta import delta_rule

B, HK, H, K, V = 2, 2, 4, 4, 3
GATES = (0.0, -1e-4, -0.1, -0.5, -5.0, -20.0, -1e4)

# Compiling is most of what these tests cost, and LLVM's optimisation nearly half of that.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(kind, time, seed=0, steps=(), erase=None, size=(B, HK, H, K, V), beta=2.0, gates=GATES):
    """Arguments in float64: keys of length one, beta in (0, `beta`), log decays of mixed gates, a state."""
    rng = np.random.default_rng(seed)
    b, hk, h, k, v = size
    units = lambda *shape: (lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True))(rng.normal(size=shape))
    shape = {"none": None, "constant": (h,), "head": (b, time, h), "channel": (b, time, h, k)}[kind]
    arrays = dict(
        q=units(b, time, hk, k),
        k=units(b, time, *steps, hk, k),
        v=rng.normal(size=(b, time, *steps, h, v)),
        beta=beta * rng.uniform(size=(b, time, *steps, h)),
        state=rng.normal(size=(b, h, k, v)),
    )
    if erase:
        arrays["erase"] = units(b, time, *steps, erase, k)
    return arrays if shape is None else arrays | dict(log_decay=rng.choice(gates, shape))


def definition(q, k, v, beta, log_decay=None, erase=None, state=None, ids=None):
    """y and the last state, token by token, with the transition as a matrix."""
    if k.ndim == 4:
        k, v, beta, erase = (None if x is None else x[:, :, None] for x in (k, v, beta, erase))
    batch, time, steps, heads, _ = v.shape
    decay = np.zeros((1, 1, 1, 1)) if log_decay is None else np.asarray(log_decay)
    decay = decay[..., None] if decay.ndim == 3 else decay[None, None, :, None] if decay.ndim == 1 else decay
    decay = np.broadcast_to(decay, (batch, time, heads, q.shape[-1]))
    ids = np.ones((batch, time), int) if ids is None else ids
    y, state = (
        np.zeros(v[:, :, 0].shape),
        np.zeros((batch, heads, q.shape[-1], v.shape[-1])) + (0 if state is None else state),
    )
    key = lambda x, b, t, h: x[b, t, ..., h * x.shape[-2] // heads, :]
    for b, h in np.ndindex(batch, heads):
        current, s = 0, state[b, h]
        for t in np.flatnonzero(ids[b]):
            s = np.zeros_like(s) if current not in (0, ids[b, t]) else s
            current = ids[b, t]
            s = np.diag(np.exp(decay[b, t, h])) @ s
            for i in range(steps):
                write = beta[b, t, i, h] * key(k, b, t, h)[i]
                read = key(k if erase is None else erase, b, t, h)[i]
                s = (np.eye(len(s)) - np.outer(write, read)) @ s + np.outer(write, v[b, t, i, h])
            y[b, t, h] = s.T @ key(q, b, t, h)
        state[b, h] = s
    return y, state


@functools.cache
def forward(**options):
    return jit(lambda arrays, ids=None: delta_rule(**arrays, segment_ids=ids, **options))


@functools.cache
def pullback(**options):
    """(arrays, cotangents of y and the state, ids) -> (y and state, gradients of all arrays)."""

    def run(arrays, cotangents, ids=None):
        out, vjp = jax.vjp(lambda arrays: delta_rule(**arrays, segment_ids=ids, **options), arrays)
        return out, vjp(cotangents)[0]

    return jit(run)


def cotangents(arrays, seed=1):
    rng = np.random.default_rng(seed)
    batch, time = arrays["q"].shape[:2]
    heads, width = arrays["v"].shape[-2:]
    return rng.normal(size=(batch, time, heads, width)), rng.normal(size=arrays["state"].shape)


def to_time(tree, time):
    """The first tokens of a tree of arrays: all with time on axis 1 but `state` and a constant decay."""
    cut = lambda name, x: x[:, :time] if x.ndim > 2 and name != "state" else x
    return {name: cut(name, x) for name, x in tree.items()}


def assert_close(got, expected, tolerance, what=""):
    """Every leaf within `tolerance` of the largest entry of its counterpart."""
    for (path, x), (_, y) in zip(*map(jax.tree_util.tree_leaves_with_path, (got, expected)), strict=True):
        bound = tolerance * max(1, np.abs(y).max(initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=bound, err_msg=f"{what} {path}")


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


TIMES = {"head": (1, 65, 200), "channel": (63, 200), "constant": (63,), "none": (64,)}


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
    assert_close(pullback(chunk=64)(arrays, weights, ids), expected, 1e-12)
    monkeypatch.setattr(linear_chunked, "_TILES", 1)
    monkeypatch.setattr(linear_chunked, "_FEWEST", 4)
    assert linear_chunked.plan(37, 4, B * H)[0] == 3
    assert_close(pullback(chunk=4)(arrays, weights, ids), expected, 1e-12)
    assert_close(forward(chunk=1)(arrays, ids), expected[0], 1e-12)


def test_states_join_the_parts_of_a_sequence(x64):
    arrays = draw("head", 24)
    ids = jnp.asarray(np.repeat([[1, 2, 0, 2], [0, 0, 3, 3]], [4, 8, 5, 7], axis=1))
    for used in (None, ids):
        run = forward(chunk=8)
        y, state = run(arrays, used)
        parts, carried = [], arrays["state"]
        for start, stop in ((0, 11), (11, 12), (12, 24)):
            part = {name: x[:, start:stop] for name, x in arrays.items() if name != "state"}
            out, carried = run(part | dict(state=carried), None if used is None else used[:, start:stop])
            parts.append(out)
        if used is None:
            assert_close((np.concatenate(parts, 1), carried), (y, state), 1e-13)
            continue
        # The second row's segment goes on; in the first, a new call takes its first segment for the one before.
        assert_close((np.concatenate(parts, 1)[1], carried[1]), (y[1], state[1]), 1e-13)


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
    # A token of three steps is three tokens, of which two do not decay and are not read.
    long = {name: x.reshape(B, 33, *x.shape[3:]) for name, x in arrays.items() if name in ("k", "v", "beta", "erase")}
    decay = np.zeros((B, 11, 3, H))
    decay[:, :, 0] = arrays["log_decay"]
    long |= dict(q=np.repeat(arrays["q"], 3, axis=1), log_decay=decay.reshape(B, 33, H), state=arrays["state"])
    y, state = forward(chunk=8)(long)
    assert_close(forward(steps=3, chunk=8)(arrays), (y[:, 2::3], state), 1e-13)


# Precision


def relative(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    scale = np.sqrt(np.mean(expected**2))
    return np.sqrt(np.mean((got - expected) ** 2)) / scale if scale else np.abs(got).max()


def against_float64(run, loop, arrays, weights):
    """RMS errors of `run` relative to `loop` in float64 on the same rounded arrays: y, state, gradients by name."""
    got = run(arrays, weights)
    with jax.enable_x64(True):
        exact = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), tree)
        expected = loop(exact(arrays), exact(weights))
    names = lambda out: dict(zip(("y", "last state"), out[0], strict=True)) | out[1]
    return {name: relative(x, names(expected)[name]) for name, x in names(got).items()}


SMALL = (1, 1, 2, 32, 32)  # B, Hk, H, K, V
BF16 = {
    "slow gates per head": ("head", 2.0, (0.0, -1e-4, -1e-2)),
    "all gates per head": ("head", 2.0, GATES),
    "all gates per channel": ("channel", 1.0, GATES),
    "slow gates per channel": ("channel", 1.0, (0.0, -1e-4, -1e-2)),
}


@pytest.mark.parametrize("case", BF16)
def test_bfloat16_keeps_the_bounds(case):
    # Of the delta rule in kernels for 16 bits: 0.006 for y, 0.008 for gradients, 0.02 for those of the gates.
    kind, beta, gates = BF16[case]
    arrays = draw(kind, 150, size=SMALL, beta=beta, gates=gates)
    kept = ("beta", "log_decay", "state")
    arrays = {name: jnp.asarray(x, jnp.float32 if name in kept else jnp.bfloat16) for name, x in arrays.items()}
    y, state = cotangents(arrays)
    weights = jnp.asarray(y, jnp.bfloat16), jnp.asarray(state, jnp.float32)
    errors = against_float64(pullback(), pullback(implementation="reference"), arrays, weights)
    bounds = {"y": 0.006, "last state": 0.006, "beta": 0.02, "log_decay": 0.02}
    assert all(error <= bounds.get(name, 0.008) for name, error in errors.items()), errors


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
