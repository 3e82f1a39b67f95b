"""Gradients of linear attention with one decay per token and head by Triton.

Two walks over time write the state S before every chunk and its gradient D after it, in bfloat16; then all chunks are
worked on at once. In between the two take K V / 16 bytes a token and head. The equations are those of
`gpu_backward.py`. Heads that share keys are added up in one program, so that dq and dk are written once; dv has a
kernel of its own, since both together lack registers.

The gradient of log_decay_t is the sum of what crosses t: pairs i >= t > j within the chunk, reads of S by tokens
i >= t, writes of j < t that outlive the chunk, and <S, D> kept through it.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls
from pallas_kernels.linear_attention import plan as planning
from pallas_kernels.linear_attention.plan import CHUNK, Plan
from pallas_kernels.linear_attention.triton import COLUMNS, KERNELS, chunk_states, constants, split_states

BLOCK = 64  # columns of keys and of values of a tile
NARROW = 32  # columns of keys where registers are short


def backward(
    q, k, v, log_decay, state, run_ids, log_write, dy, dstate=None, *, scale=1.0, need_decay=True, splits=None
):
    """Gradients (dq, dk, dv, dlog_decay, dstate, dlog_write) of `triton.forward`, from its arguments alone.

    Arguments as in `forward`; dy [B, T, H, V] bfloat16 and dstate [B, H, K, V] float32 (or None for zeros) are the
    cotangents of its results. Results: dq, dk, dv bfloat16 in their arguments' shapes; dlog_decay float32 in
    log_decay's shape, None if log_decay is None or need_decay is false; the initial state's gradient [B, H, K, V]
    float32, also where state is None; dlog_write float32, None if log_write is None. Every result is the same in every
    run.
    """
    need_decay = need_decay and log_decay is not None
    plan = planning.make_plan(q, v, q.shape[0] * v.shape[2] * v.shape[3] // COLUMNS, splits)
    decays = planning.chunk_decays(log_decay, log_write, run_ids, plan)
    segments = planning.chunk_segments(run_ids, plan)
    ends = back_ends = left = None
    if plan.splits > 1:
        ends = split_states(plan, k, v, decays, segments)
        back_ends = split_states(plan, q, dy, decays, segments, reverse=True, scale=scale)
        left = planning.split_decays(decays, segments, plan)
    before, _ = chunk_states(plan, k, v, decays, segments, state, ends, left)
    after, first = chunk_states(plan, q, dy, decays, segments, dstate, back_ends, left, reverse=True, scale=scale)
    given = (q, k, v, dy, decays, segments)
    fixed = constants(plan, decays, segments, scale) | dict(B=plan.batch, BV=BLOCK)
    dq, dk, *sums = _key_gradients(plan, (*given, before, after), fixed, need_decay)
    dv, weights = _value_gradients(plan, (*given, after), fixed)

    def by_token(x):
        x = x.reshape(plan.batch, plan.heads, -1).swapaxes(1, 2)[:, : plan.time]
        return x if run_ids is None else jnp.where(run_ids[..., None] != 0, x, 0.0)

    dlog = dwrite = None
    if need_decay:
        dlog = by_token(_decay_gradient(plan, *sums))
        dlog = jnp.sum(dlog, axis=(0, 1)) if log_decay.ndim == 1 else dlog
    if log_write is not None:
        dwrite = by_token(jnp.sum(weights, axis=0))
    return dq, dk, dv, dlog, first, dwrite


def _sums(wanted, *shape):
    """A float32 result; of one number where it is not wanted and the kernel does not write it."""
    return jax.ShapeDtypeStruct(shape if wanted else (1,), jnp.float32)


def _key_gradients(plan: Plan, given, fixed, need_decay):
    """dq, dk, and for the decays reads and writes [parts, B, H, tokens] and what is kept [parts, B, H, chunks]."""
    q, k = given[:2]
    # What heads that share keys add up to takes registers too; before Hopper so do the operands of products.
    columns = BLOCK if plan.group == 1 and triton_calls.hopper() else NARROW
    parts = plan.key // columns
    return triton_calls.call(
        KERNELS,
        "key_gradients",
        *given,
        out=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            _sums(need_decay, parts, plan.batch, plan.heads, plan.padded),
            _sums(need_decay, parts, plan.batch, plan.heads, plan.padded),
            _sums(need_decay, parts, plan.batch, plan.heads, plan.chunks),
        ),
        grid=(plan.key_heads * parts, plan.chunks, plan.batch),
        warps=4,
        stages=3,
        **fixed,
        BK=columns,
        DECAYING=need_decay,
    )


def _value_gradients(plan: Plan, given, fixed):
    """dv, and <v, dv> [parts, B, H, tokens] where tokens write with a weight."""
    v = given[2]
    parts = plan.value // BLOCK
    weights = _sums(fixed["KINDS"] == 2, parts, plan.batch, plan.heads, plan.padded)
    return triton_calls.call(
        KERNELS,
        "value_gradients",
        *given,
        out=(jax.ShapeDtypeStruct(v.shape, v.dtype), weights),
        grid=(plan.heads * parts, plan.chunks, plan.batch),
        warps=4,
        stages=2,
        **fixed,
        BK=BLOCK,
    )


def _decay_gradient(plan: Plan, reads, writes, kept):
    """Gradient of the log decays, float32 [B, H, chunks, 64], from the sums that the kernels wrote."""
    shape = (plan.batch, plan.heads, plan.chunks, CHUNK)
    reads, writes = (jnp.sum(x, axis=0).reshape(shape) for x in (reads, writes))
    later = planning.cumulate("bhcs,st->bhct", reads, lambda source, target: source >= target)
    earlier = planning.cumulate("bhcs,st->bhct", writes, lambda source, target: source < target)
    return later + earlier + jnp.sum(kept, axis=0)[..., None]
