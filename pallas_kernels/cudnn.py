"""The gradient call of cuDNN's attention by itself, which `jax.nn` makes only behind its own forward call.

It takes the results that it is the gradient of: where they are of more keys than those given, it gives the share of the
given ones, which is what a ring of devices needs. The name is not one of jax's public ones, hence `unavailable`.
"""

import jax.numpy as jnp


def unavailable() -> str | None:
    """Why jax offers no such call, in a few words; None if it does, whatever the device."""
    try:
        _library()
    except (ImportError, AttributeError) as error:
        return f"needs another version of jax: {error}"
    return None


def _library():
    from jax._src.cudnn import fused_attention_stablehlo as fused

    return fused, fused._dot_product_attention_bwd_p, fused.AttentionLayout.BNTH.value


def gradients(q, k, v, lse, dy, y, *, scale, causal=False):
    """Gradients (dq, dk, dv) of attention from given queries to given keys, in the shapes of q, k and v.

        p_ij = exp(scale q_i k_j - lse_i),   ds_ij = p_ij (dy_i v_j - sum_v dy_iv y_iv)
        dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i,   dv_j = sum_i p_ij dy_i

    q [B, H, T, K], k [B, Hk, S, K], v [B, Hk, S, K], y and dy [B, H, T, K], all bfloat16 or all float16, K a multiple
    of 8; lse [B, H, T] float32. y and lse may be over more keys than k and v. causal: query i sees the keys j <= i.
    For NVIDIA GPUs from Ampere on (arXiv 2307.08691, algorithm 2, by cuDNN). Without causality dq is added up in no
    fixed order. Raises ValueError for other shapes and dtypes.
    """
    _check(q, k, v, lse, dy, y)
    fused, call, layout = _library()
    none = [jnp.zeros(0, q.dtype)] * 7  # bias, lengths, offsets, pages
    options = {"seed": 0, "dropout_rate": 0.0, "variadic_args": (False, False), "sliding_window_length": None}
    mask = fused.MaskType.CAUSAL if causal else fused.MaskType.NO_MASK
    arrays = q, k, v, *none, lse.astype(jnp.float32), y, dy
    return tuple(call.bind(*arrays, scale=float(scale), mask_type=mask, layout=layout, **options))


def _check(q, k, v, lse, dy, y):
    if any(x.ndim != 4 for x in (q, k, v)) or q.shape[3] % 8 or q.shape[1] % max(1, k.shape[1]):
        shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
        raise ValueError(f"q, k: expected [B, H, T, K] and [B, Hk, S, K], K a multiple of 8 and H of Hk, got {shapes}")
    keys = (q.shape[0], k.shape[1], k.shape[2], q.shape[3])
    wanted = {"k": (k, keys), "v": (v, keys), "dy": (dy, q.shape), "y": (y, q.shape), "lse": (lse, q.shape[:3])}
    for name, (x, shape) in wanted.items():
        if x.shape != shape:
            raise ValueError(f"{name}: expected {shape}, got {x.shape}")
    kinds = {x.dtype.name for x in (q, k, v, dy, y)}
    if len(kinds) > 1 or not kinds <= {"bfloat16", "float16"}:
        raise ValueError(f"q: expected all of bfloat16 or all of float16, got {', '.join(sorted(kinds))}")
