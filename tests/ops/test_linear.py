"""Linear attention: both forms against a loop in float64, states, packing, both directions, the matrix."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.ops import linear_chunked
from seqmix.ops.linear import linear_attention
from seqmix.ops.linear_reference import linear_mixing_matrix

B, HK, H, K, V = 2, 2, 4, 4, 3
KINDS = ("none", "constant", "head", "channel")
GATES = (0.0, -1e-4, -0.1, -0.5, -5.0, -20.0, -1e4)

# Compiling is most of what these tests cost, and LLVM's optimisation nearly half of that.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(kind, time, seed=0, batch=B):
    """q, k, v, log_decay of mixed gates and a state, float64."""
    rng = np.random.default_rng(seed)
    shape = {"none": None, "constant": (H,), "head": (batch, time, H), "channel": (batch, time, H, K)}[kind]
    arrays = dict(
        q=rng.normal(size=(batch, time, HK, K)),
        k=rng.normal(size=(batch, time, HK, K)),
        v=rng.normal(size=(batch, time, H, V)),
        state=rng.normal(size=(batch, H, K, V)),
    )
    return arrays if shape is None else arrays | dict(log_decay=rng.choice(GATES, shape))


def definition(q, k, v, log_decay=None, state=None, ids=None):
    """(q^T S, q^T z, S, z) token by token."""
    batch, time, heads, width = *q.shape[:2], v.shape[2], q.shape[3]
    decay = np.zeros((1, 1, 1, 1)) if log_decay is None else np.asarray(log_decay)
    decay = decay[None, None, :, None] if decay.ndim == 1 else decay[..., None] if decay.ndim == 3 else decay
    decay = np.broadcast_to(decay, (batch, time, heads, width))
    q, k = (np.repeat(x, heads // q.shape[2], axis=2) for x in (q, k))
    s = np.zeros((batch, heads, width, v.shape[3])) if state is None else np.array(state)
    z = np.zeros((batch, heads, width))
    above, below = np.zeros(v.shape), np.zeros(v.shape[:3])
    for b in range(batch):
        last = 0
        for t in range(time):
            name = 1 if ids is None else ids[b, t]
            if name == 0:
                continue
            if last not in (0, name):
                s[b], z[b] = 0, 0
            last, factor = name, np.exp(decay[b, t])
            s[b] = factor[..., None] * s[b] + k[b, t][..., None] * v[b, t][:, None]
            z[b] = factor * z[b] + k[b, t]
            above[b, t] = np.einsum("hk,hkv->hv", q[b, t], s[b])
            below[b, t] = np.einsum("hk,hk->h", q[b, t], z[b])
    return above, below, s, z


def cotangents(arrays, pair=False):
    """Of y and of the state."""
    rng = np.random.default_rng(9)
    y, s = (rng.normal(size=arrays["v"].shape), rng.normal(size=(len(arrays["q"]), H, K, V)))
    return y, (s, rng.normal(size=s.shape[:3])) if pair else s


@functools.cache
def compiled(options):
    op = functools.partial(linear_attention, **dict(options))
    forward = jit(lambda arrays, ids: op(**arrays, segment_ids=ids))

    @jit
    def both(arrays, ids, seeds):
        out, pull = jax.vjp(lambda arrays: op(**arrays, segment_ids=ids), arrays)
        return *out, pull(jax.tree.map(lambda y, g: g.astype(y.dtype), out, seeds))[0]

    return forward, both


def run(arrays, ids=None, **options):
    """(y, state)"""
    return compiled(tuple(options.items()))[0](arrays, ids)


def differentiate(arrays, ids=None, **options):
    """(y, state, gradients by name), for drawn cotangents of y and of the state."""
    arrays = jax.tree.map(jnp.asarray, arrays)
    return compiled(tuple(options.items()))[1](arrays, ids, cotangents(arrays, options.get("normalize", False)))


def close(got, want, tolerance=1e-12):
    """Leaf by leaf, relative to the largest entry of each; float64 sums of some hundred terms keep 12 digits."""
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    assert len(got) == len(want) > 0
    for x, y in zip(got, want):
        x, y = np.asarray(x), np.asarray(y)
        assert x.shape == y.shape and np.all(np.isfinite(x))
        assert np.max(np.abs(x - y), initial=0) <= tolerance * max(1.0, np.max(np.abs(y), initial=0))


def ragged(time):
    """Ids with padding left, right and inside a segment, one that comes back, and a row that opens at once."""
    row = np.array([0, 0, 3, 3, 0, 3, 7, 7, 7, 0, 0, 3, 3, 3, 3, 1] + [1] * time)[:time]
    other = np.roll(row, -2)
    other[-3:] = 0
    return np.stack([row, other]).astype(np.int32)


@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_follow_the_definition_with_segments_and_a_state(x64, kind):
    arrays, ids = draw(kind, 37), ragged(37)
    above, _, state, _ = definition(**arrays, ids=ids)
    reference, chunked = (
        differentiate(arrays, ids, scale=0.5, chunk=8, implementation=name) for name in ("reference", "chunked")
    )
    close(reference[:2], (0.5 * above, state))
    close(chunked, reference)
    for x in (chunked[0], *(chunked[2][name] for name in "qkv")):
        assert np.all(np.asarray(x)[ids == 0] == 0) and np.all(np.any(np.asarray(x)[ids != 0] != 0, axis=(1, 2)))


@pytest.mark.parametrize(
    "time, kind",
    [(1, "head"), (1, "channel"), (63, "none"), (64, "constant"), (65, "head"), (200, "channel")],
)
def test_chunked_equals_reference_at_any_length(x64, time, kind):
    arrays = draw(kind, time)
    want = differentiate(arrays, implementation="reference")
    close(want[:2], definition(**arrays)[::2])
    close(differentiate(arrays, chunk=64, implementation="chunked"), want)
    assert all(np.any(np.asarray(g) != 0) for g in want[2].values())


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_the_chunk_does_not_matter(x64, kind):
    arrays = draw(kind, 70)
    above, _, state, _ = definition(**arrays)
    for chunk in (1, 4, 32):
        close(run(arrays, chunk=chunk), (above, state))


def test_the_number_of_blocks_does_not_matter(x64, monkeypatch):
    arrays = draw("head", 70)
    want = differentiate(arrays, implementation="reference")
    monkeypatch.setattr("seqmix.ops.linear_chunked._FEWEST", 2)
    monkeypatch.setattr("seqmix.ops.linear_chunked._TILES", 1)
    assert linear_chunked.plan(70, 8, B * H) == (5, 2, 8)
    compiled.cache_clear()
    close(differentiate(arrays, chunk=8), want)
    compiled.cache_clear()


@pytest.mark.parametrize("kind", ["constant", "channel"])
def test_state_passing_equals_one_pass_with_gradients(x64, kind):
    arrays = draw(kind, 29)

    @jit
    def parts(arrays, seeds):
        def split(arrays):
            ys, state = [], arrays["state"]
            for at in (slice(0, 12), slice(12, 28), slice(28, 29)):
                part = {name: x[:, at] if x.shape[:2] == (B, 29) else x for name, x in arrays.items()}
                y, state = linear_attention(**(part | dict(state=state)), chunk=8)
                ys.append(y)
            return jnp.concatenate(ys, axis=1), state

        out, pull = jax.vjp(split, arrays)
        return *out, pull(seeds)[0]

    close(parts(arrays, cotangents(arrays)), differentiate(arrays, implementation="reference"))


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_a_weight_of_writes_is_a_factor_on_the_values(x64, implementation):
    arrays = draw("head", 9)
    write = np.random.default_rng(1).choice([0.0, 0.3, 2.0], size=(B, 9, H))
    q, k, v, log_decay = (arrays[name] for name in ("q", "k", "v", "log_decay"))

    def run(weighs, v, write):
        options = dict(write=write) if weighs else {}
        v = v if weighs else v * write[..., None]
        return linear_attention(q, k, v, log_decay, implementation=implementation, **options)

    cotangents = draw("none", 9, seed=2)["v"], arrays["state"]
    got, want = (jax.vjp(functools.partial(run, weighs), v, write) for weighs in (True, False))
    for a, b in zip((*got[0], *got[1](cotangents)), (*want[0], *want[1](cotangents)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="write: expected None with normalize"):
        linear_attention(q, k, v, log_decay, write=write, normalize=True)
    with pytest.raises(ValueError, match="write"):
        linear_attention(q, k, v, log_decay, write=write[..., :1])


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_the_state_is_left_out_when_it_is_not_asked_for(implementation):
    x = jnp.ones((1, 4, 1, 2))
    call = functools.partial(linear_attention, x, x, x, implementation=implementation)
    y, none = call(return_state=False)
    assert none is None and jnp.array_equal(y, call()[0])


def test_packed_equals_separate(x64):
    arrays = draw("channel", 20, batch=1)
    ids = np.array([[0] * 2 + [5] * 4 + [0] + [5] * 3 + [2] * 6 + [0] * 4], np.int32)
    take = lambda at: {name: x if name == "state" else x[:, at] for name, x in arrays.items()}
    first, second = np.flatnonzero(ids[0] == 5), np.flatnonzero(ids[0] == 2)
    y, state = run(arrays, ids, chunk=4)
    y0 = definition(**take(first))[0]
    y1, _, last, _ = definition(**(take(second) | dict(state=None)))
    close((y[:, first], y[:, second], state), (y0, y1, last))


def test_padding_alone_returns_the_state_and_its_contents_never_matter(x64):
    arrays, ids = draw("head", 12), np.array([[0] * 12, [0, 1, 1, 0, 1, 1, 1, 1, 2, 2, 0, 0]], np.int32)
    blank = lambda x: np.where((ids == 0).reshape(2, 12, *[1] * (x.ndim - 2)), np.nan, x)
    dirty = {name: x if name == "state" else blank(x) for name, x in arrays.items()}
    for name in ("reference", "chunked"):
        want = differentiate(arrays, ids, chunk=4, implementation=name)
        close(differentiate(dirty, ids, chunk=4, implementation=name), want)
        np.testing.assert_array_equal(want[1][0], arrays["state"][0])
        np.testing.assert_array_equal(want[2]["state"][0], cotangents(arrays)[1][0])
        assert np.all(np.asarray(want[0][0]) == 0)


@hypothesis.settings(max_examples=10)
@hypothesis.given(
    ids=st.lists(st.sampled_from([0, 1, 1, 2, 2, 3]), min_size=42, max_size=42),
    gates=st.lists(st.sampled_from(GATES), min_size=42 * H, max_size=42 * H),
)
def test_any_packing_and_gates_follow_the_definition(ids, gates):
    ids, gates = np.array(ids, np.int32).reshape(2, 21), np.array(gates).reshape(2, 21, H)
    channels = np.stack([gates, np.roll(gates, 1), np.roll(gates, 2), gates - 0.3], axis=-1)
    with jax.enable_x64(True):
        for log_decay in (gates, channels):
            arrays = draw("head", 21) | dict(log_decay=log_decay)
            close(run(arrays, ids, chunk=8), definition(**arrays, ids=ids)[::2])


def test_normalised_divides_by_the_sum_of_weights(x64):
    arrays, ids = draw("head", 21), ragged(21)
    arrays |= dict(q=np.exp(arrays["q"]), k=np.exp(arrays["k"]))
    above, below, s, z = definition(**(arrays | dict(state=None)), ids=ids)
    arrays |= dict(state=(np.zeros((B, H, K, V)), np.zeros((B, H, K))))
    options = dict(normalize=True, eps=0.25, scale=3.0, chunk=8)
    want = differentiate(arrays, ids, **options, implementation="reference")
    close(want[:2], (3 * above / (3 * below[..., None] + 0.25), (s, z)))
    close(differentiate(arrays, ids, **options), want)


def test_a_normalised_state_passes_on_and_where_no_key_was_met_y_is_zero(x64):
    arrays = {name: np.abs(x) for name, x in draw("none", 18).items() if name != "state"}
    arrays["k"][:, :3] = 0
    arrays |= dict(state=(np.zeros((B, H, K, V)), np.zeros((B, H, K))))
    y, state, grads = differentiate(arrays, normalize=True, chunk=4)
    above, below, *sums = definition(**(arrays | dict(state=None)))
    below[:, :3] = 1
    close((y, state), (above / below[..., None], tuple(sums)))
    assert np.all(np.asarray(y)[:, :3] == 0) and all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))

    parts, last = [], arrays["state"]
    for at in (slice(0, 7), slice(7, 8), slice(8, 18)):
        part = {name: x[:, at] for name, x in arrays.items() if name != "state"}
        part, last = run(part | dict(state=last), normalize=True, chunk=4)
        parts.append(part)
    close((jnp.concatenate(parts, axis=1), last), (y, state))


@pytest.mark.parametrize("packed", [False, True])
def test_bidirectional_reads_the_whole_segment(x64, packed):
    arrays = {name: x for name, x in draw("none", 19).items() if name != "state"}
    ids = ragged(19) if packed else None
    matrix = linear_mixing_matrix(arrays["q"], arrays["k"], segment_ids=ids, causal=False)
    mixed = np.einsum("bhts,bshv->bthv", np.repeat(matrix, H // HK, axis=1), arrays["v"])
    want = differentiate(arrays, ids, causal=False, implementation="reference")
    close(want[:2], (mixed, definition(**arrays, ids=ids)[2]))
    close(differentiate(arrays, ids, causal=False, chunk=4), want)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mixing_matrix_times_the_values_is_the_output(x64, kind):
    arrays, ids = draw(kind, 17) | dict(state=None), ragged(17)
    matrix = linear_mixing_matrix(arrays["q"], arrays["k"], arrays.get("log_decay"), scale=0.3, segment_ids=ids)
    matrix = np.repeat(matrix, H // matrix.shape[1], axis=1)
    close(np.einsum("bhts,bshv->bthv", matrix, arrays["v"]), 0.3 * definition(**arrays, ids=ids)[0])
    assert np.all(np.triu(matrix, 1) == 0)
