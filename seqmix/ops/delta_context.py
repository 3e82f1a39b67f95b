"""The delta rule and its relatives with time cut, over a mesh or on one device: what a stretch does to a state is a
matrix [K, K].

A device can thus cut its own stretch, or the whole of time, into parts that go side by side, as rows do.
"""

from functools import partial

import jax
import jax.numpy as jnp

from seqmix.core import packing, sharding
from seqmix.ops import targets
from seqmix.ops.context import enter, stretch_bounds, through
from seqmix.ops.mesh import on_shares

VALUE = 2  # place of v among the arguments of every form
TILES, TILE = 132, 128  # multiprocessors of an H100 or H200; columns of a state that one of them takes in a step
CHUNKS = 8  # of a part, at least


def run(lay, form, d, args, head_axes, *, chunk, state, run_ids, **options):
    """The result of form(*args, state=, run_ids=, **options), with the form on stretches of time.

    Args:
      lay, d: the layout or None, and the op's sizes by letter.
      form: one of the references and chunked forms, which write nothing to columns of a state that v does not have.
      args: its arrays [B, T, ...] or None.
      head_axes: of each array, the axis of its Hk or H heads.
      chunk: of a chunked form, whose loop over chunks `parts` may cut; None of the others.

    Columns of a state do not see each other. So K more than v has, the identity at first, end as the product
    of the stretch's transitions, and on the way read what each query sees of an entering state: a stretch is gone
    through once, and what it sees of the state that enters it is a matrix product added to its outputs. Backward that
    product gives the entering state's gradient; with the end's, it is the backward pass of V columns alone.
    """
    count = 1 if chunk is None else parts(lay, d, chunk)
    form = partial(form, **options)
    if count == 1 and (lay is None or not lay.time):
        return form(*args, state=state, run_ids=run_ids)
    if lay is None:
        return _stretch((), form, count, d.V, state, run_ids, *args)
    names = [None if x is None else _names(x, axis, d) for x, axis in zip(args, head_axes, strict=True)]

    def local(state, runs, *args):
        given = zip(args, names, head_axes, strict=True)
        args = [
            lay.local_key_heads(x, d.Hk, at) if x is not None and "key_heads" in name else x for x, name, at in given
        ]
        return _stretch(lay.time, form, count, d.V, state, runs, *args)

    tokens, states = ("batch", "time", "heads", None), ("batch", "heads", None, None)
    return on_shares(lay, local, (state, run_ids, *args), (states, ("batch", "time"), *names), (tokens, states))


def parts(lay, d, chunk) -> int:
    """Into how many parts a device cuts its time, side by side like rows: a loop over chunks is as much shorter, of
    steps that take a GPU the time of a few launches however few rows they are of. As many as leave a step's V + K
    columns of all rows a multiprocessor each; 1 on other devices, and where nobody knows what a device holds.
    """
    if targets.capability() is None or (lay is None and not sharding.on_one_device()):
        return 1
    ways = lambda name: 1 if lay is None else lay.ways(name)
    tiles = d.B // ways("batch") * (d.H // ways("heads")) * -(-(d.K + d.V) // TILE)
    chunks = -(-d.T // ways("time") * getattr(d, "n", 1) // chunk)
    fits = lambda count: tiles * count <= TILES and chunks >= count * CHUNKS
    return max(count for count in (1, 2, 4, 8) if count == 1 or fits(count))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _stretch(axis, form, parts, width, state, runs, *args):
    """(y, state after all stretches) of this device's stretch; axis: mesh axes that cut time, or (); width: V."""
    return _forward(axis, form, parts, width, state, runs, *args)[0]


def _forward(axis, form, parts, width, state, runs, *args):
    local = None if runs is None else packing.runs(_cut(runs, parts))
    batch, time = args[VALUE].shape[:2]
    start = jnp.concatenate([jnp.zeros_like(state), _identity(state)], -1)
    y, ends, finish = form(*_cut(args, parts), state=jnp.repeat(start, parts, 0), run_ids=local, halves=True)
    y, reads = y[..., :width], y[..., width:].astype(args[VALUE].dtype)
    ends, factors = ends[..., :width], ends[..., width:]
    entering, last = _enter(axis, parts, ends, factors, state, runs)
    y, pull = jax.vjp(lambda entering: finish(_seen(y, reads, entering)), entering)
    y = y.reshape(batch, -1, *y.shape[2:])[:, :time]
    return (y, last), (pull, factors, entering, runs, args)


def _backward(axis, form, parts, width, saved, cotangents):
    pull_entering, factors, entering, runs, args = saved
    dy, dlast = cotangents
    dy = _cut(dy, parts)
    (first,) = pull_entering(dy)
    # The chain is linear in ends and state. What it gives by its factors is within the gradients of the stretch,
    # whose final state, of the entering one, has the gradient of its end.
    chain = lambda ends, state: _enter(axis, parts, ends, factors, state, runs)
    dends, dstate = jax.vjp(chain, entering, entering[::parts])[1]((first, dlast))
    local = None if runs is None else packing.runs(_cut(runs, parts))
    pull = jax.vjp(lambda *args: form(*_cut(args, parts), state=entering, run_ids=local), *args)[1]
    return dstate, None, *pull((dy, dends))


_stretch.defvjp(_forward, _backward)


def _cut(tree, parts):
    """Arrays [B, T, ...] as [B * parts, T / parts, ...], zeros behind the last token: they write and decay nothing."""

    def one(x):
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % parts)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0] * parts, -1, *x.shape[2:])

    return jax.tree.map(one, tree)


def _identity(state):
    """That of each head, [B, H, K, K]."""
    eye = jnp.eye(state.shape[2], dtype=state.dtype)
    return jnp.broadcast_to(eye, (*state.shape[:2], *eye.shape))


def _enter(axis, parts, ends, factors, state, runs):
    """As `enter`, of the parts of all stretches: ends and factors [B * parts, ...], and so the entering states.

    A chain goes over this device's parts. With more devices it makes of them what they together make of a zero state
    and of the identity, and what enters each of them then; so one state a device is handed on, whatever the parts.
    """
    if parts == 1:
        return enter(axis, ends, factors, _moved, state, runs)
    ends, factors = (jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0) for x in (ends, factors))
    bounds = current = None
    if runs is not None:
        current = stretch_bounds(runs)[0] if axis else jnp.ones(runs.shape[0], runs.dtype)
        bounds = [x.reshape(-1, parts).T for x in stretch_bounds(_cut(runs, parts))]
    passed, before = state, []
    if axis:
        passed = jnp.concatenate([jnp.zeros_like(state), _identity(state)], -1)
        ends = jnp.concatenate([ends, jnp.zeros_like(factors)], -1)
    for part in range(parts):
        limits = None if runs is None else [x[part] for x in bounds]
        kept, passed, current = through(passed, current, ends[part], factors[part], limits, _moved)
        before.append(kept)
    entering = jnp.stack(before, 1)
    if axis:
        width = state.shape[-1]
        first, passed = enter(axis, passed[..., :width], passed[..., width:], _moved, state, runs)
        entering = entering[..., :width] + _moved(entering[..., width:], first[:, None])
    return entering.reshape(-1, *entering.shape[2:]), passed


def _seen(y, reads, entering):
    """y with what reads [..., K] see of an entering state [B, H, K, V]: both [B, T, H, ...], or in blocks of chunks."""
    precision = jax.lax.Precision.HIGHEST if reads.dtype == entering.dtype else None
    options = dict(precision=precision, preferred_element_type=entering.dtype)
    state = entering.astype(reads.dtype)
    if y.ndim == 4:
        return y + jnp.einsum("bthk,bhkv->bthv", reads, state, **options)
    tokens = reads.reshape(*reads.shape[:3], -1, reads.shape[-1])  # a product whose result lies as y does
    return y + jnp.matmul(tokens, state, **options).reshape(y.shape)


def _names(x, axis, d):
    names = ["batch", "time", *[None] * (x.ndim - 2)]
    names[axis] = "heads" if x.shape[axis] == d.H else "key_heads"
    return tuple(names)


def _moved(transition, state):
    """transition [B, H, K, K] times state [B, H, K, V], in full precision."""
    return jnp.matmul(transition, state, precision=jax.lax.Precision.HIGHEST)
