"""Attention to blocks of keys that each token lists, through Hopper kernels: lists, gradient, and when they can run.

The query heads of a key head share a list, and neighbouring tokens the walk along the union of theirs (`unions`). The
gradients of keys and values go through the tokens of each block (`visitors`). With a causal mask the kernel of the
forward pass masks the block in which a token itself lies, and takes no later ones; the gradients through those blocks
are made apart, of the same softmax, and added.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.core import sharding
from seqmix.ops import block_lists, block_sparse_kernels, targets
from seqmix.ops.block_sparse_chunked import Config
from seqmix.ops.masks import Causal
from seqmix.ops.mesh import on_shares

SIZES = 1, 64  # tokens, and keys, of a block


class Static(NamedTuple):
    """The static half of a call."""

    scale: float
    causal: bool  # the mask, of as many keys as queries


class Unions(NamedTuple):
    """What neighbouring tokens list together."""

    count: jax.Array  # [b, h, groups] int32
    block: jax.Array  # [b, h, groups, n] int32, the first `count` in ascending order
    bits: jax.Array  # [b, h, groups, n] int32, bit i: token i of the group lists the block


def takes(sizes, blocks) -> bool:
    """Whether a call is of the kind for which these kernels are."""
    return blocks is not None and tuple(sizes) == SIZES


def reason(lay, q, k, v, *, mask, soft_cap, slopes, scale) -> str | None:
    """Why the kernels cannot run this call here; None if they can."""
    causal = mask == Causal() and q.shape[1] == k.shape[1]
    other = None if causal else mask
    for name, given in (("this mask or segments", other), ("a soft cap", soft_cap), ("slopes", slopes)):
        if given is not None:
            return f"has no form for {name} beside lists of single tokens"
    if causal:  # keys are filled up
        k, v = (jax.eval_shape(partial(_filled, axis=1, size=SIZES[1]), x) for x in (k, v))
    if lay is None:
        return _unsupported(q, k, v, scale)
    if lay.time:
        return "has no form for time cut over a mesh"
    queries, keys = ("batch", "time", "heads", None), ("batch", "time", "key_heads", None)
    with sharding.shares(lay.mesh):
        return _unsupported(*(lay.share(x, *names) for x, names in ((q, queries), (k, keys), (v, keys))), scale)


def _unsupported(q, k, v, scale):
    found = targets.unsupported("gpu", q.shape[1])
    if found is not None:
        return found
    from pallas_kernels.block_sparse_attention import token_gpu

    return token_gpu.supports(q, k, v, scale=scale, capability=targets.capability())


def run(lay, scale, q, k, v, index, causal=False):
    """(y [B, T, H, V], lse [B, H, T]) of a call that there is no reason against; index [b, h, T, c]."""
    static = Static(scale, causal)
    if lay is None:
        return _attend(static, q, k, v, index)
    batch, heads = q.shape[0], k.shape[2]
    cut = index.shape[1] == heads
    lead = ("batch" if index.shape[0] == batch else None), ("key_heads" if cut else None)

    def local(q, k, v, index):
        k, v = (lay.local_key_heads(x, heads) for x in (k, v))
        return _attend(static, q, k, v, lay.local_key_heads(index, heads, axis=1) if cut else index)

    queries, keys = ("batch", None, "heads", None), ("batch", None, "key_heads", None)
    names = queries, keys, keys, (*lead, None, None)
    return on_shares(lay, local, (q, k, v, jnp.asarray(index)), names, (queries, ("batch", "heads", None)))


@partial(jax.jit, static_argnums=(1, 2))
def unions(index, group: int, blocks: int) -> Unions:
    """The unions of the lists index [b, h, T, c] of `group` tokens each, T a multiple of it, of 0 to blocks - 1.

    By one sort of each group's entries: what is equal then stands together, and its bits are a difference of sums.
    """
    b, h, time, c = index.shape
    entries = group * c
    real = (index >= 0) & (index < blocks)
    key = jnp.where(real, index * group + (jnp.arange(time, dtype=jnp.int32) % group)[:, None], blocks * group)
    key = jax.lax.sort(key.reshape(-1, entries).astype(jnp.int32), is_stable=False)
    block, real = key // group, key < blocks * group
    fresh = jnp.pad(key[:, 1:] != key[:, :-1], ((0, 0), (1, 0)), constant_values=True)  # not listed twice by a token
    last = real & jnp.pad(block[:, 1:] != block[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    bit = jnp.where(real & fresh, jnp.uint32(1) << (key % group).astype(jnp.uint32), 0)
    total = jnp.cumsum(bit, axis=-1, dtype=jnp.uint32)  # of runs of distinct bits: differences are right modulo 2^32
    width = min(entries, blocks)
    place = jnp.arange(entries, dtype=jnp.int32)
    rank = jnp.where(last, jnp.cumsum(last, axis=-1, dtype=jnp.int32) - 1, width + place)
    ends = jnp.zeros((key.shape[0], width), jnp.int32)
    row = jnp.arange(key.shape[0], dtype=jnp.int32)[:, None]
    ends = ends.at[row, rank].set(jnp.broadcast_to(place, key.shape), mode="drop", unique_indices=True)
    block, total = (jnp.take_along_axis(x, ends, axis=-1) for x in (block, total))
    bits = total - jnp.pad(total[:, :-1], ((0, 0), (1, 0)))
    count = jnp.sum(last, axis=-1, dtype=jnp.int32)
    filled = jnp.arange(width) < count[:, None]
    block = jnp.where(filled, block, 0)
    bits = jnp.where(filled, jax.lax.bitcast_convert_type(bits, jnp.int32), 0)
    lead = b, h, time // group
    return Unions(count.reshape(lead), block.reshape(*lead, width), bits.reshape(*lead, width))


def _filled(x, axis, size, value=0):
    """x up to a multiple of size along the axis."""
    width = [(0, -x.shape[axis] % size if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, width, constant_values=value) if width[axis][1] else x


class Visitors(NamedTuple):
    """Who lists the blocks of keys: a list for each block, and more of the blocks whose own would be too long."""

    block: jax.Array  # [B, Hk, lists] int32; of the first ones its number
    begin: jax.Array  # [B, Hk, lists] int32
    count: jax.Array  # [B, Hk, lists] int32, a multiple of the tokens of a tile, <= `most`
    order: jax.Array  # [B, Hk, lists] int32: the long ones, then as the blocks lie, whose lists share queries
    token: jax.Array  # [B, Hk, n] int32: list o is token[begin[o] : begin[o] + count[o]], ascending
    counts: jax.Array  # [B, Hk, n] bool: is no filling, nor listed twice


@partial(jax.jit, static_argnums=(1, 2, 3))
def visitors(index, blocks: int, most: int, tile: int) -> Visitors:
    """The lists index [B, Hk, T, c] transposed, filled up to whole tiles of `tile` tokens, which divides `most`."""
    batch, heads, time, c = index.shape
    rows, room = batch * heads, time * c
    block, token = _by_block(index, blocks)
    again = (block[:, 1:] == block[:, :-1]) & (token[:, 1:] == token[:, :-1])
    entry = jnp.where(jnp.pad(again, ((0, 0), (1, 0))), -1, token)
    ends = jax.vmap(partial(jnp.searchsorted, v=jnp.arange(blocks + 1)))(block).astype(jnp.int32)
    whole = -(-(ends[:, 1:] - ends[:, :-1]) // tile) * tile
    begin = jnp.cumsum(whole, axis=-1, dtype=jnp.int32) - whole
    size = -(-(room + blocks * (tile - 1)) // tile) * tile
    shift = jnp.pad(begin - ends[:, :-1], ((0, 0), (0, 1)), constant_values=size)  # past the end for what is no block
    place = jnp.arange(room, dtype=jnp.int32) + jnp.take_along_axis(shift, block, axis=-1)
    filled = jnp.full((rows, size), -1, jnp.int32)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    filled = filled.at[row, place].set(entry, mode="drop", unique_indices=True)
    # What is beyond `most` of a list goes into further ones, of which there are room for as many as there can be.
    more = jnp.maximum(-(-whole // most) - 1, 0)
    last = jnp.cumsum(more, axis=-1, dtype=jnp.int32)
    number = jnp.arange(size // most, dtype=jnp.int32)
    of = jax.vmap(partial(jnp.searchsorted, v=number, side="right"))(last).astype(jnp.int32)
    there, of = of < blocks, jnp.minimum(of, blocks - 1)
    taken = lambda x: jnp.take_along_axis(x, of, axis=-1)
    part = (number - taken(last - more) + 1) * most
    owner = jnp.concatenate([jnp.broadcast_to(jnp.arange(blocks, dtype=jnp.int32), (rows, blocks)), of], axis=-1)
    begin = jnp.concatenate([begin, jnp.where(there, taken(begin) + part, 0)], axis=-1)
    count = jnp.concatenate([whole, jnp.where(there, taken(whole) - part, 0)], axis=-1)
    count = jnp.minimum(count, most)
    order = jnp.argsort(2 * count <= most, axis=-1, stable=True).astype(jnp.int32)
    found = owner, begin, count, order, jnp.maximum(filled, 0), filled >= 0
    return Visitors(*(x.reshape(batch, heads, -1) for x in found))


def _by_block(index, blocks: int):
    """(block, token) [B Hk, T c] of the entries of index [B, Hk, T, c], in ascending order; what is no block last."""
    batch, heads, time, c = index.shape
    token = jnp.arange(time, dtype=jnp.int32)[:, None]
    block = jnp.where((index >= 0) & (index < blocks), index, blocks)
    if (blocks + 1) * time < 2**31:  # one number for both sorts faster
        key = jax.lax.sort((block * time + token).reshape(batch * heads, -1), is_stable=False)
        return key // time, key % time
    both = (x.reshape(batch * heads, -1) for x in (block, jnp.broadcast_to(token, index.shape)))
    return jax.lax.sort(tuple(both), num_keys=2, is_stable=False)


def _added(sums, owner, blocks: int, like):
    """Sums [B, Hk, lists, 64, K] of lists, added up by block, [B, S, Hk, K]; the same in every run."""
    own = (owner[..., None, blocks:] == jnp.arange(blocks)[:, None]).astype(sums.dtype)
    more = jnp.einsum("bhnm,bhmsk->bhnsk", own, sums[:, :, blocks:], precision="highest")
    total = jnp.moveaxis((sums[:, :, :blocks] + more).reshape(*sums.shape[:2], -1, sums.shape[-1]), 1, 2)
    return total.astype(like.dtype)


class Walk(NamedTuple):
    """Lists as the kernels read them."""

    index: jax.Array  # [b, h, T, c]; with a causal mask of the blocks before a token's own
    union: Unions
    own: jax.Array | None  # [b, h, T] bool: who lists its own block, where the mask is causal


def _walk(static, q, k, index) -> Walk:
    from pallas_kernels.block_sparse_attention import token_gpu

    time, group, own = q.shape[1], token_gpu.group_tokens(q, k), None
    index = jnp.asarray(index, jnp.int32)
    if static.causal:
        number = (jnp.arange(time, dtype=jnp.int32) // SIZES[1])[:, None]
        own, index = jnp.any(index == number, axis=-1), jnp.where(index < number, index, -1)
    union = unions(_filled(index, 2, group, -1), group, -(-k.shape[1] // SIZES[1]))
    return Walk(index, union, own)


def _bits(flags, group: int):
    """Flags [b, h, T] of tokens as bits of an int32 for each `group` of them, [b, h, T / group]."""
    flags = _filled(flags, 2, group).reshape(*flags.shape[:2], -1, group)
    bits = jnp.where(flags, jnp.uint32(1) << jnp.arange(group, dtype=jnp.uint32), 0)
    return jax.lax.bitcast_convert_type(jnp.sum(bits, axis=-1, dtype=jnp.uint32), jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q, k, v, index):
    return _attend_forward(static, q, k, v, index)[0]


def _attend_forward(static, q, k, v, index):
    from pallas_kernels.block_sparse_attention import token_gpu

    walk = _walk(static, q, k, index)
    own = None if walk.own is None else _bits(walk.own, token_gpu.group_tokens(q, k))
    keys = (_filled(x, 1, SIZES[1]) for x in (k, v))
    y, lse = token_gpu.forward(q, *keys, tuple(walk.union), own, scale=static.scale)
    return (y, lse), (q, k, v, walk, y, lse)


def _attend_backward(static, saved, cotangents):
    q, k, v, walk, y, lse = saved
    dy, dlse = cotangents
    log2, delta = jnp.moveaxis(block_sparse_kernels.row_sums("gpu", y, dy, lse, dlse)[..., : q.shape[1]], 2, 0)
    found = _through_lists(static.scale, q, k, v, walk, lse, log2, dy, delta)
    if static.causal:
        own = _through_own(static.scale, q, k, v, walk.own, lse, dy, delta)
        found = tuple(x + y for x, y in zip(found, own, strict=True))
    return *found, None


def _through_own(scale, q, k, v, own, lse, dy, delta):
    """Gradients of q, k and v through the blocks in which the tokens lie, of those that list them."""
    size, time = SIZES[1], q.shape[1]
    own = jnp.broadcast_to(own, (q.shape[0], k.shape[2], time))
    lse = jnp.where(jnp.repeat(own, q.shape[2] // k.shape[2], axis=1), lse, -jnp.inf)
    index = np.arange(-(-time // size), dtype=np.int32)[None, None, :, None]
    lists = block_lists.lists(Causal(), index, (size, size), time, time, {})
    config = Config(scale, None, Causal(), time, time)
    return block_sparse_kernels.gradients(config, q, k, v, {}, lists, (size, size), lse, delta, dy)


def _through_lists(scale, q, k, v, walk, lse, log2, dy, delta):
    """Gradients of q, k and v through the blocks that the walk lists; log2: lse in log2, infinite for -inf."""
    from pallas_kernels.block_sparse_attention import token_gpu
    from pallas_kernels.block_sparse_attention import token_gpu_backward as kernels

    time, keys = q.shape[1], k.shape[1]
    k, v = (_filled(x, 1, SIZES[1]) for x in (k, v))
    dq = kernels.backward_queries(q, k, v, lse, dy, delta, tuple(walk.union), scale=scale)
    batch, key_heads, heads = q.shape[0], k.shape[2], q.shape[2] // k.shape[2]
    index = jnp.broadcast_to(walk.index, (batch, key_heads, *walk.index.shape[2:]))
    blocks = k.shape[1] // SIZES[1]
    found = visitors(index, blocks, _most(time), token_gpu.ROWS // heads)

    def listed(x, other):
        """[B, H, T] as [B, Hk, n G], in the order of the lists."""
        x = jnp.swapaxes(x.reshape(batch, key_heads, heads, time), 2, 3)
        x = jnp.take_along_axis(x, found.token[..., None], axis=2)
        return jnp.where(found.counts[..., None], x, other).reshape(batch, key_heads, -1)

    facts = jnp.stack([listed(log2, jnp.inf), listed(delta, 0)], axis=2)
    sums = kernels.backward_keys(q, k, v, dy, (*found[:5], facts), scale=scale)
    sums = (_added(x, found.block, blocks, like)[:, :keys] for x, like in zip(sums, (k, v), strict=True))
    return dq, *sums


def _most(time: int) -> int:
    """Tokens of a list, beyond which one warpgroup would keep the others waiting: all tokens may choose a block."""
    return min(2048, max(256, 64 * (time // 1024)))


_attend.defvjp(_attend_forward, _attend_backward)
