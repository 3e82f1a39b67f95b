"""A cache of keys and values, a ring buffer with a length per row.

    {"k": [B, slots, Hk, K], "v": [B, slots, Hk, V], "length": [B] int32}

Positions below `sinks` live in the slot of their number, later ones at sinks + (position - sinks) % ring,
where ring = slots - sinks: all sinks are there and the newest `ring` of the others. `length` alone says what
a slot holds, so what an earlier segment left behind needs no clearing.
"""

import jax.numpy as jnp

from seqmix.core import packing
from seqmix.core.shapes import dims


def n_slots(max_len: int, window: int | None = None, sinks: int = 0) -> int:
    """Slots of a row: max_len, or no more than a window and its sinks need."""
    return max_len if window is None else min(max_len, sinks + window)


def init(batch: int, max_len: int, kv_heads: int, key_dim: int, value_dim: int, dtype, window=None, sinks=0):
    """An empty cache for `max_len` tokens a row, of which a window needs the last `window` and `sinks` first.

    A row that grows beyond max_len without a window keeps its newest tokens. Raises ValueError for sizes that
    are not positive.
    """
    sizes = {"batch": batch, "max_len": max_len, "kv_heads": kv_heads}
    sizes |= {"key_dim": key_dim, "value_dim": value_dim, "window": 1 if window is None else window}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: expected a positive integer, got {size}")
    if sinks < 0:
        raise ValueError(f"sinks: expected an integer >= 0, got {sinks}")
    shape = (batch, n_slots(max_len, window, sinks), kv_heads)
    return {
        "k": jnp.zeros((*shape, key_dim), dtype),
        "v": jnp.zeros((*shape, value_dim), dtype),
        "length": jnp.zeros(batch, jnp.int32),
    }


def _ring(slots: int, sinks: int) -> int:
    return max(slots - sinks, 1)  # where sinks fill all slots, positions beyond them fall off the end


def positions(length, slots: int, sinks: int = 0):
    """The position that each slot holds in rows of `length` [B] tokens: [B, slots] int32, -1 where empty."""
    slot = jnp.arange(slots, dtype=jnp.int32)
    last = length[:, None] - 1
    ring = _ring(slots, sinks)
    newest = last - (last - slot) % ring  # the latest position that is the slot's number modulo the ring
    newest = jnp.where(newest >= sinks, newest, -1)
    return jnp.where(slot < sinks, jnp.where(slot <= last, slot, -1), newest)


def append(cache, k, v, run_ids, *, sinks: int = 0):
    """The cache after k [B, T, Hk, K] and v [B, T, Hk, V], of the segments `packing.runs` [B, T].

    A row keeps its last segment alone: the first one goes on where the row stood, any other starts at 0.
    Padding (0) writes nothing, and a row of it is unchanged. Of more tokens than slots the newest stay.
    Writes go to distinct slots, so their order does not matter; differentiable. Raises ValueError for shapes
    that disagree.
    """
    shapes = {"cached_k": "B slots Hk K", "cached_v": "B slots Hk V", "length": "B", "run_ids": "B T"}
    cached = {"cached_k": cache["k"], "cached_v": cache["v"], "length": cache["length"]}
    d = dims(shapes | {"k": "B T Hk K", "v": "B T Hk V"}, **cached, k=k, v=v, run_ids=run_ids)
    last = packing.last_run(run_ids)[:, None]
    place = packing.positions(run_ids, start=cache["length"])
    mine = (run_ids == last) & (run_ids != 0)
    length = jnp.where(last[:, 0] == 0, cache["length"], jnp.max(jnp.where(mine, place + 1, 0), axis=1))
    ring = _ring(d.slots, sinks)
    slot = jnp.where(place < sinks, place, sinks + (place - sinks) % ring)
    # A token that a later one replaces is dropped; each such index is its own, so that all are distinct.
    stays = mine & (slot < d.slots) & ((place < sinks) | (place >= length[:, None] - ring))
    slot = jnp.where(stays, slot, d.slots + jnp.arange(d.T))
    row = jnp.arange(d.B)[:, None]
    written = {
        name: cache[name].at[row, slot].set(x.astype(cache[name].dtype), mode="drop", unique_indices=True)
        for name, x in (("k", k), ("v", v))
    }
    return written | {"length": length}
