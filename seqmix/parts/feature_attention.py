"""Attention with weights phi(q) . phi(k), each row divided by its sum: what mixers with a feature map share.

    kv_t   = kv_{t-1} + phi(k_t) v_t^T,    k_t = k_{t-1} + phi(k_t)
    mixed  = phi(q_t)^T kv_t / (phi(q_t) . k_t + eps)

The state is {"kv": [B, H, F, V], "k": [B, H, F]}, F features, in float32 at least.
"""

import jax.numpy as jnp

from seqmix.core.flops import matmul
from seqmix.ops import linear_chunked
from seqmix.ops.linear import linear_attention
from seqmix.ops.linear_reference import linear_mixing_matrix

STATE_AXES = {"kv": ("batch", "heads", "state", "head_dim"), "k": ("batch", "heads", "state")}


def attend(q, k, v, *, eps, state=None, **options):
    """(mixed [B, T, H, V], state) of features q, k [B, T, H, F] and v [B, T, H, V]; options of linear_attention.

    The state returned has the dtypes of the one given.
    """
    pair = None if state is None else (state["kv"], state["k"])
    mixed, (kv, total) = linear_attention(q, k, v, normalize=True, eps=eps, state=pair, **options)
    new = {"kv": kv, "k": total}
    return mixed, new if state is None else {name: new[name].astype(held.dtype) for name, held in state.items()}


def attention_weights(q, k, *, eps, segment_ids=None, causal=True):
    """M[t, s] = phi(q_t) . phi(k_s) / (sum over visible u of phi(q_t) . phi(k_u) + eps): [B, H, T, T]."""
    scores = linear_mixing_matrix(q, k, segment_ids=segment_ids, causal=causal)
    below = jnp.sum(scores, axis=-1, keepdims=True) + eps
    return jnp.where(below == 0, 0, scores / jnp.where(below == 0, 1, below))


def zero_state(batch, heads, features, value_dim, dtype):
    """The state before the first token."""
    acc = jnp.promote_types(dtype, jnp.float32)
    return {"kv": jnp.zeros((batch, heads, features, value_dim), acc), "k": jnp.zeros((batch, heads, features), acc)}


def state_elements(heads, features, value_dim) -> int:
    """Elements of the state of one sequence."""
    return heads * features * (value_dim + 1)


def attend_flops(batch, seq, heads, features, value_dim, chunk, causal=True) -> int:
    """FLOPs of `attend` in chunks; without causality as for rows of one segment."""
    tokens, width = batch * seq * heads, value_dim + 1  # the sums are one more value
    if not causal:
        return 2 * matmul(tokens, features, width) + 2 * tokens * width
    _, _, size = linear_chunked.plan(seq, chunk, batch * heads)
    return matmul(tokens, size, features) + 2 * matmul(tokens, features, width) + matmul(tokens, size, width)
