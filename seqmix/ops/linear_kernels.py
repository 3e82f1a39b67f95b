"""Linear attention through the kernels of `pallas_kernels`: when they can run, and their gradient.

Residuals are the call's own arguments: the backward kernels compute states and scores anew.
"""

import functools

import jax
import jax.numpy as jnp

from seqmix.ops import step_kernels, targets

LEAST_WRITE = 1e-30


def reasons(implementation, q, k, v, log_decay, state, runs, write, *, scale, normalize, causal) -> dict:
    """For each target why its kernels cannot run this call here, in a few words, or None if they can.

    With implementation None the TPU's, which never ran on one, are left out where their tiles would be partly empty.
    """
    call = (q, k, v, log_decay, state, runs, write)
    found = {
        name: _unsupported(name, *call, scale=scale, normalize=normalize, causal=causal) for name in targets.TARGETS
    }
    if found["gpu"] is not None and q.shape[1] == 1 and causal and not normalize:
        found["gpu"] = step_kernels.reason(implementation, _step(jax.ShapeDtypeStruct, *call), runs, scale=scale)
    if implementation is None and found["tpu"] is None:
        found["tpu"] = _modules("tpu", log_decay)[0].wasteful(q, v)
    return found


def _unsupported(target, q, k, v, log_decay, state, runs, write, *, scale, normalize, causal) -> str | None:
    reason = targets.unsupported(target, q.shape[1])
    if reason is not None:
        return reason
    if normalize or not causal:
        return f"has no form for {'normalize' if normalize else 'causal=False'}"
    options = {} if target == "tpu" else {"capability": targets.capability()}
    return _modules(target, log_decay)[0].supports(q, k, v, log_decay, state, runs, write, scale=scale, **options)


def _per_channel(log_decay):
    return log_decay is not None and log_decay.ndim == 4


def _modules(target, log_decay):
    """The modules of a target's forward and backward kernels for such decays."""
    if target == "gpu" and _per_channel(log_decay):
        from pallas_kernels.linear_attention import gpu_channel, gpu_channel_backward

        return gpu_channel, gpu_channel_backward
    if target == "gpu":
        from pallas_kernels.linear_attention import gpu, gpu_backward

        return gpu, gpu_backward
    if target == "triton":
        from pallas_kernels.linear_attention import triton, triton_backward

        return triton, triton_backward
    if _per_channel(log_decay):
        from pallas_kernels.linear_attention import tpu_channel, tpu_channel_backward

        return tpu_channel, tpu_channel_backward
    from pallas_kernels.linear_attention import tpu, tpu_backward

    return tpu, tpu_backward


def run(target, q, k, v, log_decay, state, runs, write, scale, return_state=True):
    """(y [B, T, H, V], state [B, H, K, V] or None) of a call that the target has no reason against."""
    if q.shape[1] == 1:
        zeros = jnp.zeros if state is None else lambda *_: state.astype(jnp.float32)
        y, state = step_kernels.run(_step(zeros, q, k, v, log_decay, state, runs, write), scale=scale)
        return y, state if return_state else None
    return _run(q, k, v, log_decay, state, runs, log_writes(write), scale, target, return_state)


def _step(make, q, k, v, log_decay, state, runs, write):
    """The call of one token, with make(shape, dtype) for the state."""
    dtype = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    shape = (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
    return make(shape, dtype), q, k, v, log_decay, write, None, None


def log_writes(write):
    """What the kernels take of weights of writes: logarithms; near 0 they are of a weight too small to see."""
    if write is None:
        return None
    write = write.astype(jnp.float32)
    return jnp.log(write + jnp.where(write < LEAST_WRITE, LEAST_WRITE, 0.0))


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _run(q, k, v, log_decay, state, runs, log_write, scale, target, return_state):
    options = {"scale": scale} | ({"need_last": return_state} if target == "gpu" else {})
    y, last = _modules(target, log_decay)[0].forward(q, k, v, log_decay, state, runs, log_write, **options)
    return y, last if return_state else None


def _forward(*call):
    *arguments, scale, target, return_state = call
    values = [None if x is None else x.value for x in arguments]
    # Whether the decays' gradient is asked for, as structure: constant decays, such as RetNet's, spare its work.
    need_decay = () if arguments[3] is not None and arguments[3].perturbed else None
    return _run(*values, scale, target, return_state), (values, need_decay)


def _backward(scale, target, return_state, saved, cotangents):
    arguments, need_decay = saved
    log_decay, state = arguments[3:5]
    dy, d_last = (None if isinstance(x, jax.custom_derivatives.SymbolicZero) else x for x in cotangents)
    dy = jnp.zeros(arguments[2].shape, arguments[2].dtype) if dy is None else dy
    *gradients, d_state, d_write = _modules(target, log_decay)[1].backward(
        *arguments, dy, d_last, scale=scale, need_decay=need_decay is not None
    )
    return *gradients, None if state is None else d_state, None, d_write


_run.defvjp(_forward, _backward, symbolic_zeros=True)
