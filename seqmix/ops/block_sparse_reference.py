"""Block-sparse attention as one dense matrix: the definition of the semantics, in any dtype up to float64."""

import jax
import jax.numpy as jnp


def reference(config, q, k, v, slopes, data: dict, index, sizes):
    """(y [B, T, H, V], lse [B, H, T]) by the whole [T, S] matrix.

    Arguments as `chunked`, but index [b, h, nq, n] or None for the lists.
    """
    acc = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    (b, t, h, _), (s, groups) = q.shape, k.shape[1:3]
    score = config.scale * jnp.einsum(
        "btjrk,bsjk->bjrts", q.astype(acc).reshape(b, t, groups, h // groups, -1), k.astype(acc)
    )
    if config.soft_cap is not None:
        score = config.soft_cap * jnp.tanh(score / config.soft_cap)
    if slopes is not None:
        apart = jnp.abs(jnp.arange(t)[:, None] - jnp.arange(s))
        score -= slopes.astype(acc).reshape(groups, -1)[:, :, None, None] * apart
    seen = jnp.ones((1, 1, t, s), bool)
    if index is not None:
        listed = jnp.any(jnp.asarray(index)[..., None] == jnp.arange(-(-s // sizes[1])), axis=-2)
        seen = jnp.repeat(jnp.repeat(listed, sizes[0], axis=2), sizes[1], axis=3)[:, :, :t, :s]
    if config.mask is not None:
        matrix = jnp.asarray(config.mask.dense(t, s, data))
        seen &= matrix[:, None] if matrix.ndim == 3 else matrix
    seen = jnp.broadcast_to(seen[:, :, None], score.shape)
    top = jax.lax.stop_gradient(jnp.max(jnp.where(seen, score, -jnp.inf), axis=-1, keepdims=True))
    top = jnp.where(top > -jnp.inf, top, 0)  # rows that see nothing
    weight = jnp.where(seen, jnp.exp(jnp.where(seen, score - top, 0)), 0)
    total = jnp.sum(weight, axis=-1)
    some = total > 0
    total = jnp.where(some, total, 1)
    y = jnp.einsum("bjrts,bsjv->btjrv", weight / total[..., None], v.astype(acc)).reshape(b, t, h, -1)
    lse = jnp.where(some, top[..., 0] + jnp.log(total), -jnp.inf)
    return y.astype(v.dtype), lse.reshape(b, h, t)
