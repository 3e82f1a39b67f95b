"""Cross entropy of a linear read-out, over chunks of time, so that [B, T, vocab] never exists at once."""

import jax
import jax.numpy as jnp

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
    lse = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum rather than a gather: it stays local when the vocabulary is sharded.
    hit = jnp.arange(table.shape[0]) == targets[..., None]
    picked = jnp.sum(jnp.where(hit, logits, 0), axis=-1)
    weight = mask.astype(lse.dtype)
    return jnp.sum((lse - picked) * weight), jnp.sum(lse * lse * weight)


def chunked_cross_entropy(hidden, table, targets, mask, *, vocab: int | None = None, chunk: int = 512):
    """As `plain_cross_entropy`, with the logits of at most `chunk` tokens of a row at a time, in both passes.

    Chunk j takes the times j, n + j, 2n + j, ...: strided, so that with time sharded contiguously over
    a mesh axis every device has a share of each chunk. The backward pass recomputes the logits; the table's
    gradient accumulates in the table's own dtype. Raises ValueError if shapes disagree or `chunk` < 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected a positive number of tokens, got {chunk}")
    batch, time, width = hidden.shape
    for name, value in (("targets", targets), ("mask", mask)):
        if value.shape != (batch, time):
            raise ValueError(f"{name}: expected shape {(batch, time)} as of hidden, got {value.shape}")
    if table.ndim != 2 or table.shape[1] != width:
        raise ValueError(f"table: expected shape (V, {width}), got {table.shape}")
    n = max(1, -(-time // chunk))
    if n == 1:
        return plain_cross_entropy(hidden, table, targets, mask, vocab=vocab)
    pad = -time % n

    def split(a):
        a = jnp.pad(a, [(0, 0), (0, pad)] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, -1, n, *a.shape[2:]), 2, 0)

    @jax.checkpoint
    def one(h, w, t, m):
        return plain_cross_entropy(h, w, t, m, vocab=vocab)

    def body(carry, xs):
        nll, z = one(xs[0], table, xs[1], xs[2])
        return (carry[0] + nll, carry[1] + z), None

    zero = jnp.zeros((), jnp.promote_types(hidden.dtype, jnp.float32))
    sums, _ = jax.lax.scan(body, (zero, zero), (split(hidden), split(targets), split(mask)))
    return sums
