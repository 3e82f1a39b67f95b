"""One token of an op with a matrix for a state, through `pallas_kernels.state_step`: when it runs, and its gradient.

The ops' arguments for one token have a time axis of 1. A call is the kernel's: (state, q, k, v, log_decay, write, read,
left), the last four or five None where the op has none.
"""

import functools

import jax
import jax.numpy as jnp

from seqmix.core import sharding
from seqmix.ops import targets
from seqmix.ops.mesh import on_shares

AXES = (1, 2, 2, 2, 2, 2, 2, 2)  # of the heads of each array of a call; of log decays [H] it is 0


def reason(implementation, call, runs, *, scale, lay=None) -> str | None:
    """Why the kernel does not run this call here, in a few words; None if it does. lay: where the arrays are cut."""
    state, q = call[:2]
    if q.shape[1] != 1:
        return f"has a kernel for one token alone, got T={q.shape[1]}"
    if lay is None:
        return _unsupported(implementation, call, runs, scale)
    with sharding.shares(lay.mesh):
        shares = [None if x is None else lay.share(x, *names) for x, names in zip(call, _names(call), strict=True)]
        return _unsupported(implementation, shares, runs, scale)


def _unsupported(implementation, call, runs, scale):
    found = targets.unsupported("gpu", call[1].shape[1], least=1)
    if found is None and runs is not None:
        found = "has no form for segment_ids with one token"
    if found is not None:
        return found
    from pallas_kernels.state_step import gpu

    found = gpu.supports(*jax.eval_shape(_flat, *call), scale=scale, capability=targets.capability())
    state, *_, read, _left = call
    if found is None and implementation is None and not gpu.worthwhile(state, read):
        return "has too few heads for its kernel for one token"
    return found


def run(call, *, scale, lay=None):
    """(y [B, 1, H, V] in the dtype of v, state) of a call without a `reason`, on each device's shares."""
    if lay is None:
        return _run(scale, *call)
    names = _names(call)
    key_heads = call[1].shape[2]

    def local(*call):
        found = [
            lay.local_key_heads(x, key_heads) if x is not None and "key_heads" in one else x
            for x, one in zip(call, names, strict=True)
        ]
        return _run(scale, *found)

    return on_shares(lay, local, call, names, (("batch", "time", "heads", None), names[0]))


def _names(call):
    """The names of each array's dimensions, None of None."""
    heads, names = call[0].shape[1], []
    for x, axis in zip(call, AXES, strict=True):
        if x is None:
            names.append(None)
            continue
        axis = 0 if x.ndim == 1 else axis
        one = ["batch", *["time"] * (axis == 2), *[None] * 4][: x.ndim]
        one[axis] = "heads" if x.shape[axis] == heads else "key_heads"
        names.append(tuple(one))
    return names


def _flat(state, q, k, v, log_decay, write, read, left):
    """The kernel's arguments: without the time axis."""
    tokens = (x if x is None or x.ndim == 1 else jnp.squeeze(x, 1) for x in (q, k, v, log_decay, write, read, left))
    return state, *tokens


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(scale, *call):
    from pallas_kernels.state_step import gpu

    y, state = gpu.step(*_flat(*call), scale=scale)
    return y[:, None], state


def _forward(scale, *call):
    return _run(scale, *call), call


def _backward(scale, call, cotangents):
    return jax.vjp(functools.partial(_plain, scale), *call)[1](cotangents)


_run.defvjp(_forward, _backward)


def _plain(scale, *call):
    """The same in XLA."""
    state, q, k, v, log_decay, write, read, left = _flat(*call)
    heads, dtype = state.shape[1], v.dtype
    wide = lambda x: jnp.repeat(x.astype(state.dtype), heads // x.shape[1], axis=1)[..., None]
    before, written = state, v.astype(state.dtype)[:, :, None]
    if log_decay is not None:
        factor = jnp.exp(log_decay.astype(state.dtype))
        state = state * factor.reshape(*factor.shape, *[1] * (1 if factor.ndim == 3 else 2))
    if left is not None:
        state = state + wide(left) * jnp.sum(wide(read) * before, 2, keepdims=True)
    elif read is not None:
        written = written - jnp.sum(wide(read) * state, 2, keepdims=True)
    if write is not None:
        written = written * write.astype(state.dtype)[..., None, None]
    state = state + wide(k) * written
    y = scale * jnp.sum(wide(q) * state, 2)
    return y.astype(dtype)[:, None], state
