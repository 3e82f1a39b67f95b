"""Block-sparse attention with time cut over a mesh: each device gathers the keys, and works on its queries' lists."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.ops.block_sparse_chunked import Config, chunked
from seqmix.ops.mesh import Layout, on_shares


def row_size(lay: Layout, time: int, size: int) -> int:
    """The greatest block of queries, of at most `size`, of which a stretch of time is a whole number."""
    stretch = time // lay.ways("time")
    return next(n for n in range(min(size, stretch), 0, -1) if stretch % n == 0)


def run(lay: Layout, config: Config, q, k, v, slopes, data, lists, sizes):
    """`chunked` on each device's share; a stretch of time is a whole number of blocks of queries."""
    if isinstance(lists.full, np.ndarray):
        config = config._replace(full=bool(lists.full.any()))
    batch, heads = q.shape[0], k.shape[2]
    side = lambda name: "time" if config.mask.inputs[name] == "queries" else None
    data_names = {name: ("batch" if len(x) == batch else None, side(name)) for name, x in data.items()}
    lead = ("batch" if len(lists.index) == batch else None), ("key_heads" if lists.index.shape[1] == heads else None)

    def local(q, k, v, slopes, data, lists):
        k, v = (_gathered(lay.time, lay.local_key_heads(x, heads)) for x in (k, v))
        if lead[1]:
            lists = jax.tree.map(lambda x: lay.local_key_heads(x, heads, axis=1), lists)
        first = jax.lax.axis_index(lay.time) * lists.index.shape[2]
        return chunked(config, q, k, v, slopes, data, lists, sizes, first)

    queries, keys = ("batch", "time", "heads", None), ("batch", "time", "key_heads", None)
    names = queries, keys, keys, ("heads",), data_names, type(lists)(*((*lead, "time", None),) * 2)
    lists = jax.tree.map(jnp.asarray, lists)
    return on_shares(lay, local, (q, k, v, slopes, data, lists), names, (queries, ("batch", "heads", "time")))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gathered(axis, x):
    """All stretches of x [B, S, ...]; gradients are summed in float32 at least."""
    return jax.lax.all_gather(x, axis, axis=1, tiled=True)


def _gathered_forward(axis, x):
    return _gathered(axis, x), None


def _gathered_backward(axis, _, dx):
    acc = jnp.promote_types(dx.dtype, jnp.float32)
    return (jax.lax.psum_scatter(dx.astype(acc), axis, scatter_dimension=1, tiled=True).astype(dx.dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)
