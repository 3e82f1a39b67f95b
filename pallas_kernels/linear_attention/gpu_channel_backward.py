"""Gradients of linear attention with a decay per channel, on Hopper GPUs.

A walk forward writes the state S before each chunk, in bfloat16; a walk back in time the gradient D of the state after
it. Then every chunk stands alone. With the letters of `gpu_channel`, P = scale dy v^T, for j <= i, the gradient of the
scores, and k' = k 2^(G_last - G):

    dq = scale 2^G (dy S^T) + sum over levels ;   dk = 2^(G_last - G) (v D^T) + sum over levels
    dv = A^T dy + k' D

In a mild chunk (see `gpu_channel`) the sums over levels are 2^(G - M) (P k~) and 2^(M - G) (P^T q~), with q~ and k~ the
queries and keys decayed to the chunk's middle. Elsewhere, at a level, X holds decayed queries (of later rows) and keys
(of earlier ones), and W is P + P^T where blocks meet: W X is what dq takes in a later row and dk in an earlier one, but
for the factor that the row of X has of q or k.

The gradient of log_decay_t is, for each channel, the sum of all that crosses t: pairs i >= t > j of the chunk, reads of
S by tokens i >= t, writes of j < t that outlive the chunk, and <S, D> kept through it. Pairs are summed from t on as
q~ (P k~) less k~ (P^T q~), or X * (W X) of later rows less that of earlier ones: what does not cross t is the same
product twice and cancels.
"""

import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers
from pallas_kernels.linear_attention import gpu
from pallas_kernels.linear_attention import plan as planning
from pallas_kernels.linear_attention.gpu_channel import (
    COLUMNS,
    LEVELS,
    Joins,
    Lanes,
    Runs,
    Sums,
    exponents,
    only_first,
    read,
    specs_of,
    split_parts,
    walk_states,
)
from pallas_kernels.linear_attention.plan import CHUNK


def backward(
    q, k, v, log_decay, state, run_ids, log_write, dy, dstate=None, *, scale=1.0, need_decay=True, splits=None
):
    """Gradients (dq, dk, dv, dlog_decay, dstate, None) of `gpu_channel.forward`, from its arguments alone.

    As `gpu_backward.backward`, but log_decay and its gradient are [B, T, H, K] and log_write must be None. The kernel
    makes the decays' gradient in any case; without need_decay it is not returned.
    """
    time, key_shape, value_shape = q.shape[1], q.shape, v.shape
    given_decay = log_decay
    if time % 8:
        q, k, v, log_decay, run_ids, dy = gpu.pad_time(q, k, v, log_decay, run_ids, dy)
    lanes = Lanes(planning.make_plan(q, v, q.shape[0] * v.shape[2] * -(-v.shape[3] // 128), splits))
    decays = gpu.flat(log_decay.astype(jnp.float32))
    segments = planning.chunk_segments(run_ids, lanes.plan)
    ends, left, back_ends, back_left = [None] * 4
    back = {"reverse": True, "scale": scale}
    if lanes.plan.splits > 1:
        ends, left = walk_states(lanes, k, v, decays, segments)
        back_ends, back_left = walk_states(lanes, q, dy, decays, segments, **back)
    states, _ = walk_states(lanes, k, v, decays, segments, (state, ends, left))
    gradients, first = walk_states(lanes, q, dy, decays, segments, (dstate, back_ends, back_left), **back)
    dq, dk, dv, dlog = _chunks(lanes, q, k, v, dy, decays, segments, states, gradients, scale)

    def by_head(parts, heads):
        """Sums the parts of slices of a wide value, and those of heads that share a key head."""
        if parts.shape[0] > 1 or heads != lanes.plan.heads:
            total = parts.reshape(*parts.shape[:3], heads, lanes.plan.heads // heads, -1)
            parts = jnp.sum(total, axis=(0, 4), dtype=jnp.float32).astype(parts.dtype)
        return parts.reshape(*q.shape[:2], heads, -1)[:, :time]

    dq, dk = by_head(dq, key_shape[2]), by_head(dk, key_shape[2])
    dlog = by_head(dlog, lanes.plan.heads).astype(given_decay.dtype) if need_decay else None
    return dq, dk, dv.reshape(v.shape)[:, :time].reshape(value_shape), dlog, first, None


class Tiles(typing.NamedTuple):
    """What a warpgroup works on in shared memory: its channels of the inputs, all of v and dy, and space of its own.

    parts: the decays' two parts; free: for keys and queries; weights: for P and then the scores.
    """

    decays: Any
    q: Any
    k: Any
    v: Any
    dy: Any
    state: Any
    gradient: Any
    parts: Any
    free: Any
    weights: Any


def _chunks(lanes: Lanes, q, k, v, dy, decays, segments, states, gradients, scale):
    """dq, dk [slices, B, T, H * K], dv [B, T, H * V] and the decays' gradient [slices, B, T, H * K], float32."""
    plan, units, halves, count = lanes.plan, lanes.units, lanes.halves, lanes.warpgroups
    given = {"decays": decays, "segments": segments, "q": gpu.flat(q), "k": gpu.flat(k), "v": gpu.flat(v)}
    given |= {"dy": gpu.flat(dy)} | {
        n: x.reshape(-1, *x.shape[3:]) for n, x in (("states", states), ("gradients", gradients))
    }
    names = [name for name, x in given.items() if x is not None]
    width = COLUMNS * units

    def body(*args):
        refs, rest = dict.fromkeys(given) | dict(zip(names, args)), args[len(names) :]
        outs, buffers, (ready, done, *spare) = rest[:4], rest[4:8], rest[8:]
        block, split, row = (lax.axis_index(name) for name in ("block", "split", "row"))
        warpgroup = compat.warpgroup(count)
        unit, half = jnp.minimum(warpgroup, units - 1), jnp.minimum(warpgroup, halves - 1)
        head, piece = lanes.head(block), lax.rem(block, lanes.slices)
        at = lambda i: split * plan.steps + i

        def joins_at(start, level=0):
            return Joins(start, spare[0].at[warpgroup] if spare else None, level)

        def operand(value):
            return registers.as_operand(value, spare[1].at[warpgroup] if spare else None)

        def mild(start, runs, sums, tiles):
            """The gradients of a mild chunk's channels."""
            readers = tiles.parts.at[pl.ds(0, CHUNK)]

            def causal(found):
                joins = joins_at(start)
                return (runs.pairs(jnp.where(joins.causal(), found, 0.0)) * scale).astype(jnp.bfloat16)

            tiles.weights[...] = causal(registers.matmul((tiles.dy, registers.transposed(tiles.v))))
            exponent = exponents(joins_at(start).middle(), tiles.parts)
            readers[...] = (read(tiles.q) * jnp.exp2(exponent)).astype(jnp.bfloat16)
            tiles.free[...] = (read(tiles.k) * jnp.exp2(-exponent)).astype(jnp.bfloat16)
            compat.publish()
            dq = registers.matmul((tiles.weights, tiles.free))
            tiles.decays[...] = read(readers) * dq
            reads = state_reads(runs, tiles, lambda: sums.entering(jnp.exp2(exponent)))
            tiles.q[...] = (dq * jnp.exp2(exponent) + reads).astype(jnp.bfloat16)
            dk = registers.matmul((registers.transposed(tiles.weights), readers))
            tiles.decays[...] = registers.load_tile(tiles.decays) - read(tiles.free) * dk
            tiles.weights[...] = causal(registers.matmul((readers, registers.transposed(tiles.free))))
            finish_k(runs, tiles, dk * jnp.exp2(-exponent), lambda: sums.leaving(jnp.exp2(-exponent)))

        def strong(start, runs, tiles_at):
            """The gradients of any chunk's channels; tiles_at(level) keeps addresses out of the registers of others."""
            tiles, joins = tiles_at(1), joins_at(start)
            same = registers.spread_rows(jnp.sum(read(tiles.q) * read(tiles.k), axis=1), (CHUNK, CHUNK))
            tiles.weights[...] = jnp.where(joins.same(), same, 0.0).astype(jnp.bfloat16)
            by_unit = [pl.ds(part * COLUMNS, COLUMNS) for part in range(units)]
            own = sum(jnp.sum(read(tiles.dy.at[:, part]) * read(tiles.v.at[:, part]), axis=1) for part in by_unit)
            own = runs.real(registers.spread_rows(own * scale, (CHUNK, CHUNK)))
            tiles.decays[...] = registers.zeros((CHUNK, CHUNK))

            def join(level, carry):
                """Adds what pairs of a level are to the scores, to dq and dk, and per row to the decays' gradients."""
                dq, dk = carry
                # Factors and P are made when they are used, and masks anew: kept ones are registers that products lack.
                joins, tiles = joins_at(start, level), tiles_at(level)
                factor = jnp.exp2(exponents(joins.stretch(level), tiles.parts))
                row = jnp.where(joins.later(level), read(tiles.q), read(tiles.k))
                tiles.free[...] = (row * factor).astype(jnp.bfloat16)
                compat.publish()
                met = registers.matmul((tiles.free, registers.transposed(tiles.free))).astype(jnp.bfloat16)
                tiles.weights[...] = jnp.where(joins.joined(level), met, registers.load_tile(tiles.weights))
                joins = joins_at(start, level + LEVELS)
                below = registers.matmul((tiles.dy, registers.transposed(tiles.v)))
                below = jnp.where(joins.later(level), below * scale, 0.0).astype(jnp.bfloat16)
                above = registers.matmul((tiles.v, registers.transposed(tiles.dy)))
                above = jnp.where(joins.later(level), 0.0, above * scale).astype(jnp.bfloat16)
                both = operand(jnp.where(joins.joined(level), runs.pairs(below + above), 0.0))
                change = registers.matmul((both, tiles.free))
                one = jnp.where(joins.later(level), 1.0, 0.0)  # by row: a multiply-add is cheaper than a choice
                pairs = read(tiles.free) * change * (2 * one - 1)
                tiles.decays[...] = registers.load_tile(tiles.decays) + pairs
                joins = joins_at(start, level + 2 * LEVELS)
                change = change * jnp.exp2(exponents(joins.stretch(level), tiles.parts))
                one = jnp.where(joins.later(level), 1.0, 0.0)
                return dq + change * one, dk + change * (1 - one)

            reads = state_reads(runs, tiles, lambda: jnp.exp2(exponents(joins_at(start).before(), tiles.parts)))
            dq, dk = lax.fori_loop(0, LEVELS, join, (read(tiles.k) * own + reads, read(tiles.q) * own))
            tiles = tiles_at(2)
            tiles.q[...] = dq.astype(jnp.bfloat16)
            joins = joins_at(start)
            found = jnp.where(joins.causal(), read(tiles.weights), 0.0)
            tiles.weights[...] = (runs.pairs(found) * scale).astype(jnp.bfloat16)
            finish_k(runs, tiles, dk, lambda: jnp.exp2(exponents(joins_at(start).after(), tiles.parts)))

        def state_reads(runs, tiles, into):
            """What reads of the state add to dq; and adds what they do to the decays' gradients."""
            reads = registers.matmul((tiles.dy, registers.transposed(tiles.state)))
            reads = reads * (runs.entering(into()) * scale)
            tiles.decays[...] = registers.load_tile(tiles.decays) + reads * read(tiles.q)
            return reads

        def finish_k(runs, tiles, dk, out):
            """Adds to dk, which becomes `k`, writes that outlive the chunk; theirs to the decays' go to `parts`."""
            after = runs.leaving(out())
            tiles.free[...] = (read(tiles.k) * after).astype(jnp.bfloat16)
            writes = after * registers.matmul((tiles.v, registers.transposed(tiles.gradient)))
            tiles.parts[pl.ds(CHUNK, CHUNK)] = (writes * read(tiles.k)).astype(jnp.bfloat16)
            tiles.k[...] = (dk + writes).astype(jnp.bfloat16)

        def finish(start, runs, sums, tiles):
            """The decays' gradients, from what rows add to them."""
            decays, parts, state, gradient = tiles.decays, tiles.parts, tiles.state, tiles.gradient
            by_unit = [pl.ds(part * COLUMNS, COLUMNS) for part in range(units)]
            kept = sum(jnp.sum(read(state.at[:, part]) * read(gradient.at[:, part]), axis=1) for part in by_unit)
            kept = kept * sums.kept(runs)
            sums.first[...] = kept
            high, low = parts.at[pl.ds(0, CHUNK)], state.at[:, by_unit[0]]
            rows = registers.load_tile(decays)
            rounded = rows.astype(jnp.bfloat16)
            high[...] = rounded
            low[...] = (rows - rounded.astype(jnp.float32)).astype(jnp.bfloat16)
            compat.publish()
            total = registers.matmul((joins_at(start).strictly_before(), parts.at[pl.ds(CHUNK, CHUNK)]))
            from_on = joins_at(start).from_on()
            total = registers.matmul((from_on, high), (from_on, low), start=total)
            total = total + registers.spread_columns(registers.load_columns(sums.first), total.shape)
            decays[...] = runs.real(total)
            compat.publish()

        def chunk(indices, *tiles):
            decays, *seg, q, k, v, dy, state, gradient, _ = tiles
            runs, now = Runs(*(seg or [None])), at(indices[0])
            start, tokens = now * CHUNK, pl.ds(now * CHUNK, CHUNK)
            here = lambda ref, level=0: compat.unhoisted(ref, now + level)

            def block_at(index, level):
                """A warpgroup's block of channels or columns; adds 0, see `compat.unhoisted`."""
                index = index + jnp.minimum(now + level, 0)
                return index, pl.ds(index * COLUMNS, COLUMNS)

            def tiles_at(level):
                every, (own, channels) = (decays, q, k, v, dy, state, gradient, *buffers[:3]), block_at(half, level)
                decay_tile, q_tile, k_tile, v_tile, dy_tile, *rest = (here(ref, level) for ref in every)
                by_channel = [x.at[:, channels] for x in (decay_tile, q_tile, k_tile)]
                return Tiles(
                    *by_channel, v_tile, dy_tile, *(x.at[channels] for x in rest[:2]), *(x.at[own] for x in rest[2:])
                )

            def prepare():
                tiles, sums = tiles_at(0), Sums(here(buffers[3]), block_at(half, 0)[1])
                compat.wait(done)
                split_parts(tiles.decays, runs, tiles.parts)
                is_mild = sums.write(tiles.parts, tiles.free, joins_at(start))
                pl.when(is_mild)(lambda: mild(start, runs, sums, tiles))
                pl.when(jnp.logical_not(is_mild))(lambda: strong(start, runs, tiles_at))
                finish(start, runs, Sums(here(buffers[3], 3), block_at(half, 3)[1]), tiles_at(3))

            only_first(halves, warpgroup, prepare, lambda: compat.wait(done))
            compat.arrive(ready)
            compat.wait(ready)
            place = pl.ds(head * plan.key, plan.key)
            for tile, out, storing in ((q, outs[0], 0), (k, outs[1], 0), (decays, outs[3], count - 1)):
                compat.store(here(tile, 4), out.at[piece, row, tokens, place], warpgroup == storing)

            def values():
                parts, keys, scores = (here(buffer, 4) for buffer in buffers[:3])
                mine = block_at(unit, 4)[1]
                dy_mine, after = here(dy, 4).at[:, mine], here(gradient, 4)
                pairs = [(registers.transposed(scores.at[i]), dy_mine) for i in range(halves)]
                pairs += [(keys.at[i], after.at[pl.ds(i * COLUMNS, COLUMNS), mine]) for i in range(halves)]
                staged = parts.at[block_at(warpgroup, 4)[0], pl.ds(CHUNK, CHUNK)]
                staged[...] = registers.matmul(*pairs).astype(jnp.bfloat16)
                compat.publish()
                place = pl.ds(head * plan.value + piece * width + mine.start, COLUMNS)
                compat.store(staged, outs[2].at[row, tokens, place])

            only_first(units, warpgroup, values, lambda: None)
            compat.arrive(done)
            compat.stores_read()

        def around(run):
            compat.arrive(done)
            run(None)
            compat.wait(done)
            compat.stores_done()

        tiles = [(plan.key, lanes.key_head(block))] * 2 + [(width, block)] * 2
        specs = specs_of(lanes, block, row, segments, at, *tiles, rows=1)
        state_at = lambda i: ((row * plan.chunks + at(i)) * plan.heads + head, 0, piece)
        specs += [compat.tile_spec((1, plan.key, width), state_at)] * 2
        run = compat.pipeline(
            chunk, steps=plan.steps, specs=specs, stages=1, warpgroups=count, around=around, fetching=40
        )
        run(*[refs[name] for name in names])

    keys = (lanes.slices, plan.batch, q.shape[1], plan.heads * plan.key)
    out = [
        jax.ShapeDtypeStruct(keys, jnp.bfloat16),
        jax.ShapeDtypeStruct(keys, jnp.bfloat16),
        jax.ShapeDtypeStruct(given["v"].shape, jnp.bfloat16),
        jax.ShapeDtypeStruct(keys, jnp.float32),
    ]
    scratch = [
        compat.tile(1, count, 2 * CHUNK, COLUMNS),
        compat.tile(1, halves, CHUNK, CHUNK),
        compat.tile(1, halves, CHUNK, CHUNK),
        compat.vector(1, 2, plan.key),
        compat.barrier(count),
        compat.barrier(count),
    ]
    return compat.kernel(
        body,
        grid=(lanes.blocks, plan.splits, plan.batch),
        names=("block", "split", "row"),
        out=tuple(out),
        scratch=scratch + [compat.tile(count, CHUNK, CHUNK)] * (2 * compat.interpreting()),
        warpgroups=count,
        name="linear_attention_channel_gradients",
        sums_columns=False,
    )(*[given[name] for name in names])
