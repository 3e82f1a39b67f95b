"""Softmax attention with time cut over a mesh: which form a call takes, and the way into and out of it.

ring     keys and values go round (`softmax_ring`), only as far as the mask needs them
zigzag   the same with stretch r holding chunks r and 2R - 1 - r of 2R: causal work is equal on all devices.
         The arrays stay contiguous outside: chunks are exchanged on the way in and out
heads    time and heads change places by all-to-all, each device attends over all of time (arXiv 2309.14509)
gather   each device gathers all keys and values
"""

from functools import partial

import jax
import jax.numpy as jnp

from seqmix.ops import masks, scored, softmax_choice, softmax_library
from seqmix.ops.mesh import Layout, on_shares
from seqmix.ops.parcels import packed, unpacked
from seqmix.ops.softmax_chunked import chunked
from seqmix.ops.softmax_reference import Rules
from seqmix.ops.softmax_ring import Travel, legs, travelled

FORMS = ("ring", "zigzag", "heads", "gather")
GATHER = 2048  # keys up to which they are gathered, where no form is named


def choose(lay: Layout, rules, d, order: str, context: str | None) -> str | None:
    """The form of a call: the named one, or the best. None where keys cannot be cut as the queries are.

    Raises ValueError, with the reason, where the named form does not fit the call.
    """
    ways, heads = lay.ways("time"), d.H // lay.ways("heads")
    counts = [lay.count_key_heads(n) for n in sorted({d.Hk, d.Hv})]
    reasons = dict.fromkeys(FORMS)
    if d.S % ways:
        reasons = dict.fromkeys(FORMS, f"S={d.S} keys are no multiple of the {ways} ways in which time is cut")
    elif heads % ways or any(n % ways and ways % n for n in counts):
        shown = " and ".join(map(str, counts))
        reasons["heads"] = f"{heads} heads and {shown} key heads of a device cannot be divided by {ways} ways"
    if not reasons["zigzag"] and (d.T != d.S or d.T % (2 * ways)):
        reasons["zigzag"] = f"expected T = S a multiple of twice the {ways} ways, {2 * ways}, got T={d.T}, S={d.S}"
    if context is not None:
        if reasons[context]:
            raise ValueError(f"context: attention cannot run {context!r}: {reasons[context]}")
        return context
    if reasons["ring"]:
        return None
    if sum(hops for _, hops in _legs("ring", rules, d.T, d.S, ways, order)) < ways - 1:
        return "ring"
    if d.S <= GATHER:
        return "gather"
    if not reasons["heads"] and not any(n % ways for n in counts):
        return "heads"
    return "zigzag" if rules.causal and not reasons["zigzag"] else "ring"


def _table(rules, time, keys, ways, order):
    """Which stretches of keys a stretch of queries may see, [ways, ways], by what is known of positions (`order`)."""
    mask = ~masks.Sinks(0)
    if rules.causal and order != "given":
        mask &= masks.Causal()
    if rules.window is not None and order == "index":
        mask &= masks.Window(rules.window, rules.causal) | masks.Sinks(rules.sinks)
    return mask.tiles(time // ways, keys // ways, time, keys) != masks.EMPTY


def run(
    lay, form, rules, d, q, k, v, sink_logits, tokens, *, order, block, need_lse, library=None, cudnn=False, values=None
):
    """(y, lse) of `attention`, lse None unless needed, on each device's share; tokens and `order` as of `chunked`.

    library: of `softmax_library`, which then attends over all of time in the form "heads"; or "gpu", for the kernels
    of `block_sparse_attention` in every form. cudnn: as of `Travel`.
    values: what makes those that have no gradients in that form, as of `softmax_choice.for_values`.
    """
    axis = lay.time[0] if len(lay.time) == 1 else lay.time
    around = _legs(form, rules, d.T, d.S, lay.ways("time"), order)
    mask = scored.visibility(rules, None, tokens, "given", None)[0] if library == "gpu" else None
    travel = Travel(rules, axis, around, min(block, _halved(form, d.T // lay.ways("time"))), mask, cudnn)
    q_ids, k_ids, q_at, k_at = tokens
    alike = q_ids is k_ids and q_at is k_at
    q_places, k_places = (jnp.stack(jnp.broadcast_arrays(*x)) for x in ((q_ids, q_at), (k_ids, k_at)))

    def local(q, k, v, sink, q_places, k_places):
        k, v = (lay.local_key_heads(x, d.Hk) for x in (k, v))
        call = _by_heads if form == "heads" else _travelled
        options = dict(zigzag=form == "zigzag")
        if form == "heads":
            options = dict(order=order, block=block, library=library, values=values)
        return call(travel, q, k, v, sink, q_places, k_places, need_lse=need_lse, **options)

    queries, keys = ("batch", "time", "heads", None), ("batch", "time", "key_heads", None)
    places = [(None, "batch" if x.shape[1] == d.B else None, "time") for x in (q_places, k_places)]
    arrays = q, k, v, sink_logits, q_places, None if alike else k_places
    outputs = queries, ("batch", "heads", "time") if need_lse else None
    return on_shares(lay, local, arrays, (queries, keys, keys, ("heads",), *places), outputs)


def _legs(form, rules, time, keys, ways, order):
    """Those of `Travel`."""
    if form in ("gather", "heads"):
        return None
    return legs(_table(rules, time, keys, ways, "given" if form == "zigzag" else order))


def _halved(form, stretch):
    """The longest block: of a zig-zag no more than a chunk, so that its blocks' positions lie together."""
    return stretch // 2 if form == "zigzag" else stretch


def _travelled(travel, q, k, v, sink, q_places, k_places, *, zigzag, need_lse):
    """Keys travel to the queries."""
    if zigzag:
        # Of places [2, B or 1, T] time is in the place of heads.
        places = [x.swapaxes(1, 2) for x in (q_places, k_places) if x is not None]
        q, k, v, *places = _zigzag(travel.axis, [q, k, v, *places])
        q_places, k_places = (places[n].swapaxes(1, 2) if n < len(places) else None for n in range(2))
    b, t, h, _ = q.shape
    groups = k.shape[2]
    q = jnp.moveaxis(q, 1, 2).reshape(b, groups, h // groups, t, -1)
    k, v = (jnp.moveaxis(x, 1, 2) for x in (k, v))
    sink = None if sink is None else sink.reshape(groups, -1)
    y, lse = travelled(travel, q, k, v, sink, q_places, q_places if k_places is None else k_places)
    y, lse = jnp.moveaxis(y.reshape(b, h, t, -1), 2, 1), lse.reshape(b, h, t) if need_lse else None
    if zigzag:
        y, *lses = _zigzag(travel.axis, [y, jnp.swapaxes(lse, 1, 2)] if need_lse else [y], back=True)
        lse = jnp.swapaxes(*lses, 1, 2) if need_lse else None
    return y, lse


def _by_heads(travel, q, k, v, sink, q_places, k_places, *, order, block, need_lse, library, values):
    """Each device attends over all of time with its part of the heads."""
    axis, ways = travel.axis, jax.lax.axis_size(travel.axis)
    # Of fewer heads of keys than devices each device takes the one that its heads read.
    k, v = (jnp.repeat(x, ways // x.shape[2], axis=2) if x.shape[2] % ways else x for x in (k, v))
    turn = lambda x, split, concat: jax.lax.all_to_all(x, axis, split, concat, tiled=True)
    q, k, v = (turn(x, 2, 1) for x in (q, k, v))
    if sink is not None:
        share = sink.shape[0] // ways
        sink = jax.lax.dynamic_slice_in_dim(sink, jax.lax.axis_index(axis) * share, share)
    if order == "index":
        ids = [jnp.ones((1, x.shape[1]), jnp.int32) for x in (q, k)]
        tokens = *ids, *(jnp.arange(x.shape[1])[None] for x in (q, k))
    else:
        q_places = jax.lax.all_gather(q_places, axis, axis=2, tiled=True)
        k_places = q_places if k_places is None else jax.lax.all_gather(k_places, axis, axis=2, tiled=True)
        tokens = q_places[0], k_places[0], q_places[1], k_places[1]
    ours = lambda q, k, v: scored.by_rules(travel.rules, q, k, v, sink, tokens, order, "gpu")
    if library == "gpu":
        y, lse = ours(q, k, v)
        return turn(y, 1, 2), turn(lse, 2, 1) if need_lse else None
    if library is not None:
        ids = tokens[0] if order == "runs" else None
        by = lambda name: partial(softmax_library.on_one, name, travel.rules, ids=ids)
        call = by(library)
        if values is not None:
            alone = (lambda *arrays: ours(*arrays)[0]) if values == "gpu" else by(values)
            call = partial(softmax_choice.either, alone, call)
        return turn(call(q, k, v), 1, 2), None
    y, lse = chunked(travel.rules, q, k, v, sink, *tokens, order=order, block=block)
    return turn(y, 1, 2), turn(lse, 2, 1) if need_lse else None


def _zigzag(axis, arrays, *, back=False):
    """Of stretch r = chunks 2r and 2r + 1 of arrays [., T, ...]: the even and the odd one of chunks r and 2R - 1 - r.

    Chunk c belongs to device c, or 2R - 1 - c from R on: one even and one odd chunk each, held in their order. back:
    the other way.
    """
    return _exchanged((axis, back), arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged(way, arrays):
    axis, back = way
    ways, odd_rank = jax.lax.axis_size(axis), jax.lax.axis_index(axis) % 2 == 1
    # The first chunk of an odd device is its odd one.
    turned = lambda even, odd: (jnp.where(odd_rank, odd, even), jnp.where(odd_rank, even, odd))
    halves = [jnp.split(x, 2, axis=1) for x in arrays]
    sides = zip(*(turned(*pair) if back else pair for pair in halves), strict=True)
    moved = []
    for odd, side in enumerate(sides):
        pairs = [(c // 2, min(c, 2 * ways - 1 - c)) for c in range(odd, 2 * ways, 2)]
        flat = jax.lax.ppermute(packed(side), axis, [pair[::-1] for pair in pairs] if back else pairs)
        moved.append(unpacked(flat, side))
    return [jnp.concatenate(pair if back else turned(*pair), axis=1) for pair in zip(*moved, strict=True)]


def _exchanged_back(way, _, cotangents):
    axis, back = way
    floats = [x for x in cotangents if x.dtype != jax.dtypes.float0]
    found = iter(_exchanged((axis, not back), floats))
    return ([next(found) if x.dtype != jax.dtypes.float0 else x for x in cotangents],)


_exchanged.defvjp(lambda way, arrays: (_exchanged(way, arrays), None), _exchanged_back)


def attention_bytes(
    form: str,
    ways: int,
    batch: int,
    time: int,
    heads: int,
    key_heads: int,
    key_dim: int,
    value_dim: int,
    *,
    keys: int | None = None,
    value_heads: int | None = None,
    itemsize: int = 2,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    packed: bool = False,
    need_lse: bool = False,
) -> tuple[int, int]:
    """Bytes that a device sends for one call of `attention` in this form: (forward, backward).

    batch and heads, those of keys and of values (None: as keys) too, are those of a device; time and keys (None: time)
    are cut in `ways`. itemsize is that
    of q, k and v; packed: segment_ids are given. Of what all gather or scatter, each device sends (ways - 1) /
    ways, and a permutation all of its operand. Gradients of weights, the sink logits above all, are not counted.
    """
    rules, keys = Rules(1.0, causal, window, sinks, None), time if keys is None else keys
    t, s, acc = time // ways, keys // ways, max(itemsize, 4)
    sides = (key_heads, key_dim), (key_heads if value_heads is None else value_heads, value_dim)
    block = batch * s * sum(n * width for n, width in sides)
    rows = 8 * (batch if packed else 1)  # an id and a position, int32
    query, result = batch * t * heads * key_dim, batch * t * heads * value_dim
    lse = acc * batch * t * heads if need_lse else 0
    if form == "gather":
        there = (ways - 1) * (itemsize * block + rows * s)
        return there, there + (ways - 1) * acc * block
    if form == "heads":
        block = batch * s * sum((ways if n % ways else n) * width for n, width in sides)
        turned = (itemsize * (query + block + result) + lse) * (ways - 1) // ways
        places = rows * (t if keys == time else t + s) if packed else 0
        return turned + (ways - 1) * places, turned
    around = _legs(form, rules, time, keys, ways, "runs" if packed else "index")
    hops = sum(hops for _, hops in around)
    there = hops * (itemsize * block + rows * s)
    exchanged = itemsize * (query + block + result) + lse if form == "zigzag" else 0
    places = rows * t if form == "zigzag" else 0
    return there + exchanged + places, there + acc * (hops + len(around)) * block + exchanged
