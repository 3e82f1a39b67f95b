"""Linear attention through the Hopper kernels of `pallas_kernels`: when they can run, and their gradient.

Residuals are the call's own arguments: the backward kernels compute states and scores anew.
"""

import functools

import jax

from seqmix.ops import hopper


def unsupported(q, k, v, log_decay, state, runs, *, scale, normalize, causal) -> str | None:
    """Why the kernels cannot run this call here, in a few words; None if they can."""
    reason = hopper.unsupported(q.shape[1])
    if reason is not None:
        return reason
    if normalize or not causal:
        return f"has no form for {'normalize' if normalize else 'causal=False'}"
    from pallas_kernels.linear_attention import gpu

    return gpu.supports(q, k, v, log_decay, state, runs, scale=scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def run(q, k, v, log_decay, state, runs, scale):
    """(y [B, T, H, V], state [B, H, K, V]) of a call that `unsupported` has no reason against."""
    from pallas_kernels.linear_attention import gpu

    return gpu.forward(q, k, v, log_decay, state, runs, scale=scale)


def _forward(q, k, v, log_decay, state, runs, scale):
    return run(q, k, v, log_decay, state, runs, scale), (q, k, v, log_decay, state, runs)


def _backward(scale, arguments, cotangents):
    from pallas_kernels.linear_attention import gpu_backward

    state = arguments[4]
    *gradients, d_state = gpu_backward.backward(*arguments, *cotangents, scale=scale)
    return *gradients, None if state is None else d_state, None


run.defvjp(_forward, _backward)
