"""The delta rule and its relatives with time cut over a mesh: what a stretch does to a state is a matrix [K, K]."""

from functools import partial

import jax
import jax.numpy as jnp

from seqmix.core import packing
from seqmix.ops.context import enter
from seqmix.ops.mesh import on_shares

VALUE = 2  # place of v among the arguments of every form


def run(lay, form, d, args, head_axes, *, state, run_ids, **options):
    """The result of form(*args, state=, run_ids=, **options), with the form on each device's stretch of time.

    Args:
      lay, d: the layout, and the op's sizes by letter.
      form: one of the references and chunked forms, which write nothing to columns of a state that v does not have.
      args: its arrays [B, T, ...] or None.
      head_axes: of each array, the axis of its Hk or H heads.

    Columns of a state do not see each other. So K more than v has, the identity at first, end as the product
    of the stretch's transitions, and on the way read what each query sees of an entering state: a stretch is gone
    through once, and what it sees of the state that enters it is a matrix product added to its outputs. Backward that
    product gives the entering state's gradient; with the end's, it is the backward pass of V columns alone.
    """
    names = [None if x is None else _names(x, axis, d) for x, axis in zip(args, head_axes, strict=True)]

    def local(state, runs, *args):
        given = zip(args, names, head_axes, strict=True)
        args = [
            lay.local_key_heads(x, d.Hk, at) if x is not None and "key_heads" in name else x for x, name, at in given
        ]
        return _stretch(lay.time, partial(form, **options), d.V, state, runs, *args)

    tokens, states = ("batch", "time", "heads", None), ("batch", "heads", None, None)
    return on_shares(lay, local, (state, run_ids, *args), (states, ("batch", "time"), *names), (tokens, states))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _stretch(axis, form, width, state, runs, *args):
    """(y, state after all stretches) of this device's stretch; width: V."""
    return _forward(axis, form, width, state, runs, *args)[0]


def _forward(axis, form, width, state, runs, *args):
    local = None if runs is None else packing.runs(runs)
    key = state.shape[2]
    eye = jnp.broadcast_to(jnp.eye(key, dtype=state.dtype), (*state.shape[:2], key, key))
    start = jnp.concatenate([jnp.zeros_like(state), eye], -1)
    y, ends, finish = form(*args, state=start, run_ids=local, halves=True)
    y, reads = y[..., :width], y[..., width:].astype(args[VALUE].dtype)
    entering, last = enter(axis, ends[..., :width], ends[..., width:], _moved, state, runs)
    y, pull = jax.vjp(lambda entering: finish(_seen(y, reads, entering)), entering)
    return (y, last), (pull, ends[..., width:], entering, runs, args)


def _backward(axis, form, width, saved, cotangents):
    pull_entering, factor, entering, runs, args = saved
    dy, dlast = cotangents
    (first,) = pull_entering(dy)
    # The chain is linear in ends and state. What it gives by its factors is within the gradients of the stretch,
    # whose final state, of the entering one, has the gradient of its end.
    chain = lambda end, state: enter(axis, end, factor, _moved, state, runs)
    dend, dstate = jax.vjp(chain, entering, entering)[1]((first, dlast))
    local = None if runs is None else packing.runs(runs)
    pull = jax.vjp(lambda *args: form(*args, state=entering, run_ids=local), *args)[1]
    return dstate, None, *pull((dy, dend))


_stretch.defvjp(_forward, _backward)


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
