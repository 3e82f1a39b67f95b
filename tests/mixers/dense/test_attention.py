"""The attention mixer: forward against loops, decoding, packing, the mixing matrix, costs."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param, sharding
from seqmix.core.mixer import state_shapes
from seqmix.core.param import Param
from seqmix.mixers.dense.attention import Attention
from tests.collectives import sent

B, T, D = 4, 23, 12

MIXERS = {
    "mha": Attention(d_model=D, heads=3),
    "gqa": Attention(d_model=D, heads=4, kv_heads=2, head_dim=6, qk_norm=True, soft_cap=1.5),
    "mqa": Attention(d_model=D, heads=2, kv_heads=1, window=5, sinks=2, rope_fraction=1 / 3, block=16),
    "window": Attention(d_model=D, heads=2, window=4, rope=False, sink_logits=True),
    "both sides": Attention(d_model=D, heads=2, causal=False, window=6),
}
DECODING = [name for name, mixer in MIXERS.items() if mixer.decodes]


def weights(mixer):
    """Random weights in float64, scales and sinks too."""
    draw = np.random.default_rng(0)
    return param.map_params(lambda p: 0.4 * draw.normal(size=p.shape), mixer.params())


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


# One compiled function each for all tests, which keep to its shapes.
@functools.cache
def forward(mixer):
    return jax.jit(lambda p, x, ids=None: mixer.forward(p, x, segment_ids=ids)[0])


@functools.cache
def prefill(mixer):
    return jax.jit(lambda p, x, s, ids=None: mixer.prefill(p, x, s, segment_ids=ids))


def by_loops(mixer, params, x):
    """y of one row x [T, D], token by token."""
    width, group = params["q"].shape[-1], params["q"].shape[1] // params["k"].shape[1]
    n = round(width * mixer.rope_fraction) if mixer.rope else 0
    y = np.zeros_like(x)

    def project(name, t, h):
        u = x[t] @ params[name][:, h]
        if name != "v" and mixer.qk_norm:
            u = u / np.sqrt(np.mean(u * u) + mixer.norm_eps) * params[f"{name}_norm"]["scale"]
        if name != "v":
            turned = u.copy()
            for i in range(n // 2):
                a = t * mixer.rope_base ** (-2 * i / n)
                turned[i] = u[i] * np.cos(a) - u[i + n // 2] * np.sin(a)
                turned[i + n // 2] = u[i] * np.sin(a) + u[i + n // 2] * np.cos(a)
            u = turned
        return u

    for t, h in np.ndindex(len(x), params["q"].shape[1]):
        q, total, mixed = project("q", t, h), 0.0, 0.0
        for s in range(len(x)):
            if mixer.causal and s > t:
                continue
            if mixer.window and abs(t - s) >= mixer.window and s >= mixer.sinks:
                continue
            score = q @ project("k", s, h // group) / np.sqrt(width)
            if mixer.soft_cap:
                score = mixer.soft_cap * np.tanh(score / mixer.soft_cap)
            total += np.exp(score)
            mixed += np.exp(score) * project("v", s, h // group)
        if mixer.sink_logits:
            total += np.exp(params["sink_logits"][h])
        y[t] += mixed / total @ params["out"][h]
    return y


@pytest.mark.parametrize("name", MIXERS)
def test_forward_equals_loops_and_the_mixing_matrix(x64, name):
    mixer, x = MIXERS[name], draw(1, B, T, D)
    params = weights(mixer)
    y = forward(mixer)(params, x)
    np.testing.assert_allclose(y[1], by_loops(mixer, params, x[1]), atol=1e-12)

    @jax.jit
    def by_matrix(params, x, ids):
        values, context = mixer.project(params, x, segment_ids=ids)
        matrix = mixer.mixing_matrix(params, x, segment_ids=ids)
        assert values.shape[:3] == (B, T, mixer.heads) and matrix.shape == (B, mixer.heads, T, T)
        return mixer.merge(params, context, jnp.einsum("bgts,bsgv->btgv", matrix, values))

    ids = np.array([[0] * 3 + [1] * 7 + [0] + [1] * 2 + [5] * 6 + [1] * 4] * B, np.int32)
    packed = forward(mixer)(params, x, ids)
    np.testing.assert_allclose(by_matrix(params, x, None), y, atol=1e-12)
    np.testing.assert_allclose(by_matrix(params, x, ids), packed, atol=1e-12)
    assert np.all(np.asarray(packed)[ids == 0] == 0)


@pytest.mark.parametrize("name", MIXERS)
def test_packed_equals_separate(x64, name):
    """Three segments among padding, which inside a segment does not advance the window."""
    mixer, x = MIXERS[name], draw(2, 1, T, D)
    members = np.r_[1:5, 7:12], np.r_[12:14], np.r_[15:23]
    ids, rows = np.zeros((B, T), np.int32), np.repeat(x, B, axis=0)
    for i, (where, label) in enumerate(zip(members, (3, 1, 3))):
        ids[0, where] = label
        ids[i + 1, : len(where)] = 1
        rows[i + 1, : len(where)] = x[0, where]
    y = forward(mixer)(weights(mixer), rows, ids)
    for i, where in enumerate(members):
        np.testing.assert_allclose(y[0, where], y[i + 1, : len(where)], atol=1e-12)


def test_positions_only_rotate(x64):
    """Shifted as a whole they change nothing; stretched they do, and later tokens stay hidden."""
    mixer, x = MIXERS["mqa"], draw(3, B, T, D)
    params, at = weights(mixer), np.tile(np.arange(T), (B, 1))
    run = jax.jit(lambda x, at: mixer.forward(params, x, positions=at)[0])
    plain = forward(mixer)(params, x)
    np.testing.assert_allclose(run(x, at + 100), plain, atol=1e-10)
    assert np.abs(run(x, 5 * at) - plain).max() > 1e-3
    changed = x.copy()
    changed[:, -1] += 1
    np.testing.assert_array_equal(run(changed, -at)[:, :-1], run(x, -at)[:, :-1])


@pytest.mark.parametrize("name", DECODING)
def test_any_split_over_prefill_and_step_equals_forward(x64, name):
    mixer, x = MIXERS[name], draw(4, B, T, D)
    params, run = weights(mixer), prefill(mixer)
    want = forward(mixer)(params, x)
    for lengths in ((13,) + (1,) * 10, (1,) * 10 + (13,)):
        state, ys, start = mixer.init_state(params, B, T, jnp.float64), [], 0
        for n in lengths:
            y, state = run(params, x[:, start : start + n], state, np.ones((B, n), np.int32))
            ys.append(y)
            start += n
        np.testing.assert_allclose(np.concatenate(ys, axis=1), want, atol=1e-12)
        assert state["length"].tolist() == [T] * B


@pytest.mark.parametrize("name", DECODING)
def test_ragged_prompts_continue_like_whole_ones(x64, name):
    """Padded left, right after an older segment, inside; then padding alone, tokens in turn, a new sequence."""
    mixer, x = MIXERS[name], draw(5, B, T, D)
    params, run = weights(mixer), prefill(mixer)
    whole, own = forward(mixer)(params, x), [13, 8, 6, 11]  # tokens of each prompt
    ids, prompt = np.zeros((B, 13), np.int32), draw(6, B, 13, D)
    ids[2, :3] = 9
    slots = [np.r_[:13], np.r_[5:13], np.r_[4:10], np.r_[:5, 7:13]]
    for b in range(B):
        ids[b, slots[b]] = 2
        prompt[b, slots[b]] = x[b, : own[b]]
    y, state = run(params, prompt, mixer.init_state(params, B, T, jnp.float64), ids)
    assert np.all(np.asarray(y)[ids == 0] == 0) and state["length"].tolist() == own
    for b in range(B):
        np.testing.assert_allclose(y[b, slots[b]], whole[b, : own[b]], atol=1e-12)

    same = run(params, prompt, state, 0 * ids)[1]
    jax.tree.map(np.testing.assert_array_equal, same, state)
    for t in range(10):
        going = np.array([[t % 2], [1], [1], [t % 3 > 0]], np.int32)
        new = np.stack([x[b, n : n + 1] for b, n in enumerate(own)])
        y, state = run(params, new, state, going)
        for b in range(B):
            want = whole[b, own[b]] if going[b, 0] else np.zeros(D)
            np.testing.assert_allclose(y[b, 0], want, atol=1e-12)
            own[b] += int(going[b, 0])

    new, ids = np.roll(x[:, :13], 1, axis=1), np.repeat([[1, 2]] * B, [1, 12], axis=1).astype(np.int32)
    y, state = run(params, new, state, ids)
    assert state["length"].tolist() == [12] * B
    np.testing.assert_allclose(y[:, 1:], whole[:, :12], atol=1e-12)


def test_gradients_through_the_state_equal_those_of_one_pass(x64):
    """Without segment ids, and with a step."""
    mixer, x = dataclasses.replace(MIXERS["mqa"], block=T), draw(7, 1, T, D)
    params, weight = weights(mixer), draw(8, 1, T, D)

    def split(params, x):
        y, state = mixer.prefill(params, x[:, :-1], mixer.init_state(params, 1, T, jnp.float64))
        last, _ = mixer.step(params, x[:, -1:], state)
        return jnp.sum(y * weight[:, :-1]) + jnp.sum(last * weight[:, -1:])

    def whole(params, x):
        return jnp.sum(mixer.forward(params, x)[0] * weight)

    want, got = (jax.jit(jax.grad(f, (0, 1)))(params, x) for f in (whole, split))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-11), want, got)


def test_the_cache_is_bounded_by_window_and_sinks():
    mixer = Attention(d_model=16, heads=4, kv_heads=2, window=6, sinks=3)
    params = param.abstract(mixer.params())
    for context, slots in ((1000, 9), (7, 7)):
        shapes = state_shapes(mixer, params, 5, context, jnp.bfloat16)
        assert shapes["k"].shape == shapes["v"].shape == (5, slots, 2, 4) and shapes["k"].dtype == jnp.bfloat16
        elements = sum(np.prod(s.shape[1:]) for s in jax.tree.leaves(shapes))
        assert elements == mixer.state_size(context)
    axes = mixer.state_axes()
    assert axes.keys() == shapes.keys()
    assert all(len(axes[key]) == shapes[key].ndim for key in axes)


def test_bfloat16_stays_bfloat16():
    mixer, x = MIXERS["gqa"], draw(9, B, T, D).astype(np.float32)
    params = jax.tree.map(np.float32, weights(mixer))
    state = mixer.init_state(params, B, T, jnp.bfloat16)
    y, state = prefill(mixer)(params, jnp.asarray(x, jnp.bfloat16), state)
    assert y.dtype == state["k"].dtype == jnp.bfloat16
    exact, y = (np.asarray(a, np.float64) for a in (forward(mixer)(params, x), y))
    # Roundings of x, weights, q, k, v, p and y, 2^-9 each.
    assert np.sqrt(np.mean((y - exact) ** 2) / np.mean(exact**2)) < 0.02


@pytest.mark.parametrize(
    "fields",
    [
        dict(heads=4, kv_heads=2),
        dict(heads=4, qk_norm=True, soft_cap=2.0, window=8, sinks=1, sink_logits=True),
        dict(heads=2, head_dim=64, causal=False, rope_fraction=0.5),
    ],
)
def test_flops_are_what_xla_counts(fields):
    mixer = Attention(d_model=128, **fields)
    x = jax.ShapeDtypeStruct((2, 64, 128), jnp.float32)
    lowered = forward(mixer).lower(param.abstract(mixer.params()), x)
    for stage in (lowered, lowered.compile()):
        assert mixer.flops(2, 64) == pytest.approx(stage.cost_analysis()["flops"], rel=0.03)


def test_weights_are_declared_with_their_axes():
    mixer = Attention(d_model=32, heads=4, kv_heads=2, head_dim=16, qk_norm=True, sink_logits=True)
    tree = mixer.params()
    shapes = {name: p.shape for name, p in param.entries(tree)}
    assert shapes == {
        **{"q": (32, 4, 16), "k": (32, 2, 16), "v": (32, 2, 16), "out": (4, 16, 32)},
        **{"q_norm/scale": (16,), "k_norm/scale": (16,), "sink_logits": (4,)},
    }
    assert tree["out"].fan_in == 64 and isinstance(tree["out"], Param)
    assert {name for name, p in param.entries(tree) if not p.decay} == set(shapes) - {"q", "k", "v", "out"}


@pytest.mark.parametrize(
    "context, moved", [("ring", "collective-permute"), ("zigzag", "collective-permute"), ("heads", "all-to-all")]
)
def test_the_form_over_a_context_axis_is_a_field(context, moved):
    mixer, x = dataclasses.replace(MIXERS["gqa"], context=context), draw(1, 2, 32, D).astype(np.float32)
    params = jax.tree.map(np.float32, weights(mixer))
    forward = lambda x: mixer.forward(params, x)[0]
    want = jax.jit(forward)(x)
    mesh = sharding.make_mesh(context=4, data=2)
    with sharding.use_mesh(mesh):
        program = jax.jit(forward).lower(x).compile()
        got = program(x)
    assert moved in sent(program.as_text())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # some ten values of order one, in float32
