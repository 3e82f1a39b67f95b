"""Recurrences over a sharded time axis: each device works on a stretch of time, and states go from one to the next.

    pass 1   what a stretch makes of a zero state (its end), and what it does to the state that enters it (its factor)
    gather   ends and factors of all stretches, a few states a device; nothing as long as the sequence moves
    chain    state entering stretch r = factor_{r-1} (state entering r-1) + end_{r-1},  in the states' dtype
    pass 2   the stretch from its entering state

Gradients are those of these equations: the gather's is a scatter of sums, so the backward pass hands the states'
cotangents the other way. The idea is old (two-level scans); as context parallelism of linear recurrences it is in
LASP (arXiv 2404.02882).
"""

import jax
import jax.numpy as jnp

UNROLL = 8  # stretches that the chain passes in one step


def enter(axis, end, factor, apply, state, runs, reverse=False):
    """(state that enters this device's stretch, state after all stretches); called within `shard_map`.

    Args:
      axis: mesh axes over which time is cut.
      end: tree of what the stretch makes of a zero state, [B, ...]: the state of its last segment.
      factor: what it does to an entering state, [B, ...] or None for nothing, as `apply` understands it. It may
        forget that segments open in the stretch: these are seen to here.
      apply: (factor, state) -> state.
      state: what comes before the first stretch, a tree like `end`.
      runs: the segments' numbers [B, T] in this stretch, counted over the whole row in the direction of the
        recurrence (`packing.runs`), 0 for padding, or None.
      reverse: stretches are met from the last to the first.
    """
    bounds = None if runs is None else stretch_bounds(runs)
    ends, factors, bounds = jax.lax.all_gather((end, factor, bounds), axis)
    index = jax.lax.axis_index(axis)

    def chain(carry, stretch):
        state, current, mine = carry
        place, *stretch = stretch
        kept, new, current = through(state, current, *stretch, apply)
        mine = jax.tree.map(lambda one, other: jnp.where(place == index, one, other), kept, mine)
        return (new, current, mine), None

    # Unrolled over many, this would be most of a layer's program; as a loop each step takes a GPU some 25 us, and
    # UNROLL together are a kernel or two.
    current = None if runs is None else jnp.ones(runs.shape[0], runs.dtype)
    places = jnp.arange(jax.tree.leaves(ends)[0].shape[0])
    (state, _, entering), _ = jax.lax.scan(
        chain, (state, current, state), (places, ends, factors, bounds), reverse=reverse, unroll=UNROLL
    )
    return entering, state


def through(state, current, end, factor, bounds, apply):
    """(state that enters a stretch, state after it, its run), from the state before it, which is of run `current`.

    bounds: `stretch_bounds` of its runs; it and `current` are None without segments. The others as for `enter`.
    """
    kept = state
    if bounds is not None:
        first, last = bounds
        kept = _where(first == current, state, jax.tree.map(jnp.zeros_like, state))
    passed = kept if factor is None else apply(factor, kept)
    if bounds is not None:
        passed = _where(first == last, passed, jax.tree.map(jnp.zeros_like, passed))
    new = jax.tree.map(jnp.add, passed, end)
    if bounds is None:
        return kept, new, None
    return kept, _where(last == 0, state, new), jnp.maximum(current, last)


def stretch_bounds(runs):
    """The first and the last segment of each row [B], (0, 0) for padding alone."""
    last = jnp.max(runs, 1)
    first = jnp.min(jnp.where(runs == 0, jnp.iinfo(runs.dtype).max, runs), 1)
    return jnp.minimum(first, last), last


def _where(mask, yes, no):
    """Rows of one tree or the other."""
    return jax.tree.map(lambda a, b: jnp.where(mask.reshape(-1, *[1] * (a.ndim - 1)), a, b), yes, no)
