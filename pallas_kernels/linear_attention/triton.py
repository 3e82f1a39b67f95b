"""Linear attention with one decay per token and head, forward, on NVIDIA GPUs that Mosaic GPU leaves out: by Triton.

    S_t = exp(log_decay_t) S_{t-1} + w_t k_t v_t^T ;   y_t = scale q_t^T S_t

The algorithm and the cut of time are those of `gpu.py`: a program walks one stretch of time for a block of value
columns of one head, with the state in registers as float32, and writes neither states nor scores to memory. Heads that
share keys each compute their own scores. The kernels are in `triton_kernels.py`.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls
from pallas_kernels.linear_attention import plan as planning
from pallas_kernels.linear_attention.plan import Plan

KERNELS = "pallas_kernels.linear_attention.triton_kernels"
COLUMNS = 64  # value columns of a program that walks over time


def supports(
    q, k, v, log_decay=None, state=None, run_ids=None, log_write=None, *, scale=1.0, capability=None
) -> str | None:
    """Why `forward` and `backward` cannot run this call, in a few words; None if they can.

    Takes arrays or shapes with dtypes. capability: (major, minor) of the GPU that will run it; None asks the default
    device.
    """
    reason = triton_calls.unsupported(capability) or planning.wrong_qkv(q, k, v)
    if reason is not None:
        return reason
    batch, time, key_heads, key = q.shape
    heads, value = v.shape[2:]
    if key not in (64, 128) or value not in (64, 128, 256):
        return f"needs K in (64, 128) and V in (64, 128, 256), got K={key}, V={value}"
    if heads % key_heads:
        return f"needs a number of heads that the key heads divide, got {heads} and {key_heads}"
    if 0 in (batch, time):
        return f"needs at least one row and one token, got B={batch}, T={time}"
    return planning.wrong_rest(q, v, log_decay, run_ids, scale, state, log_write)


def forward(q, k, v, log_decay=None, state=None, run_ids=None, log_write=None, *, scale=1.0, splits=None):
    """Linear attention, (y [B, T, H, V] bfloat16, final state [B, H, K, V] float32).

    q, k: [B, T, Hk, K]; v: [B, T, H, V], all bfloat16; head h reads key head h // (H // Hk). log_decay: natural
    logarithms <= 0, [B, T, H], [H] or None for no decay. state: [B, H, K, V] float32 or None for zeros. run_ids:
    [B, T] int32, numbers 1, 2, ... of a row's segments and 0 for padding, as `seqmix.core.packing.runs` gives
    them, or None; the state belongs to run 1 and is returned for the last one. log_write: natural logarithms of the
    weights of k v^T in the state, [B, T, H], or None for 1. scale: a number above 0. splits: into how many stretches
    to cut time, None to choose. The call must be one that `supports` accepts.
    """
    plan = planning.make_plan(q, v, q.shape[0] * v.shape[2] * v.shape[3] // COLUMNS, splits)
    decays = planning.chunk_decays(log_decay, log_write, run_ids, plan)
    segments = planning.chunk_segments(run_ids, plan)
    ends = left = None
    if plan.splits > 1:
        ends = split_states(plan, k, v, decays, segments)
        left = planning.split_decays(decays, segments, plan)
    last = jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.key, plan.value), jnp.float32)
    return triton_calls.call(
        KERNELS,
        "outputs",
        *(q, k, v, decays, segments, state, ends, left),
        out=(jax.ShapeDtypeStruct(v.shape, v.dtype), last),
        grid=(plan.heads * plan.value // COLUMNS, plan.splits, plan.batch),
        **options(),
        **constants(plan, decays, segments, scale),
        **cut(plan),
        GIVEN=state is not None,
    )


def split_states(plan: Plan, keys, values, decays, segments, *, reverse=False, scale=1.0):
    """What each stretch of time adds to the state, or reverse to its gradient, in the order they are met in.

    float32 [B, splits, H, K, V]; of the last nothing is written, since nothing follows it.
    """
    given = (keys, values, decays, segments, None, None, None)
    return _walk(plan, given, plan.splits - 1, scale, REVERSE=reverse, KEPT=False, GIVEN=False)[0]


def chunk_states(plan: Plan, keys, values, decays, segments, state, ends, left, *, reverse=False, scale=1.0):
    """The state before each chunk, or reverse its gradient after it, bfloat16 [B, chunks, H, K, V], and the last one.

    state: what is given at the end where the walk begins; ends, left: of `split_states` and `planning.split_decays`.
    """
    given = (keys, values, decays, segments, state, ends, left)
    return _walk(plan, given, plan.splits, scale, REVERSE=reverse, KEPT=True, GIVEN=state is not None)[1:]


def _walk(plan: Plan, given, splits, scale, *, KEPT, **flags):
    dims = (plan.heads, plan.key, plan.value)
    unwritten = (1,)
    return triton_calls.call(
        KERNELS,
        "states",
        *given,
        out=(
            jax.ShapeDtypeStruct(unwritten if KEPT else (plan.batch, plan.splits, *dims), jnp.float32),
            jax.ShapeDtypeStruct((plan.batch, plan.chunks, *dims) if KEPT else unwritten, given[0].dtype),
            jax.ShapeDtypeStruct((plan.batch, *dims) if KEPT else unwritten, jnp.float32),
        ),
        grid=(plan.heads * plan.value // COLUMNS, splits, plan.batch),
        **options(),
        **constants(plan, given[2], given[3], scale),
        **cut(plan),
        KEPT=KEPT,
        **flags,
    )


def options() -> dict:
    """Warps and stages of a program that walks over time: such that nothing spills."""
    return {"warps": 4 if triton_calls.hopper() else 8, "stages": 2}


def cut(plan: Plan) -> dict:
    """What kernels that walk over time are told of it."""
    return dict(BV=COLUMNS, STEPS=plan.steps, SPLITS=plan.splits)


def constants(plan: Plan, decays, segments, scale) -> dict:
    """What all kernels are told of a call."""
    return dict(
        T=plan.time,
        H=plan.heads,
        HK=plan.key_heads,
        K=plan.key,
        V=plan.value,
        CHUNKS=plan.chunks,
        KINDS=decays.shape[2],
        DECAY_ROWS=decays.shape[0],
        SHIFT=math.log2(scale),
        SEGMENTS=segments is not None,
    )
