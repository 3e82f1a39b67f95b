"""Elementwise linear recurrences with real decays on NVIDIA GPUs that Mosaic GPU leaves out, by Triton.

    h_t = a_t h_{t-1} + x_t,   a_t = exp(log_a_t)

The walk, its gradient and the cut of time are those of `gpu.py`: states stay in registers as float32, and h is read
again by the gradient, so that dlog_a is rounded by as much as h is. The kernels are in `triton_kernels.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from pallas_kernels import triton_calls

KERNELS = "pallas_kernels.linear_scan.triton_kernels"
CHANNELS = 128  # of a program
WARPS = 2
ROWS = 16  # tokens whose loads are under way at once
STAGES = 2
ENOUGH = 100  # programs with which time is not cut: cutting reads the inputs twice
PROGRAMS = 528  # that time is cut for
OPENS, PADDING = 1, 2  # bits of a token's mark


def supports(x, log_a, state=None, *, capability=None) -> str | None:
    """Why `forward` and `backward` cannot run this call, in a few words; None if they can.

    Takes arrays or shapes with dtypes. capability: (major, minor) of the GPU that will run it; None asks the default
    device.
    """
    reason = triton_calls.unsupported(capability)
    if reason is not None:
        return reason
    for name, array in (("x", x), ("log_a", log_a)):
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            return f"needs bfloat16 or float32, got {name} of {array.dtype}"
    if x.ndim != 3 or x.shape != log_a.shape or 0 in x.shape:
        return f"needs x and log_a of one shape [B, T, D], got {x.shape}, {log_a.shape}"
    if x.shape[2] % CHANNELS:
        return f"needs a width that is a multiple of {CHANNELS}, got D={x.shape[2]}"
    if state is not None and (state.shape != (x.shape[0], x.shape[2]) or state.dtype != jnp.float32):
        return f"needs a float32 state [B, D], got {state.dtype} {state.shape}"
    return None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shape of a call and its cut: `splits` stretches of `steps` tiles of ROWS tokens."""

    batch: int
    time: int
    width: int
    splits: int
    steps: int


def make_plan(x, splits: int | None = None) -> Plan:
    """The cut of a call; splits None fills the chip where rows and channels do not."""
    batch, time, width = x.shape
    tiles = -(-time // ROWS)
    if splits is None:
        lanes = batch * width // CHANNELS
        splits = 1 if lanes >= ENOUGH else max(1, min(PROGRAMS // lanes, tiles // 16))
    steps = -(-tiles // splits)
    return Plan(batch, time, width, -(-tiles // steps), steps)


def token_marks(real, opened):
    """Marks of tokens, [B, T] int32, from masks [B, T]; None without masks."""
    if real is None and opened is None:
        return None
    mask = real if opened is None else opened
    real = jnp.ones(mask.shape, bool) if real is None else real
    opened = jnp.zeros(mask.shape, bool) if opened is None else opened
    return (OPENS * opened + PADDING * ~real).astype(jnp.int32)


def forward(x, log_a, state=None, real=None, opened=None, *, splits=None):
    """(h [B, T, D] in the dtype of x, final state [B, D] float32) of the recurrence.

    x, log_a: [B, T, D], bfloat16 or float32 each; log_a <= 0, of any size, -inf too. state: [B, D] float32 or None for
    zeros. real, opened: [B, T] bool or None; a token that is not real is passed over, whatever stands there (h there
    is the state carried past it), one that opens a segment forgets what came before. splits: into how many stretches
    to cut time, None to choose. The call must be one that `supports` accepts.
    """
    plan = make_plan(x, splits)
    marks = token_marks(real, opened)
    ends, left = _stretches(plan, log_a, x, marks)
    return _call(
        plan,
        "forward",
        *(log_a, x, marks, state, ends, left),
        out=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((plan.batch, plan.width), jnp.float32)),
        MARKED=marks is not None,
        GIVEN=state is not None,
    )


def backward(log_a, h, state, real, opened, dh, dstate=None, *, splits=None):
    """Gradients (dx, dlog_a, dstate) of `forward` from its arguments but x, its h and the cotangents of its results.

    dx has the dtype of dh, dlog_a that of log_a; the initial state's gradient [B, D] float32 is given also where state
    is None. dstate: the final state's cotangent, float32, or None for zeros. At tokens that are not real dx and dlog_a
    are 0, and dh is not read. Every result is the same in every run.
    """
    plan = make_plan(dh, splits)
    marks = token_marks(real, opened)
    ends, left = _stretches(plan, log_a, dh, marks, reverse=True)
    return _call(
        plan,
        "backward",
        *(log_a, dh, h, marks, dstate, state, ends, left),
        out=(
            jax.ShapeDtypeStruct(dh.shape, dh.dtype),
            jax.ShapeDtypeStruct(log_a.shape, log_a.dtype),
            jax.ShapeDtypeStruct((plan.batch, plan.width), jnp.float32),
        ),
        MARKED=marks is not None,
        GIVEN=dstate is not None,
        FROM=state is not None,
    )


def _stretches(plan: Plan, log_a, values, marks, reverse=False):
    """What each stretch makes of a zero carry, and what it leaves of one: two float32 [B, splits, D], or two None."""
    if plan.splits == 1:
        return None, None
    shape = jax.ShapeDtypeStruct((plan.batch, plan.splits, plan.width), jnp.float32)
    out = dict(out=(shape, shape), splits=plan.splits - 1)  # nothing follows the last
    return _call(plan, "stretches", log_a, values, marks, **out, MARKED=marks is not None, REVERSE=reverse)


def _call(plan: Plan, kernel, *arrays, out, splits=None, **flags):
    return triton_calls.call(
        KERNELS,
        kernel,
        *arrays,
        out=out,
        grid=(plan.width // CHANNELS, splits or plan.splits, plan.batch),
        warps=WARPS,
        stages=STAGES,
        T=plan.time,
        D=plan.width,
        CHANNELS=CHANNELS,
        ROWS=ROWS,
        STEPS=plan.steps,
        SPLITS=plan.splits,
        STAGES=STAGES,
        **flags,
    )
