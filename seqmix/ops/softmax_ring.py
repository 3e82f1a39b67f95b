"""Softmax attention whose keys are cut over devices: they travel in a ring, or are gathered; inside `shard_map`.

    ring     block by block the keys and values of all stretches come past; (y, lse) of each meets the sum of the
             earlier ones by LSE; block s + 1 is on its way while block s is worked on (arXiv 2310.01889)
    gather   all keys and values come at once; for short sequences

The backward pass keeps what a stretch owns, q, k, v, y and lse, and lets keys and values come past again, or
gathers them again; gradients of keys and values travel in float32 at least, a step behind the keys, and then home.
Where it follows from the order of whole chunks who sees whom, cuDNN may make the gradients of a visit. What goes on to
the next device goes as one array: of several exchanges XLA lets one run beside a kernel, and waits for the others.
A visit works on the pairs of blocks that ids and positions leave: none, where a mask hides a whole stretch. Shapes
are head-major, as in `softmax_chunked`; places [2, B or 1, T] are ids and positions of a stretch.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.ops import block_sparse_kernels, masks, scored
from seqmix.ops.heads import alike
from seqmix.ops.parcels import apart, packed, together, unpacked
from seqmix.ops.softmax_chunked import (
    block_pairs,
    block_sizes,
    joined,
    live_pairs,
    part,
    part_gradients,
    sink_gradient,
    whole,
)
from seqmix.ops.softmax_reference import Rules


class Travel(NamedTuple):
    """How keys reach queries: the static half of `travelled`."""

    rules: Rules
    axis: str | tuple[str, ...]  # mesh axes over which time is cut
    legs: tuple[tuple[int, int], ...] | None  # (direction, number of hops) of each way through the ring; None: gather
    block: int  # as of `attention`
    kernel: masks.Mask | None = None  # what `rules` says of places, where visits go through the Hopper kernel
    cudnn: bool = False  # gradients by cuDNN: every key is seen, or stretches are causal zigzags and places indices


def legs(table: np.ndarray) -> tuple[tuple[int, int], ...]:
    """The ways through the ring by which each stretch of keys j comes to all stretches of queries r with table[r, j].

    Up to the farthest on either side; once around in one direction where that takes no longer.
    """
    queries, keys = np.nonzero(table)
    ranks = len(table)
    after, before = (int(max(0, *x)) if len(x) else 0 for x in (queries - keys, keys - queries))
    if after + before >= ranks:
        after, before = ranks - 1, 0
    return tuple((direction, hops) for direction, hops in ((1, after), (-1, before)) if hops)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def travelled(travel: Travel, q, k, v, sink, q_places, k_places):
    """(y [B, J, R, T, V] in v.dtype, lse [B, J, R, T]) of this device's queries over the keys of all."""
    own = k, v, k_places
    if travel.legs is None:
        y, lse = _visit(travel, q, q_places, _gather(travel.axis, own), sink)
        return y.astype(v.dtype), lse
    found = _visit(travel, q, q_places, own, sink)
    visit = lambda found, block: joined(found, _visit(travel, q, q_places, unpacked(block, own)))
    for direction, hops in travel.legs:
        move = partial(_shift, travel.axis, direction)

        def hop(_, carry, move=move):
            found, block = carry
            later = move(block)
            return visit(found, block), later

        found, block = jax.lax.fori_loop(0, hops - 1, hop, (found, move(packed(own))))
        found = visit(found, block)
    return found[0].astype(v.dtype), found[1]


def _forward(travel, q, k, v, sink, q_places, k_places):
    y, lse = travelled(travel, q, k, v, sink, q_places, k_places)
    return (y, lse), (q, k, v, sink, q_places, k_places, y, lse)


def _backward(travel, saved, cotangents):
    q, k, v, sink, q_places, k_places, y, lse = saved
    dy, dlse = cotangents
    if travel.cudnn and sink is None:
        delta = None
    elif travel.kernel is None:
        delta = jnp.sum(dy.astype(lse.dtype) * y.astype(lse.dtype), axis=-1) - dlse
    else:
        delta = block_sparse_kernels.row_sums("gpu", *map(_flat, (y, dy, lse, dlse)), by_head=True)
        delta = delta[:, :, 1, : q.shape[3]].reshape(lse.shape)
    own, rows = (k, v, k_places), (lse, dy, y if travel.cudnn else delta)
    if travel.legs is None:
        dq, *grads = _visit_back(travel, q, q_places, _gather(travel.axis, own), rows)
        grads = [jax.lax.psum_scatter(g, travel.axis, scatter_dimension=2, tiled=True) for g in grads]
    else:
        dq, grads = _ring_back(travel, q, q_places, own, rows)
    dq, dk, dv = (d.astype(x.dtype) for d, x in zip((dq, *grads), (q, k, v), strict=True))
    return dq, dk, dv, None if sink is None else sink_gradient(sink, lse, delta), None, None


travelled.defvjp(_forward, _backward)


def _ring_back(travel, q, q_places, own, rows):
    """(dq, (dk, dv) of this device's keys), in acc."""
    dq, *grads = _visit_back(travel, q, q_places, own, rows, home=True)
    at_home = together(grads)
    like = [*own, at_home]

    def visit(dq, arrived, parcel):
        dq_part, *part_grads = _visit_back(travel, q, q_places, unpacked(parcel, like)[:-1], rows)
        return dq + dq_part, arrived + together(part_grads)

    for leg, (direction, hops) in enumerate(travel.legs):
        move = partial(_shift, travel.axis, direction)

        def hop(_, carry, move=move):
            dq, parcel = carry
            # The next block and the sums of earlier devices come in while this block is worked on.
            later = move(parcel)
            dq, sums = visit(dq, unpacked(later, like)[-1], parcel)
            sums = packed([sums])
            return dq, jax.lax.dynamic_update_slice_in_dim(later, sums, later.size - sums.size, axis=0)

        carried = at_home if leg == 0 else jnp.zeros_like(at_home)
        parcel = jnp.concatenate([move(packed(own)), packed([carried])])
        dq, parcel = jax.lax.fori_loop(0, hops - 1, hop, (dq, parcel))
        dq, carried = visit(dq, move(unpacked(parcel, like)[-1]), parcel)
        home = _shift(travel.axis, -direction * hops, carried)
        at_home = home if leg == 0 else at_home + home
    return dq, apart(at_home, grads)


def _shift(axis, by, x):
    """What the device `by` places before holds."""
    ranks = jax.lax.axis_size(axis)
    return jax.lax.ppermute(x, axis, [(rank, (rank + by) % ranks) for rank in range(ranks)])


def _gather(axis, block):
    return [jax.lax.all_gather(x, axis, axis=2, tiled=True) for x in block]


def _blocks(travel, q, q_places, block):
    """Sizes of blocks, q and the visiting keys and values in whole blocks, their tokens, and the list of pairs."""
    k, v, k_places = block
    sizes = block_sizes(q.shape[3], k.shape[2], travel.block)
    pairs = block_pairs(travel.rules, q.shape[3], k.shape[2], sizes, "given")
    (q_ids, q_at), (k_ids, k_at) = whole(q_places, sizes[0], 2), whole(k_places, sizes[1], 2)
    tokens = q_ids, k_ids, q_at, k_at
    work = live_pairs(travel.rules, pairs, sizes, tokens)
    return sizes, whole(q, sizes[0], 3), whole(k, sizes[1], 2), whole(v, sizes[1], 2), tokens, work


def _visit(travel, q, q_places, block, sink=None):
    """(y, lse) over a block of keys, in acc."""
    time = q.shape[3]
    if travel.kernel is not None:
        return _visit_by_kernel(travel, q, q_places, block, sink)
    sizes, q, k, v, tokens, work = _blocks(travel, q, q_places, block)
    y, lse = part(travel.rules, sizes, q, k, v, sink, tokens, work)
    return y[:, :, :, :time], lse[:, :, :, :time]


def _visit_by_kernel(travel, q, q_places, block, sink):
    y, lse = block_sparse_kernels.visit(*_by_head(travel, q, q_places, block))
    found = y.reshape(*q.shape[:4], -1).astype(lse.dtype), lse.reshape(q.shape[:4])
    if sink is None:
        return found
    return joined(found, (jnp.zeros_like(found[0]), jnp.broadcast_to(sink.astype(lse.dtype)[:, :, None], q.shape[:4])))


def _by_head(travel, q, q_places, block):
    """The arguments of `block_sparse_kernels.visit`."""
    k, v, k_places = block
    k, v = alike(k, v, axis=1)
    places = q_places[0], k_places[0], q_places[1], k_places[1]
    data = dict(zip(scored.PLACES, places, strict=True))
    return travel.rules.scale, travel.rules.soft_cap, travel.kernel, data, _flat(q), k, v


def _flat(x):
    """[B, J, R, ...] as [B, J R, ...]."""
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _visit_back(travel, q, q_places, block, rows, home=False):
    """Gradients of q and of a block's keys and values from each other, in acc; rows: (lse, dy, delta).

    home: the block is this device's own.
    """
    time, keys = q.shape[3], block[0].shape[2]
    if travel.kernel is not None or travel.cudnn:
        if travel.cudnn:
            found = _by_cudnn(travel, q, q_places, block, rows, home)
        else:
            found = block_sparse_kernels.visit_back(*_by_head(travel, q, q_places, block), *map(_flat, rows))
        dq, dk, dv = (x.astype(rows[0].dtype) for x in found)
        # Heads that were repeated for the kernel are added up.
        dk, dv = (x.reshape(*own.shape[:2], -1, *own.shape[2:]).sum(2) for x, own in zip((dk, dv), block, strict=False))
        return dq.reshape(q.shape), dk, dv
    sizes, q, k, v, tokens, work = _blocks(travel, q, q_places, block)
    lse, dy, delta = (whole(x, sizes[0], 3) for x in rows)
    dq, dk, dv = part_gradients(travel.rules, sizes, q, k, v, tokens, work, lse, dy, delta)
    return dq[:, :, :, :time], dk[:, :, :keys], dv[:, :, :keys]


def _by_cudnn(travel, q, q_places, block, rows, home):
    """What `block_sparse_kernels.visit_back` gives, of rows (lse, dy, y) and without a look at each place.

    Chunks are seen wholly, or causally at home.
    """
    from pallas_kernels import cudnn

    k, v, k_places = block
    own, others = [_flat(x) for x in (q, *rows)], alike(k, v, axis=1)
    scale = travel.rules.scale
    call = lambda own, others, **options: cudnn.gradients(own[0], *others, *own[1:], scale=scale, **options)
    if home or not travel.rules.causal:
        return call(own, others, causal=travel.rules.causal)
    # The later chunk of queries sees the earlier one of all keys. Of keys from before, the earlier queries see them
    # too; of keys from behind, the later queries see the later keys.
    half = q.shape[3] // 2
    at = jnp.where(k_places[1, 0, 0] < q_places[1, 0, 0], 0, half)
    piece = lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, half, axis=2)
    put = lambda x, new, start: jax.lax.dynamic_update_slice_in_dim(x, new, start, axis=2)
    found = [jnp.zeros(x.shape, rows[0].dtype) for x in (own[0], *others)]
    for start, stop in ((half, 0), (at, at)):
        one = call([piece(x, start) for x in own], [piece(x, stop) for x in others])
        places = zip(found, one, (start, stop, stop), strict=True)
        found = [put(total, piece(total, at) + more, at) for total, more, at in places]
    return found
