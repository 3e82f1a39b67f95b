"""Gradients of attention in which each token lists its own blocks of 64 keys, on Hopper GPUs.

    p_tgj = exp(s_tgj - lse_tg),  s_tgj = scale q_tg k_j,  ds_tgj = p_tgj (dy_tg v_j - delta_tg)
    dq_tg = scale sum_j ds_tgj k_j,  dk_j = scale sum_tg ds_tgj q_tg,  dv_j = sum_tg p_tgj dy_tg

Two kernels, each with the scores made anew, and nothing added in memory: every result is the same in every run. That of
dq walks as the forward does (`token_gpu`). In that of dk and dv a warpgroup keeps 64 keys, and walks the list of the
tokens that chose them, 64 / G tokens a tile, each fetched on its own: no row is wasted. A list that is much longer than
others (all tokens choose the first block) has to be cut into pieces, whose sums XLA adds up in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers
from pallas_kernels.block_sparse_attention import token_gpu
from pallas_kernels.block_sparse_attention.token_gpu import LOG2_E, ROWS, SIZE, Union

SHARED_BYTES = 224 * 1024  # for tiles, of the 227 KiB that a block may have
LISTS = 2  # warpgroups that compute dk and dv
LISTS_FETCHING, LISTS_COMPUTING = 24, 240  # registers of a thread there
F32 = jnp.float32


def backward_queries(q, k, v, lse, dy, delta, union, *, scale):
    """dq [B, T, H, K] bfloat16.

    q, k, v, union and scale as in `token_gpu.forward`, dy [B, T, H, V] bfloat16. lse, delta: [B, H, T] float32, the
    logarithms of the rows' sums of exp(s), -inf for a row that sees nothing, and sum_v dy y less the cotangent of lse.
    """
    (batch, time, heads, width), (_, _, key_heads, value) = q.shape, v.shape
    call = QueryCall(heads // key_heads, width, value, float(scale), cut=token_gpu.cut(k.shape[1]))
    groups = union[0].shape[2]
    missing = groups * call.group - time
    facts = [jnp.pad(x, ((0, 0), (0, 0), (0, missing))) for x in (lse * LOG2_E, delta)]
    facts = [token_gpu.by_tokens(x, call.heads) for x in facts]
    names = "q", "dy", "k", "v", "lse", "delta", "count", "block", "bits"
    by_token = lambda x: x.reshape(batch, time, key_heads, call.heads, x.shape[-1])
    arrays = by_token(q), by_token(dy), k, v, *facts, *(jnp.asarray(x, jnp.int32) for x in union)
    out = jax.ShapeDtypeStruct(arrays[0].shape, q.dtype)

    def body(*refs):
        given, (dq, shared) = dict(zip(names, refs)), refs[len(names) :]
        block = QueryBlock(call, given, dq, shared)
        fetches = compat.fetching_warpgroup(call.cut.units)
        pl.when(fetches)(block.fetch)
        pl.when(jnp.logical_not(fetches))(block.compute)

    dq = compat.kernel(
        body,
        grid=(batch, key_heads, groups),
        names=("row", "head", "group"),
        out=out,
        scratch=[query_memory(call)],
        warpgroups=call.cut.units,
        name="token_block_attention_dq",
        sums_columns=False,
    )(*arrays)
    return dq.reshape(q.shape)


@dataclasses.dataclass(frozen=True)
class QueryCall(token_gpu.Call):
    """The static half of a call for dq."""

    @property
    def stages(self) -> int:
        left = SHARED_BYTES - 2 * self.cut.rows * (self.width + self.value)
        return min(4, left // (2 * SIZE * (self.width + self.value)))


def query_memory(call: QueryCall):
    """Tiles and barriers, by name, as in `token_gpu.shared_memory`."""
    stages = call.stages
    scratch = {
        "q": compat.tile(call.cut.units * call.cut.tiles, ROWS, call.width),
        "dy": compat.tile(call.cut.units * call.cut.tiles, ROWS, call.value),
        "k": compat.tile(stages, SIZE, call.width),
        "v": compat.tile(stages, SIZE, call.value),
        "block": compat.vector(stages, dtype=jnp.int32),
        "bits": compat.vector(stages, dtype=jnp.int32),
        "own": compat.barriers(call.cut.units, call.cut.tiles * 2 * call.tokens),
        "there": compat.barriers(stages, 3),
        "free": compat.barriers(stages, call.cut.units),
    }
    if compat.interpreting():
        scratch["spare"] = compat.tile(call.cut.units, ROWS, SIZE)
    return scratch


class QueryBlock:
    """A thread block of the kernel for dq."""

    def __init__(self, call: QueryCall, given, dq, shared):
        self.call, self.given, self.dq, self.shared = call, given, dq, shared

    def fetch(self):
        call, given, shared = self.call, self.given, self.shared
        compat.registers(call.cut.fetching, more=False)
        sources, targets = ([x[name] for name in ("q", "dy")] for x in (given, shared))
        token_gpu.fetch_rows(call, given, sources, targets, shared["own"])
        token_gpu.fetch_blocks(Union(call, given), given, shared, call.stages)

    def compute(self):
        call, shared = self.call, self.shared
        compat.registers(call.cut.computing, more=True)
        unit = compat.warpgroup(call.cut.units)
        union = Union(call, self.given)
        facts = []
        for tile in range(call.cut.tiles):
            rows = pl.ds(union.token(unit, tile) * call.heads, ROWS)
            mine = (self.given[name].at[union.row, union.head, rows] for name in ("lse", "delta"))
            facts.append([registers.load_rows_of(x) for x in mine])
        compat.wait(shared["own"].at[unit])
        visit = lambda tile, *state: self.visit(unit, *facts[tile], *state)
        starts = ((registers.zeros((ROWS, call.width)),),) * call.cut.tiles
        sums = token_gpu.walk(call, shared, unit, union.count, call.stages, visit, starts)
        union = Union(call, self.given)  # again, so that nothing of it has to be kept through the loop
        for tile, (total,) in enumerate(sums):
            shared["q"][unit * call.cut.tiles + tile] = (total * call.scale).astype(jnp.bfloat16)
        compat.publish()
        token_gpu.store_rows(call, union, shared["q"], self.dq, unit)
        compat.stores_done()

    def visit(self, unit, lse, delta, own, slot, listed, carry):
        """dq / scale of 64 rows after one more block."""
        call, shared = self.call, self.shared
        q, dy, k, v = (shared[name].at[at] for name, at in (("q", own), ("dy", own), ("k", slot), ("v", slot)))
        shape = (ROWS, SIZE)
        seen = token_gpu.lists_block(call, listed)
        # p of a row that does not list the block is 2^-inf; so no row that sees nothing, whose lse is -inf, gets to p.
        lse = registers.spread_rows(jnp.where(seen, lse, jnp.inf), shape)

        def products(add, read):
            add(1, q, registers.transposed(k))
            add(2, dy, registers.transposed(v))
            p = jnp.exp2(read(1, 1) * (call.scale * LOG2_E) - lse)
            ds = p * (read(2, 0) - registers.spread_rows(delta, shape))
            add(0, registers.as_operand(ds, shared["spare"].at[unit] if "spare" in shared else None), k)

        return tuple(registers.accumulate(products, *carry, registers.zeros(shape), registers.zeros(shape))[:1])


def backward_keys(q, k, v, dy, visitors, *, scale):
    """Sums (dk [B, Hk, n, 64, K], dv [B, Hk, n, 64, V]) float32 of each of n lists.

    q, k, v, dy and scale as in `backward_queries`. visitors: (block, begin, count, order [B, Hk, n], token [B, Hk, m]
    int32, rows [B, Hk, 2, m G] float32): the keys of block[o] are listed by token[begin[o] : begin[o] + count[o]],
    where count is a multiple of 64 / G; rows are lse in log2 and delta of those tokens, by heads, with lse inf for a
    token that does not count. order: the lists as they are begun.
    """
    (batch, time, heads, width), (_, _, key_heads, value) = q.shape, v.shape
    call = KeyCall(heads // key_heads, width, value, float(scale))
    names = "q", "dy", "k", "v", "block", "begin", "count", "order", "token", "rows"
    by_token = lambda x: x.reshape(batch, time, key_heads, call.heads, x.shape[-1])
    block, begin, count, order, token, rows = visitors
    lists = order.shape[2]
    if lists % LISTS:
        order = jnp.pad(order, ((0, 0), (0, 0), (0, 1)), constant_values=-1)
    arrays = by_token(q), by_token(dy), k, v, block, begin, count, order, token, rows
    out = [jax.ShapeDtypeStruct((batch, key_heads, lists, SIZE, x.shape[-1]), F32) for x in (k, v)]

    def body(*refs):
        given, (dk, dv, shared) = dict(zip(names, refs)), refs[len(names) :]
        block = KeyBlock(call, given, (dk, dv), shared)
        fetches = compat.fetching_warpgroup(LISTS)
        pl.when(fetches)(block.fetch)
        pl.when(jnp.logical_not(fetches))(block.compute)

    return compat.kernel(
        body,
        grid=(batch, key_heads, order.shape[2] // LISTS),
        names=("row", "head", "pair"),
        out=tuple(out),
        scratch=[key_memory(call)],
        warpgroups=LISTS,
        name="token_block_attention_dkv",
    )(*arrays)


class KeyCall(QueryCall):
    """The static half of a call for dk and dv."""

    @property
    def stages(self) -> int:
        """Tiles of queries that shared memory holds for each warpgroup."""
        width = 2 * (self.width + self.value)
        return min(4, (SHARED_BYTES // LISTS - SIZE * width) // (ROWS * (width + 8)))


def key_memory(call: KeyCall):
    """Tiles and barriers, by name; each warpgroup has a block of keys and a ring of its own."""
    stages = call.stages
    scratch = {
        "k": compat.tile(LISTS, SIZE, call.width),
        "v": compat.tile(LISTS, SIZE, call.value),
        "q": compat.tile(LISTS * stages, ROWS, call.width),
        "dy": compat.tile(LISTS * stages, ROWS, call.value),
        "rows": compat.vector(LISTS * stages, 2, ROWS),
        "own": compat.barriers(LISTS, 2),
        "there": compat.barriers(LISTS * stages, 2 * call.tokens + 1),
        "free": compat.barriers(LISTS * stages),
    }
    if compat.interpreting():
        scratch |= {name: compat.tile(LISTS, SIZE, ROWS) for name in ("spare", "spare_ds")}
    return scratch


class List:
    """A block of keys and a list of tokens, as one warpgroup reads it."""

    def __init__(self, call: KeyCall, given, unit):
        self.row, self.head = lead = lax.axis_index("row"), lax.axis_index("head")
        found = given["order"][(*lead, lax.axis_index("pair") * LISTS + unit)]
        self.real = found >= 0
        self.lead, self.number = lead, jnp.maximum(found, 0)
        block, self.begin, count = (given[name][(*lead, self.number)] for name in ("block", "begin", "count"))
        self.keys = pl.ds(block * SIZE, SIZE)
        self.steps = jnp.where(self.real, count // call.tokens, 0)


class KeyBlock:
    """A thread block of the kernel for dk and dv."""

    def __init__(self, call: KeyCall, given, results, shared):
        self.call, self.given, self.results, self.shared = call, given, results, shared

    def slot(self, unit, n):
        return unit * self.call.stages + lax.rem(n, self.call.stages)

    def fetch(self):
        call, given, shared = self.call, self.given, self.shared
        compat.registers(LISTS_FETCHING, more=False)
        lists = [List(call, given, unit) for unit in range(LISTS)]
        for unit, mine in enumerate(lists):
            for name in ("k", "v"):
                source = given[name].at[mine.row, mine.keys, mine.head]
                compat.fetch(source, shared[name].at[unit], shared["own"].at[unit])

        def step(n, _):
            for unit, mine in enumerate(lists):
                pl.when(n < mine.steps)(lambda unit=unit, mine=mine: self.fetch_tile(unit, mine, n))

        lax.fori_loop(0, jnp.maximum(*(mine.steps for mine in lists)), step, None)
        for unit in range(LISTS):
            for stage in range(call.stages):  # no arrival is left behind
                compat.wait(shared["free"].at[unit * call.stages + stage])

    def fetch_tile(self, unit, mine, n):
        """The rows of the next tokens, token by token."""
        call, given, shared = self.call, self.given, self.shared
        slot = self.slot(unit, n)
        there, first = shared["there"].at[slot], mine.begin + n * call.tokens
        compat.wait(shared["free"].at[slot])
        facts = given["rows"].at[mine.row, mine.head, :, pl.ds(first * call.heads, ROWS)]
        compat.fetch(facts, shared["rows"].at[slot], there)

        def one(place, _):
            token = given["token"][(*mine.lead, first + place)]
            for name in ("q", "dy"):
                rows = shared[name].at[slot, call.rows(place)]
                compat.fetch(given[name].at[mine.row, token, mine.head], rows, there)

        lax.fori_loop(0, call.tokens, one, None)

    def compute(self):
        call, shared = self.call, self.shared
        compat.registers(LISTS_COMPUTING, more=True)
        unit = compat.warpgroup(LISTS)
        for stage in range(call.stages):
            compat.arrive(shared["free"].at[unit * call.stages + stage])
        compat.wait(shared["own"].at[unit])

        def step(n, sums):
            slot = self.slot(unit, n)
            compat.wait(shared["there"].at[slot])
            sums = self.visit(unit, slot, sums)
            compat.publish()  # the rows' facts have been read: TMA may write there
            compat.arrive(shared["free"].at[slot])
            return sums

        starts = registers.zeros((SIZE, call.width)), registers.zeros((SIZE, call.value))
        dk, dv = lax.fori_loop(0, List(call, self.given, unit).steps, step, starts)
        mine = List(call, self.given, unit)  # again, so that nothing of it has to be kept through the loop

        @pl.when(mine.real)
        def _():
            for out, total in zip(self.results, (dk * call.scale, dv)):
                out[mine.row, mine.head, mine.number] = total

    def visit(self, unit, slot, sums):
        """dk / scale and dv of 64 keys after one more tile of queries; tiles here are [keys, queries]."""
        call, shared = self.call, self.shared
        k, v = shared["k"].at[unit], shared["v"].at[unit]
        q, dy, rows = (shared[name].at[slot] for name in ("q", "dy", "rows"))
        shape = (SIZE, ROWS)
        spare = lambda name: shared[name].at[unit] if name in shared else None

        def products(add, read):
            add(2, k, registers.transposed(q))
            add(3, v, registers.transposed(dy))
            lse = registers.spread_columns(registers.load_columns(rows.at[0]), shape)
            p = jnp.exp2(read(2, 1) * (call.scale * LOG2_E) - lse)
            add(1, registers.as_operand(p, spare("spare")), dy)
            gradient = read(3, 1)
            delta = registers.spread_columns(registers.load_columns(rows.at[1]), shape)
            add(0, registers.as_operand(p * (gradient - delta), spare("spare_ds")), q)

        return tuple(registers.accumulate(products, *sums, registers.zeros(shape), registers.zeros(shape))[:2])
