"""`linear_scan` through the Hopper kernels of `pallas_kernels`: when they can run, and their gradient.

The residuals are the decays and h: x is not kept.
"""

import math

import jax
import jax.numpy as jnp

from seqmix.ops import hopper

LEAST_WIDTH = 384  # channels of the narrowest call that ran on an H100 as the kernel now is


def unsupported(x, log_a, reverse) -> str | None:
    """Why the kernels cannot run this call here, in a few words; None if they can."""
    reason = hopper.unsupported(x.shape[1])
    if reason is not None:
        return reason
    if reverse:
        return "has no form for reverse"
    from pallas_kernels import compat
    from pallas_kernels.linear_scan import gpu

    if math.prod(x.shape[2:]) == 0:
        return "needs at least one channel"
    width = _padded(math.prod(x.shape[2:]))
    if width < LEAST_WIDTH and not compat.interpreting():
        return f"was not run on a GPU below {LEAST_WIDTH} channels, got {math.prod(x.shape[2:])}"
    shape = (*x.shape[:2], width)
    given = (jax.ShapeDtypeStruct(shape, dtype) for dtype in (x.dtype, log_a.dtype))
    return gpu.supports(*given, capability=hopper.capability())


def _padded(width):
    """The width that the kernels are given: a multiple of 128, at least 256."""
    return max(256, width + -width % 128)


def scan(x, log_a, real, opened, state):
    """(h, state) of `linear_scan` for a call that `unsupported` has no reason against; state in float32."""
    shape, width = x.shape, math.prod(x.shape[2:])

    def flat(array, *leading):
        array = array.reshape(*leading, width)
        return jnp.pad(array, [(0, 0)] * len(leading) + [(0, _padded(width) - width)])

    log_a = flat(jnp.broadcast_to(log_a, shape), *shape[:2])
    h, state = _run(flat(x, *shape[:2]), log_a, flat(state, shape[0]), real, opened)
    if real is not None:  # at padding the kernels give the state that is carried past it
        h = jnp.where(real[..., None], h, 0)
    return h[..., :width].reshape(shape), state[..., :width].reshape(shape[0], *shape[2:])


@jax.custom_vjp
def _run(x, log_a, state, real, opened):
    from pallas_kernels.linear_scan import gpu

    return gpu.forward(x, log_a, state, real, opened)


def _forward(x, log_a, state, real, opened):
    h, last = _run(x, log_a, state, real, opened)
    return (h, last), (log_a, h, state, real, opened)


def _backward(residuals, cotangents):
    from pallas_kernels.linear_scan import gpu

    return *gpu.backward(*residuals, *cotangents), None, None


_run.defvjp(_forward, _backward)
