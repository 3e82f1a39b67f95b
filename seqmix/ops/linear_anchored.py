"""Decayed scores within a chunk, right for every decay <= 0, and the contraction that chunked forms are made of.

Every exponent here is a sum of decays between two tokens, so never positive, and is computed without a difference
of large sums: exp neither overflows nor loses the small decays beside the large ones.
"""

import functools

import jax
import jax.numpy as jnp


def contract(spec: str, a, b):
    """einsum(spec, a, b) of two operands of one dtype, accumulated and returned in promote(dtype, float32).

    The cotangent of a 16-bit product is rounded to 16 bits, as its operands are, so that the backward pass too
    multiplies 16-bit operands. float32 operands are multiplied in full, unless jax_default_matmul_precision says
    otherwise. Each index of an operand must be one of the other operand or of the result.
    """
    if a.dtype.itemsize < 4:
        return _contract_rounded(spec, a, b)
    precision = None if jax.config.jax_default_matmul_precision else jax.lax.Precision.HIGHEST
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=a.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract_rounded(spec, a, b):
    # XLA for CPUs has no 16-bit products: it widens the operands of some, and fails at others ("Unsupported element
    # type for DotThunk::Execute: BF16 x BF16 = F32", jaxlib 0.10.2 and 0.11.2).
    return jax.lax.platform_dependent(
        a,
        b,
        cpu=lambda a, b: jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32)),
        default=lambda a, b: jnp.einsum(spec, a, b, preferred_element_type=jnp.float32),
    )


def _contract_forward(spec, a, b):
    return _contract_rounded(spec, a, b), (a, b)


def _contract_backward(spec, operands, g):
    a, b = operands
    left, right, out = spec.replace("->", ",").split(",")
    g = g.astype(a.dtype)
    da = _contract_rounded(f"{out},{right}->{left}", g, b)
    db = _contract_rounded(f"{out},{left}->{right}", g, a)
    return da.astype(a.dtype), db.astype(b.dtype)


_contract_rounded.defvjp(_contract_forward, _contract_backward)


def head_weights(decay):
    """exp(sum of decay over j < s <= i) for j <= i, 0 above: [..., C, C] from the decays [..., C] of a chunk.

    Each decay is split into a multiple of 1/64 and a rest below it. Sums of multiples are exact in float32 for
    1024 tokens, those of the rests stay small, so the difference of two sums is as good as the sum between them.
    Below the floor exp is 0 anyway, so nothing changes where a decay is cut there.
    """
    floor = -128.0 if decay.dtype == jnp.float32 else -1024.0
    decay = jnp.maximum(decay, floor)
    coarse = jnp.round(decay * 64) / 64
    coarse, rest = jnp.cumsum(coarse, axis=-1), jnp.cumsum(decay - coarse, axis=-1)
    gap = (coarse[..., :, None] - coarse[..., None, :]) + (rest[..., :, None] - rest[..., None, :])
    i = jnp.arange(decay.shape[-1])
    # The diagonal is 1 whatever the decays; as exp(x - x) its two gradients would cancel only up to rounding.
    exponent = jnp.where(i[:, None] > i, gap, jnp.where(i[:, None] == i, 0, 4 * floor).astype(decay.dtype))
    return jnp.exp(exponent)


def prefix_suffix(decay):
    """Sums over 0 <= s <= i and over i < s < C of the decays [..., C] of a chunk."""
    after = jnp.pad(decay[..., 1:], [(0, 0)] * (decay.ndim - 1) + [(0, 1)])
    return jnp.cumsum(decay, axis=-1), jnp.flip(jnp.cumsum(jnp.flip(after, -1), axis=-1), -1)


def channel_scores(q, k, decay):
    """Scores under a decay per channel, and the sums of decays that carry a state into and out of the chunk.

        scores[i, j] = sum_k q[i, k] k[j, k] exp(sum of decay[s, k] over j < s <= i)   for j <= i, 0 above

    Blocks of 1, 2, 4, ... tokens are joined two by two. Between the later block's rows and the earlier one's columns
    lies their boundary: q takes the decays from there to i, k those from j to there, and a matmul does the rest.
    No array is larger than T x K or T x C.

    Args: q, k [B, H, N, C, K], decay [B, H, N, C, K] in the accumulating dtype, C a power of two.
    Returns: scores [B, H, N, C, C], sums over 0 <= s <= i and over i < s < C, [B, H, N, C, K].
    """
    dtype, shape = q.dtype, decay.shape

    def halves(x, size):
        """The earlier and the later of each two blocks of `size` tokens, [B, H, N C / (2 size), size, ...]."""
        x = x.reshape(*shape[:2], -1, 2, size, x.shape[-1])
        return x[..., 0, :, :], x[..., 1, :, :]

    q, k = q.astype(decay.dtype), k.astype(decay.dtype)
    prefix, suffix = decay, jnp.zeros_like(decay)
    scores = jnp.sum(q * k, axis=-1)[..., None]
    size = 1
    while size < shape[-2]:
        (before, rows), (columns, after) = halves(prefix, size), halves(suffix, size)
        first, second = halves(scores, size)
        cross = _products(halves(q, size)[1] * jnp.exp(rows), halves(k, size)[0] * jnp.exp(columns), dtype)
        upper = jnp.concatenate([first, jnp.zeros_like(cross)], axis=-1)
        scores = jnp.concatenate([upper, jnp.concatenate([cross, second], axis=-1)], axis=-2)
        prefix = jnp.concatenate([before, rows + before[..., -1:, :]], axis=-2)
        suffix = jnp.concatenate([columns + rows[..., -1:, :], after], axis=-2)
        size *= 2
    return scores.reshape(*shape[:-1], -1), prefix.reshape(shape), suffix.reshape(shape)


def _products(rows, columns, dtype):
    """rows columns^T of each two blocks [B, H, P, c, K], as a matmul of operands in `dtype` if c > 1.

    Arrays have at most six dimensions: XLA for CPUs multiplies and sums arrays of seven wrongly, or crashes, in
    jaxlib 0.10.2 (https://github.com/jax-ml/jax/issues/39257).
    """
    if rows.shape[-2] == 1:
        return jnp.sum(rows * columns, axis=-1)[..., None]
    return contract("bhpik,bhpjk->bhpij", rows.astype(dtype), columns.astype(dtype))
