"""A gated RMS norm and the product after it, through the kernels of `pallas_kernels`: when they run, their gradient."""

import functools

import jax
import jax.numpy as jnp

from seqmix.core import sharding
from seqmix.ops import targets
from seqmix.ops.dispatch import pick
from seqmix.ops.mesh import layout, on_shares

TOKENS = ("batch", "time", None, None)


def gated_norm_product(x, skip, gate, scale, out, *, eps):
    """norm((x + skip[0] skip[1]) silu(gate)) scale over heads and channels, times out; None where no kernel can.

    x, gate and skip[1]: [B, T, H, P]; scale: [H, P]; skip[0]: [H]; out: [H, P, D], in the dtype of x. The backward pass
    keeps the arguments alone: the norm, which the gradient of `out` needs, comes from the walk of the other gradients.
    """
    weight, skip = skip
    lay = layout(*x.shape[:3])
    if lay is not None and lay.heads:
        return None
    if pick("gated_norm", None, {"gpu": _unsupported(lay, x, skip, gate), "xla": None}) == "xla":
        return None
    return _product(x, skip, gate, scale, weight, out, eps)


def _unsupported(lay, *arrays) -> str | None:
    from pallas_kernels.gated_norm import gpu

    def reason(*arrays):
        batch, time, heads, channels = arrays[0].shape
        rows = [jax.ShapeDtypeStruct((batch * time, heads * channels), a.dtype) for a in arrays]
        weights = [jax.ShapeDtypeStruct((heads * channels,), jnp.float32)] * 2
        return targets.unsupported("gpu", time) or gpu.supports(*rows, *weights, capability=targets.capability())

    if lay is None:
        return reason(*arrays)
    with sharding.shares(lay.mesh):
        return reason(*(lay.share(a, *TOKENS) for a in arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _product(x, skip, gate, scale, weight, out, eps):
    from pallas_kernels.gated_norm import gpu

    def run(*arrays):
        return gpu.forward(*_flat(*arrays), eps=eps).reshape(arrays[0].shape)

    y = _on_rows(run, (x, skip, gate, scale, weight), (), TOKENS)
    return jnp.einsum("bthp,hpd->btd", y, out)


def _forward(*call):
    return _product(*call), call[:-1]


def _backward(eps, arguments, dz):
    from pallas_kernels.gated_norm import gpu

    *arguments, out = arguments
    dy = jnp.einsum("btd,hpd->bthp", dz, out)

    def run(*arrays):
        *arrays, dy = arrays
        flat = _flat(*arrays)
        *found, dscale, dweight = gpu.backward(*flat, dy.reshape(flat[0].shape), eps=eps)
        sums = (a.reshape(1, 1, *dy.shape[2:]) for a in (dscale, dweight))
        return *(a.reshape(dy.shape) for a in found), *sums

    found = _on_rows(run, (*arguments, dy), (TOKENS,), (TOKENS,) * 6)
    y, *gradients, dscale, dweight = found
    dscale, dweight = (jnp.sum(a, (0, 1)) for a in (dscale, dweight))
    scale, weight = arguments[3:]
    dout = jnp.einsum("bthp,btd->hpd", y, dz)
    return *gradients, dscale.astype(scale.dtype), jnp.sum(dweight, 1).astype(weight.dtype), dout


_product.defvjp(_forward, _backward)


def _on_rows(run, arrays, more, names):
    """run(*arrays) on each device's rows; sums over rows come back with a row for each device."""
    lay = layout(*arrays[0].shape[:3])
    given = (TOKENS, TOKENS, TOKENS, (None, None), (None,), *more)
    return run(*arrays) if lay is None else on_shares(lay, run, arrays, given, names)


def _flat(x, skip, gate, scale, weight):
    """The kernels' arguments: rows [N, H P], and float32 weights of each of their channels."""
    rows = (a.reshape(-1, a.shape[2] * a.shape[3]) for a in (x, skip, gate))
    return *rows, *(a.astype(jnp.float32) for a in (scale.ravel(), jnp.repeat(weight, x.shape[3])))
