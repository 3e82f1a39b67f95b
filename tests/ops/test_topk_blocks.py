"""Attention to chosen blocks: which are chosen, that the choice keeps to the past, and its limits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.ops import attention, block_sparse_attention, masks, topk_block_attention
from seqmix.ops.topk_blocks import choose_blocks, pooled_scores

B, H, HK, K, V = 2, 4, 2, 4, 3
CLOSE = {"rtol": 0, "atol": 1e-12}  # sums of some 40 terms in float64


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def tensors(time, keys=None):
    keys = keys or time
    return [jnp.asarray(draw(i, *s)) for i, s in enumerate([(B, time, H, K), (B, keys, HK, K), (B, keys, HK, V)])]


def chosen_by_sorting(scores, time, keys, sizes, count, local, first):
    """Sets of blocks, causal, by going through the definition."""
    out = []
    for a, row in enumerate(scores):
        begin, end = a * sizes[0], min((a + 1) * sizes[0], time) - 1
        forced = set(range(first)) | set(range(max(0, begin // sizes[1] - local + 1), end // sizes[1] + 1))
        allowed = [b for b in range(len(row)) if b * sizes[1] <= end]
        order = sorted(allowed, key=lambda b: (b not in forced, -row[b], b))
        out.append(set(order[:count]))
    return out


@pytest.mark.parametrize("sizes", [(4, 4), (8, 4), (1, 4), (4, 8), (3, 5)], ids=str)
@pytest.mark.parametrize("local, first", [(1, 0), (2, 1)])
def test_the_best_blocks_are_chosen_beside_the_forced_ones(sizes, local, first):
    time = 39
    scores = np.round(draw(3, B, HK, -(-time // sizes[0]), -(-time // sizes[1])), 1)  # with ties
    got = choose_blocks(jnp.asarray(scores), time, time, count=5, sizes=sizes, local=local, first=first)
    assert got.shape == (*scores.shape[:3], min(5, scores.shape[3]))
    for b, h in np.ndindex(B, HK):
        want = chosen_by_sorting(scores[b, h], time, time, sizes, 5, local, first)
        for row, blocks in zip(np.asarray(got[b, h]), want, strict=True):
            assert sorted(x for x in row if x >= 0) == sorted(blocks)


def test_pooled_scores_are_products_of_means(x64):
    q, k, _ = tensors(10, 7)
    heads = [slice(0, 2), slice(2, 4)]
    scores, per_head = (pooled_scores(q, k, (4, 3), pool="mean", per_head=x) for x in (False, True))
    early = pooled_scores(q, k, (4, 3))
    for b, j, a, c in np.ndindex(*scores.shape):
        mean = k[b, 3 * c : 3 * c + 3, j].mean(0)
        rows = q[b, 4 * a : 4 * a + 4, heads[j]].mean(0)
        np.testing.assert_allclose(scores[b, j, a, c], (rows @ mean).sum(), **CLOSE)
        np.testing.assert_allclose(per_head[b, heads[j], a, c], rows @ mean, **CLOSE)
        np.testing.assert_allclose(early[b, j, a, c], (q[b, 4 * a, heads[j]] @ mean).sum(), **CLOSE)
    assert scores.shape == (B, HK, 3, 3)


@pytest.mark.parametrize("sizes, per_head", [((1, 4), False), ((8, 4), True)], ids=str)
def test_chosen_blocks_give_the_dense_result_and_gradients(x64, sizes, per_head):
    time = 33
    q, k, v = tensors(time)
    scores = pooled_scores(q, k, sizes, per_head=per_head)

    def pulled(implementation):
        def f(q, k, v):
            given = scores if per_head else None
            return topk_block_attention(
                q, k, v, count=4, sizes=sizes, scores=given, return_lse=True, implementation=implementation
            )

        (y, lse), back = jax.vjp(f, q, k, v)
        return y, lse, *back((jnp.cos(y), jnp.sin(lse)))

    got, want = (jax.jit(pulled, static_argnums=0)(name) for name in ("chunked", "reference"))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    dense = attention(q, k, v)
    assert np.abs(got[0] - dense)[:, 20:].max() > 0.01  # something was left out


def test_all_blocks_are_attention_and_one_block_is_a_block_diagonal(x64):
    q, k, v = tensors(22)
    everything = jax.jit(lambda q, k, v: topk_block_attention(q, k, v, count=9, sizes=(1, 4)))(q, k, v)
    np.testing.assert_allclose(everything, attention(q, k, v), **CLOSE)
    own = topk_block_attention(q, k, v, count=1, sizes=(4, 4), implementation="reference")
    diagonal = block_sparse_attention(q, k, v, mask=masks.Causal() & masks.Blocks(4), implementation="reference")
    np.testing.assert_allclose(own, diagonal, **CLOSE)


@pytest.mark.parametrize("sizes", [(1, 4), (8, 4)], ids=str)
def test_later_tokens_change_nothing_before_them(sizes):
    tensors_ = [jnp.asarray(x, jnp.float32) for x in tensors(32)]
    run = jax.jit(lambda q, k, v: topk_block_attention(q, k, v, count=3, sizes=sizes, implementation="reference"))
    before = run(*tensors_)
    for cut in (9, 16, 22):
        after = run(*(x.at[:, cut:].set(-3 * x[:, cut:]) for x in tensors_))
        assert np.array_equal(before[:, :cut], after[:, :cut])
        assert not np.array_equal(before[:, cut:], after[:, cut:])


def test_packed_rows_of_whole_blocks_choose_as_they_would_alone(x64):
    q, k, v = tensors(32)
    ids = np.repeat([[1, 2], [4, 4]], [12, 20], axis=1)
    run = jax.jit(partial(topk_block_attention, count=3, sizes=(4, 4), implementation="reference"))
    packed = run(q, k, v, segment_ids=jnp.asarray(ids))
    for b, part in [(0, slice(0, 12)), (0, slice(12, 32)), (1, slice(0, 32))]:
        alone = run(*(x[b : b + 1, part] for x in (q, k, v)))
        np.testing.assert_allclose(packed[b : b + 1, part], alone, **CLOSE)


def test_queries_that_are_the_last_of_the_keys_are_those_of_the_whole_call(x64):
    """Decoding: one query at a time, and the last three together, with lists of their own."""
    q, k, v = draw(5, B, 13, H, K), draw(6, B, 13, HK, K), draw(7, B, 13, HK, K)
    options = {"count": 2, "sizes": (1, 4)}
    want = jax.jit(partial(topk_block_attention, **options))(q, k, v)
    for start in (10, 12):
        got = jax.jit(partial(topk_block_attention, **options, start=start))(q[:, start:], k, v)
        np.testing.assert_allclose(got, want[:, start:], **CLOSE)
    index = choose_blocks(jnp.zeros((1, 1, 1, 4)), 1, 11, count=1, sizes=(1, 3), start=10)
    assert index.tolist() == [[[[3]]]]


def test_what_is_no_number_comes_after_forced_blocks_and_minus_infinity_never():
    scores = jnp.array([0.0, jnp.nan, jnp.inf, 1.0])
    choose = lambda scores, count: choose_blocks(
        jnp.broadcast_to(scores, (1, 1, 4, 4)), 8, 8, count=count, sizes=(2, 2)
    )[0, 0].tolist()
    assert choose(scores, 1) == [[0], [1], [2], [3]]  # each its own, which is forced
    assert [sorted(row) for row in choose(scores, 2)] == [[-1, 0], [0, 1], [1, 2], [1, 3]]
    assert [sorted(row) for row in choose(jnp.array([1.0, -jnp.inf, 0.0, 0.0]), 3)[2:]] == [[-1, 0, 2], [0, 2, 3]]


BAD = {
    "count: expected at least the 3 forced blocks, got 2": {"count": 2, "local": 2, "first": 1},
    "count: expected an integer >= 1": {"count": 0},
    "start: expected an integer >= 0": {"count": 2, "start": -1},
    "segment_ids: expected shape": {"count": 2, "segment_ids": np.ones((2, 4), int)},
    "local: expected an integer >= 1": {"count": 2, "local": 0},
    "scores: expected .B, Hk=2 or H=2, nq, nk.": {"count": 2, "scores": np.zeros((2, 3, 4, 4))},
    "scores: expected shape .B, h, 4, 4.": {"count": 2, "scores": np.zeros((2, 2, 4, 3))},
    "scores: expected a floating dtype": {"count": 2, "scores": np.zeros((2, 2, 4, 4), int)},
    "sizes: expected .queries, keys.": {"count": 2, "sizes": 4},
    "blocks: topk_block_attention takes no such argument": {"count": 2, "blocks": np.zeros((4, 1), int)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_calls_are_refused_in_one_line(message):
    x = jnp.zeros((2, 16, 2, 4))
    with pytest.raises(ValueError, match=message) as error:
        topk_block_attention(x, x, x, **{"sizes": (4, 4)} | BAD[message])
    assert "\n" not in str(error.value)
