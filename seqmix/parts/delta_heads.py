"""The shell of the delta rule's mixers: what they write and read with, how strongly, and their state.

    q, k  = l2norm(silu(conv(x W)))       [B, T, H, K], of length one
    v     = silu(conv(x W_v))             [B, T, H, V]
    beta  = beta_max sigmoid(x W_beta)    [B, T, H], how far a prediction is moved to its value

Convolutions are depthwise and causal, without bias; conv_width 0 leaves them out. Mixers have the fields heads,
conv_width, beta_max and the property sizes (K, V). The state is {"conv": {q, k, v: the last inputs},
"kv": [B, H, K, V]}.
"""

import jax
import jax.numpy as jnp

from seqmix.core.flops import matmul
from seqmix.core.param import Param
from seqmix.ops.conv import short_conv_flops
from seqmix.parts import time_steps
from seqmix.parts.norms import l2_norm, norm_params
from seqmix.parts.qkv import AXES, check_sizes, conv_state, convolve, head_params, out_param, project

QKV = ("q", "k", "v")


def check(mixer):
    """Raises ValueError naming a field among those of this shell that does not fit."""
    check_sizes(mixer)
    name = type(mixer).__name__
    if not isinstance(mixer.conv_width, int) or mixer.conv_width < 0:
        raise ValueError(f"{name}.conv_width: expected an integer >= 0, got {mixer.conv_width!r}")
    if not 0 < mixer.beta_max <= 2:
        raise ValueError(f"{name}.beta_max: expected a number in (0, 2], got {mixer.beta_max}")


def params(mixer, **more) -> dict:
    """Weights "q", "k", "v", "conv" and "beta"; and of projections into heads of other sizes, name=(H, K)."""
    H, (K, V) = mixer.heads, mixer.sizes
    sizes = {"q": (H, K), "k": (H, K), "v": (H, V), **more}
    tree = head_params(mixer.d_model, sizes, conv_width=mixer.conv_width, convolved=QKV)
    return tree | {"beta": Param((mixer.d_model, H), ("embed", "heads"))}


def gated_params(mixer) -> dict:
    """The weights of `params`, "gate", "norm" and "out" of a gated way out, and "decay" of `log_decay`, for Gated
    DeltaNet and its kin; the mixer has the fields a_min, a_max, dt_min, dt_max too.
    """
    mixer.positive(d_model=mixer.d_model)
    D, H, (_, V) = mixer.d_model, mixer.heads, mixer.sizes
    decay = {
        "weight": Param((D, H), ("embed", "heads")),
        "A_log": Param((H,), ("heads",), time_steps.a_log_init(mixer.a_min, mixer.a_max), decay=False),
        "dt_bias": Param((H,), ("heads",), time_steps.dt_bias_init(mixer.dt_min, mixer.dt_max), decay=False),
    }
    more = {"decay": decay, "norm": norm_params((V,), ("head_dim",)), "out": out_param(H, V, D)}
    return params(mixer, gate=(H, V)) | more


def log_decay(params, x):
    """-exp(A_log) softplus(x W + dt_bias), [B, T, H] in promote(x.dtype, float32), of `gated_params`."""
    p = params["decay"]
    return time_steps.log_decay(per_head(x, p["weight"]), p["A_log"], p["dt_bias"])


def inputs(mixer, params, x, *, conv=None, segment_ids=None):
    """(q, k, v), beta in promote(x.dtype, float32), and the state of the convolutions."""
    heads = dict(zip(QKV, project(params, x, QKV)))
    if mixer.conv_width:
        heads, conv = convolve(params, heads, state=conv, segment_ids=segment_ids)
    else:
        heads = jax.tree.map(jax.nn.silu, heads)
    beta = per_head(x, params["beta"])
    return (l2_norm(heads["q"]), l2_norm(heads["k"]), heads["v"]), mixer.beta_max * jax.nn.sigmoid(beta), conv


def per_head(x, weight):
    """x W, [B, T, H] of W [D, H], in promote(x.dtype, float32)."""
    acc = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("btd,dh->bth", x, weight.astype(x.dtype), preferred_element_type=acc)


def zero_state(mixer, batch, dtype):
    """The state before the first token: the convolutions' inputs in `dtype`, "kv" in float32 at least."""
    kv = jnp.zeros((batch, mixer.heads, *mixer.sizes), jnp.promote_types(dtype, jnp.float32))
    return {"kv": kv} | conv_zeros(mixer, batch, dtype)


def state_axes(mixer):
    return {"kv": ("batch", *AXES, None)} | conv_axes(mixer)


def state_elements(mixer) -> int:
    """Elements of the state of one sequence."""
    H, (K, V) = mixer.heads, mixer.sizes
    return H * K * V + conv_elements(mixer)


def conv_zeros(mixer, batch, dtype) -> dict:
    """The part "conv" of `zero_state`; {} without convolutions, and so below."""
    return {"conv": conv_state(mixer.params()["conv"], batch, dtype)} if mixer.conv_width else {}


def conv_axes(mixer) -> dict:
    return {"conv": dict.fromkeys(QKV, ("batch", None, *AXES))} if mixer.conv_width else {}


def conv_elements(mixer) -> int:
    K, V = mixer.sizes
    return max(mixer.conv_width - 1, 0) * mixer.heads * (2 * K + V)


def flops(mixer, batch: int, seq: int) -> int:
    """FLOPs of `inputs`."""
    H, (K, V), tokens = mixer.heads, mixer.sizes, batch * seq
    channels = H * (2 * K + V)
    conv = short_conv_flops(batch, seq, channels, mixer.conv_width, bias=False) if mixer.conv_width else 0
    # 4 for a silu, 3 for the norm of q and k.
    return matmul(tokens, mixer.d_model, channels + H) + conv + tokens * (4 * channels + 6 * H * K)
