"""Log-linear attention with time cut over a mesh: the states of all levels pass from one stretch to the next.

A level's state enters a stretch with what the plain op's would, and is lost where a block of the level begins in it.
"""

import jax
import jax.numpy as jnp

from seqmix.core import packing
from seqmix.ops.context import enter
from seqmix.ops.linear_context import total_decay
from seqmix.ops.log_linear_chunked import places
from seqmix.ops.mesh import on_shares


def run(lay, form, d, q, k, v, beta, log_decay, level_scales, *, state, length, run_ids, **options):
    """(y, state, length) of form(..., state=, length=, run_ids=, **options), `form` on each device's stretch of time.

    The arguments are those of `recurrence` in `ops/log_linear_reference.py`; lay, d: the layout, and the op's sizes by
    letter. A stretch is gone through twice, the first time for its end and what it does to a state: for the delta rule
    that is a matrix a level, found as K more columns of values (`ops/delta_context.py`), else its decay.
    """
    place = places(length, d.T, run_ids)
    lengths = _lengths(lay.ways("time"), place, length, run_ids)

    def local(q, k, v, beta, log_decay, level_scales, state, runs, lengths):
        q, k = (lay.local_key_heads(x, d.Hk) for x in (q, k))
        renumbered = None if runs is None else packing.runs(runs)
        index = jax.lax.axis_index(lay.time)
        before, after = lengths[:, index, 0], lengths[:, index, 1]

        def call(v, state):
            tokens = dict(length=before, run_ids=renumbered)
            return form(q, k, v, beta, log_decay, level_scales, state=state, **tokens, **options)

        if beta is None:
            end = call(v, jnp.zeros_like(state))[1]
            factor = _factor(total_decay(log_decay, v.shape[1], runs, state.dtype), before, after, state)
        else:
            eye = jnp.broadcast_to(jnp.eye(d.K, dtype=state.dtype), (*state.shape[:3], d.K, d.K))
            wide = jnp.pad(v, [(0, 0)] * 3 + [(0, d.K)])
            ends = call(wide, jnp.concatenate([jnp.zeros_like(state), eye], -1))[1]
            end, factor = ends[..., : d.V], ends[..., d.V :]
        entering, state = enter(lay.time, end, factor, _scaled if beta is None else _moved, state, runs)
        return call(v, entering)[0], state

    keys, tokens = ("batch", "time", "key_heads", None), ("batch", "time", "heads", None)
    states = ("batch", "heads", None, None, None)
    names = (keys, keys, tokens, tokens[:3], tokens, tokens, states, ("batch", "time"), ("batch", None, None))
    args = q, k, v, beta, log_decay, level_scales, state, run_ids, lengths
    y, state = on_shares(lay, local, args, names, (tokens, states))
    return y, state, place[:, -1] + 1


def _lengths(ways, place, length, run_ids):
    """The length of each row's segment when it enters a stretch, 0 where the stretch begins with another, and the one
    with which it leaves: [B, ways, 2].
    """
    batch, time = place.shape
    stretches = place.reshape(batch, ways, -1)
    after = stretches[..., -1] + 1
    before = jnp.concatenate([length[:, None], after[:, :-1]], 1)
    if run_ids is not None:
        real = run_ids.reshape(stretches.shape) != 0
        first = jnp.take_along_axis(stretches, jnp.argmax(real, -1)[..., None], -1)[..., 0]
        before = jnp.where(jnp.any(real, -1), first, before)
    return jnp.stack([before, after], -1)


def _factor(total, before, after, state):
    """What a stretch multiplies the levels' states by, [B, H, L, 1 or K, 1]."""
    level = jnp.arange(1, state.shape[2] + 1)
    stays = (before[:, None] - 1) >> level == (after[:, None] - 1) >> level  # [B, L]
    decay = 1 if total is None else jnp.exp(total)[:, :, None, :, None]
    return jnp.where(stays[:, None, :, None, None], decay, jnp.zeros((), state.dtype))


def _scaled(factor, state):
    return factor * state


def _moved(factor, state):
    """The matrices [B, H, L, K, K] times the states, in full precision."""
    return jnp.matmul(factor, state, precision=jax.lax.Precision.HIGHEST)
