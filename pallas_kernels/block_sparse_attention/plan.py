"""What the kernels of block-sparse attention share: what they can take, lists as they read them, masks inside them."""

import copy
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import compat, registers

BLOCKS = 64, 128  # queries or keys of a block
WIDTHS = 64, 128  # K or V
LOG2_E = math.log2(math.e)
SMS = 132  # multiprocessors of an H100 or H200
LEAST_STEPS = 16  # of a part of a list that is cut
IDLE = 1.5  # multiprocessors for each long walk, from which on walks are cut
FILLED = 0.9  # of the multiprocessors, with as many parts as which a cut ends
CUT = 4  # thread blocks a multiprocessor, at most, of walks that are cut: the memory for their sums is bounded so

# What a mask may be made of: every one works on vectors and tiles of integers and truth values, element by element. The
# functions are for what is known while tracing, which must not be computed on the device: it may be absent.
ELEMENTWISE = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "clamp": lambda low, x, high: np.minimum(np.maximum(x, low), high),
    "convert_element_type": lambda x, new_dtype: np.asarray(x).astype(new_dtype),
    "div": lambda x, y: np.sign(x) * np.sign(y) * (np.abs(x) // np.abs(y)),
    "eq": np.equal,
    "ge": np.greater_equal,
    "gt": np.greater,
    "le": np.less_equal,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "rem": np.fmod,
    "select_n": lambda which, *cases: np.choose(np.asarray(which).astype(np.int32), cases),
    "shift_left": np.left_shift,
    "shift_right_arithmetic": np.right_shift,
    "shift_right_logical": lambda x, by: (np.uint32(x) >> np.uint32(by)).view(np.int32),
    "sign": np.sign,
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}
CALLS = {"jit", "pjit", "closed_call"}
RESHAPES = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims"}
# Longest chains of operations on one side that a kernel computes; a thread holds 2 queries and 32 keys of a tile.
CHAIN = {"queries": 8, "keys": 1}


def supports(q, k, v, sizes, *, visible=None, q_data=None, k_data=None, scale=1.0, capability=None) -> str | None:
    """Why the kernels cannot run this call, in a few words; None if they can.

    Takes arrays or shapes with dtypes; lengths are those of the call, before they are filled up to whole blocks.
    capability: (major, minor) of the GPU that will run it; None asks the default device.
    """
    reason = unfit(q, k, v, scale, capability)
    if reason is not None:
        return reason
    if sizes[0] not in BLOCKS or sizes[1] not in BLOCKS:
        return f"needs blocks of 64 or 128 queries and keys, got sizes={tuple(sizes)}"
    if visible is None:
        return None
    return Visibility(visible, tuple(q_data or ()), tuple(k_data or ())).wrong()


def unfit(q, k, v, scale, capability) -> str | None:
    """Why no Hopper kernel of block-sparse attention takes a call, whatever its lists; None if one may."""
    reason = compat.no_hopper(capability)
    if reason is not None:
        return reason
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
        return f"needs bfloat16 q, k and v, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] not in WIDTHS or v.shape[-1] not in WIDTHS:
        return f"needs K and V in {WIDTHS}, got K={q.shape[-1]}, V={v.shape[-1]}"
    if isinstance(scale, jax.core.Tracer) or not scale > 0:
        return "needs a scale that is a Python number above 0"
    return None


def rows(lse, delta):
    """[B, H, 2, T] float32 of lse and delta [B, H, T]: what gradients need of each row of queries.

    delta: sum_v dy y less the cotangent of lse. lse in log2, so that p = exp2(s - lse); of a row that sees nothing,
    whose lse is infinite, it is inf, from which p = 0, and delta 0.
    """
    some = jnp.isfinite(lse)
    return jnp.stack([jnp.where(some, lse * LOG2_E, jnp.inf), jnp.where(some, delta, 0)], axis=2)


def walks(count, owners: int, each: int) -> tuple[int, float]:
    """How many thread blocks walk lists, and how many would walk as much, were each as long as the longest.

    count: of lists, [b, h, n]; owners: lists of a thread block; each: how often there are n lists. Lists whose lengths
    are not known while tracing count as equal.
    """
    blocks = -(-count.shape[2] // owners) * each
    if not isinstance(count, np.ndarray) or not count.any():
        return blocks, blocks
    longer = np.pad(count, ((0, 0), (0, 0), (0, -count.shape[2] % owners))).reshape(-1, owners).max(1)
    return blocks, longer.mean() / longer.max() * blocks


def pieces(blocks: int, alike: float, heads: int, steps: int) -> tuple[int, int]:
    """Into how many parts (the heads, the lists) are cut that so many thread blocks walk, if they are too few.

    blocks, alike: as `walks` counts them; heads: what each walks of heads, for every one a list of about so many steps.
    """
    most = min(heads * steps // LEAST_STEPS, CUT * SMS // blocks)
    if SMS / alike < IDLE or most < 2:
        return 1, 1
    divisors = [n for n in range(1, heads + 1) if heads % n == 0 and n <= most]
    of_heads = next((n for n in divisors if alike * n >= FILLED * SMS), divisors[-1])
    return of_heads, max(1, min(round(SMS / (alike * of_heads)), most // of_heads))


def own_lists(walk, halves):
    """What each warpgroup visits of a list, {"count": [b, h, 2, owners], "place" and "entry": [b, h, 2, n]} of numpy.

    halves [b, h, n]: what the first and the second half of a block's queries see of a tile, numbers 1 and 2 for all
    and 4 and 8 for nothing, added. Of tiles that a half does not see one in a row is passed over: the next but two
    is not fetched before this one is used.
    """
    begin, count, other, _ = (np.asarray(x) for x in walk)
    lead = np.broadcast_shapes(begin.shape[:2], other.shape[:2])
    place, entry = (np.zeros((*lead, 2, other.shape[2]), np.int32) for _ in range(2))
    own = np.zeros((*lead, 2, begin.shape[2]), np.int32)
    for b, h, unit, owner in np.ndindex(own.shape):
        first, chosen = begin[b, h, owner], []
        for n, what in enumerate(halves[b, h, first : first + count[b, h, owner]]):
            if not what >> 2 + unit & 1 or n - (chosen[-1] if chosen else n) >= 2:
                chosen.append(n)
        chosen = np.asarray(chosen or range(min(1, count[b, h, owner])), np.int32)
        mine = b, h, unit, slice(first, first + len(chosen))
        own[b, h, unit, owner], place[mine] = len(chosen), chosen
        entry[mine] = other[b, h, first + chosen] * 2 + (halves[b, h, first + chosen] >> unit & 1)
    return {"count": own, "place": place, "entry": entry}


class Visibility:
    """A mask, as kernels evaluate it: on vectors of queries or of keys as far as it goes, then on the tile.

    visible(i, j, values) is elementwise in int32 i [bq, 1] and j [1, bk]; names are those of `values`, of queries and
    of keys.
    """

    def __init__(self, visible: Callable, q_names=(), k_names=()):
        self.sides = dict.fromkeys(sorted(q_names), "queries") | dict.fromkeys(sorted(k_names), "keys")
        shapes = {
            "queries": jax.ShapeDtypeStruct((64, 1), jnp.int32),
            "keys": jax.ShapeDtypeStruct((1, 128), jnp.int32),
        }
        values = {name: shapes[side] for name, side in self.sides.items()}
        seen = lambda i, j, values: jnp.asarray(visible(i, j, values))
        closed = jax.make_jaxpr(seen)(shapes["queries"], shapes["keys"], values)
        self.foreign = _first_foreign(closed.jaxpr)
        if self.foreign is None:
            given = [Node("queries", "i"), Node("keys", "j"), *(Node(self.sides[n], n) for n in sorted(self.sides))]
            (self.root,) = _graph(closed.jaxpr, closed.consts, given)

    def wrong(self) -> str | None:
        """What of the mask no kernel can evaluate, in a few words; None if nothing."""
        return None if self.foreign is None else f"has no form for a mask that uses {self.foreign!r}"

    def prepared(self, q_data, k_data, time: int, keys: int, chain=CHAIN):
        """(mask, data of queries, data of keys) that see the same, with long chains on one side done beforehand."""
        given = {"queries": q_data | {"i": _indices(time)}, "keys": k_data | {"j": _indices(keys)}}
        data = {"queries": {}, "keys": {}}
        done = {}

        def rewritten(node):
            if node not in done:
                done[node] = fresh(node)
            return done[node]

        def fresh(node):
            if node.kind in given and node.operation is not None and node.cost > chain[node.kind]:
                return made(node, Values(given[node.kind]).of(node))
            if node.operation is None:
                if node.kind in given and node.value not in ("i", "j"):
                    data[node.kind][node.value] = given[node.kind][node.value]
                return node
            return _node(node.operation, node.params, [rewritten(x) for x in node.inputs], node.kind)

        def made(node, array):
            if not isinstance(array, jax.core.Tracer):
                known = np.asarray(array)
                if (known == known.flat[0]).all():
                    return Node("scalar", known.dtype.type(known.flat[0]))
            name = f"{node.kind}_{len(data[node.kind])}"
            data[node.kind][name] = array.astype(jnp.int32)
            truth = array.dtype == jnp.bool_
            vector = Node(node.kind, name)
            return _node("ne", {}, [vector, Node("scalar", np.int32(0))], node.kind) if truth else vector

        out = copy.copy(self)
        out.root = rewritten(self.root)
        out.sides = {name: side for side, arrays in data.items() for name in arrays}
        return out, data["queries"], data["keys"]

    def asked(self, kind: str) -> tuple[str, ...]:
        """What the mask asks for of "queries" or "keys": names of vectors, and "i" or "j" if it is the index."""
        found, seen, left = set(), set(), [self.root]
        while left:
            node = left.pop()
            if node not in seen:
                seen.add(node)
                left += node.inputs
                found |= {node.value} if node.kind == kind and node.operation is None else set()
        return tuple(sorted(found))

    def __call__(self, i, j, values, sizes, *, turned=False):
        """Whether pairs are visible: bool [bq, bk], of int32 vectors i() [bq] and j() [bk], and values {name: one}.

        Vectors of queries scale rows of a tile, those of keys its columns; turned: the other way, giving [bk, bq].
        All are functions: a vector that the mask does not ask for must not exist (its layout would be unknown).
        """
        tile = _Tile(values | {"i": i, "j": j}, sizes[::-1] if turned else sizes, turned)
        return tile.spread(tile.of(self.root), self.root.kind, "tile")


def _indices(length):
    return np.arange(length, dtype=np.int32)[None]


def _first_foreign(jaxpr) -> str | None:
    """The first thing in a mask that is not elementwise."""
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in CALLS:
            inner = _first_foreign(eqn.params["jaxpr"].jaxpr)
            if inner is not None:
                return inner
        elif name not in ELEMENTWISE and name not in RESHAPES:
            return name
        elif any(jnp.issubdtype(var.aval.dtype, jnp.floating) for var in eqn.outvars):
            return f"{name} of {eqn.outvars[0].aval.dtype}"
    return next((f"an array {x.aval.shape}" for x in jaxpr.constvars if x.aval.size > 1), None)


@dataclasses.dataclass(frozen=True, eq=False)
class Node:
    """A step of a mask: an operation on others, or a leaf, whose value is a number or the name of a vector."""

    kind: str  # "scalar", "queries", "keys" or "tile"
    value: object = None
    operation: object = None
    params: dict = dataclasses.field(default_factory=dict)
    inputs: tuple = ()
    cost: int = 0  # operations below it


def _node(operation, params, inputs, kind=None):
    """A step; what is sure to be true in a conjunction is left out."""
    if isinstance(operation, str):
        operation = getattr(lax, f"{operation}_p")
    if operation is lax.and_p:
        left = [x for x in inputs if not (x.kind == "scalar" and x.operation is None and x.value is np.True_)]
        if len(left) < 2:
            return (left or inputs)[0]
    kinds = {x.kind for x in inputs} - {"scalar"}
    kind = kinds.pop() if len(kinds) == 1 else "tile" if kinds else "scalar"
    cost = 1 + sum(x.cost for x in inputs)
    return Node(kind, None, operation, params, tuple(inputs), cost)


def _graph(jaxpr, consts, given):
    """The nodes of a jaxpr's results."""
    known = {var: Node("scalar", np.asarray(const).reshape(())[()]) for var, const in zip(jaxpr.constvars, consts)}
    known |= dict(zip(jaxpr.invars, given))

    def read(var):
        return Node("scalar", np.asarray(var.val, var.aval.dtype)[()]) if hasattr(var, "val") else known[var]

    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        if eqn.primitive.name in CALLS:
            inner = eqn.params["jaxpr"]
            outs = _graph(inner.jaxpr, inner.consts, inputs)
        elif eqn.primitive.name in RESHAPES:
            outs = inputs  # a vector is spread where it meets another kind
        else:
            outs = [_node(eqn.primitive, eqn.params, inputs)]
        known |= dict(zip(eqn.outvars, outs))
    return [read(var) for var in jaxpr.outvars]


class Values:
    """Evaluates nodes of one side on whole arrays {name: [B or 1, length]}; in numpy's stead where all is known."""

    def __init__(self, leaves):
        self.leaves, self.known = leaves, {}

    def of(self, node):
        if node not in self.known:
            self.known[node] = self.made(node)
        return self.known[node]

    def made(self, node):
        if node.operation is None:
            return node.value if node.kind == "scalar" else self.leaves[node.value]
        given = [self.of(x) for x in node.inputs]
        if not any(isinstance(x, jax.Array) for x in given):
            params = {name: x for name, x in node.params.items() if name == "new_dtype"}
            return ELEMENTWISE[node.operation.name](*given, **params)
        return node.operation.bind(*jnp.broadcast_arrays(*given), **node.params)


class _Tile(Values):
    """Evaluates nodes in a kernel; leaves are functions that give a vector."""

    def __init__(self, leaves, shape, turned):
        super().__init__(leaves)
        self.shape, self.axes = shape, {"queries": int(turned), "keys": 1 - int(turned)}

    def made(self, node):
        if node.operation is None:
            return node.value if node.kind == "scalar" else self.leaves[node.value]()
        given = [self.spread(self.of(x), x.kind, node.kind) for x in node.inputs]
        return node.operation.bind(*given, **node.params)

    def spread(self, value, kind, to):
        """The value as one of the kind `to`."""
        if kind == to:
            return value
        shape = self.shape if to == "tile" else (self.shape[self.axes[to]],)
        axes = () if kind == "scalar" else (self.axes[kind],)
        value = jnp.asarray(value)
        truth = value.dtype == jnp.bool_  # spread as numbers
        value = lax.broadcast_in_dim(value.astype(jnp.int32) if truth else value, shape, axes)
        value = registers.laid(value, None if to == "tile" else self.axes[to])
        return value != 0 if truth else value
