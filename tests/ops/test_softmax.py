"""Softmax attention: both forms against a loop in float64, merging, precision, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.ops import masks
from seqmix.ops.softmax import attention, merge

B, H, K, V = 2, 4, 4, 3


def draw(seed, *shape, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def tensors(time, keys, kv_heads=2, dtype=np.float64):
    """q, k, v, sink logits, and cotangents of y and lse. kv_heads: of keys and values, or (of keys, of values)."""
    of_keys, of_values = kv_heads if isinstance(kv_heads, tuple) else (kv_heads, kv_heads)
    inputs = (B, time, H, K), (B, keys, of_keys, K), (B, keys, of_values, V), (H,)
    outputs = (B, time, H, V), (B, H, time)
    return [draw(i, *shape, dtype=dtype) for i, shape in enumerate(inputs + outputs)]


def ragged(length, *lengths):
    """Segment ids [2, length]: runs 1, 2, ... of these lengths between padding left, right and inside."""
    row = [0, 0]
    for i, n in enumerate(lengths):
        row += [i + 1] * (n // 2) + [0] + [i + 1] * (n - n // 2)
    row = np.array((row + [0] * length)[:length], np.int32)
    return np.stack([row, np.roll(row, length // 3)])


def places(ids):
    """(run, position in its run) of each token by counting, for ids [B, T]."""
    out = np.zeros((2, *ids.shape), np.int64)
    for b, row in enumerate(ids):
        run, last, place = 0, 0, 0
        for t, name in enumerate(row):
            if name:
                run, place = (run, place) if name == last else (run + 1, 0)
                last = name
                out[:, b, t] = run, place
                place += 1
    return out


def loop(q, k, v, sink=None, *, causal=True, window=None, sinks=0, soft_cap=None, scale=None, **tokens):
    """(y, lse) pair by pair, from the definition."""
    batch, time, heads, _ = q.shape
    keys, group, value_group = k.shape[1], heads // k.shape[2], heads // v.shape[2]
    if "kv_segment_ids" in tokens or "segment_ids" not in tokens:
        q_ids = tokens.get("segment_ids", np.ones((batch, time)))
        k_ids = tokens.get("kv_segment_ids", np.ones((batch, keys)))
        default = [np.tile(np.arange(n), (batch, 1)) for n in (time, keys)]
    else:
        q_ids, place = places(tokens["segment_ids"])
        k_ids, default = q_ids, (place, place)
    q_at, k_at = tokens.get("q_positions", default[0]), tokens.get("kv_positions", default[1])
    y, lse = np.zeros((batch, time, heads, v.shape[-1])), np.full((batch, heads, time), -np.inf)
    for b, i, h in np.ndindex(batch, time, heads):
        scores, seen = [], []
        for j in range(keys):
            behind = int(q_at[b, i]) - int(k_at[b, j])
            near = window is None or abs(behind) < window or k_at[b, j] < sinks
            if q_ids[b, i] and q_ids[b, i] == k_ids[b, j] and near and (behind >= 0 or not causal):
                s = q[b, i, h] @ k[b, j, h // group] * (q.shape[-1] ** -0.5 if scale is None else scale)
                scores.append(s if soft_cap is None else soft_cap * np.tanh(s / soft_cap))
                seen.append(j)
        extra = [] if sink is None else [sink[h]]
        if scores or extra:
            top = max(scores + extra)
            lse[b, h, i] = top + np.log(sum(np.exp(s - top) for s in scores + extra))
        for s, j in zip(scores, seen):
            y[b, i, h] += np.exp(s - lse[b, h, i]) * v[b, j, h // value_group]
    return y, lse


def pull(implementation, block, options, sink):
    """(q, k, v, sink, dy, dlse) -> (y, lse, gradients), compiled."""

    def f(q, k, v, logits):
        more = {"sink_logits": logits} if sink else {}
        return attention(q, k, v, return_lse=True, implementation=implementation, block=block, **more, **options)

    @jax.jit
    def run(q, k, v, logits, dy, dlse):
        (y, lse), back = jax.vjp(f, q, k, v, logits)
        return y, lse, back((dy.astype(y.dtype), dlse.astype(lse.dtype)))

    return run


SHIFTED = {
    "q_positions": np.arange(63)[None] + np.array([[137], [40]]),
    "kv_positions": np.random.default_rng(0).permuted(np.tile(np.arange(200), (2, 1)), axis=1),
}
CROSS = {"segment_ids": np.repeat([[1, 2], [0, 1]], [31, 32], axis=1)} | {
    "kv_segment_ids": np.repeat([[1, 0, 2], [1, 2, 3]], [70, 40, 90], axis=1)
}
ONE = {"q_positions": np.array([[64], [3]]), "kv_positions": np.tile(np.arange(65), (2, 1))}
PACKED = ragged(200, 90, 5, 70)
BACK = np.where(PACKED == 3, 1, PACKED)  # an id that comes back
# name: (T, S, block, key heads, sink logits, options)
CASES = {
    "one token": (1, 1, 32, 2, False, {}),
    "one query": (1, 65, 32, 1, True, ONE),
    "causal": (63, 63, 32, 2, False, {"scale": 0.9}),
    "window and sinks": (64, 64, 32, (4, 2), True, {"window": 7, "sinks": 2, "soft_cap": 1.5}),
    "both sides": (65, 65, 64, 1, False, {"window": 9, "causal": False, "segment_ids": ragged(65, 20, 31)}),
    "packed": (200, 200, 64, 2, False, {"segment_ids": BACK}),
    "packed window": (200, 200, 32, (1, 2), True, {"window": 20, "sinks": 3, "segment_ids": PACKED}),
    "past the keys": (200, 65, 32, 2, False, {"window": 20}),
    "before the keys": (65, 200, 64, 2, True, {"window": 33, "causal": False}),
    "positions": (63, 200, 64, 2, False, {**SHIFTED, "window": 50, "sinks": 4}),
    "two sets of ids": (63, 200, 32, 2, False, {**CROSS, "causal": False, "soft_cap": 0.7}),
}


@functools.cache
def results(name):
    """Of the reference and of the chunked form."""
    time, keys, block, kv_heads, sink, options = CASES[name]
    forms = [pull(form, block, options, sink) for form in ("reference", "chunked")]
    return jax.tree.map(np.asarray, [form(*tensors(time, keys, kv_heads)) for form in forms])


@pytest.mark.parametrize("name", CASES)
def test_both_forms_equal_a_loop_and_share_gradients(x64, name):
    time, keys, _, kv_heads, sink, options = CASES[name]
    args = tensors(time, keys, kv_heads)
    y, lse = loop(*args[:3], args[3] if sink else None, **options)
    for y_form, lse_form, _ in results(name):  # some 200 terms in float64
        np.testing.assert_allclose(y_form, y, rtol=0, atol=1e-12)
        np.testing.assert_allclose(lse_form, lse, rtol=0, atol=1e-12)
    (*_, wants), (*_, gots) = results(name)
    for label, want, got in zip(("q", "k", "v", "sink"), wants, gots):
        assert np.all(np.isfinite(want)), label
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-11, err_msg=label)
        assert np.any(np.abs(want) > 1e-3) == (label != "sink" or sink) or time == 1, label


def test_rows_without_keys_are_zero_and_pass_no_gradient(x64):
    empty = BACK == 0
    assert 0 < empty.sum() < empty.size
    for y, lse, grads in results("packed"):
        assert np.all(y[empty] == 0)
        np.testing.assert_array_equal(np.isneginf(lse), np.repeat(empty[:, None], H, axis=1))
        for g in grads[:3]:
            assert np.all(g[empty] == 0) and np.any(g[~empty])


def test_parts_of_the_keys_merge_by_lse(x64):
    """Values and gradients, with a third part that no query sees; all parts empty give zero."""
    *args, dy, dlse = tensors(30, 30)
    at, ids = np.tile(np.arange(30), (B, 1)), np.ones((B, 30), np.int32)

    def whole(q, k, v, sink):
        return attention(q, k, v, sink_logits=sink, window=11, return_lse=True)

    def parts(q, k, v, sink):
        def part(low, high, seen=1, **kwargs):
            return attention(
                *(q, k[:, low:high], v[:, low:high]),
                **dict(segment_ids=ids, kv_segment_ids=seen * ids[:, low:high], window=11, return_lse=True),
                **dict(q_positions=at, kv_positions=at[:, low:high], **kwargs),
            )

        return merge([part(0, 13), part(13, 30, sink_logits=sink), part(0, 5, seen=0)])

    def pulled(f, *args):
        out, back = jax.vjp(f, *args)
        return out, back((dy[:, : out[0].shape[1]], dlse[:, :, : out[0].shape[1]]))

    want, got = (jax.jit(functools.partial(pulled, f))(*args) for f in (whole, parts))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=0, atol=1e-12), want, got)

    nothing = np.zeros((B, 3, H, V)), np.full((B, H, 3), -np.inf)
    (y, lse), grads = jax.jit(lambda x: pulled(lambda *parts: merge(parts), x, x))(nothing)
    assert np.all(y == 0) and np.all(np.isneginf(lse))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_bfloat16_is_close_to_float64_of_the_same_inputs(x64):
    """Root mean squares: 0.005 for y (one rounding of p and one of y), 0.01 for gradients."""
    rounded = [x.astype(jnp.bfloat16) for x in tensors(70, 70)]
    exact = pull("reference", 32, {}, True)(*(x.astype(np.float64) for x in rounded))
    y, lse, grads = pull("chunked", 32, {}, True)(*rounded)
    assert y.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16] * 4
    for got, want, bound in [(y, exact[0], 0.005), (lse, exact[1], 0.005), *zip(grads, exact[2], [0.01] * 4)]:
        error = np.sqrt(np.mean(np.square(got.astype(np.float64) - want)) / np.mean(np.square(want)))
        assert error <= bound


def test_large_logits_stay_finite():
    q, k, v, sink, dy, dlse = tensors(70, 70, dtype=np.float32)
    q, k = 300 * q, 300 * k
    scores = np.einsum("bihk,bjhk->bhij", q, np.repeat(k, 2, 2)) / 2
    assert np.abs(scores).max() > 1e5
    for form in ("reference", "chunked"):
        y, lse, grads = pull(form, 32, {}, True)(q, k, v, sink, dy, dlse)
        assert all(np.all(np.isfinite(x)) for x in (y, lse, *grads))
        top = np.where(np.tri(70, dtype=bool), scores, -np.inf).max(-1)
        np.testing.assert_allclose(lse, np.maximum(top, sink[None, :, None]), rtol=1e-4)


IDS = np.ones((B, 6), np.int32)
BIAS = draw(5, 1, 6, 7, 7)
REFUSALS = [
    ({"causal": "no"}, "causal: expected True or False"),
    (
        {"causal": np.ones((4, 4), bool)},
        "causal: expected True or False (a mask is given by mask=), got an array of bool of shape (4, 4)",
    ),
    ({"window": True}, "window: expected an integer >= 1, got True"),
    ({"implementation": ["gpu"]}, "implementation: expected one of"),
    (
        {"k": np.ones((B, 6, 3, K)), "v": np.ones((B, 6, 3, V))},
        "k: expected a number of heads that divides H=4, got Hk=3",
    ),
    ({"k": np.ones((B, 5, 2, K))}, "v: expected shape (B=2, S=5, Hv, V), got (2, 6, 2, 3)"),
    ({"v": np.ones((B, 6, 3, V))}, "v: expected a number of heads that divides H=4, got Hv=3"),
    ({"q": np.ones((B, 0, H, K))}, "q, k: expected at least one query"),
    ({"v": np.ones((B, 6, 2, 0))}, "q, v: expected at least one row and channels, got "),
    ({"v": np.ones((B, 6, 2, V), int)}, "v: expected a floating dtype, got int"),
    ({"window": 0}, "window: expected an integer >= 1, got 0"),
    ({"block": 0}, "block: expected an integer >= 1, got 0"),
    ({"sinks": -1}, "sinks: expected an integer >= 0"),
    ({"sinks": 2, "causal": False}, "sinks: expected 0 with causal=False, got 2"),
    ({"soft_cap": -1.0}, "soft_cap: expected a positive number, got -1.0"),
    ({"scale": np.ones(H)}, "scale: expected a finite number"),
    ({"sink_logits": np.ones(3)}, "sink_logits: expected shape (H=4), got (3,)"),
    ({"segment_ids": IDS.astype(float)}, "segment_ids: expected integers, got float"),
    ({"segment_ids": IDS[:, :5]}, "segment_ids: expected shape (B=2, T=6), got (2, 5)"),
    ({"kv_segment_ids": IDS}, "segment_ids: expected the queries' ids beside kv_segment_ids, got none"),
    ({"segment_ids": IDS[:, :3], "q": np.ones((B, 3, H, K))}, "kv_segment_ids: expected the keys' ids where"),
    ({"q_positions": IDS}, "kv_positions: expected both"),
    (
        {"implementation": "chunk"},
        "implementation: expected one of cudnn, tokamax, splash, gpu, tpu, chunked, reference",
    ),
]


@pytest.mark.parametrize("change, message", REFUSALS)
def test_refusals_name_the_argument(change, message):
    q, k, v, *_ = tensors(6, 6)
    with pytest.raises(ValueError) as error:
        attention(**({"q": q, "k": k, "v": v} | change))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{}, {"implementation": "reference"}, {"mask": masks.Causal()}, {"bias": BIAS}])
def test_heads_of_keys_and_of_values_need_not_divide_each_other(options, x64):
    """Two and three of six: the heads that query heads read, written out, give the same."""
    q, k, v = draw(0, B, 7, 6, K), draw(1, B, 7, 2, K), draw(2, B, 7, 3, V)
    options |= {"segment_ids": np.array([[1, 1, 1, 2, 2, 0, 0], [0, 3, 3, 3, 3, 3, 3]]), "return_lse": True, "block": 4}

    def pulled(expand, q, k, v):
        out, back = jax.vjp(lambda q, k, v: attention(q, *expand(k, v), **options), q, k, v)
        return out, back((draw(3, *out[0].shape), np.where(out[1] > -np.inf, draw(4, *out[1].shape), 0)))

    want = pulled(lambda k, v: (k[:, :, np.arange(6) // 3], v[:, :, np.arange(6) // 2]), q, k, v)
    got = pulled(lambda k, v: (k, v), q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-13), got, want)


def test_merge_refuses_no_parts_and_unequal_shapes():
    with pytest.raises(ValueError, match="parts: expected at least one"):
        merge([])
    y, lse = np.zeros((B, 6, H, V)), np.zeros((B, H, 6))
    with pytest.raises(ValueError, match="lse: expected shape"):
        merge([(y, lse), (y, lse[:, :, :5])])
    with pytest.raises(ValueError, match="lse: expected an array, got NoneType"):
        merge([(y, None)])
    with pytest.raises(ValueError, match="lse: expected a floating dtype, got int"):
        merge([(y, lse.astype(int))])
