"""Causal softmax attention with a fixed pattern: what such mixers share.

A mixer here has the fields heads, head_dim, rope, rope_base, block and implementation, and `groups`, a tuple of (heads,
mask): a slice of the heads, and the static mask over positions within a segment by which they see. Groups are in
order and of equal size; a mask hides later positions. Decoding keeps rotated keys and values in a `parts.kv_cache`.
"""

import jax.numpy as jnp

from seqmix.core import packing
from seqmix.ops import masks
from seqmix.ops.block_sparse import block_sparse_attention, block_sparse_flops
from seqmix.ops.softmax import merge
from seqmix.parts import kv_cache, qkv
from seqmix.parts.rotary import rotate

STATE_AXES = dict.fromkeys(("k", "v"), ("batch", None, "heads", "head_dim")) | {"length": ("batch",)}


def check(mixer):
    """Raises ValueError naming one of the shared fields that does not fit."""
    name = type(mixer).__name__
    mixer.positive(heads=mixer.heads, block=mixer.block)
    if mixer.head_dim is not None:
        mixer.positive(head_dim=mixer.head_dim)
    if not mixer.rope_base > 1:
        raise ValueError(f"{name}.rope_base: expected a number above 1, got {mixer.rope_base}")
    if (mixer.d_model or mixer.head_dim) and mixer.rope and head_dim(mixer) % 2:
        raise ValueError(f"{name}.head_dim: expected an even number with rope, got {head_dim(mixer)}")


def head_dim(mixer) -> int:
    """K."""
    return qkv.head_size(mixer, "head_dim")


def params(mixer) -> dict:
    """ "q", "k" and "v" [D, H, K], "out" [H, K, D]."""
    mixer.positive(d_model=mixer.d_model)
    size = mixer.heads, head_dim(mixer)
    return {**qkv.head_params(mixer.d_model, dict.fromkeys("qkv", size)), "out": qkv.out_param(*size, mixer.d_model)}


def forward(mixer, params, x, *, segment_ids=None, positions=None):
    """y [B, T, D]. `positions` [B, T] only rotate; who sees whom is counted in tokens."""
    q, k, v = _inputs(mixer, params, x, qkv.places(x, segment_ids, positions)[0])
    data = None
    if segment_ids is not None:
        ids = packing.runs(segment_ids)
        data = _data(ids, ids, *(packing.positions(ids),) * 2)
    return way_out(params, _attend(mixer, q, k, v, data)[0])


def way_out(params, mixed):
    """y [B, T, D] of mixed values [B, T, H, K]."""
    return jnp.einsum("bthk,hkd->btd", mixed, params["out"].astype(mixed.dtype))


def init_state(mixer, batch, max_len, dtype):
    """A cache of max_len tokens a row; a row that grows beyond it keeps its newest tokens."""
    return kv_cache.init(batch, max_len, mixer.heads, *(head_dim(mixer),) * 2, dtype)


def prefill(mixer, params, x, state, *, segment_ids=None, positions=None):
    """(y [B, T, D], state): new tokens attend to the cached ones and to each other, joined by LSE."""
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else packing.runs(segment_ids)
    place = packing.positions(ids, start=state["length"])
    q, k, v = _inputs(mixer, params, x, place if positions is None else positions)
    held = kv_cache.positions(state["length"], state["k"].shape[1])
    cached = (state[name].astype(k.dtype) for name in ("k", "v"))
    # What is cached belongs to the first segment.
    data = _data(ids, (held >= 0).astype(jnp.int32), place, held)
    old = _attend(mixer, q, *cached, data, ordered=False)
    new = _attend(mixer, q, k, v, _data(ids, ids, place, place))
    return way_out(params, merge([old, new])[0]), kv_cache.append(state, k, v, ids)


def state_elements(mixer, context: int) -> int:
    """Elements of the state of a sequence."""
    return 2 * context * mixer.heads * head_dim(mixer) + 1


def mixing_matrix(mixer, params, x, *, segment_ids=None, positions=None):
    """softmax over visible j of q_i . k_j / sqrt(K), [B, H, T, T] in promote(x.dtype, float32), without the op."""
    q, k, _ = _inputs(mixer, params, x, qkv.places(x, segment_ids, positions)[0])
    acc = jnp.promote_types(x.dtype, jnp.float32)
    score = jnp.einsum("bihk,bjhk->bhij", q.astype(acc), k.astype(acc)) / q.shape[-1] ** 0.5
    ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else packing.runs(segment_ids)
    place = packing.positions(ids)
    one = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] > 0)
    seen = [one & mask.visible(place[:, :, None], place[:, None, :]) for _, mask in mixer.groups]
    seen = jnp.repeat(jnp.stack(seen, axis=1), mixer.heads // len(seen), axis=1)
    top = jnp.max(jnp.where(seen, score, jnp.finfo(acc).min), axis=-1, keepdims=True)
    weight = jnp.where(seen, jnp.exp(jnp.where(seen, score - top, 0)), 0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return weight / jnp.where(total > 0, total, 1)


def flops(mixer, batch: int, seq: int) -> int:
    """Projections, rotations, and the scores of the tiles that the pattern leaves."""
    size, each = head_dim(mixer), mixer.heads // len(mixer.groups)
    shape, sizes = (batch, seq, each, size, size), (mixer.block,) * 2
    mixed = sum(block_sparse_flops(*shape, mask=mask, sizes=sizes) for _, mask in mixer.groups)
    return (8 * mixer.d_model + 6 * mixer.rope) * batch * seq * mixer.heads * size + mixed


def _inputs(mixer, params, x, positions):
    """q and k, rotated, and v."""
    q, k, v = qkv.project(params, x, "qkv")
    if mixer.rope:
        q, k = (rotate(y, positions, base=mixer.rope_base) for y in (q, k))
    return q, k, v


def _attend(mixer, q, k, v, data=None, *, ordered=True):
    """(mixed, lse). With data, positions are given; ordered: within a segment they grow with the index."""
    parts = []
    for heads, mask in mixer.groups:
        if data is not None:
            mask = masks.Positions(mask) & masks.Segments()
            mask = masks.Causal() & mask if ordered else mask
        options = {"mask": mask, "data": data, "sizes": (mixer.block,) * 2, "implementation": mixer.implementation}
        parts.append(block_sparse_attention(*(y[:, :, heads] for y in (q, k, v)), return_lse=True, **options))
    mixed, lse = zip(*parts, strict=True)
    return jnp.concatenate(mixed, axis=2), jnp.concatenate(lse, axis=1)


def _data(q_ids, k_ids, q_positions, k_positions) -> dict:
    """The inputs of `Segments` and `Positions`."""
    ids = {"segment_ids": q_ids, "kv_segment_ids": k_ids}
    return ids | {"q_positions": q_positions, "kv_positions": k_positions}
