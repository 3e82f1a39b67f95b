"""Linear attention in chunks of C tokens: matmuls within and between them, a scan along the chunks' states.

    y_i  = sum over j <= i in the chunk of (q_i . k_j, decayed from j to i) v_j  +  (q_i, decayed from its start) S
    S'   = (S, decayed over the chunk)  +  sum over j of (k_j, decayed from j to its end) v_j^T

(Yang et al. 2312.06635, section 4; Dao and Gu 2405.21060, section 6.) Several chunks make a block, whose matmuls
run at once. Blocks are scanned, and the backward pass computes a block anew from its first state: scores, and the
states between chunks, exist for one block at a time.

Arguments are those of `ops/linear_reference.py`. Letters in einsum: b batch, n chunk, g key head, r value head of
that key head, i and j tokens of a chunk, k and v channels.
"""

import functools

import jax
import jax.numpy as jnp

from seqmix.core import packing
from seqmix.ops import linear_reference
from seqmix.ops.linear_anchored import channel_scores, contract, head_weights, prefix_suffix

# Scores and states are held at once for about so many chunks and heads, but for no fewer chunks than that: XLA
# plans for the whole mesh, of which a device has a share of the heads.
_TILES, _FEWEST = 2048, 16


def chunked(q, k, values, decay, states, runs, finish, *, chunk, strict=False):
    """(finish(outputs), states); outputs of [B, T, H, V] in the states' dtype. strict: a token skips itself."""
    batch, length, groups = q.shape[:3]
    if length == 1 and not strict:
        values, decay = jax.tree.map(lambda x: x[:, 0], (values, decay))
        outputs, states = linear_reference.step(q[:, 0], k[:, 0], values, decay, states)
        return finish(tuple(y[:, None] for y in outputs)), states
    blocks, size, chunk = plan(length, chunk, batch * values[0].shape[2])

    def split(x, place):
        """[B, T, ...] -> [blocks, B, ..., n, C, ...], n and C at axis `place`, with zeros on the right."""
        x = jnp.pad(x, [(0, 0), (0, blocks * size * chunk - length)] + [(0, 0)] * (x.ndim - 2))
        x = x.reshape(x.shape[0], blocks, size, chunk, *x.shape[2:])
        return jnp.moveaxis(x, (1, 2, 3), (0, place, place + 1))

    def grouped(x, axis):
        """H at `axis` as Hk, R."""
        return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])

    q, k = split(q, 3), split(k, 3)
    values = tuple(split(grouped(v, 2), 4) for v in values)
    if decay is not None:
        decay = split(grouped(decay, 2), 4)
    if runs is not None:
        runs = _boundaries(split(runs, 2))
    body = functools.partial(_block, strict=strict, finish=finish)
    states = tuple(grouped(s, 1) for s in states)
    xs = (q, k, values, decay, runs)
    if blocks == 1:
        states, y = jax.checkpoint(body)(states, jax.tree.map(lambda x: x[0], xs))
    else:
        # Within a scan nothing of the forward pass can be merged with the second computation.
        states, y = jax.lax.scan(jax.checkpoint(body, prevent_cse=False), states, xs)
        y = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:]), y)
    states = tuple(s.reshape(batch, -1, *s.shape[3:]) for s in states)
    return jax.tree.map(lambda x: x[:, :length], y), states


def plan(length, chunk, rows):
    """(blocks, chunks in a block, tokens in a chunk) for `rows` = B H sequences of `length` tokens."""
    chunk = min(chunk, 1 << (length - 1).bit_length())
    chunks = -(-length // chunk)
    blocks = -(-chunks // max(_FEWEST, _TILES // rows))
    return blocks, -(-chunks // blocks), chunk


def bidirectional(q, k, values, states, runs, finish, *, chunk):
    """Each token reads the whole of its segment: (finish(outputs), the last segment's sums of k v^T).

    With segments, what is before a token and what is after it: two causal passes, the second in reverse.
    """
    if runs is None:
        values = tuple(v.reshape(*v.shape[:2], q.shape[2], -1, v.shape[-1]) for v in values)
        sums = tuple(contract("btgk,btgrv->bgrkv", k, v) for v in values)
        outputs = (contract("btgk,bgrkv->btgrv", q, s.astype(q.dtype)) for s in sums)
        outputs = tuple(y.reshape(*y.shape[:2], -1, y.shape[-1]) for y in outputs)
        return finish(outputs), tuple(s.reshape(s.shape[0], -1, *s.shape[3:]) for s in sums)
    run = functools.partial(chunked, decay=None, states=states, finish=lambda outputs: outputs, chunk=chunk)
    before, sums = run(q, k, values, runs=runs)
    q, k, values, runs = jax.tree.map(lambda x: jnp.flip(x, 1), (q, k, values, runs))
    after, _ = run(q, k, values, runs=packing.runs(runs), strict=True)
    return finish(tuple(x + jnp.flip(y, 1) for x, y in zip(before, after))), sums


def _boundaries(runs):
    """Runs [blocks, B, n, C], and the runs whose state enters and leaves each chunk, [blocks, B, n]."""
    last = jnp.moveaxis(jnp.max(runs, axis=-1), 1, 0)
    leaving = jnp.maximum(jax.lax.cummax(last.reshape(last.shape[0], -1), axis=1), 1)
    entering = jnp.pad(leaving[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    entering, leaving = (jnp.moveaxis(x.reshape(last.shape), 0, 1) for x in (entering, leaving))
    return runs, entering, leaving


def _block(states, block, *, strict, finish):
    """n chunks at once: (states after them, finish(outputs of [B, n C, H, V]))."""
    q, k, values, decay, runs = block
    dtype = q.dtype
    scores, enter, leave, whole = _decays(q, k, decay, runs, strict, states[0].dtype)
    reads, writes, mixes = "bgnik,nbgrkv->bgrniv", "bgnjk,bgrnjv->nbgrkv", "bgrnij,bgrnjv->bgrniv"
    if scores.ndim == 5:
        mixes = "bgnij,bgrnjv->bgrniv"
    elif decay.ndim == 6:
        reads, writes = "bgrnik,nbgrkv->bgrniv", "bgrnjk,bgrnjv->nbgrkv"
        q, k = ((x[:, :, None] * factor).astype(dtype) for x, factor in ((q, enter), (k, leave)))
        enter = leave = None
    scores = scores.astype(dtype)

    def advance(state, chunk):
        new, factor = chunk
        return (state if factor is None else state * factor) + new, state.astype(dtype)

    def mix(v, state):
        written = contract(writes, k, v if leave is None else (v * leave[..., None]).astype(dtype))
        state, before = jax.lax.scan(advance, state, (written, whole))
        read = contract(reads, q, before)
        y = contract(mixes, scores, v) + (read if enter is None else read * enter[..., None])
        y = y.reshape(y.shape[0], -1, y.shape[3] * y.shape[4], y.shape[5])
        return state, jnp.moveaxis(y, 1, 2)

    states, outputs = zip(*(mix(v, s) for v, s in zip(values, states)))
    return states, finish(outputs)


def _decays(q, k, decay, runs, strict, acc):
    """Scores [B, Hk, (R,) n, C, C], and the factors on what enters, what leaves and what passes a chunk.

    Factors are None where they would all be 1. Sizes but for n and C may be 1: [B, Hk, R, n, C] per head, with K at
    the end per channel; the last is [n, B, Hk, R, K, 1].
    """
    i = jnp.arange(q.shape[-2])
    enter = leave = whole = None
    if decay is None:
        visible = i[:, None] > i if strict else i[:, None] >= i
        scores = jnp.where(visible, contract("bgnik,bgnjk->bgnij", q, k), 0)
    elif decay.ndim == 5:
        scores = contract("bgnik,bgnjk->bgnij", q, k)[:, :, None] * head_weights(decay)
        enter, leave = (jnp.exp(x) for x in prefix_suffix(decay))
        whole = enter[..., -1, None, None]
    else:
        q, k = (jnp.broadcast_to(x[:, :, None], decay.shape) for x in (q, k))
        heads = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (q, k, decay))
        scores, prefix, suffix = (x.reshape(*decay.shape[:5], -1) for x in channel_scores(*heads))
        enter, leave = jnp.exp(prefix), jnp.exp(suffix)
        whole = enter[..., -1, :, None]
    if runs is not None:
        runs, entering, leaving = runs
        scores = _only(runs[..., :, None] == runs[..., None, :], scores, acc, scores.ndim - 4)
        enter = _only(runs == entering[..., None], enter, acc)
        leave = _only(runs == leaving[..., None], leave, acc)
        whole = _only((entering == leaving)[..., None, None], whole, acc)
    return scores, enter, leave, None if whole is None else jnp.moveaxis(whole, 3, 0)


def _only(mask, factor, acc, heads=2):
    """factor (None: 1) where the mask [B, n, ...] holds, else 0; `heads` axes come before n in the factor."""
    mask = jnp.expand_dims(mask, tuple(range(1, 1 + heads)))
    if factor is None:
        return mask.astype(acc)
    return jnp.where(jnp.expand_dims(mask, tuple(range(mask.ndim, factor.ndim))), factor, 0)
