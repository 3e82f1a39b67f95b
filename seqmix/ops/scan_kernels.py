"""`linear_scan` through the kernels of `pallas_kernels`: when they can run, and their gradient.

The residuals are the decays and h: x is not kept.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmix.ops import targets

LEAST_WIDTH = 384  # channels of the narrowest call that ran on an H100 as the kernel now is


def reasons(x, log_a, reverse) -> dict:
    """For each target why its kernels cannot run this call here, in a few words, or None if they can."""
    return {name: _unsupported(name, x, log_a, reverse) for name in targets.TARGETS}


def _unsupported(target, x, log_a, reverse) -> str | None:
    reason = targets.unsupported(target, x.shape[1])
    if reason is not None:
        return reason
    if reverse:
        return "has no form for reverse"
    from pallas_kernels import compat

    channels = math.prod(x.shape[2:])
    if channels == 0:
        return "needs at least one channel"
    width = _padded(target, channels)
    if target == "gpu" and width < LEAST_WIDTH and not compat.interpreting():
        return f"was not run on a GPU below {LEAST_WIDTH} channels, got {channels}"
    given = (jax.ShapeDtypeStruct((*x.shape[:2], width), dtype) for dtype in (x.dtype, log_a.dtype))
    options = {} if target == "tpu" else {"capability": targets.capability()}
    return _module(target).supports(*given, **options)


def _module(target):
    if target == "gpu":
        from pallas_kernels.linear_scan import gpu

        return gpu
    if target == "triton":
        from pallas_kernels.linear_scan import triton

        return triton
    from pallas_kernels.linear_scan import tpu

    return tpu


def _padded(target, width):
    """The width that the kernels are given: a multiple of 128, for the target "gpu" at least 256."""
    return max(256 if target == "gpu" else 128, width + -width % 128)


def scan(target, x, log_a, real, opened, state, run=None):
    """(h, state) of `linear_scan` for a call that the target has no reason against; state in float32.

    run: (x, log_a, state, real, opened), these [B, T, D], -> (h, state), in place of the target's kernels.
    """
    shape, width = x.shape, math.prod(x.shape[2:])

    def flat(array, *leading):
        array = array.reshape(*leading, width)
        return jnp.pad(array, [(0, 0)] * len(leading) + [(0, _padded(target, width) - width)])

    log_a = flat(jnp.broadcast_to(log_a, shape), *shape[:2])
    x, state = flat(x, *shape[:2]), flat(state, shape[0])
    if run is not None:
        h, state = run(x, log_a, state, real, opened)
    elif target == "tpu":
        h, state = _run_tpu(*_masked(x, log_a, real, opened), state)
    else:
        h, state = _run_gpu(target, x, log_a, state, real, opened)
    if real is not None:  # at padding the kernels give the state that is carried past it
        h = jnp.where(real[..., None], h, 0)
    return h[..., :width].reshape(shape), state[..., :width].reshape(shape[0], *shape[2:])


def _masked(x, log_a, real, opened):
    """x and log_a [B, T, D] that say of themselves where padding is passed over and where segments open.

    XLA makes them with whatever it computes x and log_a by; the kernels read no masks.
    """
    if real is None:
        return x, log_a
    log_a = jnp.where(opened[..., None], -jnp.inf, jnp.where(real[..., None], log_a, 0))
    return jnp.where(real[..., None], x, 0), log_a


@jax.custom_vjp
def _run_tpu(x, log_a, state):
    return _module("tpu").forward(x, log_a, state)


def _forward_tpu(x, log_a, state):
    h, last = _run_tpu(x, log_a, state)
    return (h, last), (log_a, h, state)


def _backward_tpu(residuals, cotangents):
    return _module("tpu").backward(*residuals, *cotangents)


_run_tpu.defvjp(_forward_tpu, _backward_tpu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run_gpu(target, x, log_a, state, real, opened):
    return _module(target).forward(x, log_a, state, real, opened)


def _forward_gpu(target, x, log_a, state, real, opened):
    h, last = _run_gpu(target, x, log_a, state, real, opened)
    return (h, last), (log_a, h, state, real, opened)


def _backward_gpu(target, residuals, cotangents):
    return *_module(target).backward(*residuals, *cotangents), None, None


_run_gpu.defvjp(_forward_gpu, _backward_gpu)


class Halves(NamedTuple):
    """The Hopper kernels before and after the entering state is known, as `scan_chunked.Halves`."""

    reverse: bool = False

    def begin(self, x, log_a, real, opened):
        begun = _module("gpu").begun(x, log_a, real, opened, need_end=True)

        def finish(state):
            h, _ = begun.finish(state)
            return h, (log_a, h, state, real, opened)

        return begun.end, begun.left, finish

    def back(self, kept, dh):
        log_a, h, state, real, opened = kept
        begun = _module("gpu").backward_begun(log_a, real, opened, dh, need_start=True)
        return begun.end, lambda dend: begun.finish(h, state, dend)[:2]
