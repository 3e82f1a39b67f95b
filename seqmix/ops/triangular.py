"""Inverses of unit lower triangular matrices, in batches of small ones."""

import jax
import jax.numpy as jnp

from seqmix.core.flops import matmul

_BASE = 16  # size up to which blocks are inverted by masked products of whole blocks


@jax.custom_jvp
def unit_lower_inverse(a):
    """(I + a)^-1 of strictly lower triangular matrices a [..., N, C, C], C a power of two, in the dtype of a.

    Inverses of diagonal blocks are merged by pairs, [[I+P, 0], [L, I+Q]]^-1 = [[X, 0], [-Y L X, Y]] with
    X = (I+P)^-1 and Y = (I+Q)^-1, from blocks of one on. Every intermediate is a block of the result, so nothing
    grows that does not stand in it; the terms of a Neumann series, which takes as few products, pass 1e15 for 64
    equal keys. Entries of `a` on or above the diagonal are not read. Products are taken at full precision. The
    derivative is -X da X, with no look at how X was made.
    """
    return _inverse(a)


@unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    (a,), (da,) = primals, tangents
    inverse = unit_lower_inverse(a)
    return inverse, -_dot(_dot(inverse, jnp.tril(da, -1)), inverse)


def unit_lower_inverse_flops(size: int) -> int:
    """FLOPs of `unit_lower_inverse` of one matrix, a multiply-add being two."""
    half = min(size, _BASE)
    levels = half.bit_length() - 1
    total = 4 * levels * size * half + max(levels - 1, 0) * (size // half) * 2 * matmul(half, half, half)
    while half < size:
        total += size // (2 * half) * 2 * matmul(half, half, half)
        half *= 2
    return total


def _dot(x, y):
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _inverse(a):
    size = a.shape[-1]
    half = min(size, _BASE)
    inverse = _small_inverses(_diagonal_blocks(a, half))
    while half < size:
        low = _diagonal_blocks(a, 2 * half)[..., half:, :half]
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        low = -_dot(_dot(second, low), first)
        upper = jnp.concatenate([first, jnp.zeros_like(low)], axis=-1)
        inverse = jnp.concatenate([upper, jnp.concatenate([low, second], axis=-1)], axis=-2)
        half *= 2
    return inverse


def _diagonal_blocks(a, size):
    """[..., N * C / size, size, size] of a [..., N, C, C]."""
    blocks = [a[..., s : s + size, s : s + size] for s in range(0, a.shape[-1], size)]
    return jnp.stack(blocks, axis=-3).reshape(*a.shape[:-3], -1, size, size)


def _small_inverses(a):
    """The same merges within blocks [..., s, s], as products of whole blocks of which masks select a part."""
    size = a.shape[-1]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=a.dtype), a.shape)
    row, column = jnp.arange(size)[:, None], jnp.arange(size)[None, :]
    half = 1
    while half < size:
        odd, even = row // half, column // half
        low = jnp.where((odd % 2 == 1) & (even == odd - 1), a, 0)
        inverse = inverse - (low if half == 1 else _dot(_dot(inverse, low), inverse))
        half *= 2
    return inverse
