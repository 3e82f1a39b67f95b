"""Chunks of a fixed number of tokens, counted from the start of each segment: segments may start anywhere."""

import jax.numpy as jnp

from seqmix.core import packing
from seqmix.parts.qkv import places


def token_places(x, segment_ids=None, length=None):
    """Segments (`packing.runs`) and positions in them, [B, T] each, and the rows' length [B] after the tokens.

    x [B, T, D]; without ids all tokens are of one segment. A row's first segment goes on from `length` [B]; without it
    rows start at 0 and the length returned is None.
    """
    ones = jnp.ones(x.shape[:2], jnp.int32)
    runs = ones if segment_ids is None else packing.runs(segment_ids)
    place, after = places(x, segment_ids, length=length)
    return runs, jnp.broadcast_to(place, runs.shape), after


def chunk_ids(runs, place, chunk: int):
    """Segment ids [B, T] by which each chunk is a segment, from `token_places`.

    They count from 2 in a row; 1 is a chunk that began before the row, so that it is there only where one goes on.
    0 is padding.
    """
    opened = (runs != 0) & (place % chunk == 0)
    return jnp.where(runs != 0, 1 + jnp.cumsum(opened, axis=1, dtype=jnp.int32), 0)
