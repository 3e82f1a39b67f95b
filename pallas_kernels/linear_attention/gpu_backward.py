"""Gradients of linear attention with one decay per token and head, on Hopper GPUs.

Two kernels walk time and recompute what they need; neither states nor scores are written. Per chunk, with S the state
before it, D its gradient after it, g the cumulated decays, c those less the logarithms of the writes' weights, P_ij =
scale 2^(g_i - c_j) for j <= i and a_i, w_j the factors of carry in and out:

    forward walk:   dq = a (dy S^T) + (P * dy v^T) k ;       S <- 2^(g_last) S + k^T (w v)
    backward walk:  dk = (w v) D^T + (P * dy v^T)^T q ;      D <- 2^(g_last) D + q^T (a dy)
                    dv = w (k D) + (P * q k^T)^T dy

In the forward walk each warpgroup owns 64 value columns and adds up half of the dq of both; in the backward walk one
computes dv and the other dk. Heads that share keys, and slices of a wide value, add to the same dq and dk: each block
writes its part in bf16 and XLA adds the parts, always in one order.

The gradient of log_decay_t is the sum of everything that crosses t: pairs i >= t > j within the chunk, reads of S by
tokens i >= t, writes of j < t that outlive the chunk, and <S, D> kept through it. The sum of pairs is, over all s < t,
what later tokens read of s less what s reads of others: sums of the same rounded numbers, so that nothing is left of
their errors. <S, D> is found from what changes it: a chunk reads <S, q^T (a dy)> and writes <k^T (w v), D>. An error of
these would be that of all 64 tokens, and add up over chunks, so both are summed from the float32 states and the very
products that update D and S.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers
from pallas_kernels.linear_attention import gates
from pallas_kernels.linear_attention import plan as planning
from pallas_kernels.linear_attention.gpu import (
    Lanes,
    Tokens,
    carried_state,
    flat,
    pad_time,
    scaled_rows,
    specs_of,
    split_states,
    summed,
)
from pallas_kernels.linear_attention.plan import CHUNK, COLUMNS

KEPT_LOG2 = -24.0  # less than 2^-24 left of the state is nothing to the decays' gradient: float32 rounds to 2^-24
BLOCK = 64  # chunks whose sums are found by one triangle
SHARES = 8  # columns of the narrowest product


def backward(
    q, k, v, log_decay, state, run_ids, log_write, dy, dstate=None, *, scale=1.0, need_decay=True, splits=None
):
    """Gradients (dq, dk, dv, dlog_decay, dstate, dlog_write) of `gpu.forward`, from its arguments alone.

    Arguments as in `forward`; dy [B, T, H, V] bfloat16 and dstate [B, H, K, V] float32 (or None for zeros) are the
    cotangents of its results. Results: dq, dk, dv bfloat16 in their arguments' shapes; dlog_decay float32 in
    log_decay's shape, None if log_decay is None or need_decay is false; the initial state's gradient [B, H, K, V]
    float32, also where state is None; dlog_write float32, None if log_write is None. Every result is the same in every
    run.
    """
    options = dict(scale=scale, need_decay=need_decay, splits=splits)
    return begun(q, k, v, log_decay, run_ids, log_write, dy, **options).finish(state, dstate)


@dataclasses.dataclass(frozen=True)
class Begun:
    """A call of `backward` of which all is known but the state and the final state's gradient."""

    given: tuple  # time, log_decay, run_ids and log_write of the call
    lanes: Lanes
    need_decay: bool
    arrays: dict
    shapes: tuple
    ends: tuple  # of the splits, forward and backward, and what each leaves
    start: jax.Array | None  # the state's gradient if the final state's is 0, where it was asked for
    whole: jax.Array | None  # log2 of what is left of a state after the call, [B or 1, H], likewise
    scale: float

    def finish(self, state, dstate):
        """`backward`'s results."""
        (time, log_decay, run_ids, log_write), lanes, need_decay = self.given, self.lanes, self.need_decay
        batch, heads = lanes.plan.batch, lanes.plan.heads
        ends, back_ends, left = self.ends
        given = self.arrays | {"state": state, "ends": ends, "left": left}
        parts, *walk = _walk_forward(lanes, given, self.scale, need_decay)
        dq = _add_parts(parts, self.shapes[0])[:, :time]
        given |= {"state": dstate, "ends": back_ends}
        dv, parts, first, *back, totals = _walk_backward(lanes, given, self.scale, need_decay, log_write is not None)
        dk, dv = (x[:, :time] for x in (_add_parts(parts, self.shapes[1]), dv.reshape(self.shapes[2])))

        def by_token(x):
            x = x.reshape(batch, heads, -1).swapaxes(1, 2)[:, :time]
            return x if run_ids is None else jnp.where(run_ids[:, :time, None] != 0, x, 0.0)

        dlog = dwrite = None
        if need_decay:
            start = None if state is None else jnp.sum(state * first, axis=(2, 3))
            facts = self.arrays["decays"], self.arrays["segments"]
            dlog = by_token(_decay_gradient(lanes.plan, *facts, start, walk, back))
            dlog = jnp.sum(dlog, axis=(0, 1)) if log_decay.ndim == 1 else dlog
        if totals is not None:
            dwrite = by_token(jnp.sum(totals, axis=0))
        return dq, dk, dv, dlog, first, dwrite


def begun(q, k, v, log_decay, run_ids, log_write, dy, *, scale, need_decay=True, splits=None, need_start=False):
    """What `backward` does before it needs states; need_start: also the state's gradient if the final one's is 0."""
    time, call = q.shape[1], (q.shape[1], log_decay, run_ids, log_write)
    if time % 8:
        q, k, v, log_decay, run_ids, log_write, dy = pad_time(q, k, v, log_decay, run_ids, log_write, dy)
    batch, (heads, value) = q.shape[0], v.shape[2:]
    config = planning.config("backward", q, v, splits)
    need_decay = need_decay and log_decay is not None
    blocks = batch * heads * value // (COLUMNS * config.units)
    plan = planning.make_plan(q, v, blocks, config.splits)
    lanes = Lanes(plan, config.units, config.stages)
    decays = gates.chunk_decays(log_decay, log_write, run_ids, plan)
    segments = planning.chunk_segments(run_ids, plan)
    ends = back_ends = left = start = whole = None
    if plan.splits > 1 or need_start:
        left = gates.split_decays(decays, segments, plan)
        back_ends = split_states(lanes, q, dy, decays, segments, reverse=True, scale=scale, every=need_start)
    if need_start:
        left = lax.optimization_barrier(left)  # as forward
        start, whole = summed(back_ends, left, reverse=True), jnp.sum(left, axis=2)
    if plan.splits > 1:
        ends = split_states(
            lanes, k, v, decays, segments, every=need_start
        )  # as forward: made once where XLA sees both
    else:
        back_ends = left = None
    arrays = {"decays": decays, "segments": segments, "q": flat(q), "k": flat(k), "v": flat(v), "dy": flat(dy)}
    shapes = q.shape, k.shape, v.shape
    return Begun(call, lanes, need_decay, arrays, shapes, (ends, back_ends, left), start, whole, scale)


def _add_parts(parts, shape):
    total = parts[0] if parts.shape[0] == 1 else jnp.sum(parts, axis=0, dtype=jnp.float32)
    return total.astype(parts.dtype).reshape(shape)


def _decay_gradient(plan, decays, segments, start, walk, back):
    """Gradient of the log decays, float32 [B, H, ...] with time last, from the sums that the kernels wrote."""
    reads, lost = walk
    writes, gained = back
    shape = (plan.batch, plan.heads, plan.chunks, CHUNK)
    reads, writes = (jnp.sum(x, axis=0).reshape(shape) for x in (reads, writes))
    lost, gained = (jnp.sum(x.reshape(x.shape[0], *shape[:3], plan.key), axis=(0, 4)) for x in (lost, gained))
    left = jnp.moveaxis(gates.ends_of_chunks(decays, segments, plan), 3, 1)
    if start is not None:  # else XLA sums within the concatenation that is next, one thread a head's K V numbers
        start, lost, gained = lax.optimization_barrier((start, lost, gained))
    start = jnp.zeros(shape[:2]) if start is None else start
    kept = kept_through(start, lost, gained, left.reshape(-1, *shape[1:3]) > KEPT_LOG2)
    # What tokens from t on read, and what those before t wrote: one product with a triangle for both.
    later = jnp.sum(reads, axis=-1, keepdims=True)
    earlier = planning.cumulate("bhcs,st->bhct", writes - reads, lambda source, target: source < target)
    return later + earlier + kept[..., None]


def kept_through(start, lost, gained, stays):
    """<S, D> of what is kept through each chunk, [B, H, chunks], from its value at the first one's start, [B, H].

    <S, D> at a chunk's start less what the chunk reads of S is what is kept; that plus what the chunk writes is <S, D>
    at its end. Where `stays` is false nothing is kept, and the sum starts anew. So it is that of all differences since
    then: within BLOCK chunks, and of what such blocks end with.
    """
    count = lost.shape[-1]
    changes = jnp.concatenate([start[..., None], gained[..., :-1]], axis=-1) - lost
    blocks = -(-count // BLOCK)
    shape = *lost.shape[:2], blocks, -(-count // blocks)
    missing = [(0, 0), (0, 0), (0, shape[2] * shape[3] - count)]
    changes = jnp.pad(changes, missing).reshape(shape)
    stays = jnp.pad(jnp.broadcast_to(stays, lost.shape), missing, constant_values=True).reshape(shape)
    latest = _latest(~stays)
    kept = _since(changes, latest + 1)
    unbroken = latest < 0
    ends = _since(kept[..., -1], _latest(~unbroken[..., -1]))
    before = jnp.pad(ends[..., :-1], ((0, 0), (0, 0), (1, 0)))
    kept = kept + jnp.where(unbroken, before[..., None], 0.0)
    return kept.reshape(*shape[:2], -1)[..., :count]


def _latest(marks):
    """For each place of the last axis the last marked one up to it, or -1."""
    index = jnp.arange(marks.shape[-1])
    return jnp.max(jnp.where(marks[..., None, :] & (index <= index[:, None]), index, -1), axis=-1)


def _since(values, first):
    """For each place of the last axis the sum of the values from place `first` of it through its own."""
    index = jnp.arange(values.shape[-1])
    inside = (index <= index[:, None]) & (index >= first[..., None])
    return jnp.sum(jnp.where(inside, values[..., None, :], 0.0), axis=-1)


def _heads_of(lanes, block, decay_tile, segment, start, shift):
    """For each head of the block: the factors of its tokens, and its columns within the block's value tile."""
    width = COLUMNS * lanes.units // lanes.block_heads
    for index in range(lanes.block_heads):
        yield index, Tokens(decay_tile.at[:, index], segment, start, shift=shift), pl.ds(index * width, width)


def _add(sums, place, value):
    sums[place] = sums[place] + value if place in sums else value


def _row_sums(left, right):
    return jnp.sum(left * right, axis=1)


def _walk_forward(lanes: Lanes, given, scale, need_decay):
    """Parts of dq [parts, B, T, Hk * K]; with need_decay also sums for it, [V / 64, B, H, ...].

    Those are, by token, what it reads of the state and in the chunk less what the chunk's later tokens read of it, and,
    by chunk, what is read of the state, the sum of K numbers.
    """
    plan, units = lanes.plan, lanes.units
    names = [name for name, x in given.items() if x is not None]
    parts, slots = plan.group * plan.value // (COLUMNS * units), plan.value // COLUMNS

    def body(*args):
        refs, (dq_ref, *rest) = dict.fromkeys(given) | dict(zip(names, args)), args[len(names) :]
        outs = rest[: 2 if need_decay else 0]
        *buffers, free, handed = rest[len(outs) : len(outs) + 5]
        rest = rest[len(outs) + 5 :]
        ones, ready, sums, totals = rest[:4] if need_decay else [None] * 4
        spare = rest[-1] if compat.interpreting() else None
        block, split, row = (lax.axis_index(name) for name in ("block", "split", "row"))
        unit = compat.warpgroup(units)
        mine = pl.ds(unit * COLUMNS, COLUMNS)
        head, columns = lanes.head_and_columns(block, unit)
        at = lambda i: split * plan.steps + i

        def chunk(indices, decay_tile, *tiles):
            *seg, q_tile, k_tile, v_tile, dy_tile, carry = tiles
            now = at(indices[0])
            states, weighted, queries = (compat.unhoisted(buffer, now) for buffer in buffers)
            v_mine, dy_mine = v_tile.at[:, mine], dy_tile.at[:, mine]
            own = Tokens(
                decay_tile.at[:, unit if lanes.block_heads > 1 else 0],
                *(seg or [None]),
                now * CHUNK,
                shift=math.log2(scale),
            )
            compat.stores_read()
            states[unit] = carry.astype(jnp.bfloat16)
            weighted[unit] = scaled_rows(registers.load_float32(v_mine), own.carry_out()).astype(jnp.bfloat16)
            if need_decay:  # the tile of dq is free until that is written
                await_turn()
                read = queries.at[unit, :, pl.ds(0, COLUMNS)]
                read[...] = scaled_rows(registers.load_float32(dy_mine), own.carry_in()).astype(jnp.bfloat16)
            compat.publish()
            if need_decay:  # before the state is updated: both at once would need too many registers
                totals[unit] = _row_sums(carry, registers.matmul((registers.transposed(q_tile), read)))
            jobs = [([(registers.transposed(k_tile), weighted.at[unit])], carry * own.kept())]
            jobs.append(([(dy_mine, registers.transposed(v_mine))], None))
            if need_decay:
                jobs.append(([(q_tile, registers.transposed(k_tile))], None))
            after, crossed, *score = registers.matmuls(*jobs)
            crossed = crossed * own.pairs()
            weights = registers.as_operand(crossed, spare.at[unit] if spare is not None else None)
            if need_decay:
                crossed = registers.below(score[0] * crossed, now, 0.0, diagonal=False)
                weighted[unit] = crossed.astype(jnp.bfloat16)
                compat.publish()
            else:
                await_turn()
            jobs = [([(dy_mine, registers.transposed(states.at[unit]))], None)]
            if need_decay:
                signs = [registers.transposed(ones.at[pl.ds(n * SHARES, SHARES)]) for n in range(2)]
                pairs = weighted.at[unit]
                jobs.append(([(registers.transposed(pairs), signs[0]), (pairs, signs[1])], None))
            inter, *net = registers.matmuls(*jobs)
            inter = scaled_rows(inter, own.carry_in())
            if need_decay:
                sums[unit] = _row_sums(registers.load_float32(q_tile), inter) - jnp.sum(net[0], axis=1)
            queries[unit] = registers.matmul((weights, k_tile), start=inter).astype(jnp.bfloat16)
            if units == 2:
                add_queries(queries, weighted.at[unit])
            compat.publish()
            write(now, queries, weighted.at[unit])
            return after

        def await_turn():
            if units == 2:
                compat.wait(free)

        def add_queries(queries, total):
            """Adds up the dq that each warpgroup kept in a tile of its own: each does 64 columns, in `total`."""
            compat.arrive(handed)
            compat.wait(handed)

            @pl.when(unit * COLUMNS < plan.key)
            def _():
                total[...] = registers.load_tile(queries.at[0, :, mine]) + registers.load_tile(queries.at[1, :, mine])

            compat.arrive(free)

        def write(now, queries, total):
            tokens, first = pl.ds(now * CHUNK, CHUNK), lanes.key_head(block) * plan.key
            place = lambda start, size: dq_ref.at[block % parts, row, tokens, pl.ds(first + start, size)]
            if units == 1:
                compat.store(queries.at[0], place(0, plan.key))
            else:
                compat.store(total, place(unit * COLUMNS, COLUMNS), unit * COLUMNS < plan.key)
            if need_decay:
                slot = lax.div(columns.start, COLUMNS)
                compat.store(sums.at[unit], outs[0].at[slot, row, head, tokens])
                compat.store(totals.at[unit], outs[1].at[slot, row, head, pl.ds(now * plan.key, plan.key)])

        def around(run):
            if need_decay:

                @pl.when(unit == 0)
                def _():
                    added = registers.iota((CHUNK, CHUNK), 0) < SHARES
                    ones[...] = jnp.where(added, 1.0 / SHARES, -1.0 / SHARES).astype(jnp.bfloat16)
                    compat.publish()

                compat.arrive(ready)
                compat.wait(ready)

            where = (pl.ds(0, plan.key), columns)
            start = [refs[name] for name in ("state", "ends", "left")]
            carry = carried_state(*start, where, row, head, (0, split, 1))
            if units == 2:
                compat.arrive(free)
            run(carry)
            await_turn()
            compat.stores_done()

        _run(lanes, refs, block, row, at, chunk, around, units)

    padded = plan.chunks * CHUNK
    tile = compat.tile(units, CHUNK, COLUMNS)
    out = [jax.ShapeDtypeStruct((parts, plan.batch, padded, plan.key_heads * plan.key), jnp.bfloat16)]
    scratch = [
        compat.tile(1, units, rows, width) for rows, width in ((plan.key, COLUMNS), (CHUNK, COLUMNS), (CHUNK, plan.key))
    ]
    scratch += [compat.barrier(units), compat.barrier(units)]
    if need_decay:
        lengths = padded, plan.chunks * plan.key
        out += [jax.ShapeDtypeStruct((slots, plan.batch, plan.heads, length), jnp.float32) for length in lengths]
        scratch += [compat.tile(CHUNK, CHUNK), compat.barrier(units)]
        scratch += [compat.vector(units, CHUNK), compat.vector(units, plan.key)]
    results = compat.kernel(
        body,
        grid=(lanes.blocks, plan.splits, plan.batch),
        names=("block", "split", "row"),
        out=tuple(out),
        scratch=scratch + [tile] * compat.interpreting(),
        warpgroups=units,
        name="linear_attention_dq",
    )(*[given[name] for name in names])
    return results[0][:, :, : plan.time], *results[1:]


def _run(lanes, refs, block, row, at, chunk, around, warpgroups):
    """Runs `chunk` over the block's chunks, its tiles being decays, segments, q, k, v and dy."""
    plan = lanes.plan
    tiles = [(plan.key, lanes.key_head(block))] * 2 + [(COLUMNS * lanes.units, block)] * 2
    specs = specs_of(lanes, block, row, refs["decays"], refs["segments"], at, *tiles)
    names = ("decays", "segments", "q", "k", "v", "dy")
    # Addresses of wide values or of single heads need more than 24 registers, elsewhere the products need them more.
    fetching = 24 if plan.key > COLUMNS and lanes.block_heads > 1 else 40
    options = dict(stages=lanes.stages, warpgroups=warpgroups, around=around, fetching=fetching)
    run = compat.pipeline(chunk, steps=plan.steps, specs=specs, **options)
    run(*[refs[name] for name in names if refs[name] is not None])


def _walk_backward(lanes: Lanes, given, scale, need_decay, weighs):
    """dv [B, T, H * V], parts of dk, the first state's gradient; with need_decay also sums for it, [slots, B, H, ...].

    Those are writes, by token, and what each chunk writes that is read after it, the sum of K numbers.

    weighs: then <v, dv> too, [slots, B, H, T]: the gradient of the logarithms of the writes' weights.
    """
    plan, width = lanes.plan, COLUMNS * lanes.units
    names = [name for name, x in given.items() if x is not None]
    count, parts = lanes.block_heads, plan.group * plan.value // width
    extra = 2 * need_decay + weighs  # results beside dv, dk and the first state's gradient
    # With two units each warpgroup updates its own, and both read all; a single unit both update for themselves.
    shared = lanes.units == 2

    def body(*args):
        refs, rest = dict.fromkeys(given) | dict(zip(names, args)), args[len(names) :]
        dv_ref, dk_ref, first_ref, *rest = rest
        outs, rest = rest[:extra], rest[extra:]
        full, free, *rest = rest
        buffers, spares = (rest[:-2], rest[-2:]) if compat.interpreting() else (rest, [])
        block, split, row = (lax.axis_index(name) for name in ("block", "split", "row"))
        warpgroup = compat.warpgroup(2)
        unit = warpgroup if shared else 0
        mine = pl.ds(unit * COLUMNS, COLUMNS)
        first_head = lanes.decay_block(block) * count
        head, columns = lanes.head_and_columns(block, unit)
        at = lambda i: (split + 1) * plan.steps - 1 - i

        def chunk(indices, decay_tile, *tiles):
            *seg, q_tile, k_tile, v_tile, dy_tile, carry = tiles
            now = at(indices[0])
            states, weighted, written, dk_staged, sums, totals, *apart = (compat.unhoisted(x, now) for x in buffers)
            dv_staged = apart[0] if apart else weighted  # which is free when both have updated their states
            state_of = lambda unit: states.at[unit if shared else warpgroup]
            here = list(_heads_of(lanes, block, decay_tile, *(seg or [None]), now * CHUNK, math.log2(scale)))
            own = Tokens(
                decay_tile.at[:, unit if count > 1 else 0], *(seg or [None]), now * CHUNK, shift=math.log2(scale)
            )
            compat.stores_read()
            pl.when(warpgroup == 0)(lambda: compat.arrive(free))
            compat.wait(free)
            states[warpgroup] = carry.astype(jnp.bfloat16)
            slot = pl.ds(warpgroup * COLUMNS, COLUMNS)
            read, write = (registers.load_float32(tile.at[:, mine]) for tile in (dy_tile, v_tile))
            weighted[:, slot] = scaled_rows(read, own.carry_in()).astype(jnp.bfloat16)
            written[:, slot] = scaled_rows(write, own.carry_out()).astype(jnp.bfloat16)
            compat.publish()
            if need_decay:  # before the gradient is updated: both at once would need too many registers
                change = registers.matmul((registers.transposed(k_tile), written.at[:, slot]))
                totals[warpgroup] = _row_sums(carry, change)
            write = (registers.transposed(q_tile), weighted.at[:, slot])
            after = registers.matmul(write, start=carry * own.kept())
            compat.arrive(full)

            @pl.when(warpgroup == 0)
            def _():
                values(now, here, q_tile, k_tile, v_tile, dy_tile, state_of, dv_staged, sums)
                write_total(now, totals)

            @pl.when(warpgroup == 1)
            def _():
                keys(now, here, q_tile, v_tile, dy_tile, state_of, written, dk_staged)
                write_total(now, totals)

            return after

        def write_total(now, totals):
            if need_decay:
                place = lax.div(columns.start, COLUMNS), row, head, pl.ds(now * plan.key, plan.key)
                compat.store(totals.at[warpgroup], outs[1].at[place], shared | (warpgroup == 0))

        def values(now, here, q_tile, k_tile, v_tile, dy_tile, state_of, dv_staged, sums):
            tokens = pl.ds(now * CHUNK, CHUNK)
            score = registers.matmul((k_tile, registers.transposed(q_tile)))
            weights = [
                registers.as_operand(score * factors.pairs(transposed=True), spares[0].at[index] if spares else None)
                for index, factors, _ in here
            ]
            compat.wait(full)
            found, per_head = {}, lanes.units // count  # sums of a head, by kind
            for unit, index, factors, part in units_in(here):  # a unit at a time: registers are what is short
                acc = registers.matmul((k_tile, state_of(unit)))
                acc = scaled_rows(acc, factors.carry_out())
                # Each sum reads the values itself: with the same registers of them before and after the product that
                # adds to `acc`, both sums are the same instructions, and ptxas 13.0 takes one for the other.
                if need_decay:
                    _add(found, 0, _row_sums(registers.load_float32(v_tile.at[:, part]), acc))
                acc = registers.matmul((weights[index], dy_tile.at[:, part]), start=acc)
                if weighs:
                    _add(found, 1, _row_sums(registers.load_float32(v_tile.at[:, part]), acc))
                dv_staged[:, part] = acc.astype(jnp.bfloat16)
                if (unit + 1) % per_head == 0:
                    for kind, total in found.items():
                        sums[kind, index] = total
                    found = {}
            compat.publish()
            compat.store(dv_staged, dv_ref.at[row, tokens, pl.ds(block * width, width)])
            slot = block % max(1, plan.value // width)
            kinds = [(0, outs[:1])] * need_decay + [(1, outs[-1:])] * weighs
            for index, (kind, (out,)) in itertools.product(range(count), kinds):
                compat.store(sums.at[kind, index], out.at[slot, row, first_head + index, tokens])

        def keys(now, here, q_tile, v_tile, dy_tile, state_of, written, dk_staged):
            crossed = None  # of all heads: they share their keys, so one product with the queries does for them
            for _, factors, part in here:
                found = registers.matmul((v_tile.at[:, part], registers.transposed(dy_tile.at[:, part])))
                found = found * factors.pairs(transposed=True)
                crossed = found if crossed is None else crossed + found
            crossed = registers.as_operand(crossed, spares[1].at[0] if spares else None)
            compat.wait(full)
            products = [(crossed, q_tile)]
            for unit, *_ in units_in(here):
                slot = pl.ds((unit if shared else warpgroup) * COLUMNS, COLUMNS)
                products.append((written.at[:, slot], registers.transposed(state_of(unit))))
            dk_staged[...] = registers.matmul(*products).astype(jnp.bfloat16)
            compat.arrive(free)
            compat.publish()
            place = pl.ds(lanes.key_head(block) * plan.key, plan.key)
            compat.store(dk_staged, dk_ref.at[block % parts, row, pl.ds(now * CHUNK, CHUNK), place])

        def units_in(here):
            """`here` by units of 64 columns: (unit, head's index, its factors, the unit's columns)."""
            heads = [here[unit * count // lanes.units] for unit in range(lanes.units)]
            return [(unit, *head[:2], pl.ds(unit * COLUMNS, COLUMNS)) for unit, head in enumerate(heads)]

        def around(run):
            pl.when(warpgroup == 1)(lambda: compat.arrive(free))
            where = (pl.ds(0, plan.key), columns)
            start = [refs[name] for name in ("state", "ends", "left")]
            last = plan.splits - 1
            carry = run(carried_state(*start, where, row, head, (last, last - split, -1)))

            @pl.when((split == 0) & (shared | (warpgroup == 0)))
            def _():
                first_ref[row, head, :, columns] = carry

            compat.stores_done()
            pl.when(warpgroup == 0)(lambda: compat.arrive(free))
            compat.wait(free)

        _run(lanes, refs, block, row, at, chunk, around, 2)

    padded = plan.chunks * CHUNK
    out = [
        jax.ShapeDtypeStruct((plan.batch, padded, plan.heads * plan.value), jnp.bfloat16),
        jax.ShapeDtypeStruct((parts, plan.batch, padded, plan.key_heads * plan.key), jnp.bfloat16),
        jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.key, plan.value), jnp.float32),
    ]
    scratch = [
        compat.barrier(2),
        compat.barrier(2),
        compat.tile(1, 2, plan.key, COLUMNS),
        compat.tile(1, CHUNK, 2 * COLUMNS),
        compat.tile(1, CHUNK, 2 * COLUMNS),
        compat.tile(1, CHUNK, plan.key),
        compat.vector(1, 2, count, CHUNK),
        compat.vector(1, 2, plan.key),
    ]
    if not shared:
        scratch.append(compat.tile(1, CHUNK, width))
    sums = jax.ShapeDtypeStruct((max(1, plan.value // width), plan.batch, plan.heads, padded), jnp.float32)
    if need_decay:
        totals = (plan.value // COLUMNS, plan.batch, plan.heads, plan.chunks * plan.key)
        out += [sums, jax.ShapeDtypeStruct(totals, jnp.float32)]
    out += [sums] * weighs
    if compat.interpreting():
        scratch += [compat.tile(2, CHUNK, CHUNK)] * 2
    dv, dk, first, *rest = compat.kernel(
        body,
        grid=(lanes.blocks, plan.splits, plan.batch),
        names=("block", "split", "row"),
        out=tuple(out),
        scratch=scratch,
        warpgroups=2,
        name="linear_attention_dkv",
    )(*[given[name] for name in names])
    writes, gained = rest[:2] if need_decay else (None, None)
    return dv[:, : plan.time], dk[:, :, : plan.time], first, writes, gained, rest[-1] if weighs else None
