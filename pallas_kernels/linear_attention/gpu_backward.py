"""Gradients of linear attention with one decay per token and head, on Hopper GPUs.

Two kernels walk time and recompute what they need; neither states nor scores are written, but for bf16 states every
few chunks that the decays' gradient needs. Per chunk, with S the state before it, D its gradient after it, g the
cumulated decays, c those less the logarithms of the writes' weights, P_ij = scale 2^(g_i - c_j) for j <= i and a_i, w_j
the factors of carry in and out:

    forward walk:   dq = a (dy S^T) + (P * dy v^T) k ;       S <- 2^(g_last) S + k^T (w v)
    backward walk:  dk = (w v) D^T + (P * dy v^T)^T q ;      D <- 2^(g_last) D + q^T (a dy)
                    dv = w (k D) + (P * q k^T)^T dy

In the forward walk each warpgroup owns 64 value columns and one adds up the dq of both; in the backward walk one
computes dv and the other dk. Heads that share keys, and slices of a wide value, add to the same dq and dk: each block
writes its part in bf16 and XLA adds the parts, always in one order.

The gradient of log_decay_t is the sum of everything that crosses t: pairs i >= t > j within the chunk, reads of S by
tokens i >= t, writes of j < t that outlive the chunk, and <S, D> kept through it. Only the last comes from sums that
bf16 operands have rounded and that are subtracted; it is most of this gradient's error. `kept_through` keeps it small.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
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

KEPT_LOG2 = -12.0  # less than 2^-12 left of the state is nothing to the decays' gradient: bf16 rounds to 2^-9


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
    anchor: int | None
    arrays: dict
    shapes: tuple
    ends: tuple  # of the splits, forward and backward, and what each leaves
    start: jax.Array | None  # the state's gradient if the final state's is 0, where it was asked for
    scale: float

    def finish(self, state, dstate):
        """`backward`'s results."""
        (time, log_decay, run_ids, log_write), lanes, keep = self.given, self.lanes, self.anchor
        batch, heads = lanes.plan.batch, lanes.plan.heads
        ends, back_ends, left = self.ends
        given = self.arrays | {"state": state, "ends": ends, "left": left}
        parts, *walk = _walk_forward(lanes, given, self.scale, keep)
        dq = _add_parts(parts, self.shapes[0])[:, :time]
        given |= {"state": dstate, "ends": back_ends}
        dv, parts, first, *back, totals = _walk_backward(lanes, given, self.scale, keep, log_write is not None)
        dk, dv = (x[:, :time] for x in (_add_parts(parts, self.shapes[1]), dv.reshape(self.shapes[2])))

        def by_token(x):
            x = x.reshape(batch, heads, -1).swapaxes(1, 2)[:, :time]
            return x if run_ids is None else jnp.where(run_ids[:, :time, None] != 0, x, 0.0)

        dlog = dwrite = None
        if keep is not None:
            start = None if state is None else jnp.sum(state * first, axis=(2, 3))
            facts = self.arrays["decays"], self.arrays["segments"]
            dlog = by_token(_decay_gradient(lanes.plan, keep, *facts, start, walk, back))
            dlog = jnp.sum(dlog, axis=(0, 1)) if log_decay.ndim == 1 else dlog
        if totals is not None:
            dwrite = by_token(jnp.sum(totals, axis=0))
        return dq, dk, dv, dlog, first, dwrite


def begun(q, k, v, log_decay, run_ids, log_write, dy, *, scale, need_decay=True, splits=None, need_start=False):
    """What `backward` does before it needs states; need_start: also the state's gradient if the final one's is 0."""
    time, call = q.shape[1], (q.shape[1], log_decay, run_ids, log_write)
    if time % 8:
        q, k, v, log_decay, run_ids, log_write, dy = pad_time(q, k, v, log_decay, run_ids, log_write, dy)
    batch, padded = q.shape[:2]
    heads, value = v.shape[2:]
    config = planning.config("backward", q, v, splits)
    need_decay = need_decay and log_decay is not None
    anchor = min(config.anchor, -(-padded // CHUNK))
    blocks = batch * heads * value // (COLUMNS * config.units)
    plan = planning.make_plan(q, v, blocks, config.splits, multiple=anchor)
    lanes = Lanes(plan, config.units, config.stages)
    decays = gates.chunk_decays(log_decay, log_write, run_ids, plan)
    segments = planning.chunk_segments(run_ids, plan)
    ends = back_ends = left = start = None
    if plan.splits > 1 or need_start:
        left = gates.split_decays(decays, segments, plan)
        back_ends = split_states(lanes, q, dy, decays, segments, reverse=True, scale=scale, every=need_start)
    if need_start:
        start = summed(back_ends, left, reverse=True)
    if plan.splits > 1:
        ends = split_states(lanes, k, v, decays, segments)
    else:
        back_ends = left = None
    arrays = {"decays": decays, "segments": segments, "q": flat(q), "k": flat(k), "v": flat(v), "dy": flat(dy)}
    shapes = q.shape, k.shape, v.shape
    keep = anchor if need_decay else None
    return Begun(call, lanes, keep, arrays, shapes, (ends, back_ends, left), start, scale)


def _add_parts(parts, shape):
    total = parts[0] if parts.shape[0] == 1 else jnp.sum(parts, axis=0, dtype=jnp.float32)
    return total.astype(parts.dtype).reshape(shape)


def _decay_gradient(plan, anchor, decays, segments, start, walk, back):
    """Gradient of the log decays, float32 [B, H, ...] with time last, from the sums that the kernels wrote."""
    pairs, reads, states = walk
    writes, gradients = back
    shape = (plan.batch, plan.heads, plan.chunks, CHUNK)
    pairs, reads, writes = (jnp.sum(x, axis=0).reshape(shape) for x in (pairs, reads, writes))
    # <S, D> at the start of every anchored block; the first one has no state of its own in the arrays.
    anchors = jnp.sum(states.astype(jnp.float32) * gradients.astype(jnp.float32), axis=(3, 4))
    start = jnp.zeros_like(anchors[:, 0]) if start is None else start
    anchors = jnp.where(jnp.arange(anchors.shape[1])[:, None] == 0, start[:, None], anchors).swapaxes(1, 2)
    by_block = (plan.batch, plan.heads, plan.chunks // anchor, anchor)
    read, written = (jnp.sum(x, axis=-1).reshape(by_block) for x in (reads, writes))
    left = jnp.moveaxis(gates.ends_of_chunks(decays, segments, plan), 3, 1)
    kept = kept_through(anchors, read, written, left.reshape(-1, *by_block[1:]) > KEPT_LOG2)
    kept = kept.reshape(*shape[:3], 1)
    # What tokens from t on read, and what those before t wrote: one product with a triangle for both.
    later = jnp.sum(reads, axis=-1, keepdims=True)
    earlier = planning.cumulate("bhcs,st->bhct", writes - reads, lambda source, target: source < target)
    return pairs + later + earlier + kept


def kept_through(anchors, read, written, stays):
    """<S, D> of what is kept through each chunk, [B, H, blocks, chunks], from its values at the blocks' starts.

    <S, D> at a chunk's start less what the chunk reads of S is what is kept; that plus what the chunk writes is <S, D>
    at its end. Each step adds the rounding errors of one sum, so the walk goes both ways, from a block's start and from
    the next one's, and each value is weighted by how many sums the other is made of. Where `stays` is false nothing is
    kept, and both ways start anew.
    """
    count = read.shape[-1]
    known = jnp.arange(anchors.shape[2]) < anchors.shape[2] - 1
    ends = jnp.where(known, jnp.roll(anchors, -1, axis=2), 0.0)
    first = anchors, jnp.ones(anchors.shape)
    last = ends, jnp.broadcast_to(jnp.where(known, 1.0, 1e9), anchors.shape)

    def walk(start, order, lost, gained):
        value, sums = start
        found = [None] * count
        for chunk in order:
            value = jnp.where(stays[..., chunk], value - lost[..., chunk], 0.0)
            sums = jnp.where(stays[..., chunk], sums + 1, 0.0)
            found[chunk] = value, sums
            value, sums = value + gained[..., chunk], sums + 1
        return found

    ways = zip(walk(first, range(count), read, written), walk(last, reversed(range(count)), written, read))
    return jnp.stack([(a * m + b * n) / jnp.maximum(n + m, 1.0) for (a, n), (b, m) in ways], axis=-1)


def _heads_of(lanes, block, decay_tile, segment, start, shift):
    """For each head of the block: the factors of its tokens, and its columns within the block's value tile."""
    width = COLUMNS * lanes.units // lanes.block_heads
    for index in range(lanes.block_heads):
        yield index, Tokens(decay_tile.at[:, index], segment, start, shift=shift), pl.ds(index * width, width)


def _read(ref):
    return compat.load_tile(ref).astype(jnp.float32)


def _add(sums, place, value):
    sums[place] = sums[place] + value if place in sums else value


def _row_sums(left, right):
    return jnp.sum(left * right, axis=1)


def _walk_forward(lanes: Lanes, given, scale, anchor):
    """Parts of dq [parts, B, T, Hk * K]; with anchor also pairs and reads [V / 64, B, H, T] and states at anchors."""
    plan, units = lanes.plan, lanes.units
    names = [name for name, x in given.items() if x is not None]
    parts, slots = plan.group * plan.value // (COLUMNS * units), plan.value // COLUMNS

    def body(*args):
        refs, (dq_ref, *rest) = dict.fromkeys(given) | dict(zip(names, args)), args[len(names) :]
        outs = rest[: 3 if anchor else 0]
        *buffers, free, handed = rest[len(outs) : len(outs) + 5]
        rest = rest[len(outs) + 5 :]
        triangle, ready, sums = rest[:3] if anchor else [None] * 3
        spare = rest[-1] if compat.interpreting() else None
        block, split, row = (lax.axis_index(name) for name in ("block", "split", "row"))
        unit = compat.warpgroup(units)
        mine = pl.ds(unit * COLUMNS, COLUMNS)
        head, columns = lanes.head_and_columns(block, unit)
        at = lambda i: split * plan.steps + i

        def chunk(indices, decay_tile, *tiles):
            *seg, q_tile, k_tile, v_tile, dy_tile, carry = tiles
            now = at(indices[0])
            tokens = pl.ds(now * CHUNK, CHUNK)
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
            weighted[unit] = scaled_rows(_read(v_mine), own.carry_out()).astype(jnp.bfloat16)
            compat.publish()
            if anchor:
                keep_state(now, states.at[unit])
            jobs = [([(compat.transposed(k_tile), weighted.at[unit])], carry * own.kept())]
            jobs.append(([(dy_mine, compat.transposed(v_mine))], None))
            if anchor:
                jobs.append(([(q_tile, compat.transposed(k_tile))], None))
            after, crossed, *score = compat.matmuls(*jobs)
            crossed = (crossed * own.pairs()).astype(jnp.bfloat16)
            weights = compat.as_operand(crossed, spare.at[unit] if spare is not None else None)
            if anchor:
                weighted[unit] = (score[0] * crossed.astype(jnp.float32)).astype(jnp.bfloat16)
                compat.publish()
                over = compat.matmul((triangle, weighted.at[unit]))
                earlier = compat.iota((CHUNK, CHUNK), 1) < compat.iota((CHUNK, CHUNK), 0)
                sums[unit, 0] = jnp.sum(jnp.where(earlier, over, 0.0), axis=1)
            reads = None
            if units == 2:
                pl.when(unit == 1)(lambda: compat.wait(free))
            for start in range(0, plan.key, COLUMNS):  # a half of dq at a time: registers are what is short
                half = pl.ds(start, COLUMNS)
                inter = compat.matmul((dy_mine, compat.transposed(states.at[unit, half])))
                inter = scaled_rows(inter, own.carry_in())
                if anchor:
                    read = _row_sums(_read(q_tile.at[:, half]), inter)
                    reads = read if reads is None else reads + read
                queries[unit, :, half] = compat.matmul((weights, k_tile.at[:, half]), start=inter).astype(jnp.bfloat16)
            if anchor:
                sums[unit, 1] = reads
            compat.arrive(handed)
            pl.when(unit == 0)(lambda: add_queries(tokens, queries))
            if anchor:
                write_sums(tokens)
            return after

        def add_queries(tokens, queries):
            """Adds up the halves of dq that each warpgroup kept in a tile of its own."""
            compat.wait(handed)
            if units == 2:
                for start in range(0, plan.key, COLUMNS):
                    half = pl.ds(start, COLUMNS)
                    total = _read(queries.at[0, :, half]) + _read(queries.at[1, :, half])
                    queries[0, :, half] = total.astype(jnp.bfloat16)
                compat.arrive(free)
            compat.publish()
            place = pl.ds(lanes.key_head(block) * plan.key, plan.key)
            compat.store(queries.at[0], dq_ref.at[block % parts, row, tokens, place])

        def write_sums(tokens):
            slot = lax.div(columns.start, COLUMNS)
            compat.publish()
            for index in range(2):
                compat.store(sums.at[unit, index], outs[index].at[slot, row, head, tokens])

        def keep_state(now, state):
            place = lax.div(now, anchor)
            compat.store(state, outs[2].at[row, place, head, :, columns], lax.rem(now, anchor) == 0)

        def around(run):
            if anchor:

                @pl.when(unit == 0)
                def _():
                    ones = compat.iota((CHUNK, CHUNK), 1) >= compat.iota((CHUNK, CHUNK), 0)
                    triangle[...] = jnp.where(ones, 1.0, 0.0).astype(jnp.bfloat16)
                    compat.publish()

                compat.arrive(ready)
                compat.wait(ready)

            where = (pl.ds(0, plan.key), columns)
            start = [refs[name] for name in ("state", "ends", "left")]
            carry = carried_state(*start, where, row, head, (0, split, 1))
            if units == 2:
                pl.when(unit == 0)(lambda: compat.arrive(free))
            run(carry)
            if units == 2:
                pl.when(unit == 1)(lambda: compat.wait(free))
            compat.stores_done()

        _run(lanes, refs, block, row, at, chunk, around, units)

    padded = plan.chunks * CHUNK
    tile = compat.tile(units, CHUNK, COLUMNS)
    out = [jax.ShapeDtypeStruct((parts, plan.batch, padded, plan.key_heads * plan.key), jnp.bfloat16)]
    scratch = [
        compat.tile(1, units, rows, width) for rows, width in ((plan.key, COLUMNS), (CHUNK, COLUMNS), (CHUNK, plan.key))
    ]
    scratch += [compat.barrier(1), compat.barrier(units)]
    if anchor:
        out += [jax.ShapeDtypeStruct((slots, plan.batch, plan.heads, padded), jnp.float32)] * 2
        kept = (plan.batch, plan.chunks // anchor, plan.heads, plan.key, plan.value)
        out.append(jax.ShapeDtypeStruct(kept, jnp.bfloat16))
        scratch += [compat.tile(CHUNK, CHUNK), compat.barrier(units), compat.vector(units, 2, CHUNK)]
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
    compat.pipeline(chunk, steps=plan.steps, specs=specs, stages=lanes.stages, warpgroups=warpgroups, around=around)(
        *[refs[name] for name in names if refs[name] is not None]
    )


def _walk_backward(lanes: Lanes, given, scale, anchor, weighs):
    """dv [B, T, H * V], parts of dk, the first state's gradient; with anchor also writes and gradients at anchors.

    weighs: then <v, dv> too, [slots, B, H, T]: the gradient of the logarithms of the writes' weights.
    """
    plan, width = lanes.plan, COLUMNS * lanes.units
    names = [name for name, x in given.items() if x is not None]
    count, parts = lanes.block_heads, plan.group * plan.value // width
    extra = 2 * bool(anchor) + weighs  # results beside dv, dk and the first state's gradient
    # With two units each warpgroup updates its own, and both read all; a single unit both update for themselves.
    shared = lanes.units == 2

    def body(*args):
        refs, rest = dict.fromkeys(given) | dict(zip(names, args)), args[len(names) :]
        dv_ref, dk_ref, first_ref, *rest = rest
        outs, rest = rest[:extra], rest[extra:]
        buffers, full, free, *spares = rest[:5], *rest[5:]
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
            states, weighted, dv_staged, dk_staged, sums = (compat.unhoisted(buffer, now) for buffer in buffers)
            state_of = lambda unit: states.at[unit if shared else warpgroup]
            here = list(_heads_of(lanes, block, decay_tile, *(seg or [None]), now * CHUNK, math.log2(scale)))
            own = Tokens(
                decay_tile.at[:, unit if count > 1 else 0], *(seg or [None]), now * CHUNK, shift=math.log2(scale)
            )
            compat.stores_read()
            compat.wait(free)
            states[warpgroup] = carry.astype(jnp.bfloat16)
            slot = pl.ds(warpgroup * COLUMNS, COLUMNS)
            weighted[:, slot] = scaled_rows(_read(dy_tile.at[:, mine]), own.carry_in()).astype(jnp.bfloat16)
            compat.publish()
            if anchor:
                keep_gradient(now, states.at[warpgroup])
            write = (compat.transposed(q_tile), weighted.at[:, slot])
            after = compat.matmul(write, start=carry * own.kept())
            compat.arrive(full)

            @pl.when(warpgroup == 0)
            def _():
                values(now, here, q_tile, k_tile, v_tile, dy_tile, state_of, dv_staged, sums)

            @pl.when(warpgroup == 1)
            def _():
                keys(now, here, q_tile, v_tile, dy_tile, state_of, weighted, dk_staged)

            return after

        def keep_gradient(now, state):
            place = lax.div(now + 1, anchor)

            kept = (lax.rem(now + 1, anchor) == 0) & (now + 1 < plan.chunks) & (shared | (warpgroup == 0))
            compat.store(state, outs[1].at[row, place, head, :, columns], kept)

        def values(now, here, q_tile, k_tile, v_tile, dy_tile, state_of, dv_staged, sums):
            tokens = pl.ds(now * CHUNK, CHUNK)
            score = compat.matmul((k_tile, compat.transposed(q_tile)))
            weights = [
                compat.as_operand(score * factors.pairs(transposed=True), spares[0].at[index] if spares else None)
                for index, factors, _ in here
            ]
            compat.wait(full)
            found = {}  # by kind of sum and head
            for unit, index, factors, part in units_in(here):  # a unit at a time: registers are what is short
                acc = compat.matmul((k_tile, state_of(unit)))
                acc = scaled_rows(acc, factors.carry_out())
                if anchor:
                    _add(found, (0, index), _row_sums(_read(v_tile.at[:, part]), acc))
                acc = compat.matmul((weights[index], dy_tile.at[:, part]), start=acc)
                if weighs:
                    _add(found, (1, index), _row_sums(_read(v_tile.at[:, part]), acc))
                dv_staged[:, part] = acc.astype(jnp.bfloat16)
            compat.arrive(free)
            for place, total in found.items():
                sums[place] = total
            compat.publish()
            compat.store(dv_staged, dv_ref.at[row, tokens, pl.ds(block * width, width)])
            slot = block % max(1, plan.value // width)
            for kind, index in found:
                out = outs[-1 if kind else 0]
                compat.store(sums.at[kind, index], out.at[slot, row, first_head + index, tokens])

        def keys(now, here, q_tile, v_tile, dy_tile, state_of, weighted, dk_staged):
            pairs = []
            for index, factors, part in here:
                crossed = compat.matmul((v_tile.at[:, part], compat.transposed(dy_tile.at[:, part])))
                crossed = crossed * factors.pairs(transposed=True)
                pairs.append(compat.as_operand(crossed, spares[1].at[index] if spares else None))
            compat.wait(full)
            # Both have updated their states by now: what they added them from is free to hold the weighted values.
            written = weighted.at[:, pl.ds(0, width)]
            for _, _, factors, part in units_in(here):
                values = scaled_rows(_read(v_tile.at[:, part]), factors.carry_out())
                written[:, part] = values.astype(jnp.bfloat16)
            compat.publish()
            for start in range(0, plan.key, COLUMNS):
                half = pl.ds(start, COLUMNS)
                products = [
                    (written.at[:, part], compat.transposed(state_of(unit).at[half]))
                    for unit, _, _, part in units_in(here)
                ]
                products += [(crossed, q_tile.at[:, half]) for crossed in pairs]
                dk_staged[:, half] = compat.matmul(*products).astype(jnp.bfloat16)
            compat.arrive(free)
            compat.publish()
            place = pl.ds(lanes.key_head(block) * plan.key, plan.key)
            compat.store(dk_staged, dk_ref.at[block % parts, row, pl.ds(now * CHUNK, CHUNK), place])

        def units_in(here):
            """`here` by units of 64 columns: (unit, head's index, its factors, the unit's columns)."""
            heads = [here[unit * count // lanes.units] for unit in range(lanes.units)]
            return [(unit, *head[:2], pl.ds(unit * COLUMNS, COLUMNS)) for unit, head in enumerate(heads)]

        def around(run):
            compat.arrive(free)
            where = (pl.ds(0, plan.key), columns)
            start = [refs[name] for name in ("state", "ends", "left")]
            last = plan.splits - 1
            carry = run(carried_state(*start, where, row, head, (last, last - split, -1)))

            @pl.when((split == 0) & (shared | (warpgroup == 0)))
            def _():
                first_ref[row, head, :, columns] = carry

            compat.wait(free)
            compat.stores_done()

        _run(lanes, refs, block, row, at, chunk, around, 2)

    padded = plan.chunks * CHUNK
    out = [
        jax.ShapeDtypeStruct((plan.batch, padded, plan.heads * plan.value), jnp.bfloat16),
        jax.ShapeDtypeStruct((parts, plan.batch, padded, plan.key_heads * plan.key), jnp.bfloat16),
        jax.ShapeDtypeStruct((plan.batch, plan.heads, plan.key, plan.value), jnp.float32),
    ]
    scratch = [
        compat.tile(1, 2, plan.key, COLUMNS),
        compat.tile(1, CHUNK, 2 * COLUMNS),
        compat.tile(1, CHUNK, width),
        compat.tile(1, CHUNK, plan.key),
        compat.vector(1, 2, count, CHUNK),
        compat.barrier(2),
        compat.barrier(2),
    ]
    sums = jax.ShapeDtypeStruct((max(1, plan.value // width), plan.batch, plan.heads, padded), jnp.float32)
    if anchor:
        kept = (plan.batch, plan.chunks // anchor, plan.heads, plan.key, plan.value)
        out += [sums, jax.ShapeDtypeStruct(kept, jnp.bfloat16)]
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
    writes, gradients = rest[:2] if anchor else (None, None)
    return dv[:, : plan.time], dk[:, :, : plan.time], first, writes, gradients, rest[-1] if weighs else None
