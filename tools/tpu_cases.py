"""The calls that `tools/tpu_bundles.py` and the tests compile for TPUs: {name: (function, arguments)}.

Arguments lie as the kernels cut them, heads side by side, so that little but the kernel is compiled.
"""

import jax
import jax.numpy as jnp

BATCH, TIME, WIDTH = 8, 2048, 4096
SHAPES = {"ssd": (1, 64, 128, 64), "simple_gla": (16, 16, 128, 128), "retnet": (8, 8, 256, 512)}  # Hk, H, K, V


def cases(tile=None):
    """Forward and backward of each shape; tile: that of the kernels, None for their choice."""
    found = {}
    for name, shape in SHAPES.items():
        for way in ("forward", "backward"):
            found[f"{name}_{way}"] = _attention(way, *shape, tile)
    x = jax.ShapeDtypeStruct((BATCH, TIME, WIDTH), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    from pallas_kernels.linear_scan import tpu

    found["scan_forward"] = (lambda *args: tpu.forward(*args, tile=tile)), (x, x, state)
    found["scan_backward"] = (lambda *args: tpu.backward(*args, tile=tile)), (x, x, state, x, state)
    return found


def _attention(way, key_heads, heads, key, value, tile):
    from pallas_kernels.linear_attention import tpu, tpu_backward

    def run(q, k, v, log_decay, dy):
        q, k = (x.reshape(BATCH, TIME, key_heads, key) for x in (q, k))
        v, dy = (x.reshape(BATCH, TIME, heads, value) for x in (v, dy))
        if way == "forward":
            y, state = tpu.forward(q, k, v, log_decay, tile=tile)
            return y.reshape(BATCH, TIME, -1), state
        dq, dk, dv, *rest = tpu_backward.backward(q, k, v, log_decay, None, None, None, dy, tile=tile)
        return *(x.reshape(BATCH, TIME, -1) for x in (dq, dk, dv)), *rest

    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((BATCH, TIME, *shape), dtype)
    q, v = array(key_heads * key), array(heads * value)
    return run, (q, q, v, array(heads, dtype=jnp.float32), v)
