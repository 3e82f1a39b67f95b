"""The calls that `tools/tpu_bundles.py` and the tests compile for TPUs: {name: (function, arguments)}.

Arguments lie as the kernels cut them, heads side by side, so that little but the kernel is compiled.
"""

import jax
import jax.numpy as jnp
import numpy as np

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
    for way in ("forward", "backward"):
        found[f"packed_{way}"] = _block_sparse(way, tile)
    return found


def _block_sparse(way, sizes):
    """Packed rows under a causal mask, heads in groups of four."""
    from pallas_kernels.block_sparse_attention import tpu, tpu_backward

    sizes, key_heads, heads, width, time = sizes or (512, 512), 4, 16, 128, 2048
    walk = _causal_walk(time, sizes)
    turned = _causal_walk(time, sizes, turned=True)
    options = dict(sizes=sizes, scale=width**-0.5, visible=_packed)

    def run(q, k, v, ids, lse, dy, delta):
        q, dy = (x.reshape(BATCH, time, heads, width) for x in (q, dy))
        k, v = (x.reshape(BATCH, time, key_heads, width) for x in (k, v))
        data = dict(q_data={"ids": ids}, k_data={"key_ids": ids})
        if way == "forward":
            return tpu.forward(q, k, v, walk, **options, **data)
        return tpu_backward.backward(q, k, v, lse, dy, delta, walk, turned, **options, **data)

    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((BATCH, *shape), dtype)
    q, k = array(time, heads * width), array(time, key_heads * width)
    row = array(heads, time, dtype=jnp.float32)
    return run, (q, k, k, array(time, dtype=jnp.int32), row, q, row)


def _packed(i, j, values):
    return (j <= i) & (values["ids"] == values["key_ids"]) & (values["ids"] != 0)


def _causal_walk(time, sizes, turned=False):
    """Begin, count, other and full of the lists of a causal mask, or transposed; none is full, as far as is known."""
    rows, columns = (np.arange(0, time, size) for size in sizes)
    live = columns <= rows[:, None] + sizes[0] - 1
    live = live.T if turned else live
    count = live.sum(1, dtype=np.int32)
    other = np.nonzero(live)[1].astype(np.int32)
    return tuple(x[None, None] for x in (np.cumsum(count, dtype=np.int32) - count, count, other, other < 0))


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
