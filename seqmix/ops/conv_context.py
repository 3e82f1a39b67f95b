"""Short convolutions with time cut over a mesh: the few tokens before each stretch come from the stretches before."""

import jax
import jax.numpy as jnp

from seqmix.ops.mesh import on_shares


def run(cuts, op, last_tokens, xs, weights, biases, states, runs):
    """(ys, lasts) of `short_conv` of a tuple of arrays whose weights have equal widths, with `op`, itself, on each
    device's stretch of time.

    cuts: the layout of each array, whose axis after time is cut as heads are. `last_tokens` is the op's function of
    that name. Each device gathers the last W - 1 tokens of every stretch's last segment: a neighbour's are not enough
    where stretches are short or padded.
    """
    lay = next((lay for lay in cuts if lay.heads), cuts[0])
    width = len(weights[0])
    channels = [
        ("heads" if cut.heads else None, *[None] * x.ndim)[: x.ndim - 2] for cut, x in zip(cuts, xs, strict=True)
    ]

    def local(xs, weights, biases, states, runs):
        ends, ids = _gathered(lay.time, last_tokens, xs, width, runs)
        before = jnp.where(jnp.arange(ids.shape[0])[:, None, None] < jax.lax.axis_index(lay.time), ids, 0)
        flat = lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])
        whole, lasts = [], []
        for x, end, state in zip(xs, ends, states, strict=True):
            entering, entering_ids = _latest(last_tokens, flat(end), flat(before), width, state)
            whole.append(jnp.concatenate([entering.astype(x.dtype), x], 1))
            last = _latest(last_tokens, flat(end), flat(ids), width, state)[0]
            lasts.append(last.astype(x.dtype if state is None else state.dtype))
        whole_ids = None if runs is None else jnp.concatenate([entering_ids.astype(runs.dtype), runs], 1)
        ys = op(tuple(whole), weights, None if biases[0] is None else biases, segment_ids=whole_ids)[0]
        return tuple(y[:, width - 1 :] for y in ys), tuple(lasts)

    over = lambda *first: tuple((*first, *rest) for rest in channels)
    tokens, kept = over("batch", "time"), over("batch", None)
    names = (tokens, over(None), over(), kept, ("batch", "time"))
    return on_shares(lay, local, (xs, weights, biases, states, runs), names, (tokens, kept))


def _gathered(axis, last_tokens, xs, width, runs):
    """The last tokens of every stretch, [P, B, W-1, ...] each, and the segments they are of, 0 where there are none."""
    batch, time = xs[0].shape[:2]
    if runs is None:
        last, count = jnp.ones((batch, 1), jnp.int32), jnp.full((batch, 1), time)
    else:
        last = jnp.max(runs, 1, keepdims=True)
        count = jnp.sum((runs == last) & (runs != 0), 1, keepdims=True)
    ids = jnp.where(jnp.arange(width - 1) >= width - 1 - count, last, 0)
    return jax.lax.all_gather(([last_tokens(x, width, None, runs) for x in xs], ids), axis)


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
