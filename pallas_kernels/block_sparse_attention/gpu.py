"""Softmax attention over lists of key blocks, forward, on Hopper GPUs.

    s_ij = scale q_i . k_j  (then soft cap, slopes),   lse_i = log sum_j exp(s_ij),   y_i = sum_j exp(s_ij - lse_i) v_j

A thread block owns a block of queries of one head: a warpgroup for each 64 of them, and one that walks the block's list
and fetches its tiles of keys and values by TMA. Scores never leave registers; the running maximum and sum are those of
the online softmax (arXiv 1805.02867), in log2. Tiles that are wholly visible pass without a look at the mask. Where
lists are short, a thread block goes through several of them, and fetches the next one's tiles meanwhile.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers
from pallas_kernels.block_sparse_attention import deal
from pallas_kernels.block_sparse_attention.plan import SMS, Visibility

ROWS = 64  # queries of a warpgroup
LOG2_E = math.log2(math.e)
LOWEST = -1e38  # a maximum before the first score: 2^(-inf - LOWEST) is 0, and LOWEST - LOWEST no NaN
SHARED_BYTES = 222 * 1024  # for tiles, of the 227 KiB that a block may have
FETCHING, COMPUTING = 24, 240  # registers of a thread
MANY = 4  # vectors that a mask needs, beyond which a tile of 128 keys has too few registers for it
LONG = 32  # tiles of a list, beyond which a thread block takes one item of work
F32 = jnp.float32


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
    by_head=False,
    own=None,
    workers=None,
    order=None,
):
    """Attention of queries to the blocks of keys that their block lists: (y [B, T, H, V], lse [B, H, T] float32).

    q: [B, T, H, K], k: [B, S, Hk, K], v: [B, S, Hk, V], bfloat16; T and S are multiples of sizes (bq, bk). walk: begin
    and count [b, h, T / bq] int32, other [b, h, n] int32 and full [b, h, n] bool, with b of B or 1 and h of Hk or 1:
    block o of queries reads the key blocks other[begin[o] : begin[o] + count[o]]; full says that all pairs of a tile
    are visible. visible(i, j, values) says which are, of int32 i [bq, 1] and j [1, bk] and the values there of q_data
    {name: [B or 1, T] int32} and k_data {name: [B or 1, S]}; None: all. slopes: [H] float32, - slope |i - j| is added.
    A row that sees nothing has y = 0 and lse = -inf. The call must be one that `plan.supports` accepts.

    by_head: q, k, v and y are [B, H, T, K] instead. own: `plan.own_lists` of the walk, for blocks of 128 queries whose
    halves see different tiles, or None. workers: into how many thread blocks to deal the work, None to choose.
    order: `listed` of the call, where the walk is traced that was known.
    """
    axes = (0, 2, 1, 3) if by_head else (0, 1, 2, 3)
    batch, time, heads, width = (q.shape[axis] for axis in axes)
    _, keys, key_heads, value = (v.shape[axis] for axis in axes)
    bq, bk = sizes
    group = heads // key_heads
    q_data, k_data, seen = dict(q_data or {}), dict(k_data or {}), None
    if visible is not None:
        seen, q_data, k_data = Visibility(visible, q_data, k_data).prepared(q_data, k_data, time, keys)
    begin, count, other, full = (jnp.asarray(x, jnp.int32) for x in walk)
    units = units_of(bq, group)
    step = 64 if len(q_data) + len(k_data) > MANY else bk
    call = Call(units, bq, step, bk // step, batch, heads, group, time // bq, seen, scale, soft_cap, by_head)
    workers = workers_of(call, full.shape[-1], workers if order is None else order.shape[0])
    call = dataclasses.replace(call, workers=workers, stages=stages_for(units, step, width, value, len(k_data)))
    order = shared_out(call, walk[1], bk) if order is None else order
    if order is not None:
        call = dataclasses.replace(call, turns=order.shape[1] - 1)
    given = {"q": q, "k": k, "v": v, "begin": begin, "count": count, "entries": other * 2 + full}
    given |= {"q_data": q_data, "k_data": k_data}
    if order is not None:
        given["order"] = jnp.asarray(order)
    if slopes is not None:
        given["slopes"] = slopes.astype(jnp.float32) * LOG2_E
    if own is not None and call.parts == 1 and bq > ROWS:
        given["own"] = jax.tree.map(jnp.asarray, own)
    leaves, tree = jax.tree.flatten(given)
    shape = (batch, heads, time, value) if by_head else (batch, time, heads, value)
    out = jax.ShapeDtypeStruct(shape, v.dtype), jax.ShapeDtypeStruct((batch, heads, time), F32)

    def body(*refs):
        inputs, (y, lse, shared) = jax.tree.unflatten(tree, refs[: len(leaves)]), refs[len(leaves) :]
        block = Block(call, inputs, y, lse, shared)
        pl.when(lax.axis_index("warpgroup") == units)(block.fetch)
        pl.when(lax.axis_index("warpgroup") < units)(block.compute)

    return compat.kernel(
        body,
        grid=(workers,),
        names=("worker",),
        out=out,
        scratch=[shared_memory(call, width, value, k_data)],
        warpgroups=units,
        name="block_sparse_attention_forward",
    )(*leaves)


def units_of(rows, group):
    """Computing warpgroups of a thread block."""
    return 2 if rows > ROWS or group % 2 == 0 else 1


def workers_of(call, entries, workers=None):
    """Thread blocks, for so many entries of a row's lists."""
    return workers or (call.items if entries > LONG * call.blocks else min(call.items, SMS))


def listed(q, k, walk, sizes):
    """Which items of a call thread blocks take, [thread blocks, turns], of q [B, T, H, K]; None: that is not listed."""
    group = q.shape[2] // k.shape[2]
    call = Call(units_of(sizes[0], group), sizes[0], sizes[1], 1, q.shape[0], q.shape[2], group, walk[0].shape[2])
    call = dataclasses.replace(call, workers=workers_of(call, walk[3].shape[-1]))
    return shared_out(call, walk[1], sizes[1])


def shared_out(call, count, keys):
    """`deal.shared_out` of a call's items, where the lengths of lists [b, h, nq] are known and items not too many."""
    if not isinstance(count, np.ndarray) or not call.workers < call.items <= deal.LISTED * call.workers:
        return None
    row, heads, block = call.place(np.arange(call.items))
    lists = [row * (count.shape[0] > 1), heads // call.group * (count.shape[1] > 1)]
    return deal.shared_out(count[(*lists, block)] * keys + deal.STARTING, 2 * call.workers, call.workers)


def shared_memory(call, width, value, k_data):
    """Tiles and barriers, by name: what is `there` has come, what is `free` has been used by all warpgroups."""
    units, stages, bk = call.units, call.stages, call.keys
    scratch = {
        "q": compat.tile(units, ROWS, width),
        "k": compat.tile(stages, bk, width),
        "v": compat.tile(stages, bk, value),
        "y": compat.tile(units, ROWS, value),
        "lse": compat.vector(units, ROWS),
        "k_data": {name: compat.vector(stages, bk, dtype=jnp.int32) for name in k_data},
        "q_there": compat.barriers(units),
        "q_free": compat.barrier(units),
        "k_there": compat.barriers(stages, 1 + len(k_data)),
        "v_there": compat.barriers(stages),
        "k_free": compat.barriers(stages, units),
        "v_free": compat.barriers(stages, units),
    }
    if compat.interpreting():
        scratch["p"] = compat.tile(units, ROWS, bk)
    return scratch


def stages_for(units, keys, width, value, vectors) -> int:
    """Tiles of keys, and of values, that shared memory holds."""
    left = SHARED_BYTES - 2 * units * ROWS * (width + value)
    return max(2, min(4, left // (keys * (2 * (width + value) + 4 * vectors))))


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of a call."""

    units: int  # computing warpgroups
    rows: int  # queries of a block
    keys: int  # of a tile
    parts: int  # tiles of a listed block
    batch: int
    heads: int
    group: int  # query heads to a key head
    blocks: int  # of queries
    seen: Visibility | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    by_head: bool = False
    workers: int = 1  # thread blocks
    stages: int = 2  # tiles of keys, and of values, in shared memory
    turns: int | None = None  # of a thread block, where it is listed which items each takes

    def part(self, ref, row, tokens, head):
        """Tokens of a head, [n, K], of an array of queries, keys, values or outputs."""
        return ref.at[(row, head, tokens) if self.by_head else (row, tokens, head)]

    @property
    def together(self) -> int:
        """Heads of an item of work: two of one key head where a block of queries is a single warpgroup's."""
        return self.units * ROWS // self.rows

    @property
    def items(self) -> int:
        """Of work: a block of queries each."""
        return self.batch * self.heads // self.together * self.blocks

    @property
    def rounds(self) -> int:
        """Items that a thread block goes through, at most."""
        return self.turns or -(-self.items // self.workers)

    def place(self, index):
        """(row, first head, block of queries) of an item."""
        heads, row = self.heads // self.together, index // self.blocks
        # With causal lists the longest come first.
        return row // heads, row % heads * self.together, self.blocks - 1 - index % self.blocks


class Item:
    """A block of queries of a head, or of two, and its list."""

    def __init__(self, call: Call, given, turn):
        self.call, self.given = call, given
        worker = lax.axis_index("worker")
        if call.turns is not None:
            index = given["order"][worker, turn]
            self.real = index >= 0
            index = jnp.maximum(index, 0)
        else:
            # To and fro, so that where lists grow from item to item all workers get the same.
            worker = jnp.where(turn % 2 == 1, call.workers - 1 - worker, worker)
            index = turn * call.workers + worker
            self.real = index < call.items
            index = jnp.minimum(index, call.items - 1)
        self.row, self.heads, self.block = call.place(index)
        self.key_head = self.heads // call.group
        lists = given["begin"].shape
        self.list = self.row if lists[0] > 1 else 0, self.key_head if lists[1] > 1 else 0
        self.begin, count = (given[name][(*self.list, self.block)] for name in ("begin", "count"))
        self.count = jnp.where(self.real, count * call.parts, 0)

    def entry(self, n):
        """Number of the nth tile's block of keys, twice, and whether it is full."""
        return self.given["entries"][(*self.list, self.begin + n // self.call.parts)]

    def own(self, unit):
        """(number, place(n), entry(n)) of the tiles that a warpgroup visits."""
        if "own" not in self.given:
            return self.count, lambda n: n, self.entry
        lists, mine = self.given["own"], (*self.list, unit)
        at = lambda name: lambda n: lists[name][(*mine, self.begin + n)]
        return lists["count"][(*mine, self.block)], at("place"), at("entry")

    def keys(self, entry, n):
        """Index of the nth tile's first key."""
        call = self.call
        return (entry // 2 * call.parts + n % call.parts) * call.keys

    def head(self, unit):
        return self.heads + (unit if self.call.together > 1 else 0)

    def first(self, unit):
        """Index of a warpgroup's first query."""
        return self.block * self.call.rows + (0 if self.call.together > 1 else unit * ROWS)


class Block:
    """A thread block: the work of its warpgroups."""

    def __init__(self, call: Call, given, y, lse, shared):
        self.call, self.given, self.y, self.lse, self.shared = call, given, y, lse, shared

    def fetch(self):
        """Queries, tiles of keys and values in the order of the lists, as shared memory comes free."""
        call, given, shared = self.call, self.given, self.shared
        compat.registers(FETCHING, more=False)

        def await_free(name, n):
            """Until the tile has been used that lay where the nth one goes."""
            pl.when(n >= call.stages)(lambda: compat.wait(shared[f"{name}_free"].at[lax.rem(n, call.stages)]))

        def queries(item, found):
            pl.when(found > 0)(lambda: compat.wait(shared["q_free"]))
            for unit in range(call.units):
                source = call.part(given["q"], item.row, pl.ds(item.first(unit), ROWS), item.head(unit))
                compat.fetch(source, shared["q"].at[unit], shared["q_there"].at[unit])

        def tiles(item, before):
            def step(n, entry):
                slot = lax.rem(before + n, call.stages)
                later = item.entry(jnp.minimum(n + 1, item.count - 1))
                place = pl.ds(item.keys(entry, n), call.keys)

                def bring(name, there):
                    compat.fetch(call.part(given[name], item.row, place, item.key_head), shared[name].at[slot], there)

                await_free("k", before + n)
                there = shared["k_there"].at[slot]
                bring("k", there)
                for name, values in given["k_data"].items():
                    row = item.row if values.shape[0] > 1 else 0
                    compat.fetch(values.at[row, place], shared["k_data"][name].at[slot], there)
                await_free("v", before + n)
                there = shared["v_there"].at[slot]
                bring("v", there)
                return later

            lax.fori_loop(0, item.count, step, item.entry(0))

        def turn(index, carry):
            found, before = carry
            item = Item(call, given, index)

            @pl.when(item.count > 0)
            def _():
                queries(item, found)
                tiles(item, before)

            return found + jnp.where(item.count > 0, 1, 0), before + item.count

        found, total = lax.fori_loop(0, call.rounds, turn, (jnp.int32(0), jnp.int32(0)))
        # No barrier is left with an arrival that nobody has seen.
        pl.when(found > 0)(lambda: compat.wait(shared["q_free"]))
        for left in range(call.stages):
            await_free("k", total + left)
            await_free("v", total + left)

    def compute(self):
        """64 queries of each item."""
        call, shared = self.call, self.shared
        compat.registers(COMPUTING, more=True)
        unit = compat.warpgroup(call.units)
        y, lse = shared["y"].at[unit], shared["lse"].at[unit]

        def turn(index, before):
            item = Item(call, self.given, index)

            @pl.when(item.count > 0)
            def _():
                acc, top, total = Rows(item, shared, unit, before).walk()
                some = total > 0
                compat.stores_read()
                y[...] = (acc * registers.spread_rows(jnp.where(some, 1 / total, 0.0), acc.shape)).astype(y.dtype)
                lse[...] = jnp.where(some, (top + jnp.log2(total)) / LOG2_E, -jnp.inf)

            @pl.when(item.count == 0)
            def _():
                compat.stores_read()
                y[...] = registers.zeros(y.shape).astype(y.dtype)
                lse[...] = registers.rows(ROWS, -jnp.inf)

            compat.publish()
            queries, head = pl.ds(item.first(unit), ROWS), item.head(unit)
            ragged = item.real if call.turns is not None or call.items % call.workers else None
            compat.store(y, call.part(self.y, item.row, queries, head), ragged)
            compat.store(lse, self.lse.at[item.row, head, queries], ragged)
            return before + item.count

        lax.fori_loop(0, call.rounds, turn, jnp.int32(0))
        compat.stores_done()


class Rows:
    """A warpgroup's queries on their walk through the list; `before` counts the tiles of earlier items."""

    def __init__(self, item: Item, shared, unit, before):
        self.item, self.call, self.given, self.shared = item, item.call, item.given, shared
        self.unit, self.before = unit, before
        self.head, self.first = item.head(unit), item.first(unit)
        self.number, self.place, self.entry = item.own(unit)
        self.q = shared["q"].at[unit]

    def slot(self, n):
        """Where the list's nth tile lies."""
        return lax.rem(self.before + n, self.call.stages)

    def keys(self, slot):
        return registers.transposed(self.shared["k"].at[slot])

    def free(self, name, slot):
        compat.arrive(self.shared[f"{name}_free"].at[slot])

    def pass_over(self, first, last):
        """Tiles of the list that this warpgroup does not see."""
        if "own" not in self.given:
            return

        def step(n, _):
            for name in ("k", "v"):
                compat.wait(self.shared[f"{name}_there"].at[self.slot(n)])
                self.free(name, self.slot(n))

        lax.fori_loop(first, last, step, None)

    def walk(self):
        """(weighted sum of values [64, V], maximum in log2 and sum of weights [64]) over a list that is not empty.

        The scores of the next tile are made together with this one's sum of values: the tensor cores have work while
        the other warpgroup makes its exponentials.
        """
        call, shared = self.call, self.shared
        held = bool(shared["k_data"])  # data of keys is read after the product, and its slot kept as long
        last = self.number - 1
        opening = self.slot(self.place(0))
        compat.wait(shared["q_there"].at[self.unit])
        self.pass_over(0, self.place(0))
        compat.wait(shared["k_there"].at[opening])
        scores = registers.matmul((self.q, self.keys(opening)))
        if not held:
            self.free("k", opening)

        def step(n, carry, more=True):
            acc, top, total, scores = carry
            place = self.place(n)
            slot = self.slot(place)
            following = self.place(n + 1) if more else self.item.count
            later = self.slot(following)
            scores = self.seen(self.logits(scores, n), n, slot)
            if held:
                compat.reads_done()
                self.free("k", slot)
            factor = 1.0 if self.bent else call.scale * LOG2_E
            now = jnp.maximum(top, jnp.max(scores, axis=1) * factor)
            kept = jnp.exp2(top - now)
            weights = jnp.exp2(scores * factor - registers.spread_rows(now, scores.shape))
            acc = acc * registers.spread_rows(kept, acc.shape)
            total = total * kept + jnp.sum(weights, axis=1)
            p = registers.as_operand(weights, shared["p"].at[self.unit] if "p" in shared else None)
            acc, total, now, p = registers.together(acc, total, now, p)
            compat.wait(shared["v_there"].at[slot])
            jobs = [([(p, shared["v"].at[slot])], acc)]
            if more:
                self.pass_over(place + 1, following)
                compat.wait(shared["k_there"].at[later])
                jobs.append(([(self.q, self.keys(later))], None))
            acc, *scores = registers.matmuls(*jobs)
            self.free("v", slot)
            if more and not held:
                self.free("k", later)
            if not more:
                self.pass_over(place + 1, following)
            return acc, now, total, *scores

        start = registers.zeros((ROWS, shared["v"].shape[2])), registers.rows(ROWS, LOWEST), registers.rows(ROWS, 0.0)
        carry = lax.fori_loop(0, last, step, (*start, scores))
        compat.arrive(shared["q_free"])
        return step(last, carry, more=False)

    @property
    def bent(self) -> bool:
        """Whether scores are more than a product with a factor."""
        return self.call.soft_cap is not None or "slopes" in self.given

    def queries(self, n):
        """Indices of the queries."""
        return self.first + registers.row_places(ROWS)

    def keys_of(self, n):
        """Indices of the nth tile's keys."""
        return self.item.keys(self.entry(n), n) + registers.column_places(self.call.keys)

    def logits(self, scores, n):
        """Scores of the nth tile, scaled, in log2; as they are where a factor does it."""
        call = self.call
        if call.soft_cap is not None:
            # tanh(x) = 1 - 2 / (1 + e^2x): the GPU's own has 11 bits.
            grown = jnp.exp2(scores * (2 * LOG2_E * call.scale / call.soft_cap))
            scores = (1 - 2 / (1 + grown)) * (call.soft_cap * LOG2_E)
        elif self.bent:
            scores = scores * (call.scale * LOG2_E)
        if "slopes" in self.given:
            i = registers.spread_rows(self.queries(n), scores.shape)
            j = registers.spread_columns(self.keys_of(n), scores.shape)
            scores = scores - jnp.abs(i - j).astype(F32) * self.given["slopes"][self.head]
        return scores

    def seen(self, scores, n, slot):
        """The scores, -inf where the mask hides a pair."""
        call, row = self.call, self.item.row
        if call.seen is None:
            return scores

        def look(scores):
            values = {}
            for name, x in self.given["q_data"].items():
                mine = x.at[row if x.shape[0] > 1 else 0, pl.ds(self.first, ROWS)]
                values[name] = functools.partial(registers.load_rows_of, mine)
            for name, tiles in self.shared["k_data"].items():
                values[name] = functools.partial(registers.load_columns, tiles.at[slot])
            i, j = (functools.partial(place, n) for place in (self.queries, self.keys_of))
            return jnp.where(call.seen(i, j, values, (ROWS, call.keys)), scores, -jnp.inf)

        return lax.cond(self.entry(n) % 2 == 1, lambda scores: scores, look, scores)
