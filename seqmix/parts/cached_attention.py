"""Causal softmax attention of new tokens to themselves and to a `parts.kv_cache`."""

import jax.numpy as jnp

from seqmix.ops.softmax import attention, merge
from seqmix.parts import kv_cache


def attend(q, k, v, *, segment_ids, runs, place, cache=None, window=None, **options):
    """Mixed values [B, T, H, V] of q [B, T, H, K], k [B, T, Hk, K] and v; without a cache by one call of `attention`.

    runs and place [B, T] are what `parts.chunks.token_places` makes of segment_ids and the cache's length; what is
    cached belongs to the first segment. options: of `attention`.
    """
    options["window"] = window
    if cache is None:
        return attention(q, k, v, segment_ids=segment_ids, **options)
    held = kv_cache.positions(cache["length"], cache["k"].shape[1])
    there = {"segment_ids": runs, "kv_segment_ids": (held >= 0).astype(jnp.int32)}
    old = (cache[name].astype(y.dtype) for name, y in (("k", k), ("v", v)))
    old = attention(q, *old, **there, q_positions=place, kv_positions=held, return_lse=True, **options)
    return merge([old, attention(q, k, v, segment_ids=segment_ids, return_lse=True, **options)])[0]
