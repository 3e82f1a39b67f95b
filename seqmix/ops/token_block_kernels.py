"""Attention to blocks of keys that each token lists, through Hopper kernels: lists, gradient, and when they can run.

The query heads of a key head share a list, and neighbouring tokens the walk along the union of theirs (`unions`). The
gradients of keys and values go through the tokens of each block (`visitors`). The kernels are interpreted and compiled,
and have not run on a chip: an op takes them by name only.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmix.core import sharding
from seqmix.ops import targets
from seqmix.ops.mesh import on_shares

SIZES = 1, 64  # tokens, and keys, of a block


class Unions(NamedTuple):
    """What neighbouring tokens list together."""

    count: jax.Array  # [b, h, groups] int32
    block: jax.Array  # [b, h, groups, n] int32, the first `count` in ascending order
    bits: jax.Array  # [b, h, groups, n] int32, bit i: token i of the group lists the block


def takes(sizes, blocks) -> bool:
    """Whether a call is of the kind for which these kernels are."""
    return blocks is not None and tuple(sizes) == SIZES


def reason(implementation, lay, q, k, v, *, mask, soft_cap, slopes, scale) -> str | None:
    """Why the kernels cannot run this call here, or are not taken without being named; None if they can."""
    for name, given in (("a mask or segments", mask), ("a soft cap", soft_cap), ("slopes", slopes)):
        if given is not None:
            return f"has no form for {name} beside lists of single tokens"
    if lay is None:
        found = _unsupported(q, k, v, scale)
    elif lay.time:
        found = "has no form for time cut over a mesh"
    else:
        queries, keys = ("batch", "time", "heads", None), ("batch", "time", "key_heads", None)
        with sharding.shares(lay.mesh):
            local = [lay.share(x, *names) for x, names in ((q, queries), (k, keys), (v, keys))]
            found = _unsupported(*local, scale)
    if found is None and implementation is None:
        return "has not been run on a GPU with lists of single tokens, only if named"
    return found


def _unsupported(q, k, v, scale):
    found = targets.unsupported("gpu", q.shape[1])
    if found is not None:
        return found
    from pallas_kernels.block_sparse_attention import token_gpu

    return token_gpu.supports(q, k, v, scale=scale, capability=targets.capability())


def run(lay, scale, q, k, v, index):
    """(y [B, T, H, V], lse [B, H, T]) of a call that there is no reason against; index [b, h, T, c]."""
    if lay is None:
        return _attend(scale, q, k, v, index)
    batch, heads = q.shape[0], k.shape[2]
    cut = index.shape[1] == heads
    lead = ("batch" if index.shape[0] == batch else None), ("key_heads" if cut else None)

    def local(q, k, v, index):
        k, v = (lay.local_key_heads(x, heads) for x in (k, v))
        return _attend(scale, q, k, v, lay.local_key_heads(index, heads, axis=1) if cut else index)

    queries, keys = ("batch", None, "heads", None), ("batch", None, "key_heads", None)
    names = queries, keys, keys, (*lead, None, None)
    return on_shares(lay, local, (q, k, v, jnp.asarray(index)), names, (queries, ("batch", "heads", None)))


def unions(index, group: int, blocks: int) -> Unions:
    """The unions of the lists index [b, h, T, c] of `group` tokens each, T a multiple of it, of 0 to blocks - 1.

    By one sort of each group's entries: what is equal then stands together, and its bits are a difference of sums.
    """
    b, h, time, c = index.shape
    entries = group * c
    real = (index >= 0) & (index < blocks)
    key = jnp.where(real, index * group + (jnp.arange(time, dtype=jnp.int32) % group)[:, None], blocks * group)
    key = jnp.sort(key.reshape(-1, entries), axis=-1).astype(jnp.int32)
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


def _walk(q, k, index):
    """The lists of whole groups, and their unions."""
    from pallas_kernels.block_sparse_attention import token_gpu

    group = token_gpu.group_tokens(q, k)
    index = _filled(jnp.asarray(index, jnp.int32), 2, group, -1)
    return index, unions(index, group, k.shape[1] // SIZES[1])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(scale, q, k, v, index):
    return _attend_forward(scale, q, k, v, index)[0]


def _attend_forward(scale, q, k, v, index):
    from pallas_kernels.block_sparse_attention import token_gpu

    time = q.shape[1]
    index, union = _walk(q, k, index)
    y, lse = token_gpu.forward(_filled(q, 1, token_gpu.group_tokens(q, k)), k, v, tuple(union), scale=scale)
    y, lse = y[:, :time], lse[:, :, :time]
    return (y, lse), (q, k, v, index, union, y, lse)


def _attend_backward(scale, saved, cotangents):
    from seqmix.ops import block_lists, block_sparse_chunked

    q, k, v, index, _, y, lse = saved
    dy, dlse = cotangents
    config = block_sparse_chunked.Config(scale, None, None, q.shape[1], k.shape[1])
    lists = block_lists.lists(None, index[:, :, : q.shape[1]], SIZES, q.shape[1], k.shape[1], {})
    walks = block_lists.forward(lists), block_lists.transposed(lists, k.shape[1] // SIZES[1])
    dq, dk, dv = block_sparse_chunked.gradients(config, q, k, v, None, {}, walks, SIZES, y, lse, dy, dlse)[:3]
    return dq, dk, dv, None


_attend.defvjp(_attend_forward, _attend_backward)
