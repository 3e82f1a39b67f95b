"""Decoding: prefill in any split, then steps, is the forward pass."""

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.core import sharding
from seqmix.core.mixer import state_shapes
from tests.conformance.cases import BATCH, close, close_trees, is_float, over

DECODES = over(lambda m: m.decodes)
STEPS = 3


def _chunks(case, lengths, rng):
    """Chunks of `part` times: for each row which of its tokens stand where, [B, part] with -1 for padding.

    They hold the first lengths[b] tokens of row b, a random number of them at a time, none at times.
    """
    u, width, done = case.unit, case.part, np.zeros(BATCH, int)
    while np.any(done < lengths):
        chunk = np.full((BATCH, width), -1)
        for b in range(BATCH):
            n = min(int(rng.integers(0, width // u + 1)) * u, lengths[b] - done[b])
            blocks = np.sort(rng.permutation(width // u)[: n // u])  # padding left, right or between
            places = (blocks[:, None] * u + np.arange(u)).ravel()
            chunk[b, places] = done[b] + np.arange(n)
            done[b] += n
        yield chunk


@over(lambda m: m.decodes and m.packable)
def test_random_splits_and_steps_equal_forward(case, x64):
    """Each row has a length of its own, and its room is just what it needs: padding must not take any."""
    params, x, rng, every = case.params(), case.x(), np.random.default_rng(0), np.arange(BATCH)
    want = case.forward(params, x, None, case.inputs())
    steps = STEPS if case.unit == 1 else 0  # splits of a mixer that works in blocks fall between blocks
    lengths = rng.integers(0, (case.time - steps) // case.unit + 1, BATCH) * case.unit
    lengths[0] = case.time - steps
    assert len(set(lengths)) > 1
    state, seen = case.init_state(params, case.time), 0
    for chunk in _chunks(case, lengths, rng):
        ids = (chunk >= 0).astype(np.int32)
        tokens = np.where(ids[..., None] == 1, x[every[:, None], chunk], 9.0)
        y, state = case.prefill(params, tokens, state, ids)
        assert np.all(y[ids == 0] == 0)
        for b in range(BATCH):
            close(y[b, ids[b] == 1], want[b, chunk[b, ids[b] == 1]])
            seen += ids[b].sum()
    assert seen == lengths.sum()
    for i in range(steps):
        y, state = case.step(params, x[every, lengths + i][:, None], state)
        close(np.asarray(y)[:, 0], want[every, lengths + i])


@DECODES
def test_a_plain_split_equals_forward(case, x64):
    params, x, n = case.params(), case.x(), case.part
    want = case.forward(params, x, None, case.inputs())
    state, t, got = case.init_state(params, case.time), 0, []
    while t < case.time:
        if t + n <= case.time:
            y, state = case.prefill(params, x[:, t : t + n], state, None)
        elif case.unit == 1:
            y, state = case.step(params, x[:, t : t + 1], state)
        else:
            break
        got.append(y)
        t += y.shape[1]
    close(np.concatenate(got, axis=1), want[:, :t])


@over(lambda m: m.decodes and m.packable)
def test_padding_alone_returns_the_state(case, x64):
    params, n = case.params(), case.part
    ids = np.ones((BATCH, n), np.int32)
    _, before = case.prefill(params, case.x(time=n), case.init_state(params, case.time), ids)
    ids[1:3] = 0
    y, after = case.prefill(params, case.x(time=n, seed=5), before, ids)
    assert np.all(y[1:3] == 0) and np.any(y[0] != 0)
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[1:3], np.asarray(b)[1:3])


@over(lambda m: m.decodes and m.packable and m.align == 1)
def test_a_state_belongs_to_the_first_segment_and_leaves_with_the_last(case, x64):
    """Two documents in a chunk, the second of them going on in the next chunk, its last one in the steps."""
    params, x, n = case.params(), case.x(), case.part
    ids = np.tile(np.array([0, 1, 1, 2, 2, 2, 2, 0, 3, 3, 3, 3, 3, 3], np.int32), (BATCH, 1))
    state, got = case.init_state(params, case.time), []
    for t in (0, n):
        y, state = case.prefill(params, x[:, t : t + n], state, ids[:, t : t + n])
        got.append(y)
    for t in range(2 * n, case.time):
        y, state = case.step(params, x[:, t : t + 1], state)
        got.append(y)
    close(np.concatenate(got, axis=1), case.forward(params, x, ids, case.inputs()))


@DECODES
def test_gradients_through_the_state_equal_those_of_forward(case, x64):
    """By the chain rule over two calls of prefill, the second's gradient by the state entering the first."""
    params, x, n = case.params(), case.x(), case.part
    ones = lambda time: np.ones((BATCH, time), np.int32) if case.mixer.packable else None
    w, ids = case.x(seed=3), ones(n)
    w[:, 2 * n :] = 0
    start = jax.tree.map(jnp.asarray, case.init_state(params, case.time))
    nothing = jax.tree.map(lambda s: jnp.zeros_like(s) if is_float(s) else None, start)
    halves = [slice(0, n), slice(n, 2 * n)]
    if 2 * n > case.time:
        halves, w[:, n:] = halves[:1], 0
    args, state = [], start
    for half in halves:
        args.append((params, x[:, half], state, ids, w[:, half]))
        _, state, *_ = case.prefill_pull(*args[-1], nothing)
    carried, by_x, by_params = [nothing], [], []
    for arg in reversed(args):
        _, _, p, x_part, by_state = case.prefill_pull(*arg, carried[-1])
        by_params.append(p)
        by_x.insert(0, x_part)
        carried.append(by_state)
    _, want, want_x = case.pull(params, x, ones(case.time), case.inputs(), w)
    close(np.concatenate(by_x, axis=1), want_x[:, : n * len(halves)])
    if "memory" not in case.mixer.takes:  # whose keys and values are made before the state
        close_trees(jax.tree.map(lambda *parts: sum(parts), *by_params), want)
    assert len(args) == 1 or any(np.any(leaf != 0) for leaf in jax.tree.leaves(carried[1]))


@DECODES
def test_the_state_keeps_its_shapes_and_is_counted_and_named(case):
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    params, axes = case.params(np.float32), case.mixer.state_axes()
    for dtype, room in ((jnp.float32, case.time), (jnp.bfloat16, 40)):
        inputs = case.inputs(dtype) | case.static
        state = state_shapes(case.mixer, params, BATCH, room, dtype, **inputs)
        sizes = [leaf.size for leaf in jax.tree.leaves(state)]
        assert sum(sizes) == BATCH * case.mixer.state_size(room, **case.sizes)
        x = jax.ShapeDtypeStruct((BATCH, case.unit, case.mixer.d_model), dtype)
        _, after = jax.eval_shape(case.mixer.prefill, params, x, state)
        same = lambda a, b: (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)
        assert jax.tree.all(jax.tree.map(same, state, after))
        # Raises where a leaf has no names, or not as many as dimensions, or names that cannot be cut.
        specs = jax.tree.map(lambda leaf, names: sharding.spec(names, leaf.shape, mesh), state, axes)
        assert all(spec[0] == ("data", "fsdp") for spec in jax.tree.leaves(specs))


@DECODES
def test_steps_trace_once(case, x64):
    params, x, state = case.params(), case.x(), case.init_state(case.params(), case.time)
    _, state = case.step(params, x[:, :1], state)
    before = case.traces["step"]
    for t in range(1, 4):
        _, state = case.step(params, x[:, t : t + 1], state)
    assert case.traces["step"] == before >= 1
