"""What the kernels of block-sparse attention share: what they can take, lists as they read them, masks inside them."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import compat

BLOCKS = 64, 128  # queries or keys of a block
WIDTHS = 64, 128  # K or V

# What a mask may be made of: every one works on vectors and tiles of integers and truth values, element by element.
ELEMENTWISE = {"abs", "add", "and", "clamp", "convert_element_type", "div", "eq", "ge", "gt", "le", "lt", "max", "min"}
ELEMENTWISE |= {"mul", "ne", "neg", "not", "or", "rem", "select_n", "sign", "sub", "xor"}
ELEMENTWISE |= {"shift_left", "shift_right_arithmetic", "shift_right_logical"}
CALLS = {"jit", "pjit", "closed_call"}
RESHAPES = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims"}


def supports(q, k, v, sizes, *, visible=None, q_data=None, k_data=None, scale=1.0, capability=None) -> str | None:
    """Why the kernels cannot run this call, in a few words; None if they can.

    Takes arrays or shapes with dtypes; lengths are those of the call, before they are filled up to whole blocks.
    capability: (major, minor) of the GPU that will run it; None asks the default device.
    """
    reason = compat.unavailable()
    if reason is not None:
        return reason
    if capability is None and not compat.interpreting():
        capability = compat.capability()
    if capability is not None and capability[0] != 9:
        return f"needs a Hopper GPU (compute capability 9.x), this one has {capability[0]}.{capability[1]}"
    if capability is None and not compat.interpreting():
        return "needs a Hopper GPU, the default device is none"
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
        return f"needs bfloat16 q, k and v, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] not in WIDTHS or v.shape[-1] not in WIDTHS:
        return f"needs K and V in {WIDTHS}, got K={q.shape[-1]}, V={v.shape[-1]}"
    if sizes[0] not in BLOCKS or sizes[1] not in BLOCKS:
        return f"needs blocks of 64 or 128 queries and keys, got sizes={tuple(sizes)}"
    if isinstance(scale, jax.core.Tracer) or not scale > 0:
        return "needs a scale that is a Python number above 0"
    if visible is None:
        return None
    return Visibility(visible, tuple(q_data or ()), tuple(k_data or ())).wrong(sizes)


@dataclasses.dataclass(frozen=True)
class Visibility:
    """A mask, as kernels evaluate it: on vectors of queries or of keys as far as it goes, then on the tile.

    visible(i, j, values) is elementwise in int32 i [bq, 1] and j [1, bk]; names are those of `values`, of queries and
    of keys.
    """

    visible: Callable
    q_names: tuple[str, ...]
    k_names: tuple[str, ...]

    def jaxpr(self, sizes):
        rows, columns = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((sizes[0], 1), (1, sizes[1])))
        values = dict.fromkeys(self.q_names, rows) | dict.fromkeys(self.k_names, columns)
        seen = lambda i, j, values: jnp.asarray(self.visible(i, j, values))
        return jax.make_jaxpr(seen)(rows, columns, values)

    def wrong(self, sizes) -> str | None:
        """What of the mask no kernel can evaluate, in a few words; None if nothing."""
        found = _first_foreign(self.jaxpr(sizes).jaxpr)
        return None if found is None else f"has no form for a mask that uses {found!r}"

    def __call__(self, i, j, values, sizes, *, turned=False):
        """Whether pairs are visible: bool [bq, bk], of int32 vectors i() [bq] and j() [bk], and values {name: one}.

        Vectors of queries scale rows of a tile, those of keys its columns; turned: the other way, giving [bk, bq].
        i and j are functions: a vector that the mask does not ask for must not exist (its layout would be unknown).
        """
        closed = self.jaxpr(sizes)
        asked = {var for eqn in closed.jaxpr.eqns for var in eqn.invars if not hasattr(var, "val")}
        places = [place() if var in asked else None for place, var in zip((i, j), closed.jaxpr.invars)]
        tile = _Tile(sizes[::-1] if turned else sizes, {"queries": int(turned), "keys": 1 - int(turned)})
        sides = dict.fromkeys(self.q_names, "queries") | dict.fromkeys(self.k_names, "keys")
        given = [(places[0], "queries"), (places[1], "keys"), *((values[name], sides[name]) for name in sorted(sides))]
        ((seen, kind),) = tile.evaluate(closed.jaxpr, closed.consts, given)
        return tile.spread(seen, kind, "tile")


def _first_foreign(jaxpr) -> str | None:
    """The first thing in a mask that is not elementwise."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in CALLS:
            inner = _first_foreign(eqn.params["jaxpr"].jaxpr)
            if inner is not None:
                return inner
        elif name not in ELEMENTWISE | RESHAPES:
            return name
        elif any(jnp.issubdtype(var.aval.dtype, jnp.floating) for var in eqn.outvars):
            return f"{name} of {eqn.outvars[0].aval.dtype}"
    return next((f"an array {x.shape}" for x in jaxpr.constvars if x.aval.size > 1), None)


class _Tile:
    """Evaluates a mask's jaxpr on pairs (value, kind), kind "scalar", "queries", "keys" or "tile"."""

    def __init__(self, shape, axes):
        self.shape, self.axes = shape, axes

    def spread(self, value, kind, to):
        """The value as one of the kind `to`."""
        if kind == to:
            return value
        shape = self.shape if to == "tile" else (self.shape[self.axes[to]],)
        axes = () if kind == "scalar" else (self.axes[kind],)
        value = jnp.asarray(value)
        truth = value.dtype == jnp.bool_  # spread as numbers
        value = lax.broadcast_in_dim(value.astype(jnp.int32) if truth else value, shape, axes)
        value = compat.laid(value, None if to == "tile" else self.axes[to])
        return value != 0 if truth else value

    def evaluate(self, jaxpr, consts, inputs):
        known = {}

        def read(var):
            return known[var] if not hasattr(var, "val") else (np.asarray(var.val, var.aval.dtype), "scalar")

        for var, const in zip(jaxpr.constvars, consts):
            known[var] = jnp.reshape(const, ()), "scalar"
        known |= dict(zip(jaxpr.invars, inputs))
        for eqn in jaxpr.eqns:
            given = [read(var) for var in eqn.invars]
            if eqn.primitive.name in CALLS:
                inner = eqn.params["jaxpr"]
                outs = self.evaluate(inner.jaxpr, inner.consts, given)
            elif eqn.primitive.name in RESHAPES:
                outs = given  # a vector is spread where it meets another kind
            else:
                kinds = {kind for _, kind in given} - {"scalar"}
                to = kinds.pop() if len(kinds) == 1 else "tile" if kinds else "scalar"
                outs = [(eqn.primitive.bind(*(self.spread(*x, to) for x in given), **eqn.params), to)]
            known |= dict(zip(eqn.outvars, outs))
        return [read(var) for var in jaxpr.outvars]
