"""Attention over the blocks of keys that a mask, or a list, leaves to each block of queries."""

import jax.numpy as jnp
import numpy as np

from seqmix.core import packing
from seqmix.core.shapes import boolean, dims, finite, floating, positive
from seqmix.ops import block_groups, block_lists, block_sparse_context, block_sparse_kernels, heads, token_block_kernels
from seqmix.ops.block_sparse_chunked import Config, chunked
from seqmix.ops.block_sparse_reference import reference
from seqmix.ops.dispatch import pick
from seqmix.ops.mask_algebra import EMPTY, Mask, check_data, library
from seqmix.ops.mask_data import Segments
from seqmix.ops.mesh import layout

SIZES = 128, 128


def block_sparse_attention(
    q,
    k,
    v,
    *,
    mask=None,
    blocks=None,
    sizes=SIZES,
    data=None,
    segment_ids=None,
    scale=None,
    soft_cap=None,
    slopes=None,
    return_lse=False,
    context=None,
    implementation=None,
):
    """Softmax attention of queries [B, T, H, K] over the keys [B, S, Hk, K], values [B, S, Hv, V], that are listed.

        s_ij  = scale q_i . k_j         (then soft_cap tanh(s_ij / soft_cap), then - slope |i - j|, where given)
        lse_i = log sum_{j visible to i} exp(s_ij),    y_i = sum_{j visible to i} exp(s_ij - lse_i) v_j

    Hk and Hv each divide H; query head h reads key head h // (H // Hk) and value head h // (H // Hv). Where Hk is not
    Hv, both are repeated to the fewest heads that both numbers divide. With sizes (bq, bk), j is visible to i when the
    list of i's block of queries, i // bq, holds j // bk, and the mask lets i see j. Work is that of the listed blocks,
    or without a list of the tiles in which the mask may see; memory is linear in T and S, beside the lists.

    Args:
      q, k, v: floating. Softmax, LSE and sums are in acc = promote(their dtype, float32); the operands of
        products keep their dtype.
      mask: a mask of `ops.masks`; None sees all. At least one of mask, blocks and segment_ids is given.
      blocks: [nq, n] or [B or 1, Hk or 1, nq, n] integers, nq = ceil(T / bq): key blocks, each at most once in a
        list, in any order. What is not from 0 to ceil(S / bk) - 1 is no block (use -1).
      sizes: (bq, bk), the number of queries and of keys of a block.
      data: {name: [B or 1, T] or [B or 1, S]} for the mask's `inputs`.
      segment_ids: [B, T] integers, 0 is padding, T = S: adds `masks.Segments` of `packing.runs`.
      scale: factor on q . k, a number; None: K**-0.5.
      soft_cap: None or a positive number (Gemma 2, arXiv 2408.00118, section 2).
      slopes: [H] floating, ALiBi's (arXiv 2108.12409); differentiable.
      return_lse: also return lse, for `merge`; it is differentiable like y.
      context: where the mesh in force cuts time, how each device's queries meet all keys: "ring" (stretches of keys
        travel to those of queries that see some of them by the mask), "gather" (all keys), or None: a ring where the
        mask leaves few exchanges, else the gather. It changes neither result nor layout.
      implementation: None (the best for the call), "gpu" (Hopper kernels, for bfloat16, K and V of 64 or 128, and
        sizes of 64 or 128, or lists with bq = 1 and bk a multiple of 64; with 8 query heads or more to a list of
        blocks of 64 by kernels of their own), "tpu" (TPU kernels, for bfloat16 or float32, K and V of 64,
        128 or 256 and listed blocks of multiples of 128; interpreted and compiled, never run on a chip, hence only if
        named), "chunked" (memory linear in T and S; all differentiable once) or "reference" (dense).

    Returns:
      y [B, T, H, V] in v.dtype, or (y, lse [B, H, T] in acc). A row that sees no key has y = 0 and lse = -inf, and
      passes no gradient.

    Raises:
      ValueError: for shapes, dtypes and numbers that are not as above, and a block listed twice where the list is
        a numpy array.
    """
    return_lse = boolean("return_lse", return_lse)
    found = by_name(
        "block_sparse_attention",
        *(q, k, v),
        **dict(mask=mask, blocks=blocks, sizes=sizes, data=data, segment_ids=segment_ids, scale=scale),
        **dict(soft_cap=soft_cap, slopes=slopes, context=context, implementation=implementation),
    )
    return found if return_lse else found[0]


def by_name(
    op,
    q,
    k,
    v,
    *,
    mask=None,
    data=None,
    segment_ids=None,
    scale=None,
    soft_cap=None,
    slopes=None,
    **options,
):
    """(y, lse) of `block_sparse_attention`, whose errors name the op `op` that is made of it."""
    options = {"blocks": None, "sizes": SIZES, "context": None, "implementation": None} | options
    _check(q, k, v, slopes, segment_ids, mask, options["blocks"])
    scale, soft_cap = score_numbers(q, scale, soft_cap)
    mask, data = with_segments(mask, data, segment_ids)
    data = checked_data(mask, q.shape[1], k.shape[1], data, q.shape[0])
    score = {"scale": scale, "soft_cap": soft_cap, "slopes": slopes}
    return attend(op, q, k, v, mask, data, **score, **options)


def attend(op, q, k, v, mask, data, *, blocks, sizes, scale, soft_cap, slopes, context, implementation):
    """(y, lse) of checked arguments of `block_sparse_attention`, for the op of this name."""
    time, keys, listed = q.shape[1], k.shape[1], k.shape[2]
    k, v = heads.alike(k, v)
    sizes, given = clipped(sizes, time, keys), tuple(int(size) for size in sizes)
    lay = layout(q.shape[0], time, q.shape[2], k.shape[2])
    form = block_sparse_context.choose(lay, mask, time, keys, sizes, blocks is not None, context)
    if form is not None and blocks is None:
        sizes = block_sparse_context.block_sizes(lay, form, time, keys, sizes)
    index = None if blocks is None else _index(blocks, q.shape[0], listed, sizes, time, keys, ascending=form == "ring")
    if index is not None and index.shape[1] not in (1, k.shape[2]):
        index = library(index).repeat(index, k.shape[2] // listed, axis=1)
    config = Config(scale, soft_cap, mask, time, keys)
    call = {"mask": mask, "data": data, "sizes": given, "blocks": index, "scale": scale}
    reasons, kernels = block_sparse_kernels.reasons(implementation, lay, q, k, v, **call)
    each, walks = blocks is not None and given[0] == 1, False  # token chooses its own
    if each:
        options = {"mask": mask, "scale": scale, "slopes": slopes}
        walks = token_block_kernels.takes(given, blocks) and None is token_block_kernels.reason(
            lay, q, k, v, soft_cap=soft_cap, **options
        )
        options |= {"data": data, "size": given[1]}
        reasons["gpu"] = None if walks else block_groups.reason(lay, q, k, v, **options)
    name = pick(op, implementation, reasons | {"chunked": None, "reference": None})
    if name == "reference":
        return reference(config, q, k, v, slopes, data, index, sizes)
    if name == "gpu" and walks:
        return token_block_kernels.run(lay, scale, q, k, v, index, causal=mask is not None)
    if each and (name == "gpu" or name == "chunked" and block_groups.takes(lay, time, slopes)):
        size = given[1] if name == "gpu" else sizes[1]
        return block_groups.run(lay, config, q, k, v, data, index, size, name)
    sizes = kernels.get(name, sizes)
    if index is None:
        index = block_lists.of_mask(mask, sizes, time, keys)
    found = block_lists.lists(mask, index, sizes, time, keys, data)
    call = config, q, k, v, slopes, data, found, sizes
    if name in kernels:
        return block_sparse_kernels.run(lay, *call, name, index)
    return chunked(*call) if form is None else block_sparse_context.run(lay, form, *call)


def block_sparse_flops(
    batch: int,
    time: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    *,
    mask: Mask,
    keys: int | None = None,
    sizes: tuple[int, int] = SIZES,
) -> int:
    """FLOPs of the listed tiles of a mask, forward: every pair of a tile that may see counts, hidden or not.

    2 (K + V) for the two products of a pair and the elementwise operations beside them, without exponentials.
    """
    keys = time if keys is None else keys
    sizes = clipped(sizes, time, keys)
    tiles = int((mask.tiles(*sizes, time, keys) != EMPTY).sum())
    return batch * heads * tiles * sizes[0] * (sizes[1] * (2 * (key_dim + value_dim) + 7) + 2 * value_dim)


def _check(q, k, v, slopes, segment_ids, mask, blocks):
    shapes = {"q": "B T H K", "k": "B S Hk K", "v": "B S Hv V", "slopes": "H", "segment_ids": "B T"}
    d = dims(shapes, q=q, k=k, v=v, slopes=slopes, segment_ids=segment_ids)
    if min(d.T, d.S) < 1:
        raise ValueError(f"q, k: expected at least one query and one key, got T={d.T}, S={d.S}")
    heads.check(d)
    floating(q=q, k=k, v=v, slopes=slopes)
    check_mask(mask)
    if mask is None and blocks is None and segment_ids is None:
        raise ValueError("mask: expected a mask, a list of blocks or segment_ids, got none of them")
    check_segments(segment_ids, d.B, d.T, d.S)


def check_segments(segment_ids, batch, time, keys):
    """Raises ValueError for ids that are not [B, T] integers, and for keys that are not the queries."""
    if segment_ids is None:
        return
    packing.check(segment_ids, batch, time)
    if time != keys:
        raise ValueError(f"segment_ids: expected S={keys} keys as many as queries, T={time}; else use data")


def score_numbers(q, scale, soft_cap):
    """(scale, soft_cap), K**-0.5 for no scale. Raises ValueError for what is no number or, a cap, not positive."""
    scale = finite("scale", q.shape[-1] ** -0.5 if scale is None else scale)
    soft_cap = None if soft_cap is None else finite("soft_cap", soft_cap)
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"soft_cap: expected a positive number, got {soft_cap}")
    return scale, soft_cap


def check_mask(mask, data=None):
    """Raises ValueError for a mask that is none, and for data that are no dict, where they are given."""
    if mask is not None and not isinstance(mask, Mask):
        raise ValueError(f"mask: expected a mask of ops.masks, got {type(mask).__name__}")
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"data: expected a dict of arrays by name, got {type(data).__name__}")


def with_segments(mask, data, segment_ids):
    """The mask and data, with the segments of packed rows where there are ids."""
    check_mask(mask, data)
    data = dict(data or {})
    if segment_ids is None:
        return mask, data
    own = Segments("packed_segment_ids", "packed_kv_segment_ids")
    ids = packing.runs(jnp.asarray(segment_ids))
    return own if mask is None else mask & own, data | dict.fromkeys(own.inputs, ids)


def checked_data(mask, time, keys, data, batch) -> dict:
    """The mask's inputs as arrays [batch or 1, T or S]. Raises ValueError for others."""
    takes = {} if mask is None else mask.inputs
    for name in data if isinstance(data, dict) else ():
        if name not in takes:
            raise ValueError(f"data: expected {', '.join(takes) or 'nothing'}, which the mask takes, got {name!r}")
    data = {} if mask is None else check_data(mask, time, keys, data, need=True)
    for name, x in data.items():
        if x.ndim != 2 or x.shape[0] not in (1, batch):
            raise ValueError(f"data[{name!r}]: expected [B={batch} or 1, {x.shape[-1]}], got {tuple(x.shape)}")
    return {name: jnp.asarray(x) for name, x in data.items()}


def clipped(sizes, time, keys) -> tuple[int, int]:
    """Block sizes, not beyond the lengths: where one block holds all already."""
    if not isinstance(sizes, tuple | list) or len(sizes) != 2:
        raise ValueError(f"sizes: expected (queries, keys) of a block, got {sizes!r}")
    for size in sizes:
        positive("sizes", size)
    return min(int(sizes[0]), time), min(int(sizes[1]), keys)


def _index(blocks, batch, heads, sizes, time, keys, *, ascending):
    """`blocks` as [b, h, nq, n] int32; ascending: each list by number, what is below 0 last."""
    rows = -(-time // sizes[0])
    shape = getattr(blocks, "shape", None)
    lead = (1, 1) if shape is not None and len(shape) == 2 else tuple(shape or ())[:2]
    good = shape is not None and len(shape) in (2, 4) and lead[0] in (1, batch) and lead[1] in (1, heads)
    if not good or shape[-2] != rows or shape[-1] < 1:
        want = f"[{rows}, n] or [B={batch} or 1, Hk={heads} or 1, {rows}, n]"
        raise ValueError(f"blocks: expected {want}, got {shape if shape is not None else type(blocks).__name__}")
    if not jnp.issubdtype(blocks.dtype, jnp.integer):
        raise ValueError(f"blocks: expected integers, got {blocks.dtype}")
    if isinstance(blocks, np.ndarray):
        ordered = np.sort(blocks, axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0) & (ordered[..., 1:] * sizes[1] < keys)
        if twice.any():
            raise ValueError(f"blocks: expected each block once in a list, got {ordered[..., 1:][twice][0]} twice")
    blocks = blocks.reshape(*lead, *shape[-2:]).astype(np.int32)
    return library(blocks).sort(blocks.astype(np.uint32), axis=-1).astype(np.int32) if ascending else blocks
