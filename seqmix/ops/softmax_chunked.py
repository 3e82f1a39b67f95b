"""Softmax attention by blocks of queries and keys: memory linear in time, forward and backward.

The pairs of blocks that may see each other form a list. The forward pass walks it with a running maximum and
sum per row (online softmax, arXiv 1805.02867), the backward pass walks it again and recomputes the scores s
(arXiv 2205.14135, algorithm 4; 2307.08691, algorithm 2):

    p = exp(s - lse),  ds = p * (dy v^T - delta),  delta = sum(dy * y) - dlse

With indices for positions the list is known while tracing; segment ids and given positions shorten it at run
time. Shapes here are head-major, with J key heads and R query heads to each: q [B, J, R, T, K],
k [B, J, S, K], v [B, J, S, V]. Where values have heads of their own, v [B, J', S, V], the weights are regrouped
by them: no head is repeated.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.ops.heads import regrouped
from seqmix.ops.softmax_reference import Rules, visible


def block_sizes(time: int, keys: int, block: int) -> tuple[int, int]:
    """Sizes of a block of queries and of keys, at most `block`; a single query takes all keys at once."""

    def size(length):
        if length <= block:
            return length
        # Blocks of equal size, in sixteens: the last one is nearly full.
        each = -(-length // -(-length // block))
        return min(block, -(-each // 16) * 16)

    return (1, keys) if time == 1 else (size(time), size(keys))


def block_pairs(rules: Rules, time: int, keys: int, sizes: tuple[int, int], order: str) -> np.ndarray:
    """Pairs (query block, key block) that may see each other, [n, 2] int32.

    order: "index" when positions are indices and there are no segments; "runs" when positions grow with the
    index within a segment; "given" when nothing is known.
    """
    bq, bk = sizes
    first_q = np.arange(-(-time // bq))[:, None] * bq
    first_k = np.arange(-(-keys // bk))[None, :] * bk
    last_q, last_k = np.minimum(first_q + bq, time) - 1, np.minimum(first_k + bk, keys) - 1
    keep = np.ones((first_q.size, first_k.size), bool)
    if rules.causal and order != "given":
        keep &= first_k <= last_q
    if rules.window is not None and order == "index":
        near = first_q - last_k < rules.window
        if not rules.causal:
            near &= first_k - last_q < rules.window
        keep &= near | (first_k < rules.sinks)
    return np.argwhere(keep).astype(np.int32)


def _live(rules: Rules, pairs, sizes, q_ids, k_ids, q_positions, k_positions):
    """Whether a row of the batch may need a pair of blocks, [n] bool, by the ranges of ids and positions."""

    def span(values, ids, size):
        values, ids = (a.reshape(a.shape[0], -1, size) for a in jnp.broadcast_arrays(values, ids))
        info = jnp.iinfo(values.dtype)
        low = jnp.min(jnp.where(ids != 0, values, info.max), axis=-1)
        return low, jnp.max(jnp.where(ids != 0, values, info.min), axis=-1)

    def both(q_values, k_values):
        q_span, k_span = span(q_values, q_ids, sizes[0]), span(k_values, k_ids, sizes[1])
        return *(x[:, pairs[:, 0]] for x in q_span), *(x[:, pairs[:, 1]] for x in k_span)

    q_low, q_high, k_low, k_high = both(q_ids, k_ids)
    live = (q_low <= k_high) & (k_low <= q_high)
    q_low, q_high, k_low, k_high = both(q_positions, k_positions)
    if rules.causal:
        live &= k_low <= q_high
    if rules.window is not None:
        near = q_low - k_high < rules.window
        if not rules.causal:
            near &= k_low - q_high < rules.window
        live &= near | (k_low < rules.sinks)
    return jnp.any(live, axis=0)


def live_pairs(rules: Rules, pairs, sizes, tokens):
    """(pairs, count): those of the pairs of blocks that a row of the batch may need come first, `count` of them.

    tokens: ids and positions of queries and keys as `reference`, of whole blocks.
    """
    live = _live(rules, pairs, sizes, *tokens)
    return jnp.asarray(pairs)[jnp.argsort(~live, stable=True)], jnp.sum(live, dtype=jnp.int32)


def whole(x, size: int, axis: int):
    """x with zeros behind it, up to whole blocks of `size` along `axis`; ids of what is added are 0, so of padding."""
    width = -x.shape[axis] % size
    return jnp.pad(x, [(0, width if a == axis else 0) for a in range(x.ndim)]) if width else x


def chunked(rules: Rules, q, k, v, sink_logits, q_ids, k_ids, q_positions, k_positions, *, order, block):
    """(y [B, T, H, V], lse [B, H, T]); arguments as `reference`, `order` as `block_pairs`."""
    b, t, h, _ = q.shape
    s, groups = k.shape[1:3]
    sizes = block_sizes(t, s, block)
    pairs = block_pairs(rules, t, s, sizes, order)
    q_ids, q_positions = (whole(x, sizes[0], 1) for x in (q_ids, q_positions))
    k_ids, k_positions = (whole(x, sizes[1], 1) for x in (k_ids, k_positions))
    tokens = (q_ids, k_ids, q_positions, k_positions)
    work = pairs, len(pairs)
    if len(pairs) > 1 and order != "index":
        work = live_pairs(rules, pairs, sizes, tokens)
    q = jnp.moveaxis(whole(q, sizes[0], 1), 1, 2).reshape(b, groups, h // groups, -1, q.shape[-1])
    k, v = (jnp.moveaxis(whole(x, sizes[1], 1), 1, 2) for x in (k, v))
    sink = None if sink_logits is None else sink_logits.reshape(groups, h // groups)
    y, lse = _attend(rules, sizes, q, k, v, sink, tokens, work)
    y = jnp.moveaxis(y.reshape(b, h, *y.shape[3:])[:, :, :t], 2, 1)
    return y, lse.reshape(b, h, -1)[:, :, :t]


def _walk(body, carry, work):
    """`body(query block, key block, carry)` over the first `count` pairs."""
    pairs, count = work
    if isinstance(count, int) and count == 1:
        return body(pairs[0, 0], pairs[0, 1], carry)
    pairs = jnp.asarray(pairs)
    return jax.lax.fori_loop(0, count, lambda n, c: body(pairs[n, 0], pairs[n, 1], c), carry)


def _get(x, index, size, axis):
    return x if x.shape[axis] == size else jax.lax.dynamic_slice_in_dim(x, index * size, size, axis)


def _put(x, part, index, axis):
    if x.shape == part.shape:
        return part
    return jax.lax.dynamic_update_slice_in_dim(x, part, index * part.shape[axis], axis)


def _scores(rules, q, k, tokens, i, j, sizes, acc):
    """Scores [B, J, R, bq, bk] after the soft cap, and which of them count."""
    score = rules.scale * jnp.einsum("bjrtk,bjsk->bjrts", q, k, preferred_element_type=acc)
    if rules.soft_cap is not None:
        score = rules.soft_cap * jnp.tanh(score / rules.soft_cap)
    q_ids, k_ids, q_positions, k_positions = tokens
    q_ids, q_positions = (_get(x, i, sizes[0], 1) for x in (q_ids, q_positions))
    k_ids, k_positions = (_get(x, j, sizes[1], 1) for x in (k_ids, k_positions))
    return score, visible(rules, q_ids, k_ids, q_positions, k_positions)[:, None, None]


def part(rules: Rules, sizes, q, k, v, sink, tokens, work):
    """(y, lse), both in acc = promote(dtype, float32), of whole blocks of queries and keys.

    q [B, J, R, T, K], k [B, J, S, K], v [B, J', S, V], sink [J, R] or None; tokens and work as of `live_pairs`.
    """
    acc = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    rows = q.shape[:-1]
    top = jnp.full(rows, -jnp.inf, acc)
    total = jnp.zeros(rows, acc)
    if sink is not None:  # a first key, whose value is zero
        top, total = jnp.broadcast_to(sink.astype(acc)[:, :, None], rows), jnp.ones(rows, acc)

    def body(i, j, carry):
        y, top, total = carry
        y_i, old, sum_i = _get(y, i, sizes[0], 3), _get(top, i, sizes[0], 3), _get(total, i, sizes[0], 3)
        k_j, v_j = _get(k, j, sizes[1], 2), _get(v, j, sizes[1], 2)
        score, seen = _scores(rules, _get(q, i, sizes[0], 3), k_j, tokens, i, j, sizes, acc)
        score = jnp.where(seen, score, -jnp.inf)
        new = jnp.maximum(old, jnp.max(score, axis=-1))
        base = jnp.where(new > -jnp.inf, new, 0)  # rows that have seen nothing yet
        p = jnp.exp(score - base[..., None])
        keep = jnp.exp(old - base)
        sum_i = keep * sum_i + jnp.sum(p, axis=-1)
        p = regrouped(p.astype(v.dtype), v.shape[1])
        mixed = jnp.einsum("bjrts,bjsv->bjrtv", p, v_j, preferred_element_type=acc)
        y_i = keep[..., None] * y_i + regrouped(mixed, k.shape[1])
        return _put(y, y_i, i, 3), _put(top, new, i, 3), _put(total, sum_i, i, 3)

    y, top, total = _walk(body, (jnp.zeros((*rows, v.shape[-1]), acc), top, total), work)
    some = total > 0
    total = jnp.where(some, total, 1)
    return y / total[..., None], jnp.where(some, top + jnp.log(total), -jnp.inf)


def joined(a, b):
    """(y, lse) over the keys of both, as `attention`'s `merge`, in acc."""
    top = jnp.maximum(a[1], b[1])
    top = jnp.where(top > -jnp.inf, top, 0)
    mine, other = jnp.exp(a[1] - top), jnp.exp(b[1] - top)
    total = mine + other
    some = total > 0
    total = jnp.where(some, total, 1)
    y = (mine / total)[..., None] * a[0] + (other / total)[..., None] * b[0]
    return y, jnp.where(some, top + jnp.log(total), -jnp.inf)


def part_gradients(rules: Rules, sizes, q, k, v, tokens, work, lse, dy, delta):
    """Gradients of q, k and v, in acc, from this part of the keys.

    lse [B, J, R, T] and dy are of all parts together; delta = sum(dy * y) - dlse.
    """
    some = lse > -jnp.inf
    delta, base = jnp.where(some, delta, 0), jnp.where(some, lse, 0)
    acc = lse.dtype

    def body(i, j, carry):
        dq, dk, dv = carry
        q_i, dy_i, delta_i, base_i = (_get(x, i, sizes[0], 3) for x in (q, dy, delta, base))
        k_j, v_j = _get(k, j, sizes[1], 2), _get(v, j, sizes[1], 2)
        score, seen = _scores(rules, q_i, k_j, tokens, i, j, sizes, acc)
        p = jnp.exp(jnp.where(seen, score - base_i[..., None], -jnp.inf))
        dy_i = regrouped(dy_i, v.shape[1])
        dp = jnp.einsum("bjrtv,bjsv->bjrts", dy_i, v_j, preferred_element_type=acc)
        ds = rules.scale * p * (regrouped(dp, k.shape[1]) - delta_i[..., None])
        if rules.soft_cap is not None:
            ds *= 1 - jnp.square(score / rules.soft_cap)
        dq_i = jnp.einsum("bjrts,bjsk->bjrtk", ds.astype(k.dtype), k_j, preferred_element_type=acc)
        dk_j = jnp.einsum("bjrts,bjrtk->bjsk", ds.astype(q.dtype), q_i, preferred_element_type=acc)
        p = regrouped(p.astype(dy.dtype), v.shape[1])
        dv_j = jnp.einsum("bjrts,bjrtv->bjsv", p, dy_i, preferred_element_type=acc)
        dq = _put(dq, _get(dq, i, sizes[0], 3) + dq_i, i, 3)
        dk = _put(dk, _get(dk, j, sizes[1], 2) + dk_j, j, 2)
        return dq, dk, _put(dv, _get(dv, j, sizes[1], 2) + dv_j, j, 2)

    return _walk(body, tuple(jnp.zeros(x.shape, acc) for x in (q, k, v)), work)


def sink_gradient(sink, lse, delta):
    """Of the sink logits [J, R], in their dtype."""
    p = jnp.exp(sink.astype(lse.dtype)[:, :, None] - lse)
    return jnp.sum(-p * delta, axis=(0, 3)).astype(sink.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(rules, sizes, q, k, v, sink, tokens, work):
    y, lse = part(rules, sizes, q, k, v, sink, tokens, work)
    return y.astype(v.dtype), lse


def _attend_forward(rules, sizes, q, k, v, sink, tokens, work):
    y, lse = _attend(rules, sizes, q, k, v, sink, tokens, work)
    return (y, lse), (q, k, v, sink, tokens, work, y, lse)


def _attend_backward(rules, sizes, saved, cotangents):
    q, k, v, sink, tokens, work, y, lse = saved
    dy, dlse = cotangents
    delta = jnp.sum(dy.astype(lse.dtype) * y.astype(lse.dtype), axis=-1) - dlse
    grads = part_gradients(rules, sizes, q, k, v, tokens, work, lse, dy, delta)
    dq, dk, dv = (d.astype(x.dtype) for d, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv, None if sink is None else sink_gradient(sink, lse, delta), None, None


_attend.defvjp(_attend_forward, _attend_backward)
