"""Block-sparse attention on TPUs, forward, by lists in scalar memory.

    s_ij = scale q_i k_j,   y_i = sum_j exp(s_ij - lse_i) v_j,   lse_i = log sum_j exp(s_ij)

over the pairs of listed tiles. The lists of all blocks of queries are laid end to end, one grid step an entry, and the
index maps read them: a step's keys are fetched while the one before is worked on, and no others are. A block of
queries with an empty list takes one step, which writes zeros; where the length of lists is known to XLA alone, the
steps past their end repeat the last one's blocks, so that nothing is fetched, and do nothing. That takes fewer steps
than a grid of (block, place in its list), whose every block would have as many as the longest.

Softmax is the online one (arXiv 1805.02867), in float32 and base 2, with maxima and sums held in all lanes of a row.
Heads that share keys are worked on side by side in a step. Arrays are cut as [B, T, heads * width] where the width is
a multiple of the lanes, so that nothing is transposed in memory, else as [B, heads, T, width].
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.block_sparse_attention.plan import Values, Visibility

LANES = 128
WIDTHS = 64, 128, 256  # K or V
DTYPES = jnp.bfloat16, jnp.float32
LONGEST = 1024  # queries or keys of a block
ROW_BYTES = 4096  # of a channel of a step's queries, of all its heads together: 2048 in bfloat16
LOG2_E = math.log2(math.e)
LOWEST = -1e38  # a maximum before the first score: 2^(-inf - LOWEST) is 0, and LOWEST - LOWEST no NaN
SCALAR_BYTES = 512 * 1024  # of lists; a core has 1 MiB of scalar memory
CHAIN = {"queries": 1, "keys": 1}  # operations of a mask on one side that the kernel does; it has no division

# An entry of a list is one number: owner, other block, and these.
FIRST, LAST, FULL, LIVE = 1, 2, 4, 8
OTHER_AT, OWNER_AT = 4, 17
MOST_BLOCKS = 1 << (OWNER_AT - OTHER_AT)


def supports(q, k, v, sizes, *, visible=None, q_data=None, k_data=None, scale=1.0, entries=0) -> str | None:
    """Why `forward` and `tpu_backward.backward` cannot run this call, in a few words; None if they can.

    Takes arrays or shapes with dtypes; lengths are those of the call, before they are filled up to whole blocks. It
    does not look at the device. entries: how many blocks the lists of a row name, all heads' together.
    """
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in DTYPES:
        return f"needs q, k and v in bfloat16, or in float32, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] not in WIDTHS or v.shape[-1] not in WIDTHS:
        return f"needs K and V in {WIDTHS}, got K={q.shape[-1]}, V={v.shape[-1]}"
    if any(size % LANES or not 0 < size <= LONGEST for size in sizes):
        return f"needs blocks of a multiple of {LANES} queries and keys, up to {LONGEST}, got sizes={tuple(sizes)}"
    blocks = max(-(-x.shape[1] // size) for x, size in zip((q, k), sizes))
    if blocks > MOST_BLOCKS or 4 * (entries + blocks) > SCALAR_BYTES:
        return f"needs lists that fit scalar memory, got {blocks} blocks and {entries} entries"
    if isinstance(scale, jax.core.Tracer) or not scale > 0:
        return "needs a scale that is a Python number above 0"
    if visible is None:
        return None
    return Visibility(visible, tuple(q_data or ()), tuple(k_data or ())).wrong()


def laid(walk, most):
    """The grid steps of a walk, int32 [b, h, n]: owner after owner, a step for every block that it lists, or one.

    walk: as of `forward`. most: a bound of their number, for lists that are traced.
    """
    begin, count, other, full = walk
    xp = np if all(isinstance(x, np.ndarray) for x in walk) else jnp
    lead = np.broadcast_shapes(begin.shape[:2], other.shape[:2])
    rows = lambda x: xp.broadcast_to(xp.asarray(x), (*lead, x.shape[-1])).reshape(-1, x.shape[-1])
    begin, count, blocks = rows(begin), rows(count), rows(xp.asarray(other) * 2 + full)
    owners = begin.shape[1]
    ends = xp.cumsum(xp.maximum(count, 1), axis=1)
    number = int(ends[:, -1].max()) if xp is np else most
    at = np.arange(number, dtype=np.int32)
    owner = xp.minimum(xp.sum(ends[:, None] <= at[:, None], axis=2, dtype=np.int32), owners - 1)
    take = lambda x, index: xp.take_along_axis(x, index, axis=1)
    length = take(count, owner)
    place = at - take(ends, owner) + xp.maximum(length, 1)
    within = xp.clip(place, 0, xp.maximum(length - 1, 0))
    entry = take(blocks, xp.minimum(take(begin, owner) + within, blocks.shape[1] - 1))
    entry = xp.maximum(entry, 0)  # where an empty list begins
    flags = FIRST * (place == 0) + LAST * (place == xp.maximum(length, 1) - 1) + LIVE * (place < length)
    words = (owner << OWNER_AT) + (entry >> 1 << OTHER_AT) + FULL * (entry & 1) + flags
    return words.astype(np.int32).reshape(*lead, number)


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of a call. Owners are the blocks whose lists are walked, their tokens the rows of a tile."""

    batch: int
    heads: int
    group: int  # query heads to a key head
    together: int  # query heads of a step
    key_heads: int  # of a step: several where they have the same lists
    sizes: tuple[int, int]
    lists: tuple[int, int, int]  # shape of the lists
    scale: float
    soft_cap: float | None
    seen: Visibility | None
    names: tuple  # of the mask's data of queries, and of keys
    keys_own: bool

    @classmethod
    def of(cls, q, k, sizes, lists, seen, data, *, keys_own=False, **numbers):
        """Of q [B, T, H, K] and k [B, S, Hk, K]."""
        heads, key_heads = q.shape[2], k.shape[2]
        group = heads // key_heads
        most = max(1, ROW_BYTES // (sizes[0] * q.dtype.itemsize))
        together = max(n for n in range(1, group + 1) if group % n == 0 and n <= most)
        several = 1
        if together == group and lists[1] == 1:
            several = max(n for n in range(1, key_heads + 1) if key_heads % n == 0 and (n == 1 or n * group <= most))
        names = tuple(tuple(x) for x in data)
        shared = dict(sizes=tuple(sizes), lists=lists, seen=seen, names=names, keys_own=keys_own)
        return cls(q.shape[0], heads, group, together * several, several, **shared, **numbers)

    @property
    def turns(self) -> int:
        """Steps for an entry: all heads of a key head go over what its keys own."""
        return max(1, self.group // self.together) if self.keys_own else 1

    @property
    def grid(self):
        return self.batch, self.heads // self.together // self.turns, self.lists[2], self.turns

    @property
    def own(self) -> int:
        return self.sizes[self.keys_own]

    @property
    def other(self) -> int:
        return self.sizes[not self.keys_own]

    @property
    def own_names(self):
        return self.names[self.keys_own]

    @property
    def other_names(self):
        return self.names[not self.keys_own]

    def keys_at(self, head):
        """Which of the blocks of key heads a step reads, by its place in the grid."""
        return lax.div(head, max(1, self.group // self.together // self.turns))

    def key_head(self, head):
        """Of the step's key heads, the one that one of its query heads reads."""
        return head // self.group if self.key_heads > 1 else 0

    def word(self, words, b, h, p):
        """A step's entry."""
        rows, heads, number = self.lists
        lead = (b if rows > 1 else 0) * heads + (self.keys_at(h) if heads > 1 else 0)
        return words[lead * number + p]

    def spec(self, kind, array):
        """(array, block shape, index map) of an array that is cut by this grid.

        kind: "queries" [B, T, H * K] or [B, H, T, K], "keys" the same of key heads, "row" [B, H, n, T] of queries and
        "q_facts" [b, n, T], "k_facts" [b, n, S].
        """
        side = kind in ("keys", "k_facts")
        size, count = self.sizes[side], self.key_heads if side else self.together

        def at(b, h, p, t, words, *_):
            word = self.word(words, b, h, p)
            owner, other = word >> OWNER_AT, word >> OTHER_AT & (MOST_BLOCKS - 1)
            return self.keys_at(h) if side else h * self.turns + t, owner if side == self.keys_own else other

        def index(b, h, *rest):
            head, block = at(b, h, *rest)
            if kind.endswith("facts"):
                return b if array.shape[0] > 1 else 0, 0, block
            if kind == "row":
                return b, head, 0, block
            return (b, block, head) if len(array.shape) == 3 else (b, head, block, 0)

        if kind.endswith("facts"):
            shape = None, array.shape[1], size
        elif kind == "row":
            shape = None, count, array.shape[2], size
        elif len(array.shape) == 3:
            shape = None, size, count * (array.shape[2] // (self.heads // self.group if side else self.heads))
        else:
            shape = None, count, size, array.shape[3]
        return array, shape, index


def forward(
    q,
    k,
    v,
    walk,
    *,
    sizes,
    visible=None,
    q_data=None,
    k_data=None,
    scale=1.0,
    soft_cap=None,
    slopes=None,
    steps=None,
):
    """Attention of queries to the blocks of keys that their block lists: (y [B, T, H, V], lse [B, H, T] float32).

    q: [B, T, H, K], k: [B, S, Hk, K], v: [B, S, Hk, V], all bfloat16 or all float32; T and S are multiples of sizes
    (bq, bk). walk: begin and count [b, h, T / bq] int32, other [b, h, n] int32 and full [b, h, n] bool, with b of B or
    1 and h of Hk or 1: block o of queries reads the key blocks other[begin[o] : begin[o] + count[o]]; full says that
    all pairs of a tile are visible. visible(i, j, values) says which are, of int32 i [bq, 1] and j [1, bk] and the
    values there of q_data {name: [B or 1, T] int32} and k_data {name: [B or 1, S]}; None: all. slopes: [H] float32,
    - slope |i - j| is added. A row that sees nothing has y = 0 and lse = -inf. steps: bounds of the
    number of steps (`laid`) of the walk and of the transposed one, where they are known though the lists are traced.
    The call must be one that `supports` accepts.
    """
    seen, data, facts = prepared(visible, q_data, k_data, q.shape[1], k.shape[1])
    words = laid(walk, walk[2].shape[2] if steps is None else steps[0])
    if oversized(words):
        options = dict(sizes=sizes, visible=visible, scale=scale, soft_cap=soft_cap, slopes=slopes, steps=steps)
        return by_row(functools.partial(forward, **options), (q, k, v), (walk,), q_data, k_data)
    call = Call.of(q, k, sizes, words.shape, seen, data, scale=scale, soft_cap=soft_cap)
    (batch, time, heads, _), value = q.shape, v.shape[3]
    given = {"q": ("queries", packed(q)), "k": ("keys", packed(k)), "v": ("keys", packed(v)), **facts}
    names, prefetch = list(given), [words.reshape(-1)]
    if slopes is not None:
        prefetch.append(slopes.astype(jnp.float32) * LOG2_E)

    def body(words, *refs):
        slopes, refs = (refs[0], refs[1:]) if len(prefetch) > 1 else (None, refs)
        here, (y, lse, acc, top, total, *own) = dict(zip(names, refs)), refs[len(names) :]
        step = Step(call, words, here, *own)

        @pl.when(step.starts)
        def _():
            acc[...], total[...] = jnp.zeros_like(acc), jnp.zeros_like(total)
            top[...] = jnp.full_like(top, LOWEST)
            step.keep_facts()

        def attend(hides):
            for head in range(call.together):
                key, values = (part(here[name], call.key_head(head), call.key_heads) for name in "kv")
                scores = step.logits(dot(part(here["q"], head, call.together), key, 1, 1), head, slopes)
                scores = step.hide(scores, -jnp.inf) if hides else scores
                before = top[head]
                now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
                p = jnp.exp2(scores - across(now, call.other))
                kept = jnp.exp2(before - now)
                top[head] = now
                total[head] = total[head] * kept + folded(p)
                acc[head] = acc[head] * across(kept, value) + dot(p.astype(values.dtype), values, 1, 0)

        step.over_tile(attend)

        @pl.when(step.ends)
        def _():
            for head in range(call.together):
                some = jnp.sum(total[head], axis=1, keepdims=True)
                one = jnp.where(some > 0, some, 1.0)
                put(y, head, call.together, acc[head] / one)
                sums = jnp.where(some > 0, (top[head] + jnp.log2(one)) * (1 / LOG2_E), -jnp.inf)
                lse[head] = sums.T[:1]

    outputs = [("queries", shaped((batch, time, heads, value), v.dtype))]
    outputs.append(("row", jax.ShapeDtypeStruct((batch, heads, 1, time), jnp.float32)))
    across_lanes = compat.tpu_scratch(call.together, call.own, LANES)
    pairs = math.prod(call.grid) * call.together * math.prod(call.sizes)
    y, lse = compat.tpu_kernel(
        body,
        grid=call.grid,
        parallel=2,
        inputs=[call.spec(*given[name]) for name in names],
        outputs=[call.spec(*entry) for entry in outputs],
        scratch=[compat.tpu_scratch(call.together, call.own, value), across_lanes, across_lanes, *own_facts(call)],
        name="block_sparse_attention_forward",
        flops=2 * pairs * (q.shape[3] + value),
        exponentials=pairs,
        prefetch=prefetch,
    )
    return unpacked(y, heads), lse[:, :, 0]


def prepared(visible, q_data, k_data, time, keys):
    """(mask or None, its data of queries and of keys, what a kernel reads of it by name)."""
    data = dict(q_data or {}), dict(k_data or {})
    if visible is None:
        return None, ({}, {}), {}
    seen, *data = Visibility(visible, *data).prepared(*data, time, keys, CHAIN)
    facts = {}
    for kind, given in zip(("q_facts", "k_facts"), data):
        if given:
            rows = [jnp.asarray(x, jnp.int32) for x in given.values()]
            lead = max(x.shape[0] for x in rows)
            facts[kind] = kind, jnp.stack([jnp.broadcast_to(x, (lead, x.shape[1])) for x in rows], axis=1)
    return seen, data, facts


def oversized(words) -> bool:
    """Whether lists of several rows are too long for scalar memory."""
    return words.shape[0] > 1 and 4 * words.size > SCALAR_BYTES


def by_row(function, arrays, walks, q_data, k_data):
    """function(*arrays, *walks, q_data=, k_data=) on one row of the batch after another."""
    batch = arrays[0].shape[0]
    shared = lambda x: jnp.broadcast_to(jnp.asarray(x), (batch, *x.shape[1:]))
    given = jax.tree.map(
        shared, (tuple(arrays), tuple(tuple(x) for x in walks), dict(q_data or {}), dict(k_data or {}))
    )

    def one(row):
        arrays, walks, q_data, k_data = jax.tree.map(lambda x: x[None], row)
        return function(*arrays, *walks, q_data=q_data, k_data=k_data)

    return jax.tree.map(lambda x: x[:, 0], lax.map(one, given))


def shaped(shape, dtype):
    """What `packed` makes of an array of this shape."""
    return jax.eval_shape(packed, jax.ShapeDtypeStruct(shape, dtype))


def packed(x):
    """[B, T, H, K] as kernels cut it."""
    return jnp.moveaxis(x, 1, 2) if x.shape[3] % LANES else x.reshape(*x.shape[:2], -1)


def unpacked(x, heads):
    """[B, T, H, K] again."""
    return jnp.moveaxis(x, 1, 2) if x.ndim == 4 else x.reshape(*x.shape[:2], heads, -1)


def part(ref, head, heads):
    """A head [n, K] of those of a step."""
    return ref[head] if len(ref.shape) == 3 else ref[:, _columns(ref, head, heads)]


def put(ref, head, heads, value):
    """Writes a head of those of a step."""
    if len(ref.shape) == 3:
        ref[head] = value.astype(ref.dtype)
    else:
        ref[:, _columns(ref, head, heads)] = value.astype(ref.dtype)


def _columns(ref, head, heads):
    width = ref.shape[1] // heads
    return slice(head * width, (head + 1) * width)


def dot(left, right, left_axis, right_axis):
    """The product over one axis of each, accumulated in float32; float32 operands are not rounded."""
    exact = lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(left, right, axes, precision=exact, preferred_element_type=jnp.float32)


def across(column, width):
    """A column that stands in every lane [n, 128], as [n, width]."""
    if width <= LANES:
        return column[:, :width]
    return jnp.concatenate([column] * (width // LANES), axis=1)


def folded(tile):
    """[n, m] as [n, 128], the sums of columns a multiple of 128 apart."""
    return sum(tile[:, at : at + LANES] for at in range(0, tile.shape[1], LANES))


def own_facts(call):
    """Scratch for what the mask asks of an owner's tokens, in every lane."""
    count = len(call.own_names)
    return [compat.tpu_scratch(count, call.own, LANES, dtype=jnp.int32)] if count else []


class Step:
    """A grid step: its entry, and what the mask sees of its tile."""

    def __init__(self, call: Call, words, here, own=None):
        self.call, self.own = call, own
        kinds = ("k_facts", "q_facts") if call.keys_own else ("q_facts", "k_facts")
        self.own_rows, self.other_rows = (here.get(kind) for kind in kinds)
        b, h, p, self.turn = (pl.program_id(axis) for axis in range(4))
        self.head = h * call.turns + self.turn
        self.word = call.word(words, b, h, p)
        self.starts = self.has(FIRST) & (self.turn == 0)
        self.ends = self.has(LAST) & (self.turn == call.turns - 1)

    def has(self, flag):
        return (self.word & flag) != 0

    def keep_facts(self):
        """Before an owner's first entry: what the mask asks of its tokens."""
        for n in range(len(self.call.own_names)):
            self.own[n] = column(self.own_rows[n : n + 1])

    def over_tile(self, body):
        """body(whether pairs are hidden), if the entry is live."""
        if self.call.seen is None:
            pl.when(self.has(LIVE))(functools.partial(body, False))
            return
        full = (self.word & (LIVE | FULL)) == LIVE | FULL
        pl.when(full)(functools.partial(body, False))
        pl.when((self.word & (LIVE | FULL)) == LIVE)(functools.partial(body, True))

    def rows(self):
        """Indices of the owner's tokens, [own, 128]."""
        return (self.word >> OWNER_AT) * self.call.own + lax.broadcasted_iota(jnp.int32, (self.call.own, LANES), 0)

    def columns(self):
        """Indices of the other block's tokens, [1, other]."""
        start = (self.word >> OTHER_AT & (MOST_BLOCKS - 1)) * self.call.other
        return start + lax.broadcasted_iota(jnp.int32, (1, self.call.other), 1)

    def logits(self, products, head=0, slopes=None):
        """Scores, in log2, of products q k."""
        call = self.call
        if call.soft_cap is None:
            scores = products * (call.scale * LOG2_E)
        else:
            scores = jnp.tanh(products * (call.scale / call.soft_cap)) * (call.soft_cap * LOG2_E)
        if slopes is None:
            return scores
        apart = jnp.abs(across(self.rows(), call.other) - self.columns())
        return scores - apart.astype(jnp.float32) * slopes[self.head * call.together + head]

    def hide(self, tile, value):
        """The tile, of rows the owner's tokens, with a value at hidden pairs."""
        call = self.call
        sides = ("keys", "queries") if call.keys_own else ("queries", "keys")
        vectors = [("j", "i") if call.keys_own else ("i", "j"), (self.rows, self.columns)]
        leaves = dict(zip(*vectors))
        leaves |= {name: functools.partial(self.own.__getitem__, n) for n, name in enumerate(call.own_names)}
        leaves |= {name: functools.partial(_row, self.other_rows, n) for n, name in enumerate(call.other_names)}
        shapes = {sides[0]: (call.own, LANES), sides[1]: (1, call.other), "tile": tile.shape}
        seen = Tile(leaves, shapes, sides[0])
        return jnp.where(seen.spread(seen.of(call.seen.root), call.seen.root.kind, "tile"), tile, value)


def column(row):
    """[1, n] as [n, 128], the same in every lane."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _row(ref, n):
    return ref[n : n + 1]


class Tile(Values):
    """Evaluates a mask in a kernel; leaves are functions that give a vector."""

    def __init__(self, leaves, shapes, own):
        """shapes: of vectors of either side and of a tile; own: the side of its rows."""
        super().__init__(leaves)
        self.shapes, self.own = shapes, own

    def made(self, node):
        if node.operation is None:
            return node.value if node.kind == "scalar" else self.leaves[node.value]()
        given = [self.spread(self.of(x), x.kind, node.kind) for x in node.inputs]
        return node.operation.bind(*given, **node.params)

    def spread(self, value, kind, to):
        """The value as one of the kind `to`."""
        if kind == to or to == "scalar":
            return value
        value = jnp.asarray(value)
        truth = value.dtype == jnp.bool_  # spread as numbers
        value = value.astype(jnp.int32) if truth else value
        value = across(value, self.shapes[to][1]) if kind == self.own else jnp.broadcast_to(value, self.shapes[to])
        return value != 0 if truth else value
