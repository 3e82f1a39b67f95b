"""Cross entropy of a linear read-out, over chunks of time, so that [B, T, vocab] never exists at once."""

import functools

import jax
import jax.numpy as jnp

from seqmix.core.sharding import constrain
from seqmix.ops.mesh import layout

MASKED_LOGIT = -1e30  # what the logits of padded table rows are set to: exp of it is 0 in every float dtype


def unembed(hidden: jax.Array, table: jax.Array, vocab: int) -> jax.Array:
    """Float32 logits [..., V] = hidden [..., D] @ table[V, D]^T; table rows from `vocab` on are masked.

    The product is taken in the dtype of `hidden` and accumulated in float32 (float64 for float64 inputs).
    """
    acc = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("...d,vd->...v", hidden, table.astype(hidden.dtype), preferred_element_type=acc)
    if table.shape[0] == vocab:
        return logits
    return jnp.where(jnp.arange(table.shape[0]) < vocab, logits, jnp.asarray(MASKED_LOGIT, acc))


def plain_cross_entropy(hidden, table, targets, mask, *, vocab: int | None = None):
    """Sums over tokens, with weights mask [B, T], of nll = lse - logit[target] and of z = lse^2.

    lse = logsumexp(logits); hidden [B, T, D], table [V, D], targets [B, T] int; returns two float32 scalars
    (nll_sum, z_sum).
    The z term is the one of PaLM (arXiv 2204.02311, section 5). A target where mask is 0 may be any integer.
    """
    logits = unembed(hidden, table, table.shape[0] if vocab is None else vocab)
    lse, _, picked, weight = _picked(logits, targets, mask)
    return jnp.sum((lse - picked) * weight), jnp.sum(lse * lse * weight)


def _picked(logits, targets, mask):
    """(logsumexp, where the targets are, the targets' logits, the mask in the logits' dtype)."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum rather than a gather: it stays local when the vocabulary is sharded.
    hit = jnp.arange(logits.shape[-1]) == targets[..., None]
    return lse, hit, jnp.sum(jnp.where(hit, logits, 0), axis=-1), mask.astype(lse.dtype)


def chunked_cross_entropy(hidden, table, targets, mask, *, vocab: int | None = None, chunk: int = 512, z_loss=0.0):
    """(nll_sum + z_loss * z_sum, nll_sum, z_sum) of `plain_cross_entropy`; only the first has a gradient, in hidden and
    table. The logits of at most `chunk` tokens of a row exist at a time.

    Chunk j takes the times j, n + j, 2n + j, ...: strided, so that with time sharded contiguously over a mesh axis
    every device has a share of each chunk. Where a gradient is asked for, it is computed along with the sums: the
    logits are there, and are not computed again. Their gradient is rounded to the dtype of hidden; the table's
    accumulates in the table's own. Raises ValueError if shapes disagree or `chunk` < 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected a positive number of tokens, got {chunk}")
    batch, time, width = hidden.shape
    for name, value in (("targets", targets), ("mask", mask)):
        if value.shape != (batch, time):
            raise ValueError(f"{name}: expected shape {(batch, time)} as of hidden, got {value.shape}")
    if table.ndim != 2 or table.shape[1] != width:
        raise ValueError(f"table: expected shape (V, {width}), got {table.shape}")
    vocab = table.shape[0] if vocab is None else vocab
    return _summed(
        hidden, table, targets, jax.lax.stop_gradient(mask), (vocab, max(1, -(-time // chunk)), float(z_loss))
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed(hidden, table, targets, mask, options):
    return _over_chunks(hidden, table, targets, mask, options, gradients=False)[0]


def _forward(hidden, table, targets, mask, options):
    sums, gradients = _over_chunks(hidden, table, targets, mask, options, gradients=True)
    return sums, (*gradients, targets, mask)


def _backward(options, kept, cotangents):
    d_hidden, d_table, targets, mask = kept
    scale = cotangents[0]
    return (d_hidden * scale).astype(d_hidden.dtype), d_table * scale.astype(d_table.dtype), None, jnp.zeros_like(mask)


_summed.defvjp(_forward, _backward)


def _over_chunks(hidden, table, targets, mask, options, gradients):
    """The sums, and the gradients of the first in hidden and table or None."""
    vocab, n, z_loss = options
    batch, time, width = hidden.shape
    pad = -time % n
    rows = table.astype(hidden.dtype)
    lay = layout(batch, time)
    shares = 1 if lay is None else lay.ways("batch")

    def split(a):
        a = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, -1, n, *a.shape[2:]), 2, 0)

    def body(carry, xs):
        (nll, z), d_table = carry
        h, t, m = xs
        logits = unembed(h, rows, vocab)
        lse, hit, picked, weight = _picked(logits, t, m)
        sums = nll + jnp.sum((lse - picked) * weight), z + jnp.sum(lse * lse * weight)
        if not gradients:
            return (sums, None), None
        slope = (weight * (1 + 2 * z_loss * lse))[..., None] * jnp.exp(logits - lse[..., None])
        slope = (slope - jnp.where(hit, weight[..., None], 0)).astype(h.dtype)
        each = (a.reshape(shares, -1, *a.shape[1:]) for a in (slope, h))
        grown = jnp.einsum("sbcv,sbcd->svd", *each, preferred_element_type=d_table.dtype)
        return (sums, d_table + grown), jnp.einsum("bcv,vd->bcd", slope, rows)

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    start = (zero, zero), None
    if gradients:  # a sum for each share of the batch: between devices they are added up once, not chunk by chunk
        d_table = jnp.zeros((shares, *table.shape), table.dtype)
        start = (zero, zero), constrain(d_table, "batch", "vocab", None)
    ((nll, z), d_table), d_hidden = jax.lax.scan(body, start, (split(hidden), split(targets), split(mask)))
    if gradients:
        d_hidden = jnp.moveaxis(d_hidden, 0, 2).reshape(batch, -1, width)[:, :time]
        d_table = jnp.sum(d_table, axis=0)
    return (nll + z_loss * z, nll, z), (d_hidden, d_table)
