"""Softmax attention in which each token lists its own blocks of 64 keys, forward, on Hopper GPUs.

    s_tgj = scale q_tg . k_j,   lse_tg = log sum_j exp(s_tgj),   y_tg = sum_j exp(s_tgj - lse_tg) v_j

over the keys j of the blocks that token t lists. The G query heads of a key head share a list (arXiv 2502.11089). A
thread block owns some neighbouring tokens of a key head, and walks the union of their lists: what several of them
chose is fetched once. Beside each block of the union stand bits: who of the tokens listed it.

Rows of a tile are the heads of 64 / G tokens. A warpgroup passes over a block that none of its tile's tokens listed,
and gives the rows of those that did not weights of 0. The tensor cores work in vain where neighbours disagree, by up to
64 / G. The other way, keys as rows and the heads of one token as columns, works in vain nowhere, but reads each block
from shared memory once for each token, which takes as long, and has to reduce across warps.
docs/attention.md counts both, and the order by key blocks, which writes sums to memory. L2 is what binds.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers
from pallas_kernels.block_sparse_attention import plan

SIZE = 64  # keys of a block
ROWS = 64  # of a tile: the heads of some tokens
HEADS = 8, 16, 32, 64  # G, query heads to a key head: one bit a token, 32 at most
STAGES = 6  # blocks of keys and values in shared memory, at most
LOG2_E = math.log2(math.e)
LOWEST = -1e38  # a maximum before the first score: 2^(-inf - LOWEST) is 0, and LOWEST - LOWEST no NaN
SHARED_BYTES = 222 * 1024  # for tiles, of the 227 KiB that a block may have
LONG = 16384  # keys, whole blocks, above which unions are so long that L2 binds
F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Cut:
    """How a thread block divides its rows."""

    units: int  # warpgroups that compute
    tiles: int  # of each
    fetching: int  # registers of a thread
    computing: int

    @property
    def rows(self) -> int:
        return self.units * self.tiles * ROWS


# Three warpgroups of one tile keep the tensor cores busier than two of two, of which one makes products while the other
# makes weights; but fewer neighbours share what is fetched.
MANY, WIDE = Cut(3, 1, 32, 160), Cut(2, 2, 24, 240)


def cut(keys: int) -> Cut:
    """The cut for so many keys."""
    return WIDE if keys > LONG else MANY


def supports(q, k, v, *, scale=1.0, capability=None) -> str | None:
    """Why the kernels cannot run this call, in a few words; None if they can. Takes arrays or shapes with dtypes.

    capability: (major, minor) of the GPU that will run it; None asks the default device.
    """
    reason = plan.unfit(q, k, v, scale, capability)
    if reason is not None:
        return reason
    if q.shape[2] // k.shape[2] not in HEADS:
        return f"needs {HEADS} query heads to a key head, got H={q.shape[2]}, Hk={k.shape[2]}"
    if k.shape[1] % SIZE:
        return f"needs whole blocks of {SIZE} keys, got S={k.shape[1]}"
    return None


def group_tokens(q, k) -> int:
    """Tokens of a thread block, which share a union of lists."""
    return cut(k.shape[1]).rows // (q.shape[2] // k.shape[2])


def forward(q, k, v, union, own=None, *, scale):
    """(y [B, T, H, V] bfloat16, lse [B, H, T] float32) of queries over the blocks of keys that their tokens list.

    q [B, T, H, K], k [B, S, Hk, K], v [B, S, Hk, V] bfloat16; S is a multiple of 64. union: (count [b, h, m],
    block [b, h, m, c], bits [b, h, m, c]) int32, b of B or 1, h of Hk or 1, m = ceil(T / n) with n = `group_tokens`:
    tokens o n to o n + n - 1 read the key blocks block[o, : count[o]], token o n + i those entries whose bit i is set.
    Bits of tokens past the end are 0. A token that lists nothing has y = 0 and lse = -inf. own [b, h, m] int32 or None:
    tokens whose bits are set there see the block of keys of their own indices too, up to themselves; S >= T.
    The call must be one that `supports` accepts.
    """
    (batch, time, heads, width), (_, _, key_heads, value) = q.shape, v.shape
    call, groups = (
        Call(heads // key_heads, width, value, float(scale), own is not None, cut(k.shape[1])),
        union[0].shape[2],
    )
    names = ["q", "k", "v", "count", "block", "bits"]
    lists = *union, *(() if own is None else (own,))
    arrays = q.reshape(batch, time, key_heads, call.heads, width), k, v, *(jnp.asarray(x, jnp.int32) for x in lists)
    if own is not None:
        names.append("own")
    out = (
        jax.ShapeDtypeStruct((batch, time, key_heads, call.heads, value), v.dtype),
        jax.ShapeDtypeStruct((batch, key_heads, groups * call.cut.rows), F32),
    )

    def body(*refs):
        given, (y, lse, shared) = dict(zip(names, refs)), refs[len(names) :]
        block = Block(call, given, y, lse, shared)
        fetches = compat.fetching_warpgroup(call.cut.units)
        pl.when(fetches)(block.fetch)
        pl.when(jnp.logical_not(fetches))(block.compute)

    y, lse = compat.kernel(
        body,
        grid=(batch, key_heads, groups),  # the last changes fastest: L2 holds the keys of one head
        names=("row", "head", "group"),
        out=out,
        scratch=[shared_memory(call)],
        warpgroups=call.cut.units,
        name="token_block_attention_forward",
        sums_columns=False,
    )(*arrays)
    return y.reshape(batch, time, heads, value), by_heads(lse, call.heads)[:, :, :time]


def by_heads(rows, heads):
    """[B, Hk, T G] as [B, Hk G, T]."""
    batch, key_heads, _ = rows.shape
    return jnp.swapaxes(rows.reshape(batch, key_heads, -1, heads), 2, 3).reshape(batch, key_heads * heads, -1)


def by_tokens(rows, heads):
    """[B, Hk G, T] as [B, Hk, T G]."""
    batch, all_heads, time = rows.shape
    return jnp.swapaxes(rows.reshape(batch, all_heads // heads, heads, time), 2, 3).reshape(batch, -1, time * heads)


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of a call."""

    heads: int  # G, query heads to a key head
    width: int  # K
    value: int  # V
    scale: float
    own: bool = False  # tokens see their own block too
    cut: Cut = WIDE

    @property
    def tokens(self) -> int:
        """Of a tile."""
        return ROWS // self.heads

    @property
    def group(self) -> int:
        """Tokens of a thread block."""
        return self.cut.rows // self.heads

    def rows(self, token):
        """Rows of a token in a tile."""
        return pl.ds(pl.multiple_of(token * self.heads, 8), self.heads)

    @property
    def stages(self) -> int:
        """Blocks of keys and values that shared memory holds."""
        staged = self.value if self.value != self.width else 0
        left = SHARED_BYTES - 2 * self.cut.rows * (self.width + staged)
        return min(STAGES, left // (2 * SIZE * (self.width + self.value)))


def shared_memory(call: Call):
    """Tiles and barriers, by name: what is `there` has come, what is `free` has been used by all warpgroups."""
    stages = call.stages
    scratch = {
        "q": compat.tile(call.cut.units * call.cut.tiles, ROWS, call.width),
        "k": compat.tile(stages, SIZE, call.width),
        "v": compat.tile(stages, SIZE, call.value),
        "lse": compat.vector(call.cut.units * call.cut.tiles, ROWS),
        "block": compat.vector(stages, dtype=jnp.int32),
        "bits": compat.vector(stages, dtype=jnp.int32),
        "q_there": compat.barriers(call.cut.units, call.cut.tiles * call.tokens),
        "there": compat.barriers(stages, 3),  # keys, values, bits
        "free": compat.barriers(stages, call.cut.units),
    }
    if call.value != call.width:
        scratch["y"] = compat.tile(call.cut.units * call.cut.tiles, ROWS, call.value)
    if compat.interpreting():
        scratch["p"] = compat.tile(call.cut.units, ROWS, SIZE)
    return scratch


class Union:
    """The blocks that a thread block's tokens list, and where its tokens are."""

    def __init__(self, call: Call, given):
        # Read wherever they are needed: what is known before the warpgroups' ways part would be spilled.
        self.call, self.given = call, given
        self.row, self.head = lax.axis_index("row"), lax.axis_index("head")
        groups = given["count"].shape[2]
        self.group = groups - 1 - lax.axis_index("group")  # with causal lists the longest come first
        lead = given["count"].shape
        self.at = (self.row if lead[0] > 1 else 0, self.head if lead[1] > 1 else 0, self.group)
        self.count = given["count"][self.at]
        self.first = self.group * call.group  # token

    @property
    def visits(self):
        """Blocks that are visited: the last ones are those of the tokens themselves, where they see them."""
        if not self.call.own:
            return self.count
        last = jnp.minimum((self.first + self.call.group - 1) // SIZE, self.given["k"].shape[1] // SIZE - 1)
        return self.count + 1 + last - self.first // SIZE

    def entry(self, n):
        """The nth block of the union and its bits."""
        n = jnp.minimum(n, self.given["block"].shape[3] - 1)
        return tuple(self.given[name][(*self.at, n)] for name in ("block", "bits"))

    def own(self, n):
        """The nth block in which tokens lie, and its bits."""
        bits = self.given["own"][self.at]
        if SIZE % self.call.group:  # some of them may lie in the next block
            here = (1 << jnp.minimum(SIZE - lax.rem(self.first, SIZE), self.call.group)) - 1
            bits &= jnp.where(n == 0, here, ~here)
        return self.first // SIZE + n, bits

    def token(self, unit, tile):
        """First token of a tile."""
        return self.first + (unit * self.call.cut.tiles + tile) * self.call.tokens


def fetch_rows(call, given, sources, targets, there):
    """Starts the copies of all rows from [B, T, Hk, G, width], token by token: loops, as copies take registers."""
    for source, target in zip(sources, targets, strict=True):
        union = Union(call, given)

        def step(place, _, source=source, target=target, union=union):
            tile, token = place // call.tokens, jnp.minimum(union.first + place, source.shape[1] - 1)
            rows = target.at[tile, call.rows(lax.rem(place, call.tokens))]
            compat.fetch(source.at[union.row, token, union.head], rows, there.at[tile // call.cut.tiles])

        lax.fori_loop(0, call.group + jnp.minimum(union.count, 0), step, None)  # a number unknown: it is not unrolled


def fetch_blocks(union, given, shared, stages):
    """Keys, values and bits of the union's blocks, as shared memory comes free."""

    def await_free(n):
        """Until the block has been used that lay where the nth one goes."""
        pl.when(n >= stages)(lambda: compat.wait(shared["free"].at[lax.rem(n, stages)]))

    def start(n, block, bits):
        slot = lax.rem(n, stages)
        keys, there = pl.ds(block * SIZE, SIZE), shared["there"].at[slot]
        await_free(n)
        for name in ("k", "v"):
            compat.fetch(given[name].at[union.row, keys, union.head], shared[name].at[slot], there)
        shared["block"][slot], shared["bits"][slot] = block, bits
        compat.arrive(there)

    def step(n, entry):
        later = union.entry(n + 1)
        start(n, *entry)
        return later

    lax.fori_loop(0, union.count, step, union.entry(0))
    if union.call.own:
        again = Union(union.call, given)  # so that nothing of it has to be kept through the loop
        lax.fori_loop(again.count, again.visits, lambda n, _: start(n, *again.own(n - again.count)), None)
    for left in range(stages):  # no barrier is left with an arrival that nobody has seen
        await_free(union.visits + left)


def walk(call, shared, unit, count, stages, visit, starts):
    """A warpgroup's way along the union: the last carries of its tiles.

    visit(tile, own, slot, listed, carry) -> carry is called for the tiles of which `listed`, one bit a token, is not 0;
    own: where the tile's rows lie, which the compiler cannot know before the loop: it would keep every address.
    """
    step = lambda n, carries: walk_step(call, shared, unit, n, stages, visit, carries)
    return lax.fori_loop(0, count, step, starts)


def walk_step(call, shared, unit, n, stages, visit, carries):
    """The carries after the nth block."""
    slot = lax.rem(n, stages)
    compat.wait(shared["there"].at[slot])
    block, bits = shared["block"][slot], shared["bits"][slot]
    new = []
    for tile, carry in enumerate(carries):
        listed = (bits >> ((unit * call.cut.tiles + tile) * call.tokens)) & ((1 << call.tokens) - 1)
        own = unit * call.cut.tiles + tile + jnp.minimum(block, 0)
        seen = lambda *carry, at=(tile, own, slot, listed): visit(*at, carry)
        new.append(lax.cond(listed != 0, seen, lambda *carry: carry, *carry))
    compat.arrive(shared["free"].at[slot])
    return tuple(new)


def lists_block(call, listed):
    """Whether the token of a row is among those of `listed`, bool [ROWS]."""
    return ((listed >> (registers.row_places(ROWS) // call.heads)) & 1) == 1


def store_rows(call, union, source, target, unit):
    """Starts the copies of a warpgroup's published tiles to [B, T, Hk, G, width], token by token up to the last."""
    first = unit * call.cut.tiles * call.tokens
    count = jnp.clip(target.shape[1] - union.first - first, 0, call.cut.tiles * call.tokens)

    def step(place, _):
        rows = source.at[unit * call.cut.tiles + place // call.tokens, call.rows(lax.rem(place, call.tokens))]
        compat.store(rows, target.at[union.row, union.first + first + place, union.head])

    lax.fori_loop(0, count, step, None)


class Block:
    """A thread block: the work of its warpgroups."""

    def __init__(self, call: Call, given, y, lse, shared):
        self.call, self.given, self.y, self.lse, self.shared = call, given, y, lse, shared

    def fetch(self):
        call, given, shared = self.call, self.given, self.shared
        compat.registers(call.cut.fetching, more=False)
        fetch_rows(call, given, [given["q"]], [shared["q"]], shared["q_there"])
        fetch_blocks(Union(call, given), given, shared, call.stages)

    def compute(self):
        call, shared = self.call, self.shared
        compat.registers(call.cut.computing, more=True)
        unit = compat.warpgroup(call.cut.units)
        start = registers.zeros((ROWS, call.value)), registers.rows(ROWS, LOWEST), registers.rows(ROWS, 0.0)
        compat.wait(shared["q_there"].at[unit])
        visit = lambda *state: self.visit(unit, *state)
        carries = walk(call, shared, unit, Union(call, self.given).count, call.stages, visit, (start,) * call.cut.tiles)
        if call.own:
            union, visit = Union(call, self.given), lambda *state: self.visit(unit, *state, causal=True)
            step = lambda n, carries: walk_step(call, shared, unit, n, call.stages, visit, carries)
            carries = lax.fori_loop(union.count, union.visits, step, carries)
        union = Union(call, self.given)  # again, so that nothing of it has to be kept through the loop
        staged = shared["y" if "y" in shared else "q"]  # nobody else reads a tile of q
        for tile, (acc, top, total) in enumerate(carries):
            some = total > 0
            y = acc * registers.spread_rows(jnp.where(some, 1 / total, 0.0), acc.shape)
            staged[unit * call.cut.tiles + tile] = y.astype(jnp.bfloat16)
            shared["lse"][unit * call.cut.tiles + tile] = jnp.where(some, (top + jnp.log2(total)) / LOG2_E, -jnp.inf)
        compat.publish()
        store_rows(call, union, staged, self.y, unit)
        for tile in range(call.cut.tiles):
            rows = pl.ds(union.token(unit, tile) * call.heads, ROWS)
            compat.store(shared["lse"].at[unit * call.cut.tiles + tile], self.lse.at[union.row, union.head, rows])
        compat.stores_done()

    def visit(self, unit, tile, own, slot, listed, carry, causal=False):
        """(weighted sum of values [64, V], maximum in log2 and sum of weights [64]) after one more block.

        causal: it is that of the tokens themselves, who see it up to themselves.
        """
        call, shared, factor = self.call, self.shared, self.call.scale * LOG2_E
        acc, top, total = carry
        seen = lists_block(call, listed)
        scores = registers.matmul((shared["q"].at[own], registers.transposed(shared["k"].at[slot])))
        if causal:
            token = lax.rem(Union(call, self.given).token(unit, tile), SIZE) + registers.row_places(ROWS) // call.heads
            later = registers.spread_columns(registers.column_places(SIZE), scores.shape) > registers.spread_rows(
                token, scores.shape
            )
            scores = jnp.where(later, -jnp.inf, scores)
        now = jnp.maximum(top, jnp.where(seen, jnp.max(scores, axis=1) * factor, LOWEST))
        kept = jnp.exp2(top - now)
        weights = jnp.exp2(scores * factor - registers.spread_rows(jnp.where(seen, now, jnp.inf), scores.shape))
        total = total * kept + jnp.sum(weights, axis=1)
        p = registers.as_operand(weights, shared["p"].at[unit] if "p" in shared else None)
        acc = acc * registers.spread_rows(kept, acc.shape)
        acc, total, now, p = registers.together(acc, total, now, p)
        return registers.matmul((p, shared["v"].at[slot]), start=acc), now, total
