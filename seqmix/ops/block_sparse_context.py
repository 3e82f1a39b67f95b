"""Block-sparse attention with time cut over a mesh: each device works on the lists of its own queries' blocks.

gather   each device gathers all keys and values
ring     the keys of one stretch after another come to the stretches of queries that may see some of them, by the mask:
         a pair of stretches that it leaves empty exchanges nothing. Results over stretches are joined by LSE; the next
         stretch is on its way while one is worked on, and two are held at once (arXiv 2310.01889, but that keys come
         from where they belong). The backward pass lets the keys come again, and sends their gradients home
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.ops import block_lists
from seqmix.ops.block_lists import Walk
from seqmix.ops.block_sparse_chunked import Config, by_block, by_token, chunked, part, part_gradients, row_sums
from seqmix.ops.mask_algebra import EMPTY
from seqmix.ops.mesh import Layout, on_shares
from seqmix.ops.softmax_chunked import joined

FORMS = "ring", "gather"
MOST = 8  # exchanges of a ring that nobody named: each is written out in the program


def choose(lay: Layout | None, mask, time: int, keys: int, sizes, listed: bool, context: str | None) -> str | None:
    """The form of a call: the named one, else a ring where the mask leaves few exchanges, else the gather.

    None without a cut through time, and where lists that are given do not fit the stretches, or keys cannot be cut: XLA
    finds a way then. Raises ValueError, with the reason, where the named form does not fit the call.
    """
    if context not in (None, *FORMS):
        raise ValueError(f"context: expected None or one of {', '.join(FORMS)}, got {context!r}")
    if lay is None or not lay.time:
        return None
    ways, reasons = lay.ways("time"), dict.fromkeys(FORMS)
    if keys % ways:
        reasons = dict.fromkeys(FORMS, f"S={keys} keys are no multiple of the {ways} ways in which time is cut")
    elif listed and time // ways % sizes[0]:
        reasons = dict.fromkeys(
            FORMS, f"stretches of {time // ways} queries are no whole number of blocks of {sizes[0]}"
        )
    elif listed and keys // ways % sizes[1]:
        reasons["ring"] = f"stretches of {keys // ways} keys are no whole number of blocks of {sizes[1]}"
    if context is not None and reasons[context]:
        raise ValueError(f"context: block-sparse attention cannot run {context!r}: {reasons[context]}")
    if context is not None or reasons["gather"]:
        return context
    short = not reasons["ring"] and len(_hops(_table(mask, time, keys, ways))) < min(ways - 1, MOST + 1)
    return "ring" if short else "gather"


def block_sizes(lay: Layout, form: str, time: int, keys: int, sizes) -> tuple[int, int]:
    """The greatest blocks, of at most `sizes`, of which stretches are a whole number, of the keys in a ring alone."""
    ways = lay.ways("time")
    return _size(time // ways, sizes[0]), _size(keys // ways, sizes[1]) if form == "ring" else sizes[1]


def _size(stretch, size):
    return next(n for n in range(min(size, stretch), 0, -1) if stretch % n == 0)


def _table(mask, time, keys, ways):
    """Which stretches of keys a stretch of queries may see, [ways, ways], by the mask without its data."""
    if mask is None:
        return np.ones((ways, ways), bool)
    return mask.tiles(time // ways, keys // ways, time, keys) != EMPTY


def _hops(table):
    """Pairs (stretch of keys, stretch of queries) that exchange, {offset of the one from the other: pairs}."""
    ways = len(table)
    pairs = {n: tuple((j, (j + n) % ways) for j in range(ways) if table[(j + n) % ways, j]) for n in range(1, ways)}
    return tuple((offset, found) for offset, found in pairs.items() if found)


class Travel(NamedTuple):
    """How keys reach queries: the static half of `_travelled`."""

    config: Config
    axis: tuple[str, ...]
    hops: tuple  # (offset, pairs) of each exchange


def run(lay: Layout, form: str, config: Config, q, k, v, slopes, data, lists, sizes):
    """`chunked` on each device's share. Stretches are whole numbers of blocks; in a ring lists are ascending."""
    if isinstance(lists.full, np.ndarray):
        config = config._replace(full=bool(lists.full.any()))
    batch, heads, ways = q.shape[0], k.shape[2], lay.ways("time")
    travel = Travel(config, lay.time, _hops(_table(config.mask, config.time, config.keys, ways)))
    cut = {"queries": "time", "keys": "time" if form == "ring" else None}
    data_names = {n: ("batch" if len(x) == batch else None, cut[config.mask.inputs[n]]) for n, x in data.items()}
    lead = ("batch" if len(lists.index) == batch else None), ("key_heads" if lists.index.shape[1] == heads else None)

    def local(q, k, v, slopes, data, lists):
        k, v = (lay.local_key_heads(x, heads) for x in (k, v))
        if lead[1]:
            lists = jax.tree.map(lambda x: lay.local_key_heads(x, heads, axis=1), lists)
        first = jax.lax.axis_index(lay.time) * lists.index.shape[2]
        if form == "gather":
            return chunked(config, q, *(gathered(lay.time, x) for x in (k, v)), slopes, data, lists, sizes, first)
        walks = block_lists.forward(lists), block_lists.transposed(lists, config.keys // sizes[1])
        call = by_block(config, q, k, v, slopes, data, walks, sizes, (first, 0))
        return by_token(*_travelled(travel, *call[1:-1]), q.shape[1])

    queries, keys = ("batch", "time", "heads", None), ("batch", "time", "key_heads", None)
    names = queries, keys, keys, ("heads",), data_names, type(lists)(*((*lead, "time", None),) * 2)
    lists = jax.tree.map(jnp.asarray, lists)
    return on_shares(lay, local, (q, k, v, slopes, data, lists), names, (queries, ("batch", "heads", "time")))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _travelled(travel, q, k, v, slopes, values, walks):
    """(y in v.dtype, lse) by block, of this device's queries over the keys of all; walks are over those of all too."""

    def work(offset, mine, block, found):
        q, slopes, of_queries, walks = mine
        k, v, of_keys = block
        here, first = _at(travel, offset, walks, q.shape[2], k.shape[2])
        values = {"queries": of_queries, "keys": of_keys}
        call = travel.config, q, k, v, slopes, values, here[0], first, _acc(q, k, v)
        if found is None:
            return part(*call)
        return jax.lax.cond(jnp.any(here[0].count > 0), lambda f: joined(f, part(*call)), lambda f: f, found)

    y, lse = _visited(travel, (q, slopes, values["queries"], walks), (k, v, values["keys"]), work)
    return y.astype(v.dtype), lse


def _acc(*arrays):
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _visited(travel, mine, own, work):
    """work(offset, mine, block, what was found before) of this device's own block, and of each that comes."""
    found, block = work(0, mine, own, None), _sent(travel, own, travel.hops[0][1]) if travel.hops else None
    for (offset, _), (_, pairs) in zip(travel.hops, (*travel.hops[1:], (0, ()))):
        # The next block is sent while this one is worked on, not before: else all stretches might be held at once.
        own, mine, found = jax.lax.optimization_barrier((own, mine, found))
        coming = _sent(travel, own, pairs) if pairs else None
        found, block = work(offset, mine, block, found), coming
    return found


def _unless_empty(walks, work, otherwise):
    """work(), or arrays like its results filled with these numbers where no list has an entry.

    As a branch it keeps to itself the zeros that its loops start from: XLA would make those of all visits at once.
    """
    shapes = jax.eval_shape(work)
    fill = lambda: tuple(None if s is None else jnp.full(s.shape, x, s.dtype) for s, x in zip(shapes, otherwise))
    return jax.lax.cond(jnp.any(walks[0].count > 0), lambda: tuple(work()), fill)


def _sent(travel, tree, pairs):
    return jax.tree.map(lambda x: jax.lax.ppermute(x, travel.axis, pairs), tree)


def _at(travel, offset, walks, rows, columns):
    """(the walks among the keys that come from `offset` before, the first blocks of queries and of these keys)."""
    ways, rank = jax.lax.axis_size(travel.axis), jax.lax.axis_index(travel.axis)
    low = (rank - offset) % ways * columns
    there, back = walks
    index = there.other.reshape(*there.begin.shape, -1)
    index = jnp.where(index < 0, index.dtype.type(np.iinfo(index.dtype).max), index)
    before, count = (jnp.sum(index < end, axis=-1, dtype=jnp.int32) for end in (low, low + columns))
    there = Walk(there.begin + before, count - before, there.other - low, there.full)
    begin, count = (jax.lax.dynamic_slice_in_dim(x, low, columns, axis=2) for x in (back.begin, back.count))
    return (there, Walk(begin, count, back.other, back.full)), (rank * rows, low)


def _forward(travel, q, k, v, slopes, values, walks):
    y, lse = _travelled(travel, q, k, v, slopes, values, walks)
    return (y, lse), (q, k, v, slopes, values, walks, y, lse)


def _backward(travel, saved, cotangents):
    q, k, v, slopes, values, walks, y, lse = saved
    sums, acc, pairs = row_sums(y, lse, *cotangents), lse.dtype, dict(travel.hops)
    (k, v), sums = jax.lax.optimization_barrier(((k, v), sums))  # else the first keys to come were kept since then

    def work(offset, mine, block, found):
        q, slopes, of_queries, walks, sums = mine
        k, v, of_keys = block
        here, first = _at(travel, offset, walks, q.shape[2], k.shape[2])
        values = {"queries": of_queries, "keys": of_keys}
        call = travel.config, q, k, v, slopes, values, here, first, sums, (acc,) * 3
        dq, *of_block, dslopes = _unless_empty(here, lambda: part_gradients(*call), (0, 0, 0, 0))
        if offset:
            of_block = _sent(travel, of_block, [pair[::-1] for pair in pairs[offset]])
        new = dq, *of_block, dslopes
        return new if found is None else jax.tree.map(jnp.add, found, new)

    mine, own = (q, slopes, values["queries"], walks, sums), (k, v, values["keys"])
    *grads, dslopes = _visited(travel, mine, own, work)
    return *(d.astype(x.dtype) for d, x in zip(grads, (q, k, v), strict=True)), dslopes, None, None


_travelled.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def gathered(axis, x):
    """All stretches of x [B, S, ...]; gradients are summed in float32 at least."""
    return jax.lax.all_gather(x, axis, axis=1, tiled=True)


def _gathered_forward(axis, x):
    return gathered(axis, x), None


def _gathered_backward(axis, _, dx):
    acc = jnp.promote_types(dx.dtype, jnp.float32)
    return (jax.lax.psum_scatter(dx.astype(acc), axis, scatter_dimension=1, tiled=True).astype(dx.dtype),)


gathered.defvjp(_gathered_forward, _gathered_backward)


def block_sparse_bytes(
    form: str,
    ways: int,
    batch: int,
    time: int,
    key_heads: int,
    key_dim: int,
    value_dim: int,
    *,
    mask,
    keys: int | None = None,
    itemsize: int = 2,
) -> tuple[int, int]:
    """Bytes that a device sends for one call, (forward, backward), on average over the devices.

    batch and key_heads are those of a device; time and keys (None: time) are cut in `ways`. itemsize: of k and v.
    Data of keys, which a ring sends along, is counted as [batch, S] int32; a gather takes it as whole already.
    """
    keys = time if keys is None else keys
    stretch = batch * (keys // ways)
    block, acc = stretch * key_heads * (key_dim + value_dim), max(itemsize, 4)
    if form == "gather":
        return (ways - 1) * itemsize * block, (ways - 1) * acc * block
    pairs = sum(len(found) for _, found in _hops(_table(mask, time, keys, ways)))
    there = itemsize * block + 4 * stretch * sum(side == "keys" for side in mask.inputs.values())
    return pairs * there // ways, pairs * (there + acc * block) // ways
