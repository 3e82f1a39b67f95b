"""Short convolutions with time cut over a mesh: the few tokens before each stretch come from the stretches before."""

import jax
import jax.numpy as jnp

from seqmix.ops.mesh import on_shares


def run(lay, op, last_tokens, x, weight, bias, state, runs):
    """(y, last) of `short_conv` of one array, with `op`, itself, on each device's stretch of time.

    `last_tokens` is its function of that name; the axis of x after time is cut as heads are. Each device gathers the
    last W - 1 tokens of every stretch's last segment: a neighbour's are not enough where stretches are short or padded.
    """
    halo = len(weight) - 1
    channels = ("heads", *[None] * x.ndim)[: x.ndim - 2]

    def local(x, weight, bias, state, runs):
        tokens, ids = _gathered(lay.time, last_tokens, x, len(weight), runs)
        before = jnp.where(jnp.arange(ids.shape[0])[:, None, None] < jax.lax.axis_index(lay.time), ids, 0)
        flat = lambda a: jnp.moveaxis(a, 0, 1).reshape(x.shape[0], -1, *a.shape[3:])
        entering, entering_ids = _latest(last_tokens, flat(tokens), flat(before), len(weight), state)
        whole = jnp.concatenate([entering.astype(x.dtype), x], 1)
        whole_ids = None if runs is None else jnp.concatenate([entering_ids.astype(runs.dtype), runs], 1)
        y = op(whole, weight, bias, segment_ids=whole_ids)[0][:, halo:]
        last = _latest(last_tokens, flat(tokens), flat(ids), len(weight), state)[0]
        return y, last.astype(x.dtype if state is None else state.dtype)

    tokens, states = ("batch", "time", *channels), ("batch", None, *channels)
    names = (tokens, (None, *channels), channels, states, ("batch", "time"))
    return on_shares(lay, local, (x, weight, bias, state, runs), names, (tokens, states))


def _gathered(axis, last_tokens, x, width, runs):
    """The last tokens of every stretch [P, B, W-1, ...] and the segments they are of, 0 where there are none."""
    batch, time = x.shape[:2]
    if runs is None:
        last, count = jnp.ones((batch, 1), jnp.int32), jnp.full((batch, 1), time)
    else:
        last = jnp.max(runs, 1, keepdims=True)
        count = jnp.sum((runs == last) & (runs != 0), 1, keepdims=True)
    ids = jnp.where(jnp.arange(width - 1) >= width - 1 - count, last, 0)
    return jax.lax.all_gather((last_tokens(x, width, None, runs), ids), axis)


def _latest(last_tokens, tokens, ids, width, state):
    """The last W - 1 of these tokens' last segment, after `state` where that is the row's first, and their ids."""
    last = jnp.max(ids, 1, keepdims=True)
    count = jnp.sum((ids == last) & (ids != 0), 1, keepdims=True)
    if state is not None:  # it is of segment 1
        first = last <= 1
        state = jnp.where(first.reshape(-1, *[1] * (state.ndim - 1)), state, 0)
        count, last = jnp.where(first, count + width - 1, count), jnp.maximum(last, 1)
    kept = last_tokens(tokens, width, state, ids)
    return kept, jnp.where(jnp.arange(width - 1) >= width - 1 - count, last, 0)
