"""What mixers over a log-linear op add to their plain siblings: a weight per token, head and level, states per level.

    level_scales_t = softplus(scale * (x_t W))         [B, T, H, NL], scale [H, NL] starting at one

Mixers have the fields heads and max_len; NL = ceil(log2(max_len)) + 1. The state is {"levels": [B, H, L, K, V],
"length": [B] int32}, L of them for the tokens it has room for.
"""

import jax
import jax.numpy as jnp

from seqmix.core import param
from seqmix.core.flops import matmul
from seqmix.core.param import Param
from seqmix.ops.log_linear import levels_of


def check(mixer):
    """Raises ValueError naming max_len where it does not fit."""
    if not isinstance(mixer.max_len, int) or not 2 <= mixer.max_len <= 1 << 30:
        name = type(mixer).__name__
        raise ValueError(f"{name}.max_len: expected an integer from 2 to 2^30, got {mixer.max_len!r}")


def check_tokens(mixer, x):
    """Raises ValueError for x [B, T, D] of more than max_len tokens."""
    if x.shape[1] > mixer.max_len:
        name = type(mixer).__name__
        raise ValueError(f"x: expected at most max_len={mixer.max_len} tokens for {name}, got {x.shape[1]}")


def params(mixer) -> dict:
    """W and the scale."""
    H, NL = mixer.heads, levels_of(mixer.max_len) + 1
    scale = Param((H, NL), ("heads", None), param.ones, decay=False)
    return {"weight": Param((mixer.d_model, H, NL), ("embed", "heads", None)), "scale": scale}


def scales(params, x):
    """level_scales in promote(x.dtype, float32), of `params` and x [B, T, D]."""
    acc = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.einsum("btd,dhl->bthl", x, params["weight"].astype(x.dtype), preferred_element_type=acc)
    return jax.nn.softplus(params["scale"].astype(acc) * logits)


def zero_state(mixer, batch: int, max_len: int, size: tuple[int, int], dtype) -> dict:
    """The state before the first of max_len tokens, size = (K, V), in float32 at least; raises ValueError for more
    than the mixer's max_len.
    """
    if not 1 <= max_len <= mixer.max_len:
        name = type(mixer).__name__
        raise ValueError(f"max_len: expected at most {name}'s max_len={mixer.max_len} tokens, got {max_len}")
    shape = batch, mixer.heads, levels_of(max_len), *size
    levels = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
    return {"levels": levels, "length": jnp.zeros(batch, jnp.int32)}


def pair(state):
    """The op's state of the mixer's, or None of an empty one."""
    return (state["levels"], state["length"]) if "levels" in state else None


def unpaired(pair, old) -> dict:
    """The mixer's state of the op's, in the dtypes of the old one, if there is one."""
    names = ("levels", "length")
    return {name: x.astype(old[name].dtype) if name in old else x for name, x in zip(names, pair, strict=True)}


def elements(mixer, context: int, size: tuple[int, int]) -> int:
    """Elements of `zero_state` of one sequence."""
    return levels_of(context) * mixer.heads * size[0] * size[1] + 1


def flops(mixer, tokens: int) -> int:
    """FLOPs of `scales`."""
    columns = mixer.heads * (levels_of(mixer.max_len) + 1)
    return matmul(tokens, mixer.d_model, columns) + 8 * tokens * columns
