"""Linear attention through the Hopper kernels of `pallas_kernels`: when they can run, and their gradient.

Residuals are the call's own arguments: the backward kernels compute states and scores anew.
"""

import functools

import jax
import jax.numpy as jnp

from seqmix.ops import hopper

LEAST_WRITE = 1e-30


def unsupported(q, k, v, log_decay, state, runs, write, *, scale, normalize, causal) -> str | None:
    """Why the kernels cannot run this call here, in a few words; None if they can."""
    reason = hopper.unsupported(q.shape[1])
    if reason is not None:
        return reason
    if normalize or not causal:
        return f"has no form for {'normalize' if normalize else 'causal=False'}"
    from pallas_kernels.linear_attention import gpu

    return gpu.supports(q, k, v, log_decay, state, runs, write, scale=scale, capability=hopper.capability())


def run(q, k, v, log_decay, state, runs, write, scale):
    """(y [B, T, H, V], state [B, H, K, V]) of a call that `unsupported` has no reason against."""
    log_write = None
    if write is not None:  # the kernels take logarithms; near 0 they are of a weight too small to see
        write = write.astype(jnp.float32)
        log_write = jnp.log(write + jnp.where(write < LEAST_WRITE, LEAST_WRITE, 0.0))
    return _run(q, k, v, log_decay, state, runs, log_write, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _run(q, k, v, log_decay, state, runs, log_write, scale):
    from pallas_kernels.linear_attention import gpu

    return gpu.forward(q, k, v, log_decay, state, runs, log_write, scale=scale)


def _forward(*call):
    return _run(*call), call[:-1]


def _backward(scale, arguments, cotangents):
    from pallas_kernels.linear_attention import gpu_backward

    state = arguments[4]
    *gradients, d_state, d_write = gpu_backward.backward(*arguments, *cotangents, scale=scale)
    return *gradients, None if state is None else d_state, None, d_write


_run.defvjp(_forward, _backward)
