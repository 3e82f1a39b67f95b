"""Attention with a mask of the language, additive bias, ALiBi, and rows normalised otherwise than by softmax.

Rows of scores are made for one block of queries and all keys at once, and made again in the backward pass: memory grows
linearly with T and with S. Softmax without a bias skips what its mask hides instead (`block_sparse_attention`).
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.ops import block_sparse, block_sparse_context, block_sparse_kernels, heads, masks
from seqmix.ops.block_sparse import check_mask, checked_data
from seqmix.ops.dispatch import pick
from seqmix.ops.mesh import layout, on_shares

NORMALIZERS = "softmax", "sigmoid", "signed"
# Inputs of masks that hold among the tokens of one segment: ids and positions of queries and keys.
PLACES = "own_segment_ids", "own_kv_segment_ids", "own_q_positions", "own_kv_positions"
SPARSE = 128  # most queries and keys of a block of the block-sparse form


class Scoring(NamedTuple):
    """How rows are made: the static half of a call."""

    scale: float
    soft_cap: float | None
    normalizer: str
    mask: masks.Mask


def check(q, k, rules, mask, bias, slopes, normalizer, sink_logits, return_lse, data):
    """Raises ValueError for what `attention` cannot take, with `rules` beside a mask."""
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer: expected one of {', '.join(NORMALIZERS)}, got {normalizer!r}")
    check_mask(mask, data)
    if mask is not None and (not rules.causal or rules.window is not None or rules.sinks):
        given = {"causal": False} if not rules.causal else {}
        given |= {name: x for name, x in (("window", rules.window), ("sinks", rules.sinks)) if x}
        got = ", ".join(f"{name}={x}" for name, x in given.items())
        raise ValueError(
            f"mask: expected causal, window and sinks left alone beside a mask, which says it all, got {got}"
        )
    if data is not None and mask is None:
        raise ValueError("data: expected a mask that takes it, got none")
    if normalizer == "sigmoid" and (return_lse or sink_logits is not None):
        given = "return_lse" if return_lse else "sink_logits"
        raise ValueError(f"{given}: expected softmax or signed, whose rows have a denominator, got sigmoid")
    sizes = {"B": q.shape[0], "H": q.shape[2], "T": q.shape[1], "S": k.shape[1]}
    shape = None if bias is None else tuple(getattr(bias, "shape", ()))
    if bias is not None and (
        len(shape) != 4 or any(have not in (1, want) for have, want in zip(shape, sizes.values(), strict=True))
    ):
        wanted = ", ".join(f"{name}={size} or 1" for name, size in sizes.items())
        raise ValueError(f"bias: expected shape ({wanted}), got {shape}")
    if slopes is not None and getattr(slopes, "shape", None) != (sizes["H"],):
        raise ValueError(
            f"slopes: expected shape (H={sizes['H']},), got {getattr(slopes, 'shape', type(slopes).__name__)}"
        )
    for name, x in {"bias": bias, "slopes": slopes}.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")


def visibility(rules, mask, tokens, order, data):
    """(mask, data) that say who sees whom: the mask, or the rules as one, among the tokens of one segment.

    tokens and order are those of `attention`: ids and positions of queries and keys, and how they are known.
    """
    by_rules = mask is None
    if by_rules:
        mask = masks.Causal() if rules.causal else ~masks.Sinks(0)
        if rules.window is not None:
            mask &= masks.Window(rules.window, causal=rules.causal) | masks.Sinks(rules.sinks)
    data = dict(data or {})
    if order == "index":
        return mask, data
    placed = masks.Segments(*PLACES[:2])
    if order == "runs" and by_rules and rules.window is None:  # within a segment order is all that counts
        return (mask & placed if rules.causal else placed), data | dict(zip(PLACES[:2], tokens[:2], strict=True))
    placed = (mask if mask.inputs else masks.Positions(mask, *PLACES[2:])) & placed
    if order == "runs" and by_rules and rules.causal:  # positions grow with the index: half of the blocks fall away
        placed = masks.Causal() & placed
    return placed, data | {name: x for name, x in zip(PLACES, tokens, strict=True) if name in placed.inputs}


def by_rules(rules, q, k, v, sink_logits, tokens, order, implementation):
    """(y, lse) of checked arguments of `attention` without a mask, through the block-sparse form."""
    mask, data = visibility(rules, None, tokens, order, None)
    options = {"bias": None, "slopes": None, "normalizer": "softmax", "block": SPARSE, "context": None}
    return attend(rules, q, k, v, sink_logits, mask=mask, data=data, implementation=implementation, **options)


def attend(rules, q, k, v, sink_logits, *, mask, data, bias, slopes, normalizer, block, context, implementation):
    """(y [B, T, H, V], lse [B, H, T] or None), of checked arguments of `attention`."""
    data = checked_data(mask, q.shape[1], k.shape[1], data, q.shape[0])
    given = None if normalizer == "softmax" else f"normalizer={normalizer!r}"
    given = given if bias is None else "bias"
    forms = block_sparse_context.FORMS if given is None else ("gather",)
    if context not in (None, *forms):
        raise ValueError(f"context: expected None or {' or '.join(forms)} beside {given or 'a mask'}, got {context!r}")
    if given is None:
        score = {"scale": rules.scale, "soft_cap": rules.soft_cap, "slopes": slopes}
        options = {"blocks": None, "sizes": (min(block, SPARSE),) * 2, "context": context}
        y, lse = block_sparse.attend(
            "attention", q, k, v, mask, data, implementation=implementation, **score, **options
        )
    else:
        kernels = dict.fromkeys(block_sparse_kernels.TARGETS, f"has no form for {given}")
        name = pick("attention", implementation, kernels | {"chunked": None, "reference": None})
        scoring = Scoring(rules.scale, rules.soft_cap, normalizer, mask)
        lay = layout(q.shape[0], q.shape[1], q.shape[2], math.lcm(k.shape[2], v.shape[2]))
        if name == "reference":
            y, lse = _blocks(scoring, q, k, v, bias, slopes, data, q.shape[1])
        elif lay is None or not lay.time or k.shape[1] % lay.ways("time"):  # XLA finds a way where keys cannot be cut
            y, lse = _blocks(scoring, q, k, v, bias, slopes, data, block)
        else:
            y, lse = _on_stretches(lay, scoring, q, *heads.alike(k, v), bias, slopes, data, block)
    return (y, lse) if sink_logits is None else with_sink(y, lse, sink_logits)


def _on_stretches(lay, scoring, q, k, v, bias, slopes, data, block):
    """`_blocks` on each device's stretch of the queries, with the keys and values of all."""
    sizes = dict(zip(("batch", "heads", "time"), (q.shape[0], q.shape[2], q.shape[1]), strict=True))
    key_heads = k.shape[2]
    side = {name: "time" if of == "queries" else None for name, of in scoring.mask.inputs.items()}
    data_names = {name: ("batch" if len(x) == q.shape[0] else None, side[name]) for name, x in data.items()}
    wide = (
        ()
        if bias is None
        else tuple(n if have == size else None for (n, size), have in zip(sizes.items(), bias.shape, strict=False))
    )

    def local(q, k, v, bias, slopes, data):
        k, v = (block_sparse_context.gathered(lay.time, lay.local_key_heads(x, key_heads)) for x in (k, v))
        first = jax.lax.axis_index(lay.time) * q.shape[1]
        return _blocks(scoring, q, k, v, bias, slopes, data, block, first)

    queries, keys = ("batch", "time", "heads", None), ("batch", "time", "key_heads", None)
    names = queries, keys, keys, (*wide, None), ("heads",), data_names
    lse = None if scoring.normalizer == "sigmoid" else ("batch", "heads", "time")
    return on_shares(lay, local, (q, k, v, bias, slopes, data), names, (queries, lse))


def with_sink(y, lse, sink_logits):
    """With a logit of its head in the denominator of every row."""
    logit = sink_logits.astype(lse.dtype)[:, None]
    total = jnp.logaddexp(lse, logit)
    some = lse > -jnp.inf
    share = jnp.where(some, jnp.exp(jnp.where(some, lse, 0) - total), 0)
    return (jnp.swapaxes(share, 1, 2)[..., None] * y).astype(y.dtype), total


def _blocks(scoring, q, k, v, bias, slopes, data, block, first=0):
    """`_rows` of one block of queries after another; the first query stands at index `first`."""
    time = q.shape[1]
    sides = scoring.mask.inputs
    of_keys = {name: x for name, x in data.items() if sides[name] == "keys"}
    of_queries = {name: x for name, x in data.items() if sides[name] == "queries"}
    rows = partial(_rows, scoring, k, v, slopes, of_keys)
    if time <= block:
        return rows(q, first + np.arange(time), bias, of_queries)
    long = bias is not None and bias.shape[2] == time

    def cut(x, axis):  # into blocks, which come first
        x = jnp.pad(x, [(0, -time % block if a == axis else 0) for a in range(x.ndim)], mode="edge")
        return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, block, *x.shape[axis + 1 :]), axis, 0)

    blocks = cut(q, 1), cut(first + jnp.arange(time), 0), cut(bias, 2) if long else None
    blocks = (*blocks, {name: cut(x, 1) for name, x in of_queries.items()})

    @jax.checkpoint
    def one(args):
        q, index, part, values = args
        return rows(q, index, part if long else bias, values)

    y, lse = jax.lax.map(one, blocks)
    y = jnp.moveaxis(y, 0, 1).reshape(q.shape[0], -1, *y.shape[3:])[:, :time]
    return y, None if lse is None else jnp.moveaxis(lse, 0, 2).reshape(*lse.shape[1:3], -1)[..., :time]


def _rows(scoring, k, v, slopes, of_keys, q, index, bias, of_queries):
    """(y [B, t, H, V], lse [B, H, t] or None) of queries [B, t, H, K] that stand at index [t]."""
    acc = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    (batch, time, heads, _), groups = q.shape, k.shape[2]
    grouped = q.reshape(batch, time, groups, heads // groups, -1)
    score = scoring.scale * jnp.einsum("btjrk,bsjk->bjrts", grouped, k, preferred_element_type=acc)
    score = score.reshape(batch, heads, time, -1)
    if scoring.soft_cap is not None:
        score = scoring.soft_cap * jnp.tanh(score / scoring.soft_cap)
    other = np.arange(k.shape[1])
    if bias is not None:
        score += bias.astype(acc)
    if slopes is not None:
        score -= slopes.astype(acc)[:, None, None] * jnp.abs(index[:, None] - other)
    values = {name: x[:, :, None] for name, x in of_queries.items()} | {n: x[:, None] for n, x in of_keys.items()}
    seen = jnp.asarray(scoring.mask.visible(index[:, None], other[None], values))
    seen = jnp.broadcast_to(seen[:, None] if seen.ndim == 3 else seen, score.shape)
    lse = None
    if scoring.normalizer == "sigmoid":
        weight = jnp.where(seen, jax.nn.sigmoid(score), 0)
    else:
        size = jnp.abs(score) if scoring.normalizer == "signed" else score
        top = jax.lax.stop_gradient(jnp.max(jnp.where(seen, size, -jnp.inf), axis=-1, keepdims=True))
        top = jnp.where(top > -jnp.inf, top, 0)  # rows that see nothing
        weight = jnp.where(seen, jnp.exp(jnp.where(seen, size - top, 0)), 0)
        total = jnp.sum(weight, axis=-1)
        some = total > 0
        total = jnp.where(some, total, 1)
        lse = jnp.where(some, top[..., 0] + jnp.log(total), -jnp.inf)
        weight /= total[..., None]
        if scoring.normalizer == "signed":
            weight *= jnp.sign(score)
    weight = weight.astype(v.dtype).reshape(batch, v.shape[2], -1, time, k.shape[1])
    y = jnp.einsum("bjrts,bsjv->btjrv", weight, v, preferred_element_type=acc)
    return y.reshape(batch, time, heads, -1).astype(v.dtype), lse
