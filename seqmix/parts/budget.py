"""Taking tokens while a budget lasts: causal, exact in any split, in parallel over time."""

import jax
import jax.numpy as jnp

from seqmix.core import packing

FAR = 1 << 29  # more tokens than there are


def take(ready, limit, runs, count=None):
    """Which of the tokens that are `ready` [B, T, H] are taken: those that find fewer than `limit` taken before them.

        c_t = c_{t-1} + taken_t,    taken_t = ready_t and c_{t-1} < limit_t

    c starts at `count` [B, H] in the first of the segments `runs` [B, T] (`packing.runs`), and at 0 in the others.
    limit [B, T, H] does not fall within a segment and is not below `count`. Padding takes no token.
    """
    opens, real = packing.starts(runs)[..., None], (runs != 0)[..., None]
    ready = ready & real
    # As the limit does not fall, c goes to min(c + ready, limit): functions min(c + a, b) are closed under composition.
    grow = jnp.where(opens, FAR, ready.astype(jnp.int32))
    most = jnp.where(real, jnp.where(opens, jnp.minimum(ready, limit), limit), FAR)

    def join(first, second):
        (a, b), (c, d) = first, second
        return jnp.minimum(a + c, FAR), jnp.minimum(b + c, d)

    grow, most = jax.lax.associative_scan(join, (grow, most), axis=1)
    count = jnp.zeros_like(grow[:, 0]) if count is None else count
    after = jnp.minimum(count[:, None] + grow, most)
    before = jnp.where(opens, 0, jnp.concatenate([count[:, None], after[:, :-1]], axis=1))
    return ready & (before < limit)
