"""The mixing matrices of the delta rule and its relatives, in closed form.

Dense solves in float32 (float64 for float64 inputs) for tests and analysis: no chunks, no scan over time, no
anchors, so that they are an oracle for the ops and not a copy of them.
"""

import functools

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from seqmix.core import packing

_HIGHEST = jax.lax.Precision.HIGHEST


def delta_mixing_matrix(q, k, beta, log_decay=None, *, erase=None, scale=1.0, segment_ids=None):
    """M [B, H, T, T] with y = M v, for `delta_rule` from a zero state.

        M = scale tril(Q K^T D) (I + tril(diag(beta) A K^T D, -1))^-1 diag(beta)
        D_ij = exp(g_{j+1} + ... + g_i)

    where for decays per channel D weighs the channels of the products. Arguments as for `delta_rule`; with n
    steps a token (k [B, T, n, Hk, K]) the columns are the values of the steps, [B, H, T, T * n].
    """
    steps, acc = (k.shape[2] if k.ndim == 5 else 1), jnp.promote_types(k.dtype, jnp.float32)
    g = _log_decay(log_decay, k.shape[:2], segment_ids, acc)
    erase = k if erase is None else erase
    if k.ndim == 5:  # one step after the other; the decay before the first
        k, beta, erase = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, beta, erase))
        g = None if g is None else jnp.repeat(g, steps, 1) * (jnp.arange(k.shape[1]) % steps == 0)[:, None, None]
    seen = _visible(segment_ids, k.shape[1] // steps, steps)
    beta = jnp.moveaxis(beta.astype(acc), 1, -1)  # [B, H, T]
    scores = functools.partial(_scores, g=g, heads=beta.shape[1])
    inverse = _inverse(beta[..., None] * scores(erase, k, seen=jnp.tril(seen, -1)))
    read = scores(jnp.repeat(q, steps, 1), k, seen=seen)[:, :, steps - 1 :: steps]
    return scale * jnp.matmul(read, inverse, precision=_HIGHEST) * beta[..., None, :]


def rank_one_mixing_matrix(q, k, left, right, log_decay=None, *, scale=1.0, segment_ids=None):
    """M [B, H, T, T] with y = M v, for `diagonal_plus_rank_one` from a zero state; H is the largest number of
    heads among the arguments.

        M = scale (tril(Q K^T D) + tril(Q L^T D) (I - tril(R L^T E, -1))^-1 tril(R K^T E, -1))
        D_ij = exp(g_{j+1} + ... + g_i),    E_ij = exp(g_{j+1} + ... + g_{i-1})

    as R reads the state before its own step's decay. Arguments as for `diagonal_plus_rank_one`.
    """
    acc = jnp.promote_types(k.dtype, jnp.float32)
    g = _log_decay(log_decay, k.shape[:2], segment_ids, acc)
    seen = _visible(segment_ids, k.shape[1])
    before = jnp.tril(seen, -1)
    heads = max(x.shape[2] for x in (k, left, right, *(() if g is None else (g,))))
    scores = functools.partial(_scores, g=g, heads=heads)
    inverse = _inverse(-scores(right, left, seen=before, exclusive=True))
    corrected = jnp.matmul(inverse, scores(right, k, seen=before, exclusive=True), precision=_HIGHEST)
    erased = jnp.matmul(scores(q, left, seen=seen), corrected, precision=_HIGHEST)
    return scale * (scores(q, k, seen=seen) + erased)


def _log_decay(log_decay, shape, segment_ids, acc):
    """[B, T, H, 1 or K] or None, 0 at padding."""
    if log_decay is None:
        return None
    g = log_decay.astype(acc)
    g = g if g.ndim == 4 else jnp.broadcast_to(g, (*shape, g.shape[-1]))[..., None]
    return g if segment_ids is None else jnp.where((segment_ids != 0)[..., None, None], g, 0)


def _visible(segment_ids, time, steps=1):
    """Whether step i sees step j <= i: [B or 1, 1, T * steps, T * steps]."""
    causal = jnp.tril(jnp.ones((time * steps, time * steps), bool))[None, None]
    if segment_ids is None:
        return causal
    run = jnp.repeat(packing.runs(segment_ids), steps, axis=1)
    same = (run[:, :, None] == run[:, None, :]) & (run != 0)[:, :, None]
    return causal & same[:, None]


def _inverse(strict):
    """(I + strict)^-1."""
    eye = jnp.broadcast_to(jnp.eye(strict.shape[-1], dtype=strict.dtype), strict.shape)
    return solve_triangular(eye + strict, eye, lower=True, unit_diagonal=True)


def _scores(x, y, g, heads, seen, exclusive=False):
    """sum_k x_ik y_jk exp(g_{j+1} + ... + g_i) where `seen`, else 0: [B, H, T, T]. `exclusive` leaves g_i out."""
    acc = jnp.promote_types(x.dtype, jnp.float32)
    # Channels first, for a sum over channels that holds one [T, T] matrix at a time: [K, B, H, T].
    x, y = (jnp.moveaxis(jnp.repeat(z.astype(acc), heads // z.shape[2], 2), (3, 2), (0, 2)) for z in (x, y))
    if g is not None:
        g = jnp.moveaxis(jnp.repeat(g, heads // g.shape[2], 2), (3, 2), (0, 2))

    def weight(g):
        step = jnp.where(jnp.tril(jnp.ones((g.shape[-1],) * 2, bool), -1), g[..., :, None], 0)
        total = jnp.cumsum(step, axis=-2)  # sums over the steps after j alone: no difference of large numbers
        if exclusive:
            total = jnp.pad(total[..., :-1, :], ((0, 0), (0, 0), (1, 0), (0, 0)))
        return jnp.exp(jnp.where(seen, total, 0))

    def add(total, channel):
        x, y, g = channel
        return total + x[..., :, None] * y[..., None, :] * weight(g), None

    if g is not None and g.shape[0] > 1:
        zero = jnp.zeros((*x.shape[1:], x.shape[-1]), acc)
        products = jax.lax.scan(add, zero, (x, y, g))[0]
    else:
        products = jnp.einsum("kbhi,kbhj->bhij", x, y, precision=_HIGHEST)
        products = products if g is None else products * weight(g[0])
    return jnp.where(seen, products, 0)
