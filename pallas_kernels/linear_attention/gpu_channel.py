"""Linear attention with a decay per channel of the keys (GLA), forward, on Hopper GPUs.

    S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T ;   y_t = scale q_t^T S_t

A thread block walks one stretch of time of one head, with a warpgroup for each 64 value columns, at most two. Per chunk
of 64 tokens, with G the decays in log2 cumulated in it:

    y = (q 2^G) S + A v ;   S = 2^(G_last) S + (k 2^(G_last - G))^T v ;   A_ij = sum_c q_ic k_jc 2^(G_ic - G_jc), j <= i

Where no channel's decays add up to less than MILD in either half of a chunk, as trained gates hardly ever do,
A = (q 2^(G - M)) (k 2^(M - G))^T with M the sum at the chunk's middle: no factor overflows, and the products of two
such factors, above the diagonal, are masked. Elsewhere, whatever the decays, blocks of 1, 2, ... 32 tokens are joined
two by two: between the later block's rows and the earlier one's lies their boundary; later rows are q times what is
left of the boundary there, earlier ones k times what is left of them at the boundary. Both are rows of one tile X, and
X X^T is A wherever a row meets a row of its neighbour block. A warpgroup chooses for each chunk, from sums that it
needs anyway. The exponents are sums of decays: products of a matrix of 1, 0 and -1 with the decays, each split into two
bfloat16 parts (a relative error of 2^-17), in float32. The warpgroups share the work by channels, 64 each, then by
value columns.

The state stays in registers as float32. The algorithm is that of GLA (arXiv 2312.06635) with another way through A.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers
from pallas_kernels.linear_attention import gpu
from pallas_kernels.linear_attention import plan as planning
from pallas_kernels.linear_attention.plan import CHUNK, COLUMNS, LEAST_LOG2, LOG2_E, SEGMENT_LANES, Plan

STAGES = 2
HALF = CHUNK // 2
LEVELS = CHUNK.bit_length() - 1  # blocks of 2^level tokens are joined two by two
MILD = -60.0  # log2, 1.3 a token in natural logarithms: two factors of 2^60 leave float32 room for q and k


def supports(
    q, k, v, log_decay=None, state=None, run_ids=None, log_write=None, *, scale=1.0, capability=None
) -> str | None:
    """Why `forward` and `backward` cannot run this call, in a few words; None if they can. As `gpu.supports`."""
    reason = gpu.supports(q, k, v, None, state, run_ids, log_write, scale=scale, capability=capability)
    if reason is not None:
        return reason
    if log_write is not None:
        return "has no form for write with a decay per channel"
    return planning.wrong_channel_decay(q, v, log_decay)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """How value columns are dealt to thread blocks of one head, and channels and columns to a block's warpgroups."""

    plan: Plan

    @property
    def units(self) -> int:
        """Blocks of 64 value columns in a thread block."""
        return min(2, self.plan.value // COLUMNS)

    @property
    def halves(self) -> int:
        """Blocks of 64 channels."""
        return self.plan.key // COLUMNS

    @property
    def warpgroups(self) -> int:
        return max(self.units, self.halves)

    @property
    def slices(self) -> int:
        """Thread blocks of one head."""
        return self.plan.value // (COLUMNS * self.units)

    @property
    def blocks(self) -> int:
        return self.plan.heads * self.slices

    def head(self, block):
        return lax.div(block, self.slices)

    def key_head(self, block):
        return lax.div(self.head(block), self.plan.group)

    def columns(self, block, unit):
        """A unit's value columns within its head."""
        return pl.ds((lax.rem(block, self.slices) * self.units + unit) * COLUMNS, COLUMNS)


class Joins:
    """The masks of a chunk, whose first token is `start`."""

    def __init__(self, start, spare=None, level=0):
        self.spare = spare
        # Adds 0, which the compiler cannot know, so that it keeps no masks in registers from one chunk or level on.
        shape = (CHUNK, CHUNK)
        self.row = registers.laid(
            registers.spread_rows(registers.row_places(CHUNK) + jnp.minimum(start + level, 0), shape)
        )
        # Rows less their thread's part of the columns are compared with constants: whole columns were 16 registers.
        self.own, self.fixed = registers.thread_columns(shape)

    def past(self, row):
        """Columns after a row, of a tile [C, C] of rows."""
        return self.fixed > row - self.own

    def until(self, row):
        """Columns up to a row."""
        return self.fixed <= row - self.own

    def later(self, level):
        """Rows in the later of two blocks of 2^level tokens."""
        return (lax.shift_right_logical(self.row, level) & 1) != 0

    def joined(self, level):
        """Pairs of tokens in two blocks of 2^level that are joined."""
        size = lax.shift_left(1, level)
        return ((self.row ^ self.own ^ size) ^ self.fixed) & -size == 0  # one instruction; a shift would be another

    def halves(self):
        """Pairs of tokens in one half of the chunk."""
        return self.row & HALF == self.fixed & HALF

    def causal(self):
        """[i, s]: s <= i."""
        return self.until(self.row)

    def same(self):
        """[i, i]."""
        return self.row - self.own == self.fixed

    def stretch(self, level):
        """[i, s]: is the decay of token s between i and the boundary of its two blocks?"""
        size, later = lax.shift_left(1, level), self.later(level)
        boundary = (self.row & -(2 * size)) + (size - 1)
        after, last = jnp.where(later, boundary, self.row), jnp.where(later, self.row, boundary)
        return self.operand(self.past(after) & self.until(last))

    def middle(self):
        """[i, s]: the decays between i and the chunk's middle, counted below 0 for i before it."""
        later = (self.row >= HALF) & (self.fixed >= HALF) & self.causal()
        earlier = (self.fixed < HALF) & self.past(self.row)
        return registers.as_operand(jnp.where(later, 1.0, jnp.where(earlier, -1.0, 0.0)), self.spare)

    def before(self):
        """[i, s]: s <= i, the decays from the chunk's start through i."""
        return self.operand(self.causal())

    def after(self):
        """[i, s]: s > i, the decays from i to the chunk's end."""
        return self.operand(self.past(self.row))

    def strictly_before(self):
        """[i, s]: s < i."""
        return self.operand(self.until(self.row - 1))

    def from_on(self):
        """[i, s]: s >= i."""
        return self.operand(self.past(self.row - 1))

    def operand(self, mask):
        return registers.as_operand(jnp.where(mask, 1.0, 0.0), self.spare)


def read(ref):
    return registers.load_tile(ref).astype(jnp.float32)


def split_parts(ref, runs, parts):
    """Writes a tile of decays, 0 at padding, in log2 as a sum of two bfloat16 tiles; `publish` comes after."""
    decays = runs.real(jnp.maximum(registers.load_tile(ref) * LOG2_E, LEAST_LOG2))
    high = decays.astype(jnp.bfloat16)
    parts[pl.ds(0, CHUNK)] = high
    parts[pl.ds(CHUNK, CHUNK)] = (decays - high.astype(jnp.float32)).astype(jnp.bfloat16)


def exponents(operand, parts):
    return registers.matmul((operand, parts.at[pl.ds(0, CHUNK)]), (operand, parts.at[pl.ds(CHUNK, CHUNK)]))


class Runs:
    """The segments of one chunk."""

    def __init__(self, segments):
        self.segments = segments
        if segments is not None:
            self.runs = segments.at[pl.ds(0, CHUNK)]
            self.enters, self.leaves = segments[CHUNK], segments[CHUNK + 1]

    def only(self, tile, run):
        """The rows of a run; all without segments."""
        if self.segments is None:
            return tile
        keep = registers.load_rows(self.runs) == run
        return jnp.where(registers.spread_rows(keep.astype(jnp.int32), tile.shape) != 0, tile, 0.0)

    def entering(self, tile):
        """The rows that read the incoming state."""
        return tile if self.segments is None else self.only(tile, self.enters)

    def leaving(self, tile):
        """The rows that write to the outgoing state."""
        return tile if self.segments is None else self.only(tile, self.leaves)

    def kept(self, factors):
        """What is left of the incoming state's rows at the chunk's end."""
        return factors if self.segments is None else factors * jnp.where(self.enters == self.leaves, 1.0, 0.0)

    def real(self, tile):
        """The rows that are no padding."""
        if self.segments is None:
            return tile
        keep = registers.load_rows(self.runs) != 0
        return jnp.where(registers.spread_rows(keep.astype(jnp.int32), tile.shape) != 0, tile, 0.0)

    def pairs(self, scores):
        """Scores of tokens in one segment."""
        if self.segments is None:
            return scores
        rows = registers.spread_rows(registers.load_rows(self.runs), scores.shape)
        columns = registers.spread_columns(registers.load_columns(self.runs), scores.shape)
        return jnp.where((rows == columns) & (rows != 0), scores, 0.0)


def scores(q, k, joins_at, parts, tile):
    """A [64, 64] in float32 of 64 channels, whatever the decays, whose parts lie in `parts`.

    joins_at(level) makes the chunk's Joins; `tile` is free space for bfloat16 [64, 64].
    """

    def join(level, found):
        joins = joins_at(level)
        factor = jnp.exp2(exponents(joins.stretch(level), parts))  # before q and k are read, which takes registers
        tile[...] = (jnp.where(joins.later(level), read(q), read(k)) * factor).astype(jnp.bfloat16)
        compat.publish()
        met = registers.matmul((tile, registers.transposed(tile)))
        return jnp.where(joins_at(level).joined(level), met, found)

    found = lax.fori_loop(0, LEVELS, join, registers.zeros((CHUNK, CHUNK)))
    own = jnp.sum(read(q) * read(k), axis=1)
    joins = joins_at(0)
    found = jnp.where(joins.causal(), found, 0.0)
    return jnp.where(joins.same(), registers.spread_rows(own, found.shape), found)


def forward(q, k, v, log_decay, state=None, run_ids=None, log_write=None, *, scale=1.0, splits=None, need_last=True):
    """Linear attention with a decay per channel, (y [B, T, H, V] bfloat16, final state [B, H, K, V] float32).

    As `gpu.forward`, but log_decay is [B, T, H, K] and log_write must be None.
    """
    batch, time = q.shape[:2]
    if time % 8:
        q, k, v, log_decay, run_ids = gpu.pad_time(q, k, v, log_decay, run_ids)
    lanes = Lanes(planning.make_plan(q, v, batch * v.shape[2] * -(-v.shape[3] // 128), splits))
    decays = gpu.flat(log_decay.astype(jnp.float32))
    segments = planning.chunk_segments(run_ids, lanes.plan)
    ends = left = None
    if lanes.plan.splits > 1:
        ends, left = walk_states(lanes, k, v, decays, segments)
    y, last = _fused(lanes, q, k, v, decays, segments, state, ends, left, scale, need_last)
    return y[:, :time], last


def specs_of(lanes, block, row, segments, chunk_at, *arrays, rows=None):
    """Pipeline specs of decays (and segments), then of [B, T, heads * width] arrays given as (width, index).

    rows=1: tiles are [1, 64, width], for `compat.unhoisted`.
    """
    spec = lambda kind, width, index: kind((rows, CHUNK, width), lambda i: (row, chunk_at(i), index))
    specs = [spec(compat.wide_tile_spec, lanes.plan.key, lanes.head(block))]
    if segments is not None:
        specs.append(compat.vector_spec((None, None, SEGMENT_LANES), lambda i: (row, chunk_at(i), 0)))
    return specs + [spec(compat.tile_spec, *array) for array in arrays]


def write_whole(parts, ones, whole, runs):
    """What is left of the incoming state's rows at the chunk's end, one a channel; `ones` is a tile to fill with 1."""
    ones[...] = (registers.zeros((CHUNK, CHUNK)) + 1).astype(jnp.bfloat16)
    compat.publish()
    # The sums over a chunk, one a row: the same in each column.
    total = registers.matmul(*[(registers.transposed(parts.at[pl.ds(i * CHUNK, CHUNK)]), ones) for i in (0, 1)])
    whole[...] = runs.kept(jnp.exp2(jnp.sum(total, axis=1) * (1 / CHUNK)))


class Sums:
    """Sums of decays over both halves of a chunk, in log2: `vectors` [2, K] of shared memory, of which `channels`."""

    def __init__(self, vectors, channels):
        self.first, self.second = (vectors.at[i, channels] for i in range(2))

    def write(self, parts, space, joins):
        """Makes the sums, in a tile of `space`; is the chunk mild in all channels?"""
        space[...] = jnp.where(joins.halves(), 1.0, 0.0).astype(jnp.bfloat16)
        compat.publish()
        # The first half's sums, one a row, fill the first columns, the second half's the others.
        total = registers.matmul(*[(registers.transposed(parts.at[pl.ds(i * CHUNK, CHUNK)]), space) for i in (0, 1)])
        first = jnp.min(jnp.where(joins.fixed < HALF, total, 0.0), axis=1)
        second = jnp.min(jnp.where(joins.fixed < HALF, 0.0, total), axis=1)
        self.second[...] = second
        self.first[...] = jnp.minimum(first, second)
        # Every row of the tile holds all channels, so that each row's least is that of all.
        every = registers.spread_columns(registers.load_columns(self.first), total.shape)
        self.first[...] = jnp.min(every, axis=1)
        least = self.first[0]
        self.first[...] = first
        return least >= MILD

    def kept(self, runs):
        """What is left of the incoming state's rows at the chunk's end."""
        return runs.kept(jnp.exp2(registers.load_rows(self.first) + registers.load_rows(self.second)))

    def entering(self, tile):
        """A tile decayed to the chunk's middle, decayed to its start."""
        return tile * registers.spread_columns(jnp.exp2(registers.load_columns(self.first)), tile.shape)

    def leaving(self, tile):
        """A tile decayed to the chunk's middle, decayed to its end."""
        return tile * registers.spread_columns(jnp.exp2(registers.load_columns(self.second)), tile.shape)


def only_first(count, warpgroup, run, otherwise):
    """run() in the first `count` of the warpgroups, otherwise() in the others, if there are any."""
    if count == 2:
        run()
        return
    pl.when(warpgroup < count)(run)
    pl.when(warpgroup >= count)(otherwise)


def carried_state(given, ends, left, where, row, head, splits):
    """A tile of the state at one end of a split, as `gpu.carried_state`, with what is left [B, splits, H, K]."""
    shape = tuple(index.size for index in where)
    carry = (
        registers.zeros(shape) if given is None else registers.load_tile(given.at[(row, head, *where)], shared=False)
    )
    if ends is None:
        return carry
    first, count, step = splits

    def through(index, carry):
        split = first + index * step
        end = registers.load_tile(ends.at[(row, split, head, *where)], shared=False)
        return gpu.scaled_rows(carry, registers.load_rows_of(left.at[row, split, head])) + end

    return lax.fori_loop(0, count, through, carry)


def walk_states(lanes: Lanes, keys, values, decays, segments, start=None, *, reverse=False, scale=1.0):
    """States along time, in one of two ways.

    start None: what each split of time adds to the state, float32 [B, splits, H, K, V], and what it leaves of the
    incoming one, [B, splits, H, K]. The last split is left out, since nothing follows it; its slots are not written.
    start (state, ends, left), as `carried_state` takes them: the states that the chunks meet, bfloat16
    [B, chunks, H, K, V], and the last one, float32 [B, H, K, V].
    reverse: the same for the state's gradient, of queries, times `scale`, and output gradients, back in time: a chunk
    meets the gradient of the state after it, and the first split is left out.
    """
    plan, units, halves, count = lanes.plan, lanes.units, lanes.halves, lanes.warpgroups
    keep = start is not None
    state, ends, left = start if keep else [None] * 3
    given = {"decays": decays, "segments": segments, "keys": gpu.flat(keys), "values": gpu.flat(values)}
    given |= {"state": state, "ends": ends, "left": left}
    names = [name for name, x in given.items() if x is not None]
    splits = plan.splits if keep else plan.splits - 1

    def body(*args):
        refs, rest = dict.fromkeys(given) | dict(zip(names, args)), args[len(names) :]
        out_ref, last_ref, all_parts, all_ones, *rest = rest
        held_all, (whole, ready, done, *spare) = (rest[0], rest[1:]) if keep else (None, rest)
        block, split, row = (lax.axis_index(name) for name in ("block", "split", "row"))
        split = split + 1 if reverse and not keep else split
        warpgroup = compat.warpgroup(count)
        unit, half = jnp.minimum(warpgroup, units - 1), jnp.minimum(warpgroup, halves - 1)
        head, columns = lanes.head(block), lanes.columns(block, unit)
        mine, channels = pl.ds(unit * COLUMNS, COLUMNS), pl.ds(half * COLUMNS, COLUMNS)
        last = plan.steps - 1
        at = lambda i: split * plan.steps + (last - i if reverse else i)

        def chunk(indices, decay_tile, *tiles):
            *seg, key_tile, value_tile, carry = tiles
            state, left = carry if not keep else (carry, None)
            now = at(indices[0])
            runs, first = Runs(*(seg or [None])), now * CHUNK
            parts, ones = (compat.unhoisted(buffer, first).at[half] for buffer in (all_parts, all_ones))
            if keep:
                held = held_all.at[warpgroup]
                compat.stores_read()
                held[...] = state.astype(jnp.bfloat16)
                compat.publish()
                compat.store(held, out_ref.at[row, now, head, :, columns], warpgroup < units)

            def prepare():
                split_parts(decay_tile.at[:, channels], runs, parts)
                compat.wait(done)
                write_whole(parts, ones, whole.at[channels], runs)
                joins, keys = Joins(first, spare[0].at[warpgroup] if spare else None), key_tile.at[:, channels]
                if reverse:
                    factors = runs.entering(jnp.exp2(exponents(joins.before(), parts))) * scale
                else:
                    factors = runs.leaving(jnp.exp2(exponents(joins.after(), parts)))
                keys[...] = (read(keys) * factors).astype(jnp.bfloat16)
                compat.publish()

            only_first(halves, warpgroup, prepare, lambda: compat.wait(done))
            compat.arrive(ready)
            compat.wait(ready)
            kept = registers.load_rows(whole)
            write = (registers.transposed(key_tile), value_tile.at[:, mine])
            state = registers.matmul(write, start=gpu.scaled_rows(state, kept))
            compat.arrive(done)
            return state if keep else (state, left * kept)

        def around(run):
            compat.arrive(done)
            where = (pl.ds(0, plan.key), columns)
            if keep:
                to_split = (plan.splits - 1, plan.splits - 1 - split, -1) if reverse else (0, split, 1)
                given = [refs[name] for name in ("state", "ends", "left")]
                state, left = run(carried_state(*given, where, row, head, to_split)), None
            else:
                state, left = run((registers.zeros((plan.key, COLUMNS)), registers.rows(plan.key, 1.0)))
            compat.wait(done)
            if keep:

                @pl.when((warpgroup < units) & (split == (0 if reverse else plan.splits - 1)))
                def _():
                    last_ref[row, head, :, columns] = state

                compat.stores_done()
                return

            @pl.when(warpgroup < units)
            def _():
                out_ref[row, split, head, :, columns] = state

            @pl.when((warpgroup == 0) & (lax.rem(block, lanes.slices) == 0))
            def _():
                last_ref[row, split, head] = left

        tiles = ((plan.key, lanes.key_head(block)), (COLUMNS * units, block))
        specs = specs_of(lanes, block, row, segments, at, *tiles)
        run = compat.pipeline(chunk, steps=plan.steps, specs=specs, stages=STAGES, warpgroups=count, around=around)
        run(*[refs[name] for name in ("decays", "segments", "keys", "values") if refs[name] is not None])

    shape = (plan.batch, plan.chunks if keep else plan.splits, plan.heads, plan.key, plan.value)
    scratch = [compat.tile(1, halves, 2 * CHUNK, COLUMNS), compat.tile(1, halves, CHUNK, CHUNK)]
    scratch += [compat.tile(count, plan.key, COLUMNS)] * keep
    scratch += [compat.vector(plan.key), compat.barrier(count), compat.barrier(count)]
    scratch += [compat.tile(count, CHUNK, CHUNK)] * compat.interpreting()
    second = (plan.batch, plan.heads, plan.key, plan.value) if keep else shape[:-1]
    return compat.kernel(
        body,
        grid=(lanes.blocks, splits, plan.batch),
        names=("block", "split", "row"),
        out=(
            jax.ShapeDtypeStruct(shape, jnp.bfloat16 if keep else jnp.float32),
            jax.ShapeDtypeStruct(second, jnp.float32),
        ),
        scratch=scratch,
        warpgroups=count,
        name="linear_attention_channel_states",
        sums_columns=False,
    )(*[given[name] for name in names])


def _fused(lanes: Lanes, q, k, v, decays, segments, state, ends, left, scale, need_last):
    """Outputs and final state; every split starts from `state` carried through the `ends` of those before it."""
    plan, units, halves = lanes.plan, lanes.units, lanes.halves
    given = {"decays": decays, "segments": segments, "q": gpu.flat(q), "k": gpu.flat(k), "v": gpu.flat(v)}
    given |= {"state": state, "ends": ends, "left": left}
    names = [name for name, x in given.items() if x is not None]
    outs = gpu.results(plan, given["v"], need_last)

    def body(*args):
        refs = dict.fromkeys(given) | dict(zip(names, args))
        y_ref, *last_ref = args[len(names) : len(names) + len(outs)]
        *buffers, ready, done = args[len(names) + len(outs) :][:5]
        spare = args[len(names) + len(outs) + 5 :]
        block, split, row = (lax.axis_index(name) for name in ("block", "split", "row"))
        warpgroup = compat.warpgroup(lanes.warpgroups)
        unit, half = jnp.minimum(warpgroup, units - 1), jnp.minimum(warpgroup, halves - 1)
        head, columns = lanes.head(block), lanes.columns(block, unit)
        mine, channels = pl.ds(unit * COLUMNS, COLUMNS), pl.ds(half * COLUMNS, COLUMNS)
        at = lambda i: split * plan.steps + i

        def prepare(start, runs, states, mixes, vectors, decay_tile, q_tile, k_tile):
            joins_at = lambda level: Joins(start, spare[0].at[warpgroup] if spare else None, level)
            parts, mix = states.at[warpgroup, pl.ds(0, 2 * CHUNK)], mixes.at[half]
            decays, q, k = (tile.at[:, channels] for tile in (decay_tile, q_tile, k_tile))
            sums = Sums(vectors, channels)
            split_parts(decays, runs, parts)
            compat.wait(done)
            mild = sums.write(parts, mix, joins_at(0))

            @pl.when(mild)
            def _():
                joins = joins_at(0)
                exponent = exponents(joins.middle(), parts)
                readers, writers = parts.at[pl.ds(0, CHUNK)], parts.at[pl.ds(CHUNK, CHUNK)]
                decayed = read(q) * jnp.exp2(exponent)
                readers[...] = decayed.astype(jnp.bfloat16)
                q[...] = runs.entering(sums.entering(decayed)).astype(jnp.bfloat16)
                decayed = read(k) * jnp.exp2(-exponent)
                writers[...] = decayed.astype(jnp.bfloat16)
                k[...] = runs.leaving(sums.leaving(decayed)).astype(jnp.bfloat16)
                compat.publish()
                found = registers.matmul((readers, registers.transposed(writers)))
                joins = joins_at(0)
                mix[...] = runs.pairs(jnp.where(joins.causal(), found, 0.0)).astype(jnp.bfloat16)

            @pl.when(jnp.logical_not(mild))
            def _():
                mix[...] = runs.pairs(scores(q, k, joins_at, parts, mix)).astype(jnp.bfloat16)
                into = runs.entering(jnp.exp2(exponents(joins_at(0).before(), parts)))
                q[...] = (read(q) * into).astype(jnp.bfloat16)
                out = runs.leaving(jnp.exp2(exponents(joins_at(0).after(), parts)))
                k[...] = (read(k) * out).astype(jnp.bfloat16)

            compat.publish()

        def chunk(indices, decay_tile, *tiles):
            *seg, q_tile, k_tile, v_tile, carry = tiles
            runs = Runs(*(seg or [None]))
            start = at(indices[0]) * CHUNK
            states, mixes, vectors = (compat.unhoisted(x, start) for x in buffers)
            compat.stores_read()  # y of the chunk before, from where the decays' parts go
            prepared = lambda: prepare(start, runs, states, mixes, vectors, decay_tile, q_tile, k_tile)
            only_first(halves, warpgroup, prepared, lambda: compat.wait(done))
            compat.arrive(ready)
            mine_v = v_tile.at[:, mine]
            held = states.at[warpgroup, pl.ds(0, plan.key)]
            held[...] = carry.astype(jnp.bfloat16)
            compat.publish()
            compat.wait(ready)
            y = registers.matmul((q_tile, held), *[(mixes.at[part], mine_v) for part in range(halves)])
            output = states.at[warpgroup, pl.ds(0, CHUNK)]
            output[...] = (y * scale).astype(jnp.bfloat16)
            compat.publish()
            place = pl.ds(head * plan.value + columns.start, COLUMNS)
            compat.store(output, y_ref.at[row, pl.ds(start, CHUNK), place], warpgroup < units)
            after = gpu.scaled_rows(carry, Sums(vectors, pl.ds(0, plan.key)).kept(runs))
            after = registers.matmul((registers.transposed(k_tile), mine_v), start=after)
            compat.arrive(done)
            return after

        def around(run):
            compat.arrive(done)
            where = (pl.ds(0, plan.key), columns)
            given = [refs[name] for name in ("state", "ends", "left")]
            carry = run(carried_state(*given, where, row, head, (0, split, 1)))

            for ref in last_ref:

                @pl.when((split == plan.splits - 1) & (warpgroup < units))
                def _(ref=ref):
                    ref[row, head, :, columns] = carry

            compat.wait(done)
            compat.stores_done()

        tiles = [(plan.key, lanes.key_head(block))] * 2 + [(COLUMNS * units, block)]
        specs = specs_of(lanes, block, row, segments, at, *tiles)
        run = compat.pipeline(
            chunk, steps=plan.steps, specs=specs, stages=STAGES, warpgroups=lanes.warpgroups, around=around
        )
        run(*[refs[name] for name in ("decays", "segments", "q", "k", "v") if refs[name] is not None])

    count = lanes.warpgroups
    y, *last = compat.kernel(
        body,
        grid=(lanes.blocks, plan.splits, plan.batch),
        names=("block", "split", "row"),
        out=outs,
        scratch=[
            compat.tile(1, count, max(plan.key, 2 * CHUNK), COLUMNS),
            compat.tile(1, halves, CHUNK, CHUNK),
            compat.vector(1, 2, plan.key),
            compat.barrier(count),
            compat.barrier(count),
        ]
        + [compat.tile(count, CHUNK, CHUNK)] * compat.interpreting(),
        warpgroups=count,
        name="linear_attention_channel_forward",
        sums_columns=False,
    )(*[given[name] for name in names])
    return y.reshape(v.shape), last[0] if need_last else None
