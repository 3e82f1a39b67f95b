"""Short convolutions through the kernels of `pallas_kernels`: when they can run, and their gradient."""

import functools
import math

import jax
import jax.numpy as jnp

from seqmix.core import sharding
from seqmix.ops import targets
from seqmix.ops.dispatch import pick
from seqmix.ops.mesh import on_shares

ACTIVATIONS = {None: False, jax.nn.silu: True}  # those that the kernels have, and whether they are silu


def chosen(cuts, calls, activation) -> bool:
    """Whether the kernels run these (x, weight, bias, state), whose layouts on the mesh are `cuts`."""
    if cuts[0] is None:
        reason = unsupported(calls, activation)
    elif any(lay.time for lay in cuts):
        reason = "has no form for time that is cut"
    else:
        with sharding.shares(cuts[0].mesh):
            reason = unsupported([_share(lay, *call) for lay, call in zip(cuts, calls, strict=True)], activation)
    return pick("short_conv", None, {"gpu": reason, "xla": None}) == "gpu"


def unsupported(calls, activation) -> str | None:
    """Why the kernels cannot run these calls here, in a few words; None if they can."""
    if activation not in ACTIVATIONS:
        return "has no form for this activation"
    for x, weight, bias, state in calls:
        reason = targets.unsupported("gpu", x.shape[1])
        if reason is None and state is not None:
            reason = "has no form for a state"
        if reason is not None:
            return reason
        from pallas_kernels.short_conv import gpu

        reason = gpu.supports(*jax.eval_shape(_flat, x, weight, bias), capability=targets.capability())
        if reason is not None:
            return reason
    return None


def run(cuts, calls, run_ids, activation, twice):
    """The list of the calls' results, once or twice, each on its devices' shares."""
    silu = ACTIVATIONS[activation]
    ys = []
    for lay, (x, weight, bias, _) in zip(cuts, calls, strict=True):
        call = (x, weight, bias, run_ids)
        if lay is None:
            ys.append(_run(*call, silu, twice))
            continue
        names = (*_names(x)[:3], ("batch", "time"))
        local = functools.partial(_run, silu=silu, twice=twice)
        ys.append(on_shares(lay, local, call, names, [names[0]] * (1 + twice)))
    return list(zip(*ys, strict=True))


def _names(x):
    """Of the dimensions of x, weight, bias and state: those after time are cut as heads are, in their first."""
    channels = ("heads", *[None] * x.ndim)[: x.ndim - 2]
    return ("batch", "time", *channels), (None, *channels), channels, ("batch", None, *channels)


def _share(lay, *call):
    return [None if a is None else lay.share(a, *names) for a, names in zip(call, _names(call[0]), strict=True)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _run(x, weight, bias, run_ids, silu, twice):
    from pallas_kernels.short_conv import gpu

    y = gpu.forward(*_flat(x, weight, bias), run_ids, silu=silu).reshape(x.shape)
    return [y] * (1 + twice)


def _forward(*call):
    return _run(*call), call[:4]


def _backward(silu, twice, arguments, dys):
    from pallas_kernels.short_conv import gpu

    x, weight, bias, run_ids = arguments
    flat = _flat(x, weight, bias)
    found = gpu.backward(*flat, run_ids, *(dy.reshape(flat[0].shape) for dy in dys), silu=silu)
    dx, dweight, dbias = (d.reshape(a.shape) for d, a in zip(found, (x, weight, weight[0]), strict=True))
    return dx, dweight.astype(weight.dtype), None if bias is None else dbias.astype(bias.dtype), None


_run.defvjp(_forward, _backward)


def _flat(x, weight, bias):
    """x [B, T, C], and weight [W, C] and bias [C] in float32."""
    width = math.prod(x.shape[2:])
    bias = jnp.zeros(width, jnp.float32) if bias is None else bias.reshape(width).astype(jnp.float32)
    return x.reshape(*x.shape[:2], width), weight.reshape(len(weight), width).astype(jnp.float32), bias
