"""Softmax attention over lists of key blocks, forward, on Hopper GPUs.

    s_ij = scale q_i . k_j  (then soft cap, slopes),   lse_i = log sum_j exp(s_ij),   y_i = sum_j exp(s_ij - lse_i) v_j

A thread block owns a block of queries of one head: a warpgroup for each 64 of them, and one that walks the block's list
and fetches its tiles of keys and values by TMA. Scores never leave registers; the running maximum and sum are those of
the online softmax (arXiv 1805.02867), in log2. Where there are two computing warpgroups they take turns at the tensor
cores: one multiplies while the other makes its exponentials (arXiv 2407.08608). Tiles that are wholly visible pass
without a look at the mask.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.block_sparse_attention.plan import Visibility

ROWS = 64  # queries of a warpgroup
LOG2_E = math.log2(math.e)
LOWEST = -1e38  # a maximum before the first score: 2^(-inf - LOWEST) is 0, and LOWEST - LOWEST no NaN
FETCHING, COMPUTING = 24, 240  # registers of a thread
F32 = jnp.float32


def forward(q, k, v, walk, *, sizes, visible=None, q_data=None, k_data=None, scale=1.0, soft_cap=None, slopes=None):
    """Attention of queries to the blocks of keys that their block lists: (y [B, T, H, V], lse [B, H, T] float32).

    q: [B, T, H, K], k: [B, S, Hk, K], v: [B, S, Hk, V], bfloat16; T and S are multiples of sizes (bq, bk). walk: begin
    and count [b, h, T / bq] int32, other [b, h, n] int32 and full [b, h, n] bool, with b of B or 1 and h of Hk or 1:
    block o of queries reads the key blocks other[begin[o] : begin[o] + count[o]]; full says that all pairs of a tile
    are visible. visible(i, j, values) says which are, of int32 i [bq, 1] and j [1, bk] and the values there of q_data
    {name: [B or 1, T] int32} and k_data {name: [B or 1, S]}; None: all. slopes: [H] float32, - slope |i - j| is added.
    A row that sees nothing has y = 0 and lse = -inf. The call must be one that `plan.supports` accepts.
    """
    batch, time, heads, width = q.shape
    key_heads, value = v.shape[2:]
    bq, bk = sizes
    group = heads // key_heads
    q_data, k_data = dict(q_data or {}), dict(k_data or {})
    begin, count, other, full = (jnp.asarray(x, jnp.int32) for x in walk)
    call = Call(
        units=2 if bq > ROWS or group % 2 == 0 else 1,
        rows=bq,
        keys=bk,
        group=group,
        blocks=time // bq,
        seen=None if visible is None else Visibility(visible, tuple(q_data), tuple(k_data)),
        scale=scale,
        soft_cap=soft_cap,
    )
    given = {"q": q, "k": k, "v": v, "begin": begin, "count": count, "entries": other * 2 + full}
    given |= {"q_data": q_data, "k_data": k_data}
    if slopes is not None:
        given["slopes"] = slopes.astype(jnp.float32) * LOG2_E
    leaves, tree = jax.tree.flatten(given)
    units, stages = call.units, call.stages
    out = jax.ShapeDtypeStruct((batch, time, heads, value), v.dtype), jax.ShapeDtypeStruct((batch, heads, time), F32)
    scratch = {
        "q": compat.tile(units, ROWS, width),
        "k": compat.tile(stages, bk, width),
        "v": compat.tile(stages, bk, value),
        "y": compat.tile(units, ROWS, value),
        "lse": compat.vector(units, ROWS),
        "k_data": {name: compat.vector(stages, bk, dtype=jnp.int32) for name in k_data},
        "q_there": compat.barriers(units),
        "k_there": compat.barriers(stages, 1 + len(k_data)),
        "v_there": compat.barriers(stages),
        "k_free": compat.barriers(stages, units),
        "v_free": compat.barriers(stages, units),
        "turn": compat.barrier(units),
    }
    if compat.interpreting():
        scratch["p"] = compat.tile(units, ROWS, bk)

    def body(*refs):
        inputs, (y, lse, shared) = jax.tree.unflatten(tree, refs[: len(leaves)]), refs[len(leaves) :]
        Block(call, inputs, y, lse, shared).run()

    return compat.kernel(
        body,
        grid=(batch, heads // call.heads, call.blocks),
        names=("row", "heads", "block"),
        out=out,
        scratch=[scratch],
        warpgroups=units,
        name="block_sparse_attention_forward",
    )(*leaves)


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of a call."""

    units: int  # computing warpgroups
    rows: int  # queries of a block
    keys: int  # and keys
    group: int  # query heads to a key head
    blocks: int  # of queries
    seen: Visibility | None
    scale: float
    soft_cap: float | None
    stages: int = 2  # tiles of keys, and of values, in shared memory

    @property
    def heads(self) -> int:
        """Heads of a thread block: two of one key head where a block of queries is a single warpgroup's."""
        return self.units * ROWS // self.rows


class Block:
    """A thread block: the work of its warpgroups."""

    def __init__(self, call: Call, given, y, lse, shared):
        self.call, self.given, self.y, self.lse, self.shared = call, given, y, lse, shared
        self.row, self.heads = lax.axis_index("row"), lax.axis_index("heads")
        self.block = call.blocks - 1 - lax.axis_index("block")  # with causal lists the longest come first
        self.key_head = self.heads * call.heads // call.group
        lists = given["begin"].shape
        self.list = self.row if lists[0] > 1 else 0, self.key_head if lists[1] > 1 else 0
        self.begin, self.count = (given[name][(*self.list, self.block)] for name in ("begin", "count"))

    def entry(self, n):
        """Number of the nth key block, twice, and whether its tile is full."""
        return self.given["entries"][(*self.list, self.begin + n)]

    def run(self):
        pl.when(lax.axis_index("warpgroup") == self.call.units)(self.fetch)
        pl.when(lax.axis_index("warpgroup") < self.call.units)(self.compute)

    def fetch(self):
        """Tiles of keys and values, in the order of the list, as shared memory comes free."""
        call, given, shared = self.call, self.given, self.shared
        compat.registers(FETCHING, more=False)

        def await_free(name, n):
            """Until the tile has been used that lay where the nth one goes."""
            pl.when(n >= call.stages)(lambda: compat.wait(shared[f"{name}_free"].at[lax.rem(n, call.stages)]))

        def step(n, entry):
            slot = lax.rem(n, call.stages)
            later = self.entry(jnp.minimum(n + 1, self.count - 1))
            place = pl.ds(entry // 2 * call.keys, call.keys)

            def bring(name):
                compat.fetch(given[name].at[self.row, place, self.key_head], shared[name].at[slot], there(name))

            there = lambda name: shared[f"{name}_there"].at[slot]
            await_free("k", n)
            bring("k")
            for name, values in given["k_data"].items():
                row = self.row if values.shape[0] > 1 else 0
                compat.fetch(values.at[row, place], shared["k_data"][name].at[slot], there("k"))
            await_free("v", n)
            bring("v")
            return later

        @pl.when(self.count > 0)
        def _():
            lax.fori_loop(0, self.count, step, self.entry(0))
            for left in range(call.stages):  # no barrier is left with an arrival that nobody has seen
                await_free("k", self.count + left)
                await_free("v", self.count + left)

    def compute(self):
        """64 queries of a head."""
        call, shared = self.call, self.shared
        compat.registers(COMPUTING, more=True)
        unit = compat.warpgroup(call.units)
        head = self.heads * call.heads + (unit if call.heads > 1 else 0)
        first = self.block * call.rows + (0 if call.heads > 1 else unit * ROWS)
        queries = pl.ds(first, ROWS)
        y, lse = shared["y"].at[unit], shared["lse"].at[unit]

        @pl.when(self.count > 0)
        def _():
            mine = Rows(self, unit, head, first)
            there = shared["q_there"].at[unit]
            compat.fetch(self.given["q"].at[self.row, queries, head], mine.q, there)
            compat.wait(there)
            acc, top, total = mine.walk()
            some = total > 0
            y[...] = (acc * compat.spread_rows(jnp.where(some, 1 / total, 0.0), acc.shape)).astype(y.dtype)
            lse[...] = jnp.where(some, (top + jnp.log2(total)) / LOG2_E, -jnp.inf)

        @pl.when(self.count == 0)
        def _():
            y[...] = compat.zeros(y.shape).astype(y.dtype)
            lse[...] = compat.rows(ROWS, -jnp.inf)

        compat.publish()
        compat.store(y, self.y.at[self.row, queries, head])
        compat.store(lse, self.lse.at[self.row, head, queries])
        compat.stores_done()


class Rows:
    """A warpgroup's queries on their walk through the list."""

    def __init__(self, block: Block, unit, head, first):
        self.block, self.call, self.shared = block, block.call, block.shared
        self.unit, self.head, self.first = unit, head, first
        self.q = self.shared["q"].at[unit]

    def turn(self):
        """Gives the tensor cores to the other warpgroup, or takes them from it."""
        if self.call.units > 1:
            compat.arrive(self.shared["turn"])
            compat.wait(self.shared["turn"])

    def keys(self, slot):
        return compat.transposed(self.shared["k"].at[slot])

    def free(self, name, slot):
        compat.arrive(self.shared[f"{name}_free"].at[slot])

    def walk(self):
        """(weighted sum of values [64, V], maximum in log2 and sum of weights [64]) over a list that is not empty.

        The scores of the next tile are made together with this one's sum of values.
        """
        call, shared = self.call, self.shared
        held = bool(shared["k_data"])  # data of keys is read after the product, and its slot kept as long
        last = self.block.count - 1
        compat.wait(shared["k_there"].at[0])
        pl.when(self.unit == 1)(self.turn)
        scores = compat.matmul((self.q, self.keys(0)), issued=self.turn)
        if not held:
            self.free("k", 0)

        def step(n, carry, more=True):
            acc, top, total, scores = carry
            slot, later = lax.rem(n, call.stages), lax.rem(n + 1, call.stages)
            scores = self.seen(self.logits(scores, n), n, slot)
            if held:
                self.free("k", slot)
            factor = 1.0 if self.bent else call.scale * LOG2_E
            now = jnp.maximum(top, jnp.max(scores, axis=1) * factor)
            kept = jnp.exp2(top - now)
            weights = jnp.exp2(scores * factor - compat.spread_rows(now, scores.shape))
            acc = acc * compat.spread_rows(kept, acc.shape)
            total = total * kept + jnp.sum(weights, axis=1)
            p = compat.as_operand(weights, shared["p"].at[self.unit] if "p" in shared else None)
            acc, total, now, p = compat.together(acc, total, now, p)
            compat.wait(shared["v_there"].at[slot])
            jobs = [([(p, shared["v"].at[slot])], acc)]
            if more:
                compat.wait(shared["k_there"].at[later])
                jobs.append(([(self.q, self.keys(later))], None))
            self.turn()
            acc, *scores = compat.matmuls(*jobs, issued=self.turn)
            self.free("v", slot)
            if more and not held:
                self.free("k", later)
            return acc, now, total, *scores

        start = compat.zeros((ROWS, shared["v"].shape[2])), compat.rows(ROWS, LOWEST), compat.rows(ROWS, 0.0)
        carry = lax.fori_loop(0, last, step, (*start, scores))
        carry = step(last, carry, more=False)
        if call.units > 1:
            pl.when(self.unit == 0)(self.turn)
        return carry

    @property
    def bent(self) -> bool:
        """Whether scores are more than a product with a factor."""
        return self.call.soft_cap is not None or "slopes" in self.block.given

    def queries(self, n):
        """Indices of the queries."""
        return self.first + compat.row_places(ROWS)

    def keys_of(self, n):
        """Indices of the nth block's keys."""
        return self.block.entry(n) // 2 * self.call.keys + compat.column_places(self.call.keys)

    def logits(self, scores, n):
        """Scores of the nth block, scaled, in log2; as they are where a factor does it."""
        call = self.call
        if call.soft_cap is not None:
            # tanh(x) = 1 - 2 / (1 + e^2x): the GPU's own has 11 bits.
            grown = jnp.exp2(scores * (2 * LOG2_E * call.scale / call.soft_cap))
            scores = (1 - 2 / (1 + grown)) * (call.soft_cap * LOG2_E)
        elif self.bent:
            scores = scores * (call.scale * LOG2_E)
        if "slopes" in self.block.given:
            i = compat.spread_rows(self.queries(n), scores.shape)
            j = compat.spread_columns(self.keys_of(n), scores.shape)
            scores = scores - jnp.abs(i - j).astype(F32) * self.block.given["slopes"][self.head]
        return scores

    def seen(self, scores, n, slot):
        """The scores, -inf where the mask hides a pair."""
        call, given, row = self.call, self.block.given, self.block.row
        if call.seen is None:
            return scores

        def look(scores):
            values = {}
            for name, x in given["q_data"].items():
                values[name] = compat.load_rows_of(x.at[row if x.shape[0] > 1 else 0, pl.ds(self.first, ROWS)])
            for name, tiles in self.shared["k_data"].items():
                values[name] = compat.load_columns(tiles.at[slot])
            i, j = (functools.partial(place, n) for place in (self.queries, self.keys_of))
            return jnp.where(call.seen(i, j, values, (ROWS, call.keys)), scores, -jnp.inf)

        return lax.cond(self.block.entry(n) % 2 == 1, lambda scores: scores, look, scores)
