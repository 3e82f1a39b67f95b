"""Normalisation of a mixer's channels: RMS per head or over groups of heads, with a gate before or after; L2."""

import functools

import jax
import jax.numpy as jnp

from seqmix.core import param
from seqmix.core.param import Param


def norm_params(shape, axes) -> dict:
    """A scale per channel, starting at one, without weight decay."""
    return {"scale": Param(tuple(shape), tuple(axes), param.ones, decay=False)}


def rms_norm(x, scale=None, *, skip=None, eps=1e-5, groups=None, gate=None, gate_first=False, activation=jax.nn.silu):
    """Root-mean-square normalisation, with a gate where one is given.

        norm(x)  = x / sqrt(mean(x^2) + eps) * scale
        y        = norm(x) * activation(gate)        or, with gate_first, norm(x * activation(gate))

    The mean is over the last axis: per head for x [..., H, P]. With `groups` = G it is over G groups of H/G
    consecutive heads and their channels: G = 1 normalises all of a token's channels together.

    Args:
        x: [..., P], or [..., H, P] with groups.
        scale: of the trailing shape of x ([P], or one per head and channel [H, P]), or None.
        skip: (weight [H], array of the shape of x): x + weight * array takes the place of x; or None.
        gate: of the shape of x, or None.

    Computed in float32 (float64 for float64 inputs); returns the dtype of x. The backward pass keeps the arguments
    alone, and computes the rest anew. Raises ValueError for shapes that do not fit. Source: arXiv 1910.07467; gated:
    arXiv 2405.21060 (gate first), 2312.06635 (gate after).
    """
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gate: expected shape {tuple(x.shape)} as of x, got {tuple(gate.shape)}")
    if scale is not None and scale.shape != x.shape[x.ndim - scale.ndim :]:
        raise ValueError(f"scale: expected the trailing shape of x {x.shape}, got {tuple(scale.shape)}")
    if groups is not None and (x.ndim < 2 or groups < 1 or x.shape[-2] % groups):
        raise ValueError(f"groups: expected a divisor of the heads of x {x.shape}, got {groups}")
    options = dict(eps=eps, groups=groups, gate_first=gate_first, activation=activation)
    # Without a barrier, which under a scan over layers would copy every argument.
    return jax.checkpoint(functools.partial(_rms_norm, **options), prevent_cse=False)(x, scale, skip, gate)


def _rms_norm(x, scale, skip, gate, *, eps, groups, gate_first, activation):
    acc = jnp.promote_types(x.dtype, jnp.float32)
    h = x.astype(acc)
    h = h if skip is None else h + skip[0].astype(acc)[:, None] * skip[1]
    weight = 1 if gate is None else activation(gate.astype(acc))
    h = h * weight if gate_first else h
    # Heads are only split, never merged with their channels, so that they can be sharded.
    grouped = h if groups is None else h.reshape(*h.shape[:-2], groups, -1, h.shape[-1])
    mean = jnp.mean(grouped * grouped, axis=-1 if groups is None else (-2, -1), keepdims=True)
    h = (grouped * jax.lax.rsqrt(mean + eps)).reshape(h.shape)
    h = h if scale is None else h * scale
    h = h if gate_first else h * weight
    return h.astype(x.dtype)


def l2_norm(x, *, eps=1e-6):
    """x / sqrt(sum x^2 + eps) over the last axis: vectors of length one, or 0 and differentiable where x is 0.

    Computed in float32 (float64 for float64 inputs); returns the dtype of x.
    """
    h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (h * jax.lax.rsqrt(jnp.sum(h * h, axis=-1, keepdims=True) + eps)).astype(x.dtype)
