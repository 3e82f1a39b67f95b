"""The delta rule and its relatives with time cut over a mesh: what a stretch does to a state is a matrix [K, K]."""

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
      form: one of the references and chunked forms.
      args: its arrays [B, T, ...] or None, v in place VALUE.
      head_axes: of each array, the axis of its Hk or H heads.

    Columns of a state do not see each other. So K more of them, 0 in v and the identity at first, end as the product
    of the stretch's transitions, and on the way read what each query sees of an entering state: a stretch is gone
    through once, and what it sees of the state that enters it is a matrix product added to its outputs.
    """
    names = [None if x is None else _names(x, axis, d) for x, axis in zip(args, head_axes, strict=True)]

    def local(state, runs, *args):
        given = zip(args, names, head_axes, strict=True)
        args = [
            lay.local_key_heads(x, d.Hk, at) if x is not None and "key_heads" in name else x for x, name, at in given
        ]
        renumbered = None if runs is None else packing.runs(runs)

        v = args[VALUE]
        eye = jnp.broadcast_to(jnp.eye(d.K, dtype=state.dtype), (*state.shape[:2], d.K, d.K))
        wide = jnp.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, d.K)])
        start = jnp.concatenate([jnp.zeros_like(state), eye], -1)
        moved = [wide if place == VALUE else x for place, x in enumerate(args)]
        y, ends = form(*moved, state=start, run_ids=renumbered, **options)
        entering, state = enter(lay.time, ends[..., : d.V], ends[..., d.V :], _moved, state, runs)
        return _seen(y[..., : d.V], y[..., d.V :], entering), state

    tokens, states = ("batch", "time", "heads", None), ("batch", "heads", None, None)
    return on_shares(lay, local, (state, run_ids, *args), (states, ("batch", "time"), *names), (tokens, states))


def _seen(y, reads, entering):
    """y [B, T, H, V] with what reads [B, T, H, K] see of an entering state [B, H, K, V]."""
    precision = jax.lax.Precision.HIGHEST if y.dtype == entering.dtype else None
    operands = reads, entering.astype(reads.dtype)
    more = jnp.einsum("bthk,bhkv->bthv", *operands, precision=precision, preferred_element_type=entering.dtype)
    return (y.astype(entering.dtype) + more).astype(y.dtype)


def _names(x, axis, d):
    names = ["batch", "time", *[None] * (x.ndim - 2)]
    names[axis] = "heads" if x.shape[axis] == d.H else "key_heads"
    return tuple(names)


def _moved(transition, state):
    """transition [B, H, K, K] times state [B, H, K, V], in full precision."""
    return jnp.matmul(transition, state, precision=jax.lax.Precision.HIGHEST)
