"""Elementwise scans with time cut over a mesh: only the states' chain crosses devices (`seqmix.ops.context`).

The chunked form and the Hopper kernels go through a stretch in two halves: they know what each of their own pieces of
time makes of a zero state before they need the state that enters the first. Joined, that is what the stretch makes of
one: it is handed on, and nothing is gone through twice, backward neither. Other forms, and the selective scan, go
through each stretch twice, the first time for its state alone.
"""

from functools import partial

import jax
import jax.numpy as jnp

from seqmix.core import packing, sharding
from seqmix.ops import dispatch, scan_chunked, scan_kernels, targets
from seqmix.ops.context import enter
from seqmix.ops.mesh import on_shares


def kernel(lay, implementation, x, log_a, reverse) -> str | None:
    """The kernels through which each device can run its share of a `linear_scan`, of those asked for; or None.

    Raises ValueError where time is cut and what was asked for cannot run: a device's own call could not say so.
    """
    tokens, decays = _names(x, log_a)
    with sharding.shares(lay.mesh):
        reasons = scan_kernels.reasons(lay.share(x, *tokens), lay.share(log_a, *decays), reverse)
    return targets.chosen(reasons, implementation, "linear_scan" if lay.time else None)


def _names(x, log_a):
    """The names of the dimensions of both; those of size one in log_a have none."""
    tokens = ("batch", "time", "heads", *[None] * x.ndim)[: x.ndim]
    return tokens, tuple(name if size > 1 else None for name, size in zip(tokens, log_a.shape, strict=True))


def linear(lay, op, x, log_a, state, segment_ids, *, masks, dtype, chunk, implementation, reverse):
    """`linear_scan`'s result with `op`, itself; log_a has as many axes as x. What follows time is cut as heads are.

    masks: the function that makes those of tokens from segments; dtype: of h.
    """
    runs = None
    if segment_ids is not None:  # numbered in the direction of the scan
        runs = jnp.flip(packing.runs(jnp.flip(segment_ids, 1)), 1) if reverse else packing.runs(segment_ids)
    options = dict(reverse=reverse, chunk=chunk, implementation=implementation)

    def local(x, log_a, state, runs):
        call = lambda state: op(x, log_a, state=state, segment_ids=runs, **options)
        if not lay.time:
            return call(state)
        real, opened = masks(runs, reverse)
        if implementation == "gpu":
            run = lambda *given: _stretch(lay.time, scan_kernels.Halves(), *given, runs)
            return scan_kernels.scan("gpu", x, log_a, real, opened, state, run)
        if implementation in (None, "chunked"):
            dispatch.pick("linear_scan", "chunked", {"chunked": None})
            form = scan_chunked.Halves(scan_chunked.Way(chunk, reverse, dtype), state.dtype)
            return _stretch(lay.time, form, x, log_a, state, real, opened, runs)
        logs = log_a.astype(state.dtype if jnp.iscomplexobj(log_a) else jnp.finfo(state.dtype).dtype)
        logs = jnp.broadcast_to(logs, (*logs.shape[:1], x.shape[1], *logs.shape[2:]))
        if runs is not None:
            logs = jnp.where((runs != 0).reshape(*runs.shape, *[1] * (x.ndim - 2)), logs, 0)
        end = call(jnp.zeros_like(state))[1]
        entering, last = enter(lay.time, end, jnp.exp(jnp.sum(logs, 1)), _left, state, runs, reverse)
        return call(entering)[0], last

    tokens, decays = _names(x, log_a)
    states = (tokens[0], *tokens[2:])
    return on_shares(lay, local, (x, log_a, state, runs), (tokens, decays, states, tokens[:2]), (tokens, states))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _stretch(axis, form, x, log_a, state, real, opened, runs):
    """(h, state after all stretches) of this device's stretch, by a form in two halves (`scan_chunked.Halves`)."""
    return _forward(axis, form, x, log_a, state, real, opened, runs)[0]


def _forward(axis, form, x, log_a, state, real, opened, runs):
    end, left, finish = form.begin(x, log_a, real, opened)
    entering, last = enter(axis, end, left, _left, state, runs, form.reverse)
    h, kept = finish(entering)
    return (h, last), (kept, left, entering, runs)


def _backward(axis, form, saved, cotangents):
    kept, left, entering, runs = saved
    dh, dlast = cotangents
    start, finish = form.back(kept, dh)
    # Nothing is on its way between devices while the forward kernel fills the chip: they would wait for each other.
    start, _ = jax.lax.optimization_barrier((start, kept))
    # The chain is linear in ends and state. Its gradient by the decays is within that of the stretch, whose final
    # state, of the entering one, has the gradient of its end.
    chain = lambda end, state: enter(axis, end, left, _left, state, runs, form.reverse)
    dend, dstate = jax.vjp(chain, entering, entering)[1]((start, dlast))
    return *finish(dend), dstate, None, None, None


_stretch.defvjp(_forward, _backward)


def _left(left, state):
    return (left * state).astype(state.dtype)


def selective(lay, form, d, u, dt, A, B, C, state, segment_ids):
    """(y, state) of form(u, dt, A, B, C, state, runs); channels are cut as heads are, groups as key heads."""

    def local(u, dt, A, B, C, state, runs):
        B, C = (lay.local_key_heads(m, d.G) for m in (B, C))
        end = form(u, dt, A, B, C, jnp.zeros_like(state), runs)[1]
        total = jnp.sum(dt.astype(state.dtype), 1)[..., None] * A.astype(state.dtype)
        entering, last = enter(lay.time, end, total, lambda total, h: jnp.exp(total) * h, state, runs)
        return form(u, dt, A, B, C, entering, runs)[0], last

    tokens, groups, states = ("batch", "time", "heads"), ("batch", "time", "key_heads", None), ("batch", "heads", None)
    names = (tokens, tokens, ("heads", None), groups, groups, states, ("batch", "time"))
    runs = None if segment_ids is None else packing.runs(segment_ids)
    return on_shares(lay, local, (u, dt, A, B, C, state, runs), names, (tokens, states))
