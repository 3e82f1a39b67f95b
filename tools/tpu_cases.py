"""The calls that `tools/tpu_bundles.py` and the tests compile for TPUs: {name: (function, arguments)}.

Arguments lie as the kernels cut them, heads side by side, so that little but the kernel is compiled.
"""

import jax
import jax.numpy as jnp

from seqmix.ops import block_lists, masks

BATCH, TIME, WIDTH = 8, 2048, 4096
SHAPES = {  # Hk, H, K, V
    "ssd": (1, 64, 128, 64),
    "simple_gla": (16, 16, 128, 128),
    "retnet": (8, 8, 256, 512),
    "gla": (16, 16, 128, 128),  # with a decay per channel
}
PACKED = masks.Causal() & masks.Segments()
SPARSE = {  # mask, Hk, H, K and V, soft cap, sizes of blocks: a step of two heads each, which compiles in seconds
    "packed_forward": (PACKED, 1, 2, 128, None, (256, 256)),
    "packed_backward": (PACKED, 1, 2, 128, None, (256, 256)),
    "boxed_backward": (masks.Boxed(masks.Neighbourhood((32, 64), (13, 13)), (8, 16)), 2, 2, 64, 30.0, (128, 128)),
}


def cases(tile=None):
    """Forward and backward of each shape; tile: that of the kernels, None for their choice."""
    found = {}
    for name, shape in SHAPES.items():
        for way in ("forward", "backward"):
            found[f"{name}_{way}"] = _attention(way, *shape, tile, per_channel=name == "gla")
    x = jax.ShapeDtypeStruct((BATCH, TIME, WIDTH), jnp.bfloat16)
    state = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    from pallas_kernels.linear_scan import tpu

    found["scan_forward"] = (lambda *args: tpu.forward(*args, tile=tile)), (x, x, state)
    found["scan_backward"] = (lambda *args: tpu.backward(*args, tile=tile)), (x, x, state, x, state)
    for name, (*given, sizes) in SPARSE.items():
        found[name] = _block_sparse(name.split("_")[1], *given, tile or sizes)
    return found


def _block_sparse(way, mask, key_heads, heads, width, soft_cap, sizes):
    """Attention under a mask."""
    from pallas_kernels.block_sparse_attention import plan, tpu, tpu_backward

    lists = block_lists.lists(mask, block_lists.of_mask(mask, sizes, TIME, TIME), sizes, TIME, TIME, {})
    walks = block_lists.forward(lists), block_lists.transposed(lists, TIME // sizes[1])
    options = dict(sizes=sizes, scale=width**-0.5, visible=mask.visible, soft_cap=soft_cap)

    def run(q, k, v, data, lse, dy, delta):
        q, dy = (x.reshape(BATCH, TIME, heads, width) for x in (q, dy))
        k, v = (x.reshape(BATCH, TIME, key_heads, width) for x in (k, v))
        sides = ({n: x for n, x in data.items() if mask.inputs[n] == side} for side in ("queries", "keys"))
        more = options | dict(zip(("q_data", "k_data"), sides))
        if way == "forward":
            return tpu.forward(q, k, v, walks[0], **more)
        return tpu_backward.backward(q, k, v, plan.rows(lse, delta), dy, *walks, **more)

    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((BATCH, *shape), dtype)
    q, k = array(TIME, heads * width), array(TIME, key_heads * width)
    row = array(heads, TIME, dtype=jnp.float32)
    return run, (q, k, k, {name: array(TIME, dtype=jnp.int32) for name in mask.inputs}, row, q, row)


def _attention(way, key_heads, heads, key, value, tile, per_channel):
    from pallas_kernels.linear_attention import tpu, tpu_backward, tpu_channel, tpu_channel_backward

    forward = (tpu_channel if per_channel else tpu).forward
    backward = (tpu_channel_backward if per_channel else tpu_backward).backward

    def run(q, k, v, log_decay, dy):
        if per_channel:
            log_decay = log_decay.reshape(BATCH, TIME, heads, key)
        q, k = (x.reshape(BATCH, TIME, key_heads, key) for x in (q, k))
        v, dy = (x.reshape(BATCH, TIME, heads, value) for x in (v, dy))
        if way == "forward":
            y, state = forward(q, k, v, log_decay, tile=tile)
            return y.reshape(BATCH, TIME, -1), state
        dq, dk, dv, *rest = backward(q, k, v, log_decay, None, None, None, dy, tile=tile)
        return *(x.reshape(BATCH, TIME, -1) for x in (dq, dk, dv)), *rest

    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct((BATCH, TIME, *shape), dtype)
    q, v = array(key_heads * key), array(heads * value)
    return run, (q, q, v, array(heads * key if per_channel else heads, dtype=jnp.float32), v)
