"""Linear attention with one decay per token and head, forward, on Hopper GPUs.

    S_t = exp(log_decay_t) S_{t-1} + w_t k_t v_t^T ;   y_t = scale q_t^T S_t

A thread block walks one stretch of time for one or two warpgroups of 64 value columns each: two heads that share their
keys (Mamba-2's groups), or two halves of one head. Per chunk of 64 tokens, with g the decays in log2 cumulated in it
and c = g - log2 w:

    y = 2^g (q S) + (q k^T * 2^(g_i - c_j), j <= i) v ;   S = 2^(g_last) S + k^T (2^(g_last - c) v)

The state stays in registers as float32; neither it nor the scores are written to memory. One more warpgroup fetches
tiles by TMA. Where rows and heads are too few to fill the chip, time is cut in stretches: a first kernel computes each
stretch's own contribution to the state, the second starts every stretch from the sum of those before it. The first one
skips tokens whose writes decay below 2^-150 before the stretch ends, so its time depends on the decays.

The algorithm is the chunked form of Mamba-2 (arXiv 2405.21060) and of GLA (arXiv 2312.06635).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers
from pallas_kernels.linear_attention import gates
from pallas_kernels.linear_attention import plan as planning
from pallas_kernels.linear_attention.plan import CHUNK, COLUMNS, SEGMENT_LANES, Plan


def supports(
    q, k, v, log_decay=None, state=None, run_ids=None, log_write=None, *, scale=1.0, capability=None
) -> str | None:
    """Why `forward` and `backward` cannot run this call, in a few words; None if they can.

    Takes arrays or shapes with dtypes. capability: (major, minor) of the GPU that will run it; None asks the default
    device.
    """
    reason = compat.no_hopper(capability)
    if reason is not None:
        return reason
    reason = planning.wrong_qkv(q, k, v)
    if reason is not None:
        return reason
    batch, time, key_heads, key = q.shape
    heads, value = v.shape[2:]
    if key not in (64, 128) or value not in (64, 128, 256):
        return f"needs K in (64, 128) and V in (64, 128, 256), got K={key}, V={value}"
    if heads % key_heads:
        return f"needs a number of heads that the key heads divide, got {heads} and {key_heads}"
    if 0 in (batch, time):
        return f"needs at least one row and one token, got B={batch}, T={time}"
    return planning.wrong_rest(q, v, log_decay, run_ids, scale, state, log_write)


@dataclasses.dataclass(frozen=True)
class Lanes:
    """How heads and value columns are dealt to thread blocks, each with one or two units of 64 columns."""

    plan: Plan
    units: int
    stages: int

    @property
    def blocks(self) -> int:
        return self.plan.heads * self.plan.value // (COLUMNS * self.units)

    @property
    def block_heads(self) -> int:
        """Heads in one thread block."""
        return max(1, COLUMNS * self.units // self.plan.value)

    def decay_block(self, block):
        """Index of the block's heads, in units of `block_heads`."""
        return block // max(1, self.plan.value // (COLUMNS * self.units))

    def key_head(self, block):
        return self.decay_block(block) * self.block_heads // self.plan.group

    def head_and_columns(self, block, unit):
        first = (block * self.units + unit) * COLUMNS
        return first // self.plan.value, pl.ds(first % self.plan.value, COLUMNS)


def forward(
    q, k, v, log_decay=None, state=None, run_ids=None, log_write=None, *, scale=1.0, splits=None, need_last=True
):
    """Linear attention, (y [B, T, H, V] bfloat16, final state [B, H, K, V] float32).

    q, k: [B, T, Hk, K]; v: [B, T, H, V], all bfloat16; head h reads key head h // (H // Hk). log_decay: natural
    logarithms <= 0, [B, T, H], [H] or None for no decay. state: [B, H, K, V] float32 or None for zeros. run_ids:
    [B, T] int32, numbers 1, 2, ... of a row's segments and 0 for padding, as `seqmix.core.packing.runs` gives
    them, or None; the state belongs to run 1 and is returned for the last one. log_write: natural logarithms of the
    weights of k v^T in the state, [B, T, H], or None for 1. scale: a number above 0. splits: into how many stretches
    to cut time, None to choose. need_last: False gives None for the final state, which is not written to memory. The
    call must be one that `supports` accepts.
    """
    return begun(q, k, v, log_decay, run_ids, log_write, scale=scale, splits=splits).finish(state, need_last)


@dataclasses.dataclass(frozen=True)
class Begun:
    """A call of `forward` of which all is known but the state that enters it."""

    time: int
    call: tuple
    ends: jax.Array | None
    end: jax.Array | None  # the final state from a state of zeros, where it was asked for
    left: jax.Array | None  # log2 of what is left of a state after the call, [B or 1, H], likewise
    scale: float

    def finish(self, state, need_last=True):
        """`forward`'s results."""
        y, last = _fused(*self.call, state, self.ends, self.scale, need_last)
        return y[:, : self.time], last


def begun(q, k, v, log_decay, run_ids, log_write, *, scale, splits=None, need_end=False) -> Begun:
    """What `forward` does before it needs the state; need_end: also the final state that comes from zeros."""
    batch, time = q.shape[:2]
    heads, value = v.shape[2:]
    if time % 8:  # TMA cuts time in eights; what it reads past the end is 0, which changes nothing
        q, k, v, log_decay, run_ids, log_write = pad_time(q, k, v, log_decay, run_ids, log_write)
    config = planning.config("forward", q, v, splits)
    plan = planning.make_plan(q, v, batch * heads * value // (COLUMNS * config.units), config.splits)
    decays = gates.chunk_decays(log_decay, log_write, run_ids, plan)
    segments = planning.chunk_segments(run_ids, plan)
    lanes = Lanes(plan, config.units, config.stages)
    ends = end = left = None
    if plan.splits > 1 or need_end:
        ends = split_states(lanes, k, v, decays, segments, every=need_end)
    if need_end:
        # Without the barrier XLA sums the chunks' decays once more for the whole call, in one thread block.
        left = lax.optimization_barrier(gates.split_decays(decays, segments, plan))
        end, left = summed(ends, left), jnp.sum(left, axis=2)
    ends = ends if plan.splits > 1 else None
    return Begun(time, (lanes, q, k, v, decays, segments), ends, end, left, scale)


def summed(ends, left, reverse=False):
    """What all splits add to the state at the end of time, [B, H, K, V]; reverse: to its gradient at the start.

    ends: [B, splits, H, K, V], what each adds at its own end; left: [B or 1, H, splits], log2 of what it leaves.
    """
    steps = range(ends.shape[1])
    total = jnp.zeros_like(ends[:, 0])
    for split in reversed(steps) if reverse else steps:
        total = total * jnp.exp2(left)[:, :, split, None, None] + ends[:, split]
    return total


def pad_time(q, k, v, log_decay, run_ids, *more):
    """The arrays with time padded on the right to a multiple of 8, by tokens that write nothing and do not decay."""
    missing = -q.shape[1] % 8

    def pad(x):
        return x if x is None or x.ndim == 1 else jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))

    if log_decay is not None and log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (*q.shape[:2], log_decay.shape[0]))
    return tuple(pad(x) for x in (q, k, v, log_decay, run_ids, *more))


def results(plan, flat_v, need_last):
    """Shapes of what a forward kernel writes: y, and the final state where it is asked for."""
    last = jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.key, plan.value), jnp.float32)
    return (jax.ShapeDtypeStruct(flat_v.shape, jnp.bfloat16), *[last] * need_last)


def carried_state(given, ends, left, where, row, head, splits):
    """A tile of the state at one end of a split: what the call was given, carried through the `splits` beyond it.

    given: [B, H, K, V] or None for zeros; ends: what each split adds, [B, splits, H, K, V], and left: log2 of what it
    leaves, [B or 1, H, splits], or None where time is not cut. where: (rows, columns) of the tile. splits: (first,
    count, step) in the order of the walk.
    """
    shape = tuple(index.size for index in where)
    carry = (
        registers.zeros(shape) if given is None else registers.load_tile(given.at[(row, head, *where)], shared=False)
    )
    if ends is None:
        return carry
    first, count, step = splits
    decay_row = row if left.shape[0] > 1 else 0

    def through(index, carry):
        split = first + index * step
        end = registers.load_tile(ends.at[(row, split, head, *where)], shared=False)
        return carry * jnp.exp2(left[decay_row, head, split]) + end

    return lax.fori_loop(0, count, through, carry)


class Tokens:
    """Decays and segments of one chunk, as factors for the rows and columns of its tiles.

    Each factor reads what it needs when it is asked for: kept vectors are registers that products lack.
    """

    def __init__(self, decays, segments, start, shift=0.0):
        # Of tokens that read, and of tokens that write: the same where all write with weight 1.
        self.decays, self.sources = decays.at[0], decays.at[decays.shape[0] - 1]
        self.start = start
        self.last = decays[0, CHUNK - 1]
        self.shift = shift
        self.segments = segments
        if segments is not None:
            self.runs = segments.at[pl.ds(0, CHUNK)]
            self.before, self.after = segments[CHUNK], segments[CHUNK + 1]

    @staticmethod
    def _shifted(rows, shift):
        return rows + shift if shift else rows  # adding 0.0 would be an instruction

    def carry_in(self):
        """What a token's output reads of the incoming state, scale included: [64]."""
        exponent = self._shifted(registers.load_rows(self.decays), self.shift)
        if self.segments is not None:
            exponent = jnp.where(registers.load_rows(self.runs) == self.before, exponent, -jnp.inf)
        return jnp.exp2(exponent)

    def carry_out(self):
        """What is left of a token's write at the chunk's end: [64]."""
        exponent = self.last - registers.load_rows(self.sources)
        if self.segments is not None:
            exponent = jnp.where(registers.load_rows(self.runs) == self.after, exponent, -jnp.inf)
        return jnp.exp2(exponent)

    def kept(self):
        """What is left of the incoming state at the chunk's end: a scalar."""
        left = jnp.exp2(self.last)
        return left if self.segments is None else jnp.where(self.before == self.after, left, 0.0)

    def pairs(self, transposed=False):
        """What token i's output reads of token j's write, scale included: [i, j], or [j, i] transposed."""
        shape = (CHUNK, CHUNK)
        rows, columns = (self.sources, self.decays) if transposed else (self.decays, self.sources)
        down = self._shifted(registers.load_rows(rows), -self.shift if transposed else self.shift)
        down = registers.spread_rows(down, shape)
        across = registers.spread_columns(registers.load_columns(columns), shape)
        exponent = across - down if transposed else down - across
        if self.segments is not None:
            row_runs = registers.spread_rows(registers.load_rows(self.runs), shape)
            column_runs = registers.spread_columns(registers.load_columns(self.runs), shape)
            exponent = jnp.where((row_runs == column_runs) & (row_runs != 0), exponent, -jnp.inf)
        return jnp.exp2(registers.below(exponent, self.start, -jnp.inf, upper=transposed))


def scaled_rows(tile, factors):
    return tile * registers.spread_rows(factors, tile.shape)


def specs_of(lanes, block, row, decays, segments, chunk_at, *arrays):
    """Pipeline specs of decays (and segments), then of [B, T, heads * width] arrays given as (width, index)."""
    decay_row = row if decays.shape[0] > 1 else 0
    specs = [
        compat.vector_spec(
            (None, decays.shape[1], None, lanes.block_heads, CHUNK),
            lambda i: (decay_row, 0, chunk_at(i), lanes.decay_block(block), 0),
        )
    ]
    if segments is not None:
        specs.append(compat.vector_spec((None, None, SEGMENT_LANES), lambda i: (row, chunk_at(i), 0)))
    for width, index in arrays:
        specs.append(compat.tile_spec((None, CHUNK, width), lambda i, index=index: (row, chunk_at(i), index)))
    return specs


def flat(x):
    """[B, T, heads, width] as [B, T, heads * width]."""
    return x.reshape(*x.shape[:2], -1)


def split_states(lanes: Lanes, keys, values, decays, segments, *, reverse=False, scale=1.0, every=False):
    """What each split of time adds to the state: keys^T (weights * values), float32 [B, splits, H, K, V].

    Forward the weights are what is left of a token's write at the split's end; the last split is left out, since
    nothing follows it. reverse: the same for the state's gradient, of queries and output gradients: weights are what
    a token reads of the split's incoming state, and the first split is left out (its slot is not written). every: no
    split is left out. Chunks of which nothing is left at that end are not visited. The walk goes away from it: the
    kernel that needs the states begins where this one stops, with what is still in the cache.
    """
    lanes = dataclasses.replace(lanes, stages=min(4, lanes.plan.steps))
    return _split_states(lanes, keys, values, decays, segments, reverse, scale, every, compat.interpreting())


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7, 8))  # so that XLA finds forward's and backward's to be the same
def _split_states(lanes, keys, values, decays, segments, reverse, scale, every, interpreting):
    plan, units = lanes.plan, lanes.units
    inputs = [x for x in (decays, segments, flat(keys), flat(values)) if x is not None]
    counts = gates.reaching(decays, segments, plan, lanes.block_heads, reverse)

    def body(counts, *args):
        refs, (out_ref, weighted) = args[: len(inputs)], args[len(inputs) :]
        block, split, row = (lax.axis_index(name) for name in ("block", "split", "row"))
        split = split + 1 if reverse and not every else split
        steps = counts[row if counts.shape[0] > 1 else 0, split, lanes.decay_block(block)]
        unit = compat.warpgroup(units)
        head, columns = lanes.head_and_columns(block, unit)

        def chunk(indices, decay_tile, *tiles):
            *seg, key_tile, value_tile, (total, left) = tiles
            tokens = Tokens(
                decay_tile.at[:, unit if lanes.block_heads > 1 else 0],
                *(seg or [None]),
                at(indices[0]) * CHUNK,
                shift=math.log2(scale),
            )
            mine = registers.load_float32(value_tile.at[:, pl.ds(unit * COLUMNS, COLUMNS)])
            weights = tokens.carry_in() if reverse else tokens.carry_out()
            weighted[unit] = scaled_rows(mine, weights).astype(jnp.bfloat16)
            compat.publish()
            added = registers.matmul((registers.transposed(key_tile), weighted.at[unit]))
            return total + added * left, left * tokens.kept()

        def around(run):
            out_ref[row, split, head, :, columns] = run((registers.zeros((plan.key, COLUMNS)), jnp.float32(1.0)))[0]

        at = lambda i: split * plan.steps + (i if reverse else plan.steps - 1 - i)
        tiles = ((plan.key, lanes.key_head(block)), (COLUMNS * units, block))
        specs = specs_of(lanes, block, row, decays, segments, at, *tiles)
        compat.pipeline(chunk, steps=steps, specs=specs, stages=lanes.stages, warpgroups=units, around=around)(*refs)

    shape = (plan.batch, plan.splits, plan.heads, plan.key, plan.value)
    return compat.kernel(
        body,
        grid=(lanes.blocks, plan.splits - (not every), plan.batch),
        names=("block", "split", "row"),
        out=jax.ShapeDtypeStruct(shape, jnp.float32),
        scratch=[compat.tile(units, CHUNK, COLUMNS)],
        warpgroups=units,
        name="linear_attention_states",
    )(counts, *inputs)


def _fused(lanes: Lanes, q, k, v, decays, segments, state, ends, scale, need_last):
    """Outputs and final state; every split starts from `state` carried through the `ends` of those before it."""
    plan, units = lanes.plan, lanes.units
    left = None if ends is None else gates.split_decays(decays, segments, plan)
    given = {"decays": decays, "segments": segments, "q": flat(q), "k": flat(k), "v": flat(v)}
    given |= {"state": state, "ends": ends, "left": left}
    names = [name for name, x in given.items() if x is not None]
    outs = results(plan, given["v"], need_last)

    def body(*args):
        refs = dict.fromkeys(given) | dict(zip(names, args))
        y_ref, *last_ref = args[len(names) : len(names) + len(outs)]
        states, weighted, outputs, *spare = args[len(names) + len(outs) :]
        block, split, row = (lax.axis_index(name) for name in ("block", "split", "row"))
        unit = compat.warpgroup(units)
        head, columns = lanes.head_and_columns(block, unit)
        mine = pl.ds(unit * COLUMNS, COLUMNS)
        at = lambda i: split * plan.steps + i

        def chunk(indices, decay_tile, *tiles):
            *seg, q_tile, k_tile, v_tile, carry = tiles
            tokens = Tokens(
                decay_tile.at[:, unit if lanes.block_heads > 1 else 0],
                *(seg or [None]),
                at(indices[0]) * CHUNK,
                shift=math.log2(scale),
            )
            v_mine = v_tile.at[:, mine]
            states[unit] = carry.astype(jnp.bfloat16)
            values = registers.load_float32(v_mine)
            weighted[unit] = scaled_rows(values, tokens.carry_out()).astype(jnp.bfloat16)
            compat.publish()
            scores = registers.matmul((q_tile, registers.transposed(k_tile))) * tokens.pairs()
            scores = registers.as_operand(scores, spare[0].at[unit] if spare else None)
            y = scaled_rows(registers.matmul((q_tile, states.at[unit])), tokens.carry_in())
            y = registers.matmul((scores, v_mine), start=y)
            compat.stores_read()
            outputs[unit] = y.astype(jnp.bfloat16)
            compat.publish()
            place = pl.ds(head * plan.value + columns.start, COLUMNS)
            compat.store(outputs.at[unit], y_ref.at[row, pl.ds(at(indices[0]) * CHUNK, CHUNK), place])
            write = (registers.transposed(k_tile), weighted.at[unit])
            return registers.matmul(write, start=carry * tokens.kept())

        def around(run):
            where = (pl.ds(0, plan.key), columns)
            given = [refs[name] for name in ("state", "ends", "left")]
            carry = run(carried_state(*given, where, row, head, (0, split, 1)))

            for ref in last_ref:

                @pl.when(split == plan.splits - 1)
                def _(ref=ref):
                    ref[row, head, :, columns] = carry

            compat.stores_done()

        tiles = [(plan.key, lanes.key_head(block))] * 2 + [(COLUMNS * units, block)]
        specs = specs_of(lanes, block, row, decays, segments, at, *tiles)
        run = compat.pipeline(
            chunk, steps=plan.steps, specs=specs, stages=lanes.stages, warpgroups=units, around=around
        )
        run(*[refs[name] for name in ("decays", "segments", "q", "k", "v") if refs[name] is not None])

    tile = compat.tile(units, CHUNK, COLUMNS)
    y, *last = compat.kernel(
        body,
        grid=(lanes.blocks, plan.splits, plan.batch),
        names=("block", "split", "row"),
        out=outs,
        scratch=[compat.tile(units, plan.key, COLUMNS), tile, tile] + [tile] * compat.interpreting(),
        warpgroups=units,
        name="linear_attention_forward",
    )(*[given[name] for name in names])
    return y.reshape(v.shape), last[0] if need_last else None
