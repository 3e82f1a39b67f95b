"""Log-linear attention by its definition: a loop over time with one state per level, and the weights as a matrix."""

import jax
import jax.numpy as jnp

from seqmix.core import packing
from seqmix.core.shapes import dims


def recurrence(q, k, v, beta, log_decay, level_scales, *, scale, state, length, run_ids):
    """Arguments as `ops/log_linear.py` hands them on: beta [B, T, H] or None (then nothing is erased), log_decay
    [B, T, H, 1 or K] or None, level_scales [B, T, H, L + 1], state [B, H, L, K, V], length [B], run_ids [B, T] or
    None. Returns y, the state and the length after it.
    """
    heads, acc = v.shape[2], state.dtype
    level = jnp.arange(1, state.shape[2] + 1)
    read = lambda x, s: jnp.einsum("bhk,bhlkv->bhlv", x, s, precision=jax.lax.Precision.HIGHEST)

    def step(carry, token):
        s, place = carry
        q, k, v, beta, decay, scales, opens, real = token
        place = jnp.where(opens, 0, place)
        since = place[:, None, None] % (1 << level)  # the start of the token's block of each level
        later = (since >> (level - 1)) == 1  # [B, 1, L]
        new = jnp.where((since == 0)[..., None, None], 0, s) * decay[:, :, None, :, None]
        value = jnp.where(later[..., None], 0, v[:, :, None])
        own = jnp.sum(q * k, axis=-1, keepdims=True) * v
        if beta is not None:
            value, own = beta[..., None, None] * (value - read(k, new)), beta[..., None] * own
        new = new + k[:, :, None, :, None] * value[..., None, :]
        weights = jnp.where(later, scales[..., 1:], 0)  # [B, H, L]
        y = scales[..., :1] * own + jnp.sum(weights[..., None] * read(q, new), axis=2)
        real = real[:, None, None]
        s = jnp.where(real[..., None, None], new, s)
        return (s, place + real[:, 0, 0]), jnp.where(real, scale * y, 0).astype(v.dtype)

    batch, time = v.shape[:2]
    run_ids = jnp.ones((batch, time), jnp.int32) if run_ids is None else run_ids
    decay = jnp.ones((batch, time, 1, 1), acc) if log_decay is None else jnp.exp(log_decay)
    q, k = (jnp.repeat(x.astype(acc), heads // x.shape[2], axis=2) for x in (q, k))
    tokens = q, k, v.astype(acc), beta, decay, level_scales, packing.starts(run_ids), run_ids != 0
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tokens)
    (state, length), y = jax.lax.scan(step, (state, length), xs)
    return jnp.moveaxis(y, 0, 1).astype(v.dtype), state, length


def level_matrix(level_scales, *, segment_ids=None):
    """level_scales[t, lev(t, s)], by which log-linear attention multiplies the mixing matrix of the plain one.

    lev(t, s) is the number of bits of t xor s, for positions t and s within their segment; entries where s comes
    after t, or belongs to another segment, mean nothing. level_scales [B, T, H, NL]; returns [B, H, T, T].
    """
    d = dims("B T H NL", level_scales=level_scales)
    place = jnp.arange(d.T)[None]
    if segment_ids is not None:
        packing.check(segment_ids, d.B, d.T)
        place = packing.positions(packing.runs(segment_ids))
    apart = place[:, :, None] ^ place[:, None, :]
    level = jnp.sum(apart[..., None] >= 1 << jnp.arange(d.NL - 1), axis=-1)
    index = jnp.broadcast_to(level[:, None], (d.B, d.H, d.T, d.T))
    return jnp.take_along_axis(jnp.moveaxis(level_scales, 1, 2), index, axis=-1)
