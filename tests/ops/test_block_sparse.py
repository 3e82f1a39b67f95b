"""Block-sparse attention: the chunked form and its gradients against the dense matrix in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix import ops
from seqmix.ops import block_sparse_attention, block_sparse_chunked, masks, merge
from seqmix.ops.block_sparse import block_sparse_flops

B, H, HK, K, V = 2, 4, 2, 4, 3
# Both forms sum at most 200 terms of order one in float64, where rounding is 1e-16 of each.
CLOSE = {"rtol": 0, "atol": 1e-12}


@pytest.fixture(autouse=True)
def many_small_groups(monkeypatch):
    """Short sequences then take several groups, and several steps of several blocks, as long ones do."""
    monkeypatch.setattr(block_sparse_chunked, "OWN", 24)
    monkeypatch.setattr(block_sparse_chunked, "OTHER", 16)


def draw(seed, *shape, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def tensors(time, keys, dtype=np.float64):
    """(q, k, v, slopes) and cotangents of (y, lse)."""
    inputs = (B, time, H, K), (B, keys, HK, K), (B, keys, HK, V), (H,)
    outputs = (B, time, H, V), (B, H, time)
    drawn = [draw(i, *shape, dtype=dtype) for i, shape in enumerate(inputs + outputs)]
    return drawn[:3] + [np.abs(drawn[3]) / 8], drawn[4:]


def lists(seed, time, keys, sizes, lead=()):
    """Random lists of different blocks, with holes, rows of holes, and numbers that are no block."""
    rng = np.random.default_rng(seed)
    rows, count = -(-time // sizes[0]), -(-keys // sizes[1])
    width = max(1, count // 2)
    out = np.argsort(rng.random((*lead, rows, count + 3)), axis=-1)[..., :width].astype(np.int32)
    out[rng.random(out.shape) < 0.2] = -1
    out[..., rows // 2, :] = -1
    return out


def ids(time):
    """Two packed rows with padding at the left, inside and at the right."""
    row = np.zeros(time, np.int32)
    row[2 : time // 2], row[time // 2 + 3 : time - 4], row[time // 4] = 5, 7, 0
    return np.stack([row, np.sort(row)])


def positions(time):
    return {"q_positions": draw(7, B, time).argsort(1), "kv_positions": draw(8, B, time).argsort(1)}


def starts(time):
    first = np.random.default_rng(3).integers(0, time, (B, time))
    return {"starts": first, "ends": first + 20}


EMPTY_ROWS = masks.BlockTable(draw(5, 7, 5) > 0.3, 10, 9) & ~masks.Transpose(masks.Blocks(10))
SCORE = {"soft_cap": 1.5, "scale": 0.7}
CASES = {
    "one token": (1, 1, {"mask": masks.Causal(), "sizes": (4, 4)}),
    "one query": (1, 64, {"mask": masks.Causal(63) & masks.Strided(3), "sizes": (8, 8)}),
    "window and sinks": (
        63,
        63,
        {"mask": masks.Causal() & (masks.Window(9) | masks.Sinks(3)), "sizes": (8, 16)} | SCORE,
    ),
    "empty rows": (65, 40, {"mask": EMPTY_ROWS, "sizes": (8, 8)}),
    "not causal": (64, 64, {"mask": ~masks.Window(20, causal=False), "sizes": (16, 8)}),
    "grid": (
        70,
        70,
        {"mask": masks.Neighbourhood((7, 10), (4, 3), (2, 1), (1, 2), (True, False)), "sizes": (5, 10)} | SCORE,
    ),
    "packed": (65, 65, {"mask": masks.Causal(), "segment_ids": ids(65), "sizes": (8, 8)}),
    "positions": (33, 33, {"mask": masks.Positions(masks.Causal()), "data": positions(33), "sizes": (8, 4)}),
    "lists": (60, 51, {"blocks": lists(1, 60, 51, (8, 4), (B, HK)), "sizes": (8, 4)} | SCORE),
    "lists of a batch": (40, 40, {"blocks": jnp.asarray(lists(2, 40, 40, (8, 8), (B, 1))), "sizes": (8, 8)}),
    "one list and intervals": (
        200,
        200,
        {"blocks": lists(3, 200, 200, (16, 8)), "mask": masks.Intervals(), "data": starts(200), "sizes": (16, 8)},
    ),
    "lists of tokens": (
        37,
        37,
        {"blocks": lists(4, 37, 37, (1, 4), (1, HK)), "mask": masks.Causal(), "sizes": (1, 4)},
    ),
}


def with_gradients(implementation, inputs, cotangents, **kwargs):
    """y, lse (0 where it is -inf) and the gradients of q, k, v and the slopes."""

    def run(inputs, cotangents):
        def f(q, k, v, slopes):
            y, lse = block_sparse_attention(
                q, k, v, slopes=slopes, return_lse=True, implementation=implementation, **kwargs
            )
            return y, jnp.where(lse > -jnp.inf, lse, 0)

        out, back = jax.vjp(f, *inputs)
        return *out, *back(tuple(cotangents))

    return jax.jit(run)(inputs, cotangents)


@pytest.mark.parametrize("case", CASES)
def test_the_chunked_form_and_its_gradients_are_those_of_the_dense_matrix(x64, case):
    time, keys, kwargs = CASES[case]
    inputs, cotangents = tensors(time, keys)
    got = with_gradients("chunked", inputs, cotangents, **kwargs)
    want = with_gradients("reference", inputs, cotangents, **kwargs)
    for name, a, b in zip(("y", "lse", "dq", "dk", "dv", "dslopes"), got, want, strict=True):
        assert a.dtype == np.float64 and np.isfinite(a).all()
        np.testing.assert_allclose(a, b, **CLOSE, err_msg=name)
    assert np.abs(want[4]).max() > 0.1  # the case sees something


def test_the_reference_is_the_definition(x64):
    time, keys, sizes = 11, 14, (4, 3)
    blocks, mask = lists(6, time, keys, sizes, (B, HK)), masks.Causal(3)
    (q, k, v, slopes), _ = tensors(time, keys)
    y, lse = block_sparse_attention(
        *map(jnp.asarray, (q, k, v)),
        blocks=blocks,
        mask=mask,
        sizes=sizes,
        soft_cap=2.0,
        slopes=jnp.asarray(slopes),
        return_lse=True,
        implementation="reference",
    )
    empty = 0
    for b, h, i in np.ndindex(B, H, time):
        group = h // (H // HK)
        js = [j for j in range(keys) if j <= i + 3 and j // 3 in blocks[b, group, i // 4]]
        empty += not js
        scores = [2 * np.tanh(q[b, i, h] @ k[b, j, group] * K**-0.5 / 2) - slopes[h] * abs(i - j) for j in js]
        total = sum(np.exp(scores))
        want = sum((np.exp(s) * v[b, j, group] for s, j in zip(scores, js, strict=True)), np.zeros(V))
        np.testing.assert_allclose(y[b, i, h], want / total if js else 0, **CLOSE)
        np.testing.assert_allclose(lse[b, h, i], np.log(total) if js else -np.inf, **CLOSE)
    assert 0 < empty < B * H * time


def test_parts_of_the_keys_merge_into_the_whole_and_the_whole_is_attention(x64):
    time, near = 50, masks.Window(7)
    (q, k, v, _), cotangents = tensors(time, time)

    def joined(q, k, v):
        parts = near, masks.Causal() & ~near
        return merge([block_sparse_attention(q, k, v, mask=m, sizes=(8, 8), return_lse=True) for m in parts])

    def whole(q, k, v):
        return ops.attention(q, k, v, return_lse=True, block=16)

    def pulled(f):
        out, back = jax.vjp(f, q, k, v)
        return *out, *back(tuple(cotangents))

    for a, b in zip(jax.jit(lambda: pulled(joined))(), jax.jit(lambda: pulled(whole))(), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_bfloat16_stays_within_half_a_percent_of_float64_at_the_same_inputs():
    inputs, cotangents = tensors(64, 64, np.float32)
    low, back = ([jnp.asarray(x, jnp.bfloat16) for x in xs] for xs in (inputs, cotangents))
    back[1] = jnp.asarray(cotangents[1], jnp.float32)
    kwargs = {"mask": masks.Causal(), "sizes": (8, 8)}
    got = with_gradients("chunked", low, back, **kwargs)
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32] + [jnp.bfloat16] * 4
    with jax.enable_x64(True):
        high, exact = ([np.asarray(x, np.float64) for x in xs] for xs in (low, back))
        want = with_gradients("reference", high, exact, **kwargs)
    for name, a, b in zip(("y", "lse", "dq", "dk", "dv", "dslopes"), got, want, strict=True):
        b = np.asarray(b)
        error = np.asarray(a, np.float64) - b
        # 2^-9 of rounding in p, dS and the result, each relative to its own size
        assert np.sqrt(np.mean(error**2) / np.mean(np.square(b))) < 5e-3, name


def test_memory_grows_with_the_length_and_not_with_its_square(monkeypatch):
    monkeypatch.undo()

    def temporary(time):
        x = jax.ShapeDtypeStruct((1, time, 1, 8), jnp.float32)
        loss = jax.grad(lambda q, k, v: block_sparse_attention(q, k, v, mask=masks.Causal()).sum(), (0, 1, 2))
        return jax.jit(loss).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.2 * temporary(4096)


def test_flops_are_those_of_the_tiles_that_may_see():
    cost = {"time": 4096, "heads": 2, "key_dim": 64, "value_dim": 64, "batch": 3}
    full = block_sparse_flops(**cost, mask=~masks.Sinks(0))
    assert full > 2 * 128 * 4096**2 * 6
    assert block_sparse_flops(**cost, mask=masks.Causal()) == full * 33 / 64
    assert block_sparse_flops(**cost, mask=masks.Window(129)) == full * (2 * 32 - 1) / 32**2


BAD = {
    "mask: expected a mask, a list of blocks or segment_ids": {},
    "mask: expected a mask of ops.masks, got int": {"mask": 3},
    "data: expected nothing, which the mask takes, got 'starts'": {
        "blocks": np.zeros((2, 1), int),
        "data": {"starts": np.zeros((2, 8), int)},
    },
    "sizes: expected an integer >= 1": {"sizes": (0, 4)},
    "sizes: expected .queries, keys.": {"sizes": 4},
    "data: expected 'starts'": {"mask": masks.Intervals()},
    "data.'starts'.: expected .B=2 or 1, 8.": {
        "mask": masks.Intervals(),
        "data": dict.fromkeys(("starts", "ends"), np.zeros((3, 8), int)),
    },
    "blocks: expected .2, n. or": {"blocks": np.zeros((3, 1), np.int32)},
    "blocks: expected integers": {"blocks": np.zeros((2, 1))},
    "blocks: expected each block once in a list, got 1 twice": {"blocks": np.array([[1, 1], [0, 1]])},
    "scale: expected a finite number": {"scale": "x"},
    "soft_cap: expected a positive number": {"soft_cap": -1.0},
    "slopes: expected shape": {"slopes": np.zeros(3)},
    "segment_ids: expected integers": {"segment_ids": np.zeros((2, 8))},
    "implementation: expected one of gpu, tpu, chunked, reference": {"implementation": "triton"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_calls_are_refused_in_one_line(message):
    x = np.zeros((2, 8, 2, 4), np.float32)
    default = {"mask": masks.Causal()} if BAD[message] and "blocks" not in BAD[message] else {}
    with pytest.raises(ValueError, match=message) as error:
        block_sparse_attention(x, x, x, **{"sizes": (4, 4)} | default | BAD[message])
    assert "\n" not in str(error.value)
