"""Block-sparse attention through the kernels of `pallas_kernels`: when they can run, and their gradient.

The targets are "gpu", for Hopper, and "tpu". Residuals are q, k, v, y and lse, so that forward and backward need not be
of one implementation: the chunked form makes the gradients that the backward kernels do not.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.core import sharding
from seqmix.ops import block_halves, block_lists, block_sparse_chunked, block_sparse_sizes, targets
from seqmix.ops.mask_algebra import Mask
from seqmix.ops.masks import Sinks
from seqmix.ops.mesh import on_shares

TARGETS = "gpu", "tpu"
BLOCKS = 64, 128


class Call(NamedTuple):
    """The static half of a call."""

    scale: float
    soft_cap: float | None
    mask: Mask | None  # of lists and of the chunked form
    seen: Mask | None  # of the kernel: None where all listed tiles are full
    sizes: tuple[int, int]
    lengths: tuple[int, int]
    full: bool
    target: str = "gpu"
    steps: tuple[int, int] | None = None  # of the TPU kernels, at most, over lists and transposed ones


def block_sizes(sizes, listed: bool) -> tuple[int, int]:
    """Sizes of the Hopper kernels' blocks: those of a call that lists blocks, else 128, and 64 keys if it says so."""
    return tuple(sizes) if listed else (128, 64 if sizes[1] == 64 else 128)


def reasons(implementation, lay, q, k, v, *, mask, data, sizes, blocks=None, scale, cut=False) -> tuple[dict, dict]:
    """({target: why its kernels cannot run this call here, or None}, {target: sizes of their blocks}).

    sizes and blocks are those of the call. With implementation None the TPU's are left out, which never ran on one.
    """
    found, chosen = dict.fromkeys(TARGETS, "was not asked for"), {}
    lengths = q.shape[1], k.shape[1]
    if implementation is None:
        found["tpu"] = "has never run on a TPU, only if named"
    if implementation in (None, "gpu"):
        chosen["gpu"] = block_sizes(sizes, blocks is not None)
        options = dict(mask=mask, data=data, scale=scale, cut=cut)
        found["gpu"] = reason(lay, q, k, v, sizes=chosen["gpu"], **options)
    elif implementation == "tpu":
        chosen["tpu"] = block_sparse_sizes.choose(mask, *lengths) if blocks is None else tuple(sizes)
        listed = block_lists.of_mask(mask, chosen["tpu"], *lengths) if blocks is None else blocks
        options = dict(mask=mask, data=data, scale=scale, cut=cut, target="tpu", entries=math.prod(listed.shape[1:]))
        found["tpu"] = reason(lay, q, k, v, sizes=chosen["tpu"], **options)
    return found, chosen


def reason(lay, q, k, v, *, mask, data, sizes, scale, cut=False, target="gpu", **options) -> str | None:
    """Why a target's kernels cannot run this call here, in a few words; None if they can. sizes: of their blocks.

    cut: they are to run on stretches of time where the mesh cuts it. options: of their own `supports`.
    """
    call = dict(mask=mask, data=data, sizes=sizes, scale=scale, target=target, **options)
    if lay is None:
        return _unsupported(q, k, v, **call)
    if lay.time and not (cut and target == "gpu"):
        return "has no form for time cut over a mesh"
    queries, keys = ("batch", "time", "heads", None), ("batch", "time", "key_heads", None)
    with sharding.shares(lay.mesh):
        local = [lay.share(x, *names) for x, names in ((q, queries), (k, keys), (v, keys))]
        return _unsupported(*local, **call)


def _unsupported(q, k, v, mask, data, sizes, scale, target, **options):
    found = targets.unsupported(target, q.shape[1])
    if found is not None:
        return found
    if target == "gpu":
        options["capability"] = targets.capability()
    if mask is not None and not block_sparse_sizes.whole(mask, sizes, q.shape[1], k.shape[1]):
        sides = _sides(mask, data)
        options |= {"visible": mask.visible, "q_data": sides[0], "k_data": sides[1]}
    return _modules(target)[0].supports(q, k, v, sizes, scale=scale, **options)


def _modules(target):
    """A target's modules: what says whether it runs, and its forward and backward kernels."""
    if target == "tpu":
        from pallas_kernels.block_sparse_attention import tpu, tpu_backward

        return tpu, tpu, tpu_backward
    from pallas_kernels.block_sparse_attention import gpu, gpu_backward, plan

    return plan, gpu, gpu_backward


def _sides(mask, data):
    """The data of queries, and of keys."""
    sides = {} if mask is None else mask.inputs
    return [{name: x for name, x in data.items() if sides[name] == side} for side in ("queries", "keys")]


def run(lay, config, q, k, v, slopes, data, lists, sizes, target="gpu", index=None):
    """(y [B, T, H, V], lse [B, H, T]) of a call that there is no reason against; as `block_sparse_chunked.chunked`.

    index: that of which the lists are what the data leaves.
    """
    steps = block_sparse_sizes.steps(index, -(-k.shape[1] // sizes[1])) if target == "tpu" else None
    if lay is None:
        return _local(config, q, k, v, slopes, data, lists, sizes, target, steps)
    batch, heads = q.shape[0], k.shape[2]
    data_names = {name: ("batch" if len(x) == batch else None, None) for name, x in data.items()}
    lead = ("batch" if len(lists.index) == batch else None), ("key_heads" if lists.index.shape[1] == heads else None)

    def local(q, k, v, slopes, data, given):
        k, v = (lay.local_key_heads(x, heads) for x in (k, v))
        if given is not None and lead[1]:
            given = jax.tree.map(lambda x: lay.local_key_heads(x, heads, axis=1), given)
        return _local(config, q, k, v, slopes, data, lists if given is None else given, sizes, target, steps)

    queries, keys = ("batch", None, "heads", None), ("batch", None, "key_heads", None)
    names = queries, keys, keys, ("heads",), data_names, type(lists)(*((*lead, None, None),) * 2)
    known = isinstance(lists.index, np.ndarray) and lists.index.shape[:2] == (1, 1)
    arrays = q, k, v, slopes, data, None if known else jax.tree.map(jnp.asarray, lists)
    return on_shares(lay, local, arrays, names, (queries, ("batch", "heads", None)))


def _local(config, q, k, v, slopes, data, lists, sizes, target, steps):
    """The call on one device."""
    call, walks = _prepared(config, lists, sizes, target, steps)
    order = _modules(target)[1].listed(q, k, walks[0], sizes) if target == "gpu" else None
    return _attend(call, q, k, v, slopes, data, (*walks, order))


def gradients(config, q, k, v, data, lists, sizes, lse, delta, dy):
    """Those of q, k and v of `run` on one device; lse [B, H, T] and delta as in `visit_back`."""
    call, walks = _prepared(config, lists, sizes)
    return _by_kernel(call, q, k, v, data, walks, _rows(call, lse, delta), dy)


def row_sums(name, y, dy, lse, dlse, *, by_head=False):
    """`plan.rows` of y, dy [B, T, H, V] and lse, dlse [B, H, T], for gradients by an implementation of this name.

    For "gpu" a kernel makes them, up to a whole tile of T, and of y and dy by heads too.
    """
    from pallas_kernels.block_sparse_attention import plan, rows_gpu

    if name != "gpu":
        return plan.rows(lse, jnp.einsum("bthv,bthv->bht", dy, y, preferred_element_type=lse.dtype) - dlse)
    y, dy = (_filled(x, rows_gpu.ROWS, 1 + by_head) for x in (y, dy))
    lse, dlse = (_filled(x, rows_gpu.ROWS, 2, value) for x, value in ((lse, jnp.inf), (dlse, 0)))
    return rows_gpu.rows(y, dy, lse, dlse, by_head=by_head)


def _rows(call, lse, delta):
    """`plan.rows` of whole blocks; rows that fill them up have weights 0, as those that see nothing."""
    from pallas_kernels.block_sparse_attention import plan

    return plan.rows(_filled(lse, call.sizes[0], 2, jnp.inf), _filled(delta, call.sizes[0], 2))


def _prepared(config, lists, sizes, target="gpu", steps=None):
    """`Call`, and the lists as the kernels walk them."""
    static = isinstance(lists.full, np.ndarray)
    seen = config.mask
    full = bool(lists.full.any()) if static else True
    clear = static and (lists.full | (lists.index < 0)).all()
    if clear or (seen is not None and block_sparse_sizes.whole(seen, sizes, config.time, config.keys)):
        seen = None
    elif config.keys % sizes[1]:  # keys that fill up the last block
        seen = Sinks(config.keys) if seen is None else seen & Sinks(config.keys)
    lengths = config.time, config.keys
    call = Call(config.scale, config.soft_cap, config.mask, seen, sizes, lengths, full, target, steps)
    transposed = block_lists.turned if target == "gpu" else block_lists.transposed
    walks = block_lists.forward(lists), transposed(lists, -(-config.keys // sizes[1]))
    known = None
    if static and seen is not None and target == "gpu":
        known = block_halves.halves(config.mask, lists, walks[0], sizes, *lengths)
    return call, (*walks, known)


def visit(scale, soft_cap, mask, data, q, k, v):
    """(y [B, H, T, V], lse [B, H, T]) of q [B, H, T, K] over k [B, Hk, S, K] and v; by heads, without a gradient.

    data: of a mask that says all by it: q, k and v are stretches, whose indices mean nothing.
    """
    from pallas_kernels.block_sparse_attention import gpu

    call, lists = _visited(scale, soft_cap, mask, data, q, k)
    q, k, v = (_filled(x, size, 2) for x, size in ((q, call.sizes[0]), (k, call.sizes[1]), (v, call.sizes[1])))
    y, lse = gpu.forward(q, k, v, block_lists.forward(lists), by_head=True, **_options(call, data))
    return y[:, :, : call.lengths[0]], lse[:, :, : call.lengths[0]]


def visit_back(scale, soft_cap, mask, data, q, k, v, lse, dy, delta):
    """Gradients of q, k and v of a `visit` from each other, where lse [B, H, T] may be over more keys.

    dy: [B, H, T, V] is that of the sum over all keys; delta: [B, H, T], the sums over channels of dy y, less lse's.
    """
    call, lists = _visited(scale, soft_cap, mask, data, q, k)
    walks = block_lists.forward(lists), block_lists.turned(lists, -(-k.shape[2] // call.sizes[1]))
    q, k, v, dy = (jnp.moveaxis(x, 1, 2) for x in (q, k, v, dy))
    gradients = _by_kernel(call, q, k, v, data, walks, _rows(call, lse, delta), dy)
    return tuple(jnp.moveaxis(x, 2, 1) for x in gradients)


def _visited(scale, soft_cap, mask, data, q, k):
    """`Call` and lists of a visit."""
    sizes, time, keys = (128, 128), q.shape[2], k.shape[2]
    index = block_lists.of_mask(mask, sizes, time, keys)
    if index.shape[3] == -(-keys // sizes[1]) and (index >= 0).all():
        # Every tile may hold a visible pair: an iota, where the array would be a constant of the program.
        index = jnp.broadcast_to(jnp.arange(index.shape[3], dtype=jnp.int32), index.shape)
    lists = block_lists.lists(mask, index, sizes, time, keys, data)
    seen = mask & Sinks(keys) if keys % sizes[1] else mask
    return Call(scale, soft_cap, mask, seen, sizes, (time, keys), True), lists


def _options(call, data):
    """What both kernels take by name, the data filled up."""
    given = [{n: _filled(x, size) for n, x in x.items()} for x, size in zip(_sides(call.mask, data), call.sizes)]
    if call.seen is None:
        given = {}, {}
    visible = None if call.seen is None else call.seen.visible
    options = {"sizes": call.sizes, "visible": visible, "q_data": given[0], "k_data": given[1]}
    if call.target == "tpu":
        options["steps"] = call.steps
    return options | {"scale": call.scale, "soft_cap": call.soft_cap}


def _filled(x, size, axis=1, value=0):
    """x up to whole blocks."""
    width = [(0, -x.shape[axis] % size if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, width, constant_values=value) if width[axis][1] else x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call, q, k, v, slopes, data, walks):
    time = q.shape[1]
    bq, bk = call.sizes
    options = _options(call, data) | {"slopes": slopes}
    if isinstance(walks[2], block_halves.Halves):
        options["own"] = walks[2].own
    if walks[3] is not None:
        options["order"] = walks[3]
    y, lse = _modules(call.target)[1].forward(_filled(q, bq), _filled(k, bk), _filled(v, bk), walks[0], **options)
    return y[:, :time], lse[:, :, :time]


def _attend_forward(call, q, k, v, slopes, data, walks):
    y, lse = _attend(call, q, k, v, slopes, data, walks)
    return (y, lse), (q, k, v, slopes, data, walks, y, lse)


def _attend_backward(call, saved, cotangents):
    q, k, v, slopes, data, walks, y, lse = saved
    dy, dlse = cotangents
    if slopes is None:
        y, dy = (_filled(x, call.sizes[0]) for x in (y, dy))
        lse, dlse = (_filled(x, call.sizes[0], 2, value) for x, value in ((lse, jnp.inf), (dlse, 0)))
        rows = (y, lse, dlse) if call.target == "gpu" else row_sums(call.target, y, dy, lse, dlse)
        return (*_by_kernel(call, q, k, v, data, walks, rows, dy), None, None, None)
    config = block_sparse_chunked.Config(call.scale, call.soft_cap, call.mask, *call.lengths, call.full)
    call = (config, q, k, v, slopes, data, walks[:2], call.sizes)
    return (*block_sparse_chunked.gradients(*call, y, lse, dy, dlse), None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _by_kernel(call, q, k, v, data, walks, rows, dy):
    """Gradients of q, k and v by the backward kernels; rows, as these take them, are of whole blocks of queries."""
    time, keys = q.shape[1], k.shape[1]
    bq, bk = call.sizes
    options, (walk, turned, *more) = _options(call, data), walks
    known = more[0] if more else None
    if known is not None:
        walk = walk if known.marks is None else walk._replace(full=known.marks)
        turned, options["turned_queries"] = known.turned, block_halves.HALF
    arrays = _filled(q, bq), _filled(k, bk), _filled(v, bk), rows, _filled(dy, bq)
    dq, dk, dv = _modules(call.target)[2].backward(*arrays, walk, turned, **options)
    return dq[:, :time], dk[:, :keys], dv[:, :keys]
