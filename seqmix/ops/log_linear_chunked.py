"""Log-linear attention in chunks of C tokens: one weighted matrix within chunks, one state a level between them.

Let M be the matrix of the plain op within a chunk, R_t the vector with which token t reads the state that enters
the chunk (R_t^T S is what the plain op adds to y_t), D what the state is multiplied by over the chunk, and u_t the
row that the plain op adds with its key (the value, or for the delta rule the corrected one). For each level l

    y_t    = sum over s of M_ts level_scales[t, lev(t, s)] v_s  +  sum over l of level_scales[t, l] r_l(t) R_t^T S_l
    S_l'   = e_l D S_l + sum over s of (k_s, decayed to the chunk's end) u_s^T,     u from w_l(s) v_s and e_l S_l

    r_l(t) = [t stands in the later half of its block of 2^l positions, and the block began before the chunk]
    w_l(s) = [s stands in the earlier half of its block of 2^l positions, and the block is that of the last token]
    e_l    = [the block of the last token began before the chunk]

so all but u is made once for all levels, and positions may stand in any place of a chunk: nothing needs to be
aligned to it. Where they are aligned, a chunk reads no level whose blocks lie within it.
(Guo et al. 2506.04761, whose chunks are aligned.)

Layout and helpers are those of `ops/delta_chunked.py`; L levels come after the heads, before K, V or C.
"""

import functools

import jax
import jax.numpy as jnp

from seqmix.core import packing
from seqmix.ops.delta_chunked import (
    chunk_scores,
    chunk_system,
    cut,
    decay_sums,
    decayed,
    in_chunks,
    joined,
    passing,
    per_head,
    product,
    scan_blocks,
    solving,
    times,
)
from seqmix.ops.linear_chunked import plan


def chunked(q, k, v, beta, log_decay, level_scales, *, scale, state, length, run_ids, chunk):
    """Arguments as for `recurrence` in `ops/log_linear_reference.py`, and the chunk; state and length are None where
    rows start.
    """
    batch, time, heads, width = v.shape
    acc = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    count = level_scales.shape[-1] - 1
    first, last = 0, count
    if state is None:
        near, far = read_levels(time, chunk)
        first, last = min(near, count) if run_ids is None else 0, min(far, count)
        state = jnp.zeros((batch, heads, count, q.shape[-1], width), acc)
        length = jnp.zeros(batch, jnp.int32)
    place = places(length, time, run_ids)
    beta = None if beta is None else beta[..., None]
    args = q, k, v, beta, log_decay, level_scales, place, length - 1, run_ids, chunk
    between = tuple(range(first + 1, last + 1))
    y, middle = _pass(*args, state[:, :, first:last], levels=between, near=first or last)
    # Levels that no chunk reads are a pass of their own, which is dropped where the state is not used.
    rest = (*range(1, first + 1), *range(last + 1, count + 1))
    if rest:
        _, others = _pass(*args, state[:, :, : len(rest)], levels=rest, near=0)
        middle = jnp.concatenate([others[:, :, :first], middle, others[:, :, first:]], axis=2)
    return (scale * y).astype(v.dtype), middle, place[:, -1] + 1


def read_levels(time, chunk):
    """(near, far): of `time` tokens in chunks that positions are aligned to, levels up to `near` are those within a
    chunk, and those above it up to `far` the ones between chunks.
    """
    _, _, size = plan(time, chunk, 1)
    return size.bit_length() - 1, (time - 1).bit_length()


def places(length, time, run_ids):
    """Positions [B, T]; padding has that of the token before it."""
    if run_ids is None:
        return length[:, None] + jnp.arange(time, dtype=length.dtype)
    place = packing.positions(run_ids, start=length)
    last = jax.lax.cummax(jnp.where(run_ids != 0, jnp.arange(time), -1), axis=1)
    before = jnp.take_along_axis(place, jnp.maximum(last, 0), axis=1)
    return jnp.where(last < 0, length[:, None] - 1, before)


def _pass(q, k, v, beta, log_decay, level_scales, place, entered, run_ids, chunk, state, *, levels, near):
    """(y without scale in the dtype of the state, state [B, H, len(levels), K, V]): pairs of tokens of one chunk at
    levels up to `near`, pairs of different chunks at `levels`; the row's last position before it is entered [B].
    """
    batch, time, heads, _ = v.shape
    shape = plan(time, chunk, batch * heads * max(1, len(levels)))
    c = in_chunks(q, k, k, v, None, beta, log_decay, state.dtype, run_ids, shape)
    scales = cut(level_scales, state.dtype, run_ids, shape)
    blocks, chunks, size = shape
    place = jnp.pad(place, ((0, 0), (0, blocks * chunks * size - time)), mode="edge").reshape(batch, -1, size)
    before = jnp.concatenate([entered[:, None], place[:, :-1, -1]], axis=1)
    place, before = (jnp.moveaxis(x.reshape(batch, blocks, chunks, -1), 1, 0) for x in (place, before))
    block = functools.partial(_block, levels=levels, near=near)
    state, y = scan_blocks(block, state, (c, scales, place, before))
    return joined(y, time, run_ids), state


def _block(state, block, *, levels, near):
    """The states [B, H, L, K, V] after N chunks, and y [B, H, N, C, V] in them; place [B, N, C], before [B, N, 1]."""
    c, scales, place, before = block
    mixes, *plain = _plain(c)
    weighted = (mixes * _level_weights(scales, place, near)).astype(c.value.dtype)
    y = product("bhnij,bhnjv->bhniv", weighted, c.value)
    if not levels:
        return state, y
    place, before, after = (x[:, None, None] for x in (place, before, place[..., -1:]))
    level = jnp.array(levels)[:, None, None]
    later = (place >> (level - 1)) & 1 == 1  # [B, 1, L, N, C]
    reads = later & (place >> level == before >> level)
    writes = ~later & (place >> level == after >> level)
    stays = before >> level == after >> level  # [B, 1, L, N, 1]
    weights = jnp.where(reads, jnp.stack([scales[..., at] for at in levels], axis=2), 0)  # [B, H, L, N, C]
    left, left_rows = decayed(c.left, decay_sums(c.decay, reverse=True), c.leaves)
    split = lambda x, axis: jnp.moveaxis(x, axis, 0)
    xs = jax.tree.map(lambda x: split(x, 2), (*plain, left, left_rows, passing(c)))
    xs = xs, tuple(split(x, 3)[..., None] for x in (weights, writes, stays))
    state, between = jax.lax.scan(functools.partial(_advance, precision=solving(c.q.dtype)), state, xs)
    return state, y + jnp.moveaxis(between, 0, 2)


def _advance(s, chunk, *, precision):
    """The states [B, H, L, K, V] after a chunk, and what its tokens read of them, [B, H, C, V]."""
    (read, read_rows, system, value, left, left_rows, decay), (weights, writes, stays) = chunk
    over_levels = lambda x: None if x is None else x[:, :, None]
    y = jnp.sum(weights * times(product("bhck,bhlkv->bhlcv", read, s), over_levels(read_rows)), axis=2)
    u = jnp.where(writes, over_levels(value), 0)
    if system is not None:
        inverse, right, right_rows = system
        carried = times(product("bhck,bhlkv->bhlcv", right, s), over_levels(right_rows))
        u = jnp.einsum("bhij,bhljv->bhliv", inverse, u + jnp.where(stays, carried, 0), precision=precision)
    s = jnp.where(stays, times(s, over_levels(decay)), 0)
    return s + product("bhck,bhlcv->bhlkv", left, times(u, over_levels(left_rows))), y


def _plain(c):
    """Of the plain op: M [B, H, N, C, C], R as x and rows, what corrects the values or None, and the values."""
    scores = chunk_scores(c, c.q, c.left)
    read, rows = decayed(c.q, decay_sums(c.decay), c.entered)
    if c.beta is None:
        return scores, read, rows, None, c.value
    inverse, target, right, right_rows = chunk_system(c)
    heads, precision = c.value.shape[1], solving(c.q.dtype)
    solved = jnp.matmul(scores, inverse, precision=precision)
    erased = jnp.matmul(solved, times(per_head(right, heads), right_rows), precision=precision)
    read = (times(per_head(read, heads), rows) + erased).astype(c.q.dtype)
    return solved * jnp.swapaxes(c.beta, -1, -2), read, None, (inverse, right, right_rows), target


def _level_weights(scales, place, near):
    """level_scales[i, lev(i, j)] [B, H, N, C, C] of levels up to `near`, 0 above; scales [B, H, N, C, L + 1]."""
    apart = place[:, None, :, :, None] ^ place[:, None, :, None, :]
    weights = jnp.where(apart == 0, scales[..., :1], 0)
    for at in range(1, near + 1):
        weights = jnp.where((apart >> (at - 1)) == 1, scales[..., at : at + 1], weights)
    return weights
