"""The best of the scores that each token has for blocks of its past, on Hopper GPUs.

A thread owns a token, keeps its best scores in registers in descending order, and passes once over those of its range:
those that one is greater than move on by a place, so that of equal ones the first stays first.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers

TOKENS = 128  # of a thread block: one a thread
AHEAD = 8  # scores of a token that are read before the first of them is looked at


def best(scores, low, high, *, count):
    """Index [B, h, count, T] int32 of each token's `count` greatest scores [B, h, n, T] float32, the greatest first.

    Of n only those from low to high - 1 count, both [B, T] int32, 0 <= low, high <= n; of equal ones the lower comes
    first; -1 where there are no more. A score that is NaN or -inf is never taken. T is a multiple of 128.
    """
    batch, heads, _, time = scores.shape
    tiles = lambda x: x.reshape(batch, -1, TOKENS)
    empty = tiles(low >= high)
    begin = jnp.min(jnp.where(empty, scores.shape[2], tiles(low)), axis=-1)
    end = jnp.max(jnp.where(empty, 0, tiles(high)), axis=-1)

    def body(scores, low, high, begin, end, index):
        # With causal ranges the last tokens have the most to look at.
        tile = time // TOKENS - 1 - lax.axis_index("tile")
        row, head, tokens = lax.axis_index("row"), lax.axis_index("head"), pl.ds(tile * TOKENS, TOKENS)
        least, past = (registers.load_raw_lanes(x.at[row, tokens]) for x in (low, high))
        first, last = begin[row, tile], end[row, tile]

        def step(n, found):
            places = [first + n * AHEAD + i for i in range(AHEAD)]
            inside = [jnp.minimum(place, last - 1) for place in places]
            given = [registers.load_raw_lanes(scores.at[row, head, place, tokens]) for place in inside]
            for place, score in zip(places, given):
                found = taken(found, jnp.where((place >= least) & (place < past), score, -jnp.inf), place)
            return found

        lanes = lambda value: registers.lanes(TOKENS, value)
        nothing = [lanes(jnp.float32(-jnp.inf)) for _ in range(count)], [lanes(jnp.int32(-1)) for _ in range(count)]
        _, found = lax.fori_loop(0, (jnp.maximum(last - first, 0) + AHEAD - 1) // AHEAD, step, nothing)
        for n, place in enumerate(found):
            index[row, head, n, tokens] = place

    return compat.kernel(
        body,
        grid=(batch, heads, time // TOKENS),
        names=("row", "head", "tile"),
        out=jax.ShapeDtypeStruct((batch, heads, count, time), jnp.int32),
        scratch=[],
        warpgroups=1,
        fetching=False,
        name="best_of_ranges",
        sums_columns=False,
    )(scores, low, high, begin, end)


def taken(found, score, place):
    """(scores, places), each a list in descending order, after one more score of each token."""
    place = registers.lanes(TOKENS, place)
    greater = [score > other for other in found[0]]  # from some place on

    def moved(old, new):
        chosen = [jnp.where(greater[0], new, old[0])]
        for n in range(1, len(old)):
            chosen.append(jnp.where(greater[n], jnp.where(greater[n - 1], old[n - 1], new), old[n]))
        return chosen

    return moved(found[0], score), moved(found[1], place)
