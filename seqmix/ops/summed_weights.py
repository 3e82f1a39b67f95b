"""Softmax weights summed over the query heads of a key head: what choices of blocks go by."""

import jax
import jax.numpy as jnp

from seqmix.core.shapes import boolean, check_arrays, dims, finite
from seqmix.ops import heads, targets
from seqmix.ops.dispatch import pick
from seqmix.ops.mesh import layout


def block_weights(q, k, lse, seen, *, scale, by_keys=False, implementation=None):
    """Weights [B, Hk, T, S] in lse.dtype of queries q [B, T, H, K] over keys [B, S, Hk, K], 0 where not seen.

        w_tj = sum over the H / Hk query heads g of a key head of exp(scale q_tg . k_j - lse_tg)

    lse [B, H, T]: of the attention whose weights these are. seen [B, T, S] bool. No gradient passes. by_keys: the
    weights as [B, Hk, S, T], where what is not seen may be anything.

    implementation: None (the best for the call), "gpu" (Hopper kernel, bfloat16, K of 64 or 128) or "chunked",
    which makes all scores at once.
    Raises ValueError for shapes that do not fit and an implementation that does not take the call.
    """
    for name, x in {"q": q, "k": k, "lse": lse, "seen": seen}.items():
        check_arrays(**{name: x})
        if not jnp.issubdtype(x.dtype, jnp.bool_ if name == "seen" else jnp.floating):
            raise ValueError(f"{name}: expected a {'bool' if name == 'seen' else 'floating'} dtype, got {x.dtype}")
    d = dims({"q": "B T H K", "k": "B S Hk K", "lse": "B H T", "seen": "B T S"}, q=q, k=k, lse=lse, seen=seen)
    scale, by_keys = finite("scale", scale), boolean("by_keys", by_keys)
    if min(d.T, d.S) < 1:
        raise ValueError(f"q, k: expected at least one query and one key, got T={d.T}, S={d.S}")
    heads.check(d)
    q, k, lse = (jax.lax.stop_gradient(x) for x in (q, k, lse))
    if pick("block_weights", implementation, {"gpu": unsupported(q, k, scale), "chunked": None}) == "gpu":
        found = _by_kernel(q, k, lse, seen, scale)
        return found if by_keys else jnp.where(seen[:, None], jnp.swapaxes(found, 2, 3), 0)
    score = scale * jnp.einsum(
        "btjrk,bnjk->bjrtn", q.reshape(d.B, d.T, d.Hk, -1, d.K), k, preferred_element_type=lse.dtype
    )
    seen = seen[:, None, None]
    lse = lse.reshape(*score.shape[:-1], 1)
    found = jnp.where(seen, jnp.exp(jnp.where(seen, score - lse, 0)), 0).sum(2)
    return jnp.swapaxes(found, 2, 3) if by_keys else found


def unsupported(q, k, scale) -> str | None:
    """Why the kernel cannot run this call here, in a few words; None if it can."""
    found = targets.unsupported("gpu", q.shape[1])
    if found is not None:
        return found
    if layout(q.shape[0], q.shape[1], q.shape[2], k.shape[2]) is not None:
        return "has no form for several devices"
    from pallas_kernels.block_sparse_attention import weights_gpu

    return weights_gpu.supports(q, k, scale=scale, capability=targets.capability())


def _by_kernel(q, k, lse, seen, scale):
    """The weights by keys."""
    from pallas_kernels.block_sparse_attention import weights_gpu

    def filled(x, axis, size):
        return jnp.pad(x, [(0, -n % size if a == axis else 0) for a, n in enumerate(x.shape)])

    time, keys = q.shape[1], k.shape[1]
    last = jnp.max(jnp.where(seen, jnp.arange(1, keys + 1, dtype=jnp.int32), 0), axis=-1)
    last = filled(last, 1, weights_gpu.TOKENS).reshape(len(q), -1, weights_gpu.TOKENS).max(-1)
    rows = filled(q, 1, weights_gpu.TOKENS), filled(k, 1, weights_gpu.KEYS), filled(lse, 2, weights_gpu.TOKENS)
    found = weights_gpu.weights(*rows, -(-last // weights_gpu.KEYS), scale=scale)
    return found[:, :, :keys, :time]
