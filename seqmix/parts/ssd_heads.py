"""The shell of Mamba-2's mixers: what they write, read and decay with, the skip, and the normed way out.

    z, x, B, C, dt = split(u W_in)
    x, B, C        = silu(conv(x)), silu(conv(B)), silu(conv(C))        depthwise, causal, conv_width taps
    dt             = softplus(dt + dt_bias),   log_decay = -exp(A_log) dt
    out            = W_out (rmsnorm((mixed + D x) * silu(z)) * scale)    norm over d_inner / n_groups channels

Mixers have the fields d_state, head_dim, expand, n_groups, conv_width, chunk, dt_min, dt_max, dt_floor, a_min, a_max,
norm_eps, conv_bias and the property heads.
"""

import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from seqmix.core import param
from seqmix.core.flops import matmul
from seqmix.core.param import Param
from seqmix.core.sharding import constrain
from seqmix.ops.conv import short_conv, short_conv_flops
from seqmix.ops.mesh import layout
from seqmix.ops.norm_kernels import gated_norm_product
from seqmix.parts import time_steps
from seqmix.parts.norms import norm_params, rms_norm


def check(mixer):
    """Raises ValueError naming a field among those of this shell that does not fit."""
    sizes = ("d_state", "head_dim", "expand", "n_groups", "conv_width", "chunk")
    mixer.positive(**{name: getattr(mixer, name) for name in sizes})
    if mixer.chunk & (mixer.chunk - 1):
        raise ValueError(f"{type(mixer).__name__}.chunk: expected a power of two, got {mixer.chunk}")
    time_steps.check_ranges(mixer, ("dt_min", "dt_max"), ("a_min", "a_max"))
    if mixer.d_model == 0:
        return
    name, inner = type(mixer).__name__, mixer.expand * mixer.d_model
    if inner % mixer.head_dim:
        got = f"{mixer.expand} * {mixer.d_model} = {inner} and head_dim {mixer.head_dim}"
        raise ValueError(f"{name}.head_dim: expected a divisor of expand * d_model, got {got}")
    if mixer.heads % mixer.n_groups:
        got = f"{mixer.heads} heads and n_groups {mixer.n_groups}"
        raise ValueError(f"{name}.n_groups: expected a divisor of the number of heads, got {got}")


def _uniform(bound: float):
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def params(mixer) -> dict:
    """Weights "in", "conv", "A_log", "D", "dt_bias", "norm", "out"; with conv_bias "conv_bias"."""
    mixer.positive(d_model=mixer.d_model)
    D, H, P, W = mixer.d_model, mixer.heads, mixer.head_dim, mixer.conv_width
    group, axes = (mixer.n_groups, mixer.d_state), ("kv_heads", "state")
    shapes = {"x": ((H, P), ("heads", "head_dim")), "B": (group, axes), "C": (group, axes)}
    uniform = _uniform(W**-0.5)  # as PyTorch draws the weights and biases of a depthwise convolution
    a_log = time_steps.a_log_init(mixer.a_min, mixer.a_max)
    dt_bias = time_steps.dt_bias_init(mixer.dt_min, mixer.dt_max, mixer.dt_floor)
    tree = {
        "in": {
            **{k: Param((D, *s), ("embed", *a)) for k, (s, a) in {"z": shapes["x"], **shapes}.items()},
            "dt": Param((D, H), ("embed", "heads")),
        },
        "conv": {k: Param((W, *s), (None, *a), uniform) for k, (s, a) in shapes.items()},
        "A_log": Param((H,), ("heads",), a_log, decay=False),
        "D": Param((H,), ("heads",), param.ones, decay=False),
        "dt_bias": Param((H,), ("heads",), dt_bias, decay=False),
        "norm": norm_params((H, P), ("heads", "head_dim")),
        "out": Param((H, P, D), ("heads", "head_dim", "embed"), fan_in=H * P),
    }
    if mixer.conv_bias:
        tree["conv_bias"] = {k: Param(s, a, uniform, decay=False) for k, (s, a) in shapes.items()}
    return tree


def inputs(params, x, *, conv=None, segment_ids=None):
    """z, dt, log_decay, {x, B, C} after the convolutions, the same once more, and the state of these."""
    acc = jnp.promote_types(x.dtype, jnp.float32)
    weights = {k: w.astype(x.dtype) for k, w in params["in"].items()}
    parts = {k: jnp.einsum("btd,dhp->bthp", x, weights[k]) for k in ("z", "x")}
    parts["B"], parts["C"], dt = _narrow(x, weights)
    for key, over in (("z", "heads"), ("x", "heads"), ("B", "kv_heads"), ("C", "kv_heads")):
        parts[key] = constrain(parts[key], "batch", "time", over, None)
    with jax.named_scope("gates"):
        dt = jax.nn.softplus(constrain(dt, "batch", "time", "heads") + params["dt_bias"].astype(acc))
        log_decay = -jnp.exp(params["A_log"].astype(acc)) * dt
    z = parts.pop("z")
    taps, bias = params["conv"], params.get("conv_bias")
    options = dict(state=conv, segment_ids=segment_ids, activation=jax.nn.silu, twice=True)
    with jax.named_scope("convolution"):
        (parts, again), conv = short_conv(parts, taps, bias, **options)
    return z, dt, log_decay, parts, again, conv


def _narrow(x, weights):
    """B, C and, in float32, dt before its bias: one product, as they are narrow, unless their heads are cut."""
    groups = weights["B"].shape[1:]
    lay = layout(*x.shape[:2], weights["dt"].shape[1], groups[0])
    if lay is not None and lay.heads:
        return *(jnp.einsum("btd,dgn->btgn", x, weights[k]) for k in "BC"), _product(x, weights["dt"])
    joint = jnp.concatenate([weights[k].reshape(len(weights[k]), -1) for k in ("B", "C", "dt")], axis=1)
    size = math.prod(groups)
    b, c, dt = jnp.split(_product(x, joint), (size, 2 * size), axis=2)
    return *(part.astype(x.dtype).reshape(*x.shape[:2], *groups) for part in (b, c)), dt


def _product(x, weight):
    """x [B, T, D] times [D, K] in float32 (float64 of float64); the backward pass multiplies in the dtype of x."""
    return checkpoint_name(_wide_product(x, weight), "product")


@jax.custom_vjp
def _wide_product(x, weight):
    return jnp.einsum("btd,dk->btk", x, weight, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))


def _forward(x, weight):
    return _wide_product(x, weight), (x, weight)


def _backward(kept, dy):
    x, weight = kept
    dy = dy.astype(x.dtype)
    return jnp.einsum("btk,dk->btd", dy, weight), jnp.einsum("btd,btk->dk", x, dy)


_wide_product.defvjp(_forward, _backward)


def way_out(mixer, params, z, mixed, x=None):
    """out [B, T, D] of mixed [B, T, H, P] and the x that skips the mixing, None where it is in mixed.

    It is 0 at padding, since both are.
    """
    scale, out, skip = params["norm"]["scale"], params["out"].astype(z.dtype), None if x is None else (params["D"], x)
    with jax.named_scope("gated_norm"):
        if skip is not None and mixer.n_groups == 1:
            y = gated_norm_product(mixed, skip, z, scale, out, eps=mixer.norm_eps)
            if y is not None:
                return y
        options = dict(eps=mixer.norm_eps, groups=mixer.n_groups, gate=z, gate_first=True)
        h = rms_norm(mixed, scale, skip=skip, **options)
    return jnp.einsum("bthp,hpd->btd", h.astype(z.dtype), out)


def with_steps(params, scores, dt, segment_ids):
    """The mixing matrix of x, scores dt_s + D [t = s], of the one of dt x: [B, H, T, T]."""
    own = params["D"].astype(dt.dtype)[:, None, None] * jnp.eye(dt.shape[1], dtype=dt.dtype)
    if segment_ids is not None:
        own = jnp.where(segment_ids[:, None, :, None] != 0, own, 0)
    return scores * jnp.moveaxis(dt, 1, 2)[:, :, None, :] + own


def conv_state(mixer, batch: int, dtype):
    """The convolutions' last inputs before the first token, zeros."""
    H, P, G, N, rows = mixer.heads, mixer.head_dim, mixer.n_groups, mixer.d_state, mixer.conv_width - 1
    sizes = {"x": (H, P), "B": (G, N), "C": (G, N)}
    return {k: jnp.zeros((batch, rows, *size), dtype) for k, size in sizes.items()}


def conv_axes():
    """Logical axes of `conv_state`."""
    group = ("batch", None, "kv_heads", "state")
    return {"x": ("batch", None, "heads", "head_dim"), "B": group, "C": group}


def conv_elements(mixer) -> int:
    """Elements of `conv_state` of one sequence."""
    return (mixer.conv_width - 1) * (mixer.heads * mixer.head_dim + 2 * mixer.n_groups * mixer.d_state)


def flops(mixer, batch: int, seq: int) -> int:
    """FLOPs of all but the op."""
    H, P, G, N = mixer.heads, mixer.head_dim, mixer.n_groups, mixer.d_state
    inner, convolved, tokens = H * P, H * P + 2 * G * N, batch * seq
    projections = matmul(tokens, mixer.d_model, 3 * inner + 2 * G * N + H)  # into z, x, B, C, dt, and out
    conv = short_conv_flops(batch, seq, convolved, mixer.conv_width, mixer.conv_bias)
    # 8 a channel: dt x, D x, its sum, gate, square, mean, norm, scale; 4 a silu; 8 a head's dt and decay.
    return projections + conv + tokens * (8 * inner + 4 * (inner + convolved) + 8 * H)
