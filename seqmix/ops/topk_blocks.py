"""Attention to the blocks of keys with the best scores."""

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.core.shapes import boolean, check_arrays, dims, floating, positive
from seqmix.ops import block_groups, heads
from seqmix.ops.block_sparse import (
    by_name,
    check_mask,
    check_segments,
    checked_data,
    clipped,
    score_numbers,
    with_segments,
)
from seqmix.ops.mask_algebra import EMPTY, MOST
from seqmix.ops.masks import Blocks, Causal
from seqmix.ops.softmax import merge

SIZES = 64, 64
FEW = 8  # blocks that are looked for one by one
OPTIONS = "scale", "soft_cap", "slopes", "return_lse", "context", "implementation"  # that go on to the attention
NAME = "topk_block_attention"
PLACES = 32  # most blocks that the kernel looks for, in registers


def pooled_scores(q, k, sizes=SIZES, *, pool="first", per_head=False):
    """Scores of blocks of keys for blocks of queries, [B, Hk, nq, nk] (per_head: [B, H, nq, nk]), in acc.

        score_ab = qbar_a . kbar_b,    kbar_b the mean key of block b (of its real keys, in a ragged last block)

    qbar_a is the first query of block a, or with pool="mean" the mean of its queries; without per_head it is
    summed over the query heads of a key head. acc = promote(dtypes, float32). No scale: only the order counts.

    The score of a block of keys takes in all of its keys, and the mean all queries of a block, later ones too.
    Where that must not be, the first query is taken, and blocks not yet past are forced (`choose_blocks`).
    Raises ValueError for shapes that do not fit and another pool.
    """
    d = dims({"q": "B T H K", "k": "B S Hk K"}, q=q, k=k)
    if min(d.T, d.S) < 1:
        raise ValueError(f"q, k: expected at least one query and one key, got T={d.T}, S={d.S}")
    heads.check(d)
    per_head = boolean("per_head", per_head)
    if pool not in ("first", "mean"):
        raise ValueError(f"pool: expected first or mean, got {pool!r}")
    bq, bk = clipped(sizes, d.T, d.S)
    acc = jnp.promote_types(jnp.result_type(q, k), jnp.float32)

    def means(x, size):
        length = x.shape[1]
        x = jnp.pad(x.astype(acc), [(0, 0), (0, -length % size), (0, 0), (0, 0)])
        real = np.minimum(length - np.arange(0, length, size), size)
        return x.reshape(x.shape[0], -1, size, *x.shape[2:]).sum(2) / real[:, None, None].astype(acc)

    q = q[:, ::bq].astype(acc) if pool == "first" else means(q, bq)
    q, k = q.reshape(*q.shape[:2], d.Hk, d.H // d.Hk, d.K), means(k, bk)
    if per_head:
        return jnp.einsum("bajrk,bcjk->bjrac", q, k).reshape(d.B, d.H, q.shape[1], k.shape[1])
    return jnp.einsum("bajk,bcjk->bjac", q.sum(3), k)


def choose_blocks(
    scores,
    time,
    keys,
    *,
    count,
    sizes=SIZES,
    mask=None,
    data=None,
    segment_ids=None,
    local=1,
    first=0,
    start=0,
):
    """The `count` best blocks of keys of each block of queries, [B, h, nq, min(count, nk)] int32, -1 for none.

    scores: [B, h, nq, nk] floating, for blocks of `sizes` of `time` queries and `keys` keys. Equal scores: the
    lower block; -inf is never chosen, and what is no number before all but forced blocks, so that it is seen.
    start: index among the keys of the first query, as in decoding, where they are the last: S - T. Only blocks in
    which the mask (None: `masks.Causal(start)`), with its data and segment_ids as in `block_sparse_attention`, may
    see a pair are candidates. Of these, forced, and counted in `count`, are the first `first` blocks and the local
    ones: those in which the queries themselves are, and the local - 1 before. With a causal mask all other
    candidates then lie before the block's first query. No gradient passes.

    Raises ValueError for shapes and numbers that do not fit, and a count below the number of forced blocks.
    """
    positive("count", count)
    positive("local", local)
    positive("first", first, 0)
    positive("start", start, 0, MOST)
    bq, bk = clipped(sizes, time, keys)
    rows, columns = -(-time // bq), -(-keys // bk)
    d = dims({"scores": f"B h {rows} {columns}"}, scores=scores)
    floating(scores=scores)
    check_segments(segment_ids, d.B, time, keys)
    low = (start + np.arange(rows)[:, None] * bq) // bk
    high = (start + np.minimum((np.arange(rows)[:, None] + 1) * bq, time) - 1) // bk
    block = np.arange(columns)
    forced = (block < first) | ((block > low - local) & (block <= high))
    if count < min(columns, int(forced.sum(1).max())):
        raise ValueError(f"count: expected at least the {int(forced.sum(1).max())} forced blocks, got {count}")
    mask, data = with_segments(Causal(start) if mask is None else mask, data, segment_ids)
    data = checked_data(mask, time, keys, data, d.B)
    seen = jnp.asarray(mask.tiles(bq, bk, time, keys, data=data) != EMPTY)
    seen = seen[:, None] if seen.ndim == 3 else seen
    return best_blocks(jnp.where(seen, forced_first(scores, forced), -jnp.inf), min(count, columns))


def forced_first(scores, forced):
    """The scores, without a gradient, those of forced blocks above all others."""
    scores = jax.lax.stop_gradient(scores)
    return jnp.where(forced, jnp.inf, jnp.minimum(scores, jnp.finfo(scores.dtype).max))


def best_blocks(scores, count: int):
    """Index, int32, of the `count` greatest along the last axis, the lower of equal ones first; -1 for -inf.

    What is no number counts as the greatest finite one.
    """
    scores = jnp.where(jnp.isnan(scores), jnp.finfo(scores.dtype).max, scores)
    if not 0 < count <= FEW:
        best, index = jax.lax.top_k(scores, count)
        return jnp.where(best > -jnp.inf, index, -1).astype(jnp.int32)
    found = []
    for _ in range(count):  # passes: XLA's top_k for GPUs sorts
        index = jnp.argmax(scores, axis=-1).astype(jnp.int32)
        found.append(jnp.where(jnp.max(scores, axis=-1) > -jnp.inf, index, -1))
        scores = jnp.where(jnp.arange(scores.shape[-1]) == index[..., None], -jnp.inf, scores)
    return jnp.stack(found, axis=-1)


def best_in_ranges(scores, low, high, count: int, implementation=None):
    """`best_blocks` of scores [B, h, n, T] from low to high - 1, both [B, T]: [B, h, T, min(count, n)] int32.

    implementation: "gpu" (Hopper kernel, for float32 and up to 32 places; takes nothing for NaN) or None, which sorts.
    """
    count = min(count, scores.shape[2])
    if implementation == "gpu" and count <= PLACES:
        from pallas_kernels.block_sparse_attention import best_gpu

        filled = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % best_gpu.TOKENS)])
        found = best_gpu.best(filled(scores), filled(low), filled(high), count=count)
        return jnp.swapaxes(found[..., : scores.shape[-1]], 2, 3)
    place = jnp.arange(scores.shape[2])
    inside = (place >= low[..., None]) & (place < high[..., None])
    return best_blocks(jnp.where(inside[:, None], jnp.swapaxes(scores, 2, 3), -jnp.inf), count)


def topk_block_attention(
    q,
    k,
    v,
    *,
    count,
    sizes=SIZES,
    scores=None,
    mask=None,
    local=1,
    first=0,
    start=0,
    data=None,
    segment_ids=None,
    **options,
):
    """Softmax attention of queries [B, T, H, K] to the `count` best blocks of keys for each block of queries.

    k [B, S, Hk, K], v [B, S, Hk, V]: as many value heads as key heads.

    `choose_blocks` takes the blocks, of `sizes` (bq, bk), by the scores, and `block_sparse_attention` attends
    to what the mask shows in them: its arguments, with scale, soft_cap, slopes, return_lse and implementation in
    `options`, its results and its errors. sizes[0] = 1 chooses for each token.

    scores: [B, Hk, nq, nk], shared by the query heads of a key head, or [B, H, nq, nk], one choice for each query
      head, for which k and v are repeated to H heads; None: `pooled_scores` of the first queries. Given scores
      have to keep to the past themselves. They get no gradient, and for sizes[0] = 1 they are T S / bk numbers a head.
    mask: None is `masks.Causal(start)`.
    start: index among the keys of the first query. The last T of S tokens, as in decoding, have start = S - T: then
      each row is that of the whole call, with sizes[0] = 1 and scores of its own query.
    segment_ids: as in `block_sparse_attention`. Where segments are whole blocks, each chooses as it would alone;
      elsewhere the means of keys cross their borders. Blocks forced by `first` are those of the row.
    """
    d = dims({"q": "B T H K", "k": "B S Hk K", "v": "B S Hk V"}, q=q, k=k, v=v)
    heads.check(d)
    floating(q=q, k=k, v=v)
    for name in options:
        if name not in OPTIONS:
            raise ValueError(f"{name}: topk_block_attention takes no such argument; it takes {', '.join(OPTIONS)}")
    return_lse = boolean("return_lse", options.pop("return_lse", False))
    score_numbers(q, options.get("scale"), options.get("soft_cap"))
    check_mask(mask, data)
    check_segments(segment_ids, d.B, d.T, d.S)
    positive("start", start, 0, MOST)
    mask = Causal(start) if mask is None else mask
    scores = pooled_scores(q, k, sizes) if scores is None else scores
    check_arrays(scores=scores)
    if scores.ndim != 4 or scores.shape[1] not in (d.Hk, d.H):
        raise ValueError(f"scores: expected [B, Hk={d.Hk} or H={d.H}, nq, nk], got {tuple(scores.shape)}")
    chosen = {"sizes": sizes, "mask": mask, "data": data, "segment_ids": segment_ids}
    blocks = choose_blocks(scores, d.T, d.S, count=count, local=local, first=first, start=start, **chosen)
    listed = k, v
    if scores.shape[1] != d.Hk:
        listed = tuple(jnp.repeat(x, d.H // d.Hk, axis=2) for x in (k, v))
    apart = sizes[0] == 1 and mask == Causal() and not start and d.T == d.S >= block_groups.LEAST
    if apart and options.get("implementation") != "reference":
        y, lse = _own_and_others(q, (k, v), listed, blocks, int(sizes[1]), segment_ids=segment_ids, **options)
    else:
        y, lse = by_name(NAME, q, *listed, blocks=blocks, **chosen, **options)
    return (y, lse) if return_lse else y


def _own_and_others(q, keys, listed, blocks, size, **options):
    """(y, lse), causal, where lists [B, h, T, n] name each token's own block: of the others all keys are visible."""
    step = next((n for n in (128, 64) if size % n == 0), None)
    if step is None:
        near = {"mask": Causal() & Blocks(size)}
    else:
        first = np.arange(0, q.shape[1], step)[:, None] // size * size // step
        tiles = first + np.arange(size // step)
        near = {"mask": Causal(), "blocks": tiles.astype(np.int32), "sizes": (step, step)}
    parts = [by_name(NAME, q, *keys, **near, **options)]
    if blocks.shape[-1] > 1:
        own = (jnp.arange(q.shape[1]) // size)[:, None]
        place = jnp.argmax(blocks == own, axis=-1, keepdims=True)
        others = jnp.where(jnp.arange(blocks.shape[-1] - 1) < place, blocks[..., :-1], blocks[..., 1:])
        parts.append(by_name(NAME, q, *listed, blocks=others, sizes=(1, size), **options))
    return merge(parts)
