"""Softmax attention, and how results over parts of the keys are joined."""

import math
from functools import partial

import jax
import jax.numpy as jnp

from seqmix.core import packing
from seqmix.core.shapes import boolean, check_arrays, described, dims, finite, floating, positive
from seqmix.ops import block_sparse_kernels, heads, scored, softmax_choice, softmax_context, softmax_library
from seqmix.ops.dispatch import pick, record
from seqmix.ops.mask_algebra import MOST
from seqmix.ops.mesh import layout
from seqmix.ops.softmax_chunked import block_pairs, block_sizes, chunked
from seqmix.ops.softmax_reference import Rules, reference

BLOCK = 512


def attention(
    q,
    k,
    v,
    *,
    scale=None,
    causal=True,
    window=None,
    sinks=0,
    segment_ids=None,
    kv_segment_ids=None,
    q_positions=None,
    kv_positions=None,
    soft_cap=None,
    sink_logits=None,
    mask=None,
    data=None,
    bias=None,
    slopes=None,
    normalizer="softmax",
    return_lse=False,
    block=BLOCK,
    context=None,
    implementation=None,
):
    """Softmax attention of queries [B, T, H, K] over keys [B, S, Hk, K] with values [B, S, Hv, V].

        s_ij  = scale q_i . k_j                  (then soft_cap tanh(s_ij / soft_cap), where there is a cap)
        lse_i = log(sum_{j visible to i} exp(s_ij) + exp(sink_logit))            (the sink: where given)
        y_i   = sum_{j visible to i} exp(s_ij - lse_i) v_j

    Hk and Hv each divide H, and one need not divide the other (Sigma, arXiv 2501.13629, has 32, 4 and 16): query head h
    reads key head h // (H // Hk) and value head h // (H // Hv). With pos the positions, j is visible to i when both are
    of one segment and, causal, pos_j <= pos_i; with a window W, 0 <= pos_i - pos_j < W as well (not causal:
    |pos_i - pos_j| < W), except that positions below `sinks` stay visible to all that follow them.

    Args:
      q, k, v: floating. Softmax, LSE and sums are in acc = promote(their dtype, float32); the operands of
        products keep their dtype.
      scale: factor on q . k, a number; None: K**-0.5.
      window: None or W >= 1.
      sinks: >= 0 and, unless 0, causal (StreamingLLM, arXiv 2309.17453, where they are the first tokens).
      segment_ids: [B, T] integers, 0 is padding; alone, it holds for queries and keys (T = S), and an id that
        comes back after another is a new segment (`packing.runs`).
      kv_segment_ids: [B, S], with segment_ids: then both are taken as they are, and equal means visible.
      q_positions, kv_positions: [B, T] and [B, S] integers, both or neither. Neither: with segment_ids alone
        positions in the segment, padding not counted; else indices, of queries and of keys from 0 on.
      soft_cap: None or a positive number (Gemma 2, arXiv 2408.00118, section 2).
      sink_logits: [H], a logit in the denominator of every row of its head (gpt-oss, arXiv 2508.10925).
      mask: a mask of `ops.masks` in place of causal, window and sinks, which stay at their defaults. Beside segment
        ids it holds within a segment, a static one by the positions; one that depends on data by what that says.
      data: {name: [B or 1, T] or [B or 1, S]} for the mask's `inputs`.
      bias: [B or 1, H or 1, T or 1, S or 1], added to scores after the soft cap; differentiable.
      slopes: [H], ALiBi's (arXiv 2108.12409): - slope |i - j| is added, i and j indices, hence without given positions
        (for which a bias does it); differentiable.
      normalizer: "softmax"; "sigmoid": y_i = sum_j sigmoid(s_ij) v_j, no lse, no sink (arXiv 2409.04431, where a bias
        of -log S is added); "signed": sign(s_ij) exp(|s_ij| - lse_i), with lse of |s| (arXiv 2411.07176).
      return_lse: also return lse, for `merge`; it is differentiable like y.
      block: number of queries and of keys whose scores exist at once in the chunked form.
      context: where the mesh in force cuts time, how each device's queries meet all keys: "ring", "zigzag", "heads",
        "gather" (`softmax_context`) or None, the best for the call; with mask or slopes "ring" or "gather", with bias
        or another normalizer "gather" alone. It changes neither result nor layout.
      implementation: None, the best for the call; "gpu" (Hopper kernels: bfloat16, K and V of 64 or 128), "cudnn",
        "tokamax" (GPUs) or "splash" (TPUs; compiled, not run on a chip), which take a part of the calls
        (`softmax_library`; docs/attention.md says which goes where); "tpu" (TPU kernels, only if named: never run on a
        chip either); "chunked" (memory linear in T and S) or "reference" (dense). "reference" can be differentiated
        again, all others once. Where Hv is not Hk, "chunked" and "reference" repeat no head, and the others (and what
        takes a mask) repeat those of keys and values to the fewest that both numbers divide.

    Returns:
      y [B, T, H, V] in v.dtype, or (y, lse [B, H, T] in acc). A row that sees no key, padding above all, has
      y = 0 and lse = -inf (with a sink: its logit), and passes no gradient to q, k and v.

    Raises:
      ValueError: for shapes, dtypes and numbers that are not as above, and for a context or an implementation that
        cannot take the call.
    """
    given = segment_ids, kv_segment_ids, q_positions, kv_positions
    d = _check(q, k, v, sink_logits, *given)
    if context not in (None, *softmax_context.FORMS):
        raise ValueError(f"context: expected None or one of {', '.join(softmax_context.FORMS)}, got {context!r}")
    rules = _rules(q.shape[-1] ** -0.5 if scale is None else scale, causal, window, sinks, soft_cap)
    positive("block", block)
    return_lse = boolean("return_lse", return_lse)
    tokens, order = _tokens(q.shape[1], k.shape[1], *given)
    if any(x is not None for x in (mask, data, bias, slopes)) or normalizer != "softmax":
        softmax_library.no_scoring(implementation)
        scored.check(q, k, rules, mask, bias, slopes, normalizer, sink_logits, return_lse, data)
        if slopes is not None and q_positions is not None:
            raise ValueError("slopes: expected no given positions beside them; add -slope |i - j| as a bias, got both")
        mask, data = scored.visibility(rules, mask, tokens, order, data)
        scoring = {"bias": bias, "slopes": slopes, "normalizer": normalizer}
        options = {"mask": mask, "data": data, "block": block, "context": context, "implementation": implementation}
        y, lse = scored.attend(rules, q, k, v, sink_logits, **scoring, **options)
        return (y, lse) if return_lse else y
    lay = layout(d.B, d.T, d.H, math.gcd(d.Hk, d.Hv))
    if d.Hk != d.Hv and lay != layout(d.B, d.T, d.H):  # a device's heads would begin within a head of keys
        k, v = heads.alike(k, v)
        d.Hk = d.Hv = k.shape[2]
        lay = layout(d.B, d.T, d.H, d.Hk)
    alike = (k, v) if d.Hk == d.Hv else jax.eval_shape(heads.alike, k, v)  # as kernels take them
    form = None
    if lay is not None and lay.time and implementation != "reference":
        form = softmax_context.choose(lay, rules, d, order, context)
    libraries = softmax_library.reasons(implementation, lay, form, rules, q, *alike, sink_logits, order, return_lse)
    mask, data = scored.visibility(rules, None, tokens, "given" if form else order, None)
    shape = {"mask": mask, "data": data, "sizes": (scored.SPARSE,) * 2, "scale": rules.scale}
    kernels, _ = block_sparse_kernels.reasons(implementation, lay, q, *alike, **shape, cut=form is not None)
    forms = libraries | kernels
    if implementation is None and softmax_choice.yields(rules, q, k, v):
        forms = kernels | libraries
    name = pick("attention", implementation, forms | {"chunked": None, "reference": None})
    if form:
        call = (rules, d, q, k, v, sink_logits, tokens)
        options = dict(order=order, block=block, need_lse=return_lse, library=None if name == "chunked" else name)
        if implementation is None and name == "gpu" and order == "index" and not return_lse:
            options["cudnn"] = softmax_choice.for_ring(lay, form, rules, q, *alike)
        elif implementation is None and name == "cudnn":
            options["values"] = softmax_choice.for_values(forms, rules, q, k, v)
        if options.get("cudnn"):
            record("attention", "cudnn")  # in its gradients
        y, lse = softmax_context.run(lay, form, *call, **options)
    elif name in kernels:
        y, lse = scored.by_rules(rules, q, k, v, sink_logits, tokens, order, name)
    elif name in libraries:
        by = lambda name: partial(softmax_library.run, name, lay, rules, ids=tokens[0] if order == "runs" else None)
        other = None
        if implementation is None and name == "cudnn":
            other = softmax_choice.for_values(forms, rules, q, k, v)
        if other is None:
            return by(name)(q, k, v)
        ours = lambda *arrays: scored.by_rules(rules, *arrays, sink_logits, tokens, order, "gpu")[0]
        return softmax_choice.either(ours if other == "gpu" else by(other), by(name), q, k, v)
    elif name == "chunked":
        y, lse = chunked(rules, q, k, v, sink_logits, *tokens, order=order, block=block)
    else:
        y, lse = reference(rules, q, k, v, sink_logits, *tokens)
    return (y, lse) if return_lse else y


def merge(parts):
    """(y, lse) of attention over all keys, from the pairs (y [B, T, H, V], lse [B, H, T]) of parts of them.

        lse = log sum_p exp(lse_p),   y = sum_p exp(lse_p - lse) y_p        (online softmax, arXiv 1805.02867)

    Every key, and the sink logit, is in one part. y has the dtype of the first. Gradients are finite where
    some parts, or all, see nothing. Raises ValueError for no parts or unequal shapes.
    """
    parts = list(parts) if hasattr(parts, "__iter__") else [parts]
    if not parts:
        raise ValueError("parts: expected at least one (y, lse), got none")
    for part in parts:
        if not isinstance(part, tuple | list) or len(part) != 2:
            raise ValueError(f"parts: expected pairs (y, lse), got {described(part)}")
    for y, lse in parts:
        check_arrays(lse=lse)
        dims({"first": "B T H V", "y": "B T H V", "lse": "B H T"}, first=parts[0][0], y=y, lse=lse)
        floating(y=y, lse=lse)
    lses = jnp.stack([lse for _, lse in parts])
    top = jax.lax.stop_gradient(jnp.max(lses, axis=0))
    top = jnp.where(top > -jnp.inf, top, 0)
    weights = jnp.exp(lses - top)
    total = jnp.sum(weights, axis=0)
    some = total > 0
    total = jnp.where(some, total, 1)
    shares = jnp.swapaxes(weights / total, 2, 3)[..., None]
    y = sum(share * y.astype(share.dtype) for share, (y, _) in zip(shares, parts, strict=True))
    return y.astype(parts[0][0].dtype), jnp.where(some, top + jnp.log(total), -jnp.inf)


def attention_flops(
    batch: int,
    seq: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    window: int | None = None,
    causal: bool = True,
    sinks: int = 0,
    soft_cap: bool = False,
    block: int = BLOCK,
) -> int:
    """FLOPs of the chunked `attention` of `seq` tokens to themselves, forward, without segments.

    Every pair in a block of scores that is not skipped counts, hidden or not: 2 (K + V) for the two products
    and the elementwise operations beside them, without exponentials. Up to `block` tokens that is the whole
    square.
    """
    rules = _rules(1.0, causal, window, sinks, 1.0 if soft_cap else None)
    bq, bk = block_sizes(seq, seq, block)
    pairs = len(block_pairs(rules, seq, seq, (bq, bk), "index"))
    per_score = 2 * (key_dim + value_dim) + 7 + (2 if soft_cap else 0)
    return batch * heads * pairs * bq * (bk * per_score + 2 * value_dim)


def _check(q, k, v, sink_logits, *given):
    shapes = {"segment_ids": "B T", "kv_segment_ids": "B S", "q_positions": "B T", "kv_positions": "B S"}
    given = dict(zip(shapes, given, strict=True))
    shapes |= {"q": "B T H K", "k": "B S Hk K", "v": "B S Hv V", "sink_logits": "H"}
    d = dims(shapes, q=q, k=k, v=v, sink_logits=sink_logits, **given)
    if min(d.T, d.S) < 1:
        raise ValueError(f"q, k: expected at least one query and one key, got T={d.T}, S={d.S}")
    if min(d.B, d.K, d.V) < 1:
        raise ValueError(f"q, v: expected at least one row and channels, got B={d.B}, K={d.K}, V={d.V}")
    heads.check(d)
    floating(q=q, k=k, v=v, sink_logits=sink_logits)
    for name, x in given.items():
        if x is not None and not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"{name}: expected integers, got {x.dtype}")
    has = {name: x is not None for name, x in given.items()}
    if has["kv_segment_ids"] and not has["segment_ids"]:
        raise ValueError("segment_ids: expected the queries' ids beside kv_segment_ids, got none")
    if has["segment_ids"] and not has["kv_segment_ids"] and d.T != d.S:
        raise ValueError(f"kv_segment_ids: expected the keys' ids where S={d.S} is not T={d.T}, got none")
    if has["q_positions"] != has["kv_positions"]:
        missing = "kv_positions" if has["q_positions"] else "q_positions"
        raise ValueError(f"{missing}: expected both q_positions and kv_positions or neither, got none")
    return d


def _rules(scale, causal, window, sinks, soft_cap) -> Rules:
    """`Rules` of checked numbers."""
    causal = boolean("causal", causal, "True or False (a mask is given by mask=)")
    if window is not None:
        positive("window", window, 1, MOST)
    positive("sinks", sinks, 0, MOST)
    if sinks and not causal:
        raise ValueError(f"sinks: expected 0 with causal=False, got {sinks!r}")
    scale, soft_cap = finite("scale", scale), None if soft_cap is None else finite("soft_cap", soft_cap)
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap: expected a positive number, got {soft_cap}")
    window = None if window is None else int(window)
    return Rules(scale, causal, window, int(sinks), soft_cap)


def _tokens(time, keys, segment_ids, kv_segment_ids, q_positions, kv_positions):
    """(ids and positions of queries and keys, [B, T] or [1, T] int32, and the order of `block_pairs`)."""
    order = "index"
    if segment_ids is None:
        ones = jnp.ones((1, time), jnp.int32)
        ids = ones, ones if time == keys else jnp.ones((1, keys), jnp.int32)
    elif kv_segment_ids is None:
        ids, order = (packing.runs(segment_ids),) * 2, "runs"
    else:
        ids, order = (segment_ids, kv_segment_ids), "given"
    if q_positions is not None:
        return (*ids, q_positions, kv_positions), "given"
    if order == "runs":
        return (*ids, *(packing.positions(ids[0]),) * 2), order
    at = jnp.arange(time)[None]
    return (*ids, at, at if time == keys else jnp.arange(keys)[None]), order
