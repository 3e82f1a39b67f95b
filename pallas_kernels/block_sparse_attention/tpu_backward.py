"""Gradients of block-sparse attention, on TPUs.

    p_ij = exp(s_ij - lse_i),  s_ij = scale q_i k_j,  ds_ij = p_ij (dy_i v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij dy_i

(arXiv 2307.08691, algorithm 2), over the pairs of listed tiles. One kernel walks, for each block of queries, its key
blocks and adds up dq; the other walks, for each block of keys, the query blocks that list it, of all heads that share
the keys, and adds up dk and dv. Its tiles have keys as their rows, so that no tile is transposed for a product and what
belongs to queries, lse and delta, lies in the lanes as it does in memory. Both compute the scores anew.
"""

import functools
import math

import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.block_sparse_attention import tpu
from pallas_kernels.block_sparse_attention.tpu import LANES, LOG2_E, Call, Step, across, dot, part


def backward(
    q,
    k,
    v,
    rows,
    dy,
    walk,
    turned,
    *,
    sizes,
    visible=None,
    q_data=None,
    k_data=None,
    scale,
    soft_cap=None,
    steps=None,
):
    """Gradients (dq, dk, dv) of block-sparse attention in the shapes and dtypes of q, k and v.

    q [B, T, H, K], k [B, S, Hk, K], v [B, S, Hk, V], dy [B, T, H, V]; head h reads key head h // (H // Hk). rows:
    [B, H, 2, T] float32, as `plan.rows` of lse and delta. turned: the walk of blocks of keys over the query blocks
    that list them. All else is as of `tpu.forward`.
    """
    steps = (walk[2].shape[2], turned[2].shape[2] + turned[0].shape[2]) if steps is None else steps
    options = dict(sizes=sizes, visible=visible, scale=scale, soft_cap=soft_cap, steps=steps)
    return _gradients(q, k, v, rows, dy.astype(q.dtype), walk, turned, q_data=q_data, k_data=k_data, **options)


def _gradients(q, k, v, rows, dy, walk, turned, *, q_data, k_data, sizes, visible, scale, soft_cap, steps):
    words = tuple(map(tpu.laid, (walk, turned), steps))
    if any(map(tpu.oversized, words)):
        options = dict(sizes=sizes, visible=visible, scale=scale, soft_cap=soft_cap, steps=steps)
        return tpu.by_row(functools.partial(_gradients, **options), (q, k, v, rows, dy), (walk, turned), q_data, k_data)
    seen, data, facts = tpu.prepared(visible, q_data, k_data, q.shape[1], k.shape[1])
    given = {name: ("queries", tpu.packed(x)) for name, x in {"q": q, "dy": dy}.items()}
    given |= {name: ("keys", tpu.packed(x)) for name, x in {"k": k, "v": v}.items()}
    given |= {"rows": ("row", rows), **facts}
    options = dict(scale=scale, soft_cap=soft_cap)
    calls = [Call.of(q, k, sizes, x.shape, seen, data, keys_own=own, **options) for own, x in zip((False, True), words)]
    widths = q.shape[3], v.shape[3]
    (dq,) = _run(calls[0], words[0], given, _dq_body, [("queries", q)], widths)
    dk, dv = _run(calls[1], words[1], given, _dkv_body, [("keys", k), ("keys", v)], widths)
    return tpu.unpacked(dq, q.shape[2]), *(tpu.unpacked(x, k.shape[2]) for x in (dk, dv))


def _run(call, words, given, make, outputs, widths):
    """The outputs of one of the two kernels."""
    names = list(given)
    if call.keys_own:
        name, products = "dkv", (2, 2)
        scratch = [compat.tpu_scratch(call.key_heads, call.own, width) for width in widths]
    else:
        name, products = "dq", (2, 1)
        scratch = [compat.tpu_scratch(call.together, call.own, widths[0])]
        scratch.append(compat.tpu_scratch(call.together, 2, call.own, LANES))
    facts = tpu.own_facts(call)

    def body(words, *refs):
        here, rest = dict(zip(names, refs)), refs[len(names) :]
        step = Step(call, words, here, *rest[len(rest) - len(facts) :])
        make(call, step, here, rest[: len(outputs)], rest[len(outputs) : len(rest) - len(facts)])

    pairs = math.prod(call.grid) * call.together * math.prod(call.sizes)
    return compat.tpu_kernel(
        body,
        grid=call.grid,
        parallel=2,
        inputs=[call.spec(*given[name]) for name in names],
        outputs=[call.spec(kind, tpu.shaped(x.shape, x.dtype)) for kind, x in outputs],
        scratch=scratch + facts,
        name=f"block_sparse_attention_{name}",
        flops=2 * pairs * sum(n * width for n, width in zip(products, widths)),
        exponentials=pairs,
        prefetch=[words.reshape(-1)],
    )


def _weights(step, products, lse, hides):
    """p of a tile, 0 where hidden, and p times the derivative of the soft cap."""
    call = step.call
    if call.soft_cap is None:
        p = jnp.exp2(products * (call.scale * LOG2_E) - lse)
        p = step.hide(p, 0.0) if hides else p
        return p, p
    bent = jnp.tanh(products * (call.scale / call.soft_cap))
    p = jnp.exp2(bent * (call.soft_cap * LOG2_E) - lse)
    p = step.hide(p, 0.0) if hides else p
    return p, p - p * bent * bent


def _dq_body(call, step, here, outputs, scratch):
    (dq,), (acc, columns) = outputs, scratch

    @pl.when(step.starts)
    def _():
        acc[...] = jnp.zeros_like(acc)
        for head in range(call.together):
            for n in range(2):
                columns[head, n] = tpu.column(here["rows"][head, n : n + 1])
        step.keep_facts()

    def add(hides):
        for head in range(call.together):
            key, value = (part(here[name], call.key_head(head), call.key_heads) for name in "kv")
            lse, delta = (across(columns[head, n], call.other) for n in range(2))
            query, dy = (part(here[name], head, call.together) for name in ("q", "dy"))
            _, bent = _weights(step, dot(query, key, 1, 1), lse, hides)
            ds = bent * (dot(dy, value, 1, 1) - delta)
            acc[head] += dot(ds.astype(key.dtype), key, 1, 0)

    step.over_tile(add)

    @pl.when(step.ends)
    def _():
        for head in range(call.together):
            tpu.put(dq, head, call.together, acc[head] * call.scale)


def _dkv_body(call, step, here, outputs, scratch):
    """Tiles are [keys, queries]."""
    (dk, dv), (dk_acc, dv_acc) = outputs, scratch

    @pl.when(step.starts)
    def _():
        dk_acc[...], dv_acc[...] = jnp.zeros_like(dk_acc), jnp.zeros_like(dv_acc)
        step.keep_facts()

    def add(hides):
        for head in range(call.together):
            place = call.key_head(head)
            key, value = (part(here[name], place, call.key_heads) for name in "kv")
            query, dy = (part(here[name], head, call.together) for name in ("q", "dy"))
            lse, delta = (here["rows"][head, n : n + 1] for n in range(2))
            p, bent = _weights(step, dot(key, query, 1, 1), lse, hides)
            dv_acc[place] += dot(p.astype(dy.dtype), dy, 1, 0)
            ds = bent * (dot(value, dy, 1, 1) - delta)
            dk_acc[place] += dot(ds.astype(query.dtype), query, 1, 0)

    step.over_tile(add)

    @pl.when(step.ends)
    def _():
        for place in range(call.key_heads):
            tpu.put(dk, place, call.key_heads, dk_acc[place] * call.scale)
            tpu.put(dv, place, call.key_heads, dv_acc[place])
