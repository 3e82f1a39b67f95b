"""Softmax attention as one dense matrix: the definition of the semantics, in any dtype up to float64."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Rules(NamedTuple):
    """How a score is made and who sees whom: the static half of a call."""

    scale: float  # factor on q . k
    causal: bool  # keys at later positions are hidden
    window: int | None  # keys this many positions away, or more, are hidden
    sinks: int  # positions below it are seen from beyond the window
    soft_cap: float | None  # scores s become soft_cap * tanh(s / soft_cap)


def visible(rules: Rules, q_ids, k_ids, q_positions, k_positions):
    """Whether query i sees key j, [B, T, S] bool, from ids and positions [B, T] and [B, S] (or B = 1)."""
    q_ids, q_positions = q_ids[:, :, None], q_positions[:, :, None]
    k_ids, k_positions = k_ids[:, None, :], k_positions[:, None, :]
    seen = (q_ids == k_ids) & (q_ids != 0)
    ahead = k_positions - q_positions
    if rules.causal:
        seen &= ahead <= 0
    if rules.window is not None:
        near = ahead > -rules.window
        if not rules.causal:
            near &= ahead < rules.window
        if rules.sinks:
            near |= k_positions < rules.sinks
        seen &= near
    return seen


def reference(rules: Rules, q, k, v, sink_logits, q_ids, k_ids, q_positions, k_positions):
    """(y [B, T, H, V], lse [B, H, T]) by the whole [T, S] matrix, computed in promote(dtype, float32).

    q [B, T, H, K], k [B, S, Hk, K], v [B, S, Hv, V], sink_logits [H] or None; ids and positions as `visible`.
    """
    acc = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    b, t, h, _ = q.shape
    groups = k.shape[2]
    grouped = q.astype(acc).reshape(b, t, groups, h // groups, -1)
    score = rules.scale * jnp.einsum("btjrk,bsjk->bjrts", grouped, k.astype(acc))
    score = score.reshape(b, h, t, -1)
    if rules.soft_cap is not None:
        score = rules.soft_cap * jnp.tanh(score / rules.soft_cap)
    seen = visible(rules, q_ids, k_ids, q_positions, k_positions)[:, None]
    seen = jnp.broadcast_to(seen, score.shape)
    if sink_logits is not None:  # one more key for every row, with a value of zero
        extra = jnp.broadcast_to(sink_logits.astype(acc)[None, :, None, None], (b, h, t, 1))
        score = jnp.concatenate([score, extra], axis=-1)
        seen = jnp.concatenate([seen, jnp.ones_like(extra, bool)], axis=-1)
    top = jax.lax.stop_gradient(jnp.max(jnp.where(seen, score, -jnp.inf), axis=-1, keepdims=True))
    top = jnp.where(top > -jnp.inf, top, 0)  # rows that see nothing
    weight = jnp.where(seen, jnp.exp(jnp.where(seen, score - top, 0)), 0)
    total = jnp.sum(weight, axis=-1)
    some = total > 0
    total = jnp.where(some, total, 1)
    p = (weight / total[..., None])[..., : k.shape[1]]
    p = p.reshape(b, v.shape[2], -1, t, k.shape[1])
    y = jnp.einsum("bjrts,bsjv->btjrv", p, v.astype(acc)).reshape(b, t, h, -1)
    return y.astype(v.dtype), jnp.where(some, top[..., 0] + jnp.log(total), -jnp.inf)
