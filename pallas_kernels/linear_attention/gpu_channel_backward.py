"""Gradients of linear attention with a decay per channel, on Hopper GPUs.

A walk forward writes the state S before each chunk, in bfloat16; a walk back in time the gradient D of the state after
it. Then every chunk stands alone. With the letters of `gpu_channel`, P = scale dy v^T, for j <= i, the gradient of the
scores, and k' = k 2^(G_last - G):

    dq = scale 2^G (dy S^T) + sum over levels ;   dk = 2^(G_last - G) (v D^T) + sum over levels
    dv = A^T dy + k' D

At a level, X holds decayed queries (of later rows) and keys (of earlier ones), and W is P + P^T where blocks meet:
W X is what dq takes in a later row and dk in an earlier one, but for the factor that the row of X has of q or k.

The gradient of log_decay_t is, for each channel, the sum of all that crosses t: pairs i >= t > j of the chunk, reads of
S by tokens i >= t, writes of j < t that outlive the chunk, and <S, D> kept through it. Pairs are summed as X * (W X) of
later rows less that of earlier ones, from t on: what does not cross t is the same product twice and cancels.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.linear_attention import gpu
from pallas_kernels.linear_attention import plan as planning
from pallas_kernels.linear_attention.gpu_channel import (
    COLUMNS,
    LEVELS,
    STORED,
    Joins,
    Lanes,
    Runs,
    channel_decays,
    exponents,
    log2_decays,
    only_first,
    read,
    specs_of,
    split_parts,
    stretches,
    walk_states,
    write_whole,
)
from pallas_kernels.linear_attention.plan import CHUNK


def backward(q, k, v, log_decay, state, run_ids, log_write, dy, dstate=None, *, scale=1.0, splits=None):
    """Gradients (dq, dk, dv, dlog_decay, dstate, None) of `gpu_channel.forward`, from its arguments alone.

    As `gpu_backward.backward`, but log_decay and its gradient are [B, T, H, K] and log_write must be None.
    """
    time, key_shape, value_shape = q.shape[1], q.shape, v.shape
    given_decay = log_decay
    if time % 8:
        q, k, v, log_decay, run_ids, dy = gpu.pad_time(q, k, v, log_decay, run_ids, dy)
    lanes = Lanes(planning.make_plan(q, v, q.shape[0] * v.shape[2] * -(-v.shape[3] // 128), splits))
    decays = channel_decays(log_decay, run_ids)
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
    dlog = by_head(dlog, lanes.plan.heads).astype(given_decay.dtype)
    return dq, dk, dv.reshape(v.shape)[:, :time].reshape(value_shape), dlog, first, None


def _chunks(lanes: Lanes, q, k, v, dy, decays, segments, states, gradients, scale):
    """dq, dk [slices, B, T, H * K], dv [B, T, H * V] and the decays' gradient [slices, B, T, H * K], float32."""
    plan, units, halves, count = lanes.plan, lanes.units, lanes.halves, lanes.warpgroups
    given = {"decays": decays, "segments": segments, "q": gpu.flat(q), "k": gpu.flat(k), "v": gpu.flat(v)}
    given |= {"dy": gpu.flat(dy), "states": states, "gradients": gradients, "stretches": stretches()}
    names = [name for name, x in given.items() if x is not None]
    width = COLUMNS * units

    def body(*args):
        refs, rest = dict.fromkeys(given) | dict(zip(names, args)), args[len(names) :]
        outs, buffers, (whole, made, joined, landed, ready, done, *spare) = rest[:4], rest[4:8], rest[8:]
        block, split, row = (lax.axis_index(name) for name in ("block", "split", "row"))
        warpgroup = compat.warpgroup(count)
        unit, half = jnp.minimum(warpgroup, units - 1), jnp.minimum(warpgroup, halves - 1)
        head, piece = lanes.head(block), lax.rem(block, lanes.slices)
        mine, channels = pl.ds(unit * COLUMNS, COLUMNS), pl.ds(half * COLUMNS, COLUMNS)
        at = lambda i: split * plan.steps + i

        def joins_at(start, level):
            return Joins(start, spare[0].at[warpgroup] if spare else None, level)

        def operand(value):
            return compat.as_operand(value, spare[1].at[warpgroup] if spare else None)

        def crossed(start, runs, v_tile, dy_tile):
            """P + P^T but for its diagonal, and the diagonal of P: [64, 64] bfloat16 and [64]."""
            below = compat.matmul((dy_tile, compat.transposed(v_tile)))
            above = compat.matmul((v_tile, compat.transposed(dy_tile)))
            joins = joins_at(start, 0)
            both = runs.pairs(jnp.where(joins.row > joins.column, below, above) * scale)
            return both, jnp.sum(jnp.where(joins.row == joins.column, both, 0.0), axis=1)

        def join(level, carry, start, tiles, weights, exponent):
            """One level: adds to the scores, dq, dk, and what the level adds to the decays' gradients, per row."""
            scores, dq, dk = carry
            q, k, tile = tiles
            joins = joins_at(start, level)
            later, joined = joins.later(level), joins.joined(level)
            factor = jnp.exp2(exponent(joins))
            tile[...] = (jnp.where(later, read(q), read(k)) * factor).astype(jnp.bfloat16)
            compat.publish()
            scores = jnp.where(joined, compat.matmul((tile, compat.transposed(tile))), scores)
            change = compat.matmul((operand(jnp.where(joined, read(weights), 0.0)), tile))
            crossing = read(tile) * change
            change = change * factor
            one = jnp.where(later, 1.0, 0.0)  # by row: a multiply-add is cheaper than a choice
            return (scores, dq + change * one, dk + change * (1 - one)), crossing * (2 * one - 1)

        def inner(start, runs, decays, q, k, parts, tile, weights, stored, v_tile, dy_tile):
            """Within the chunk: scores, dq and dk; `decays` becomes what pairs add to their gradients, per row."""
            both, own = crossed(start, runs, v_tile, dy_tile)
            weights[...] = both.astype(jnp.bfloat16)
            tiles = (q, k, tile)
            zeros = compat.zeros((CHUNK, CHUNK))
            dq = read(k) * compat.spread_rows(own, zeros.shape)
            dk = read(q) * compat.spread_rows(own, zeros.shape)
            decays[...] = zeros

            def step(level, carry, stretch):
                carry, pairs = join(level, carry, start, tiles, weights, lambda joins: exponents(stretch(joins), parts))
                decays[...] = compat.load_tile(decays) + pairs
                return carry

            made_here = lambda i, carry: step(i * (LEVELS - 1), carry, lambda joins: joins.stretch(i * (LEVELS - 1)))
            fetched = lambda level, carry: step(level, carry, lambda _: stored.at[level - STORED[0]])
            carry = lax.fori_loop(0, 2, made_here, (zeros, dq, dk))
            compat.wait(made)
            scores, dq, dk = lax.fori_loop(STORED[0], STORED[-1] + 1, fetched, carry)
            joins = joins_at(start, 0)
            scores = jnp.where(joins.row > joins.column, scores, 0.0)
            same = jnp.sum(read(q) * read(k), axis=1)
            scores = jnp.where(joins.row == joins.column, compat.spread_rows(same, scores.shape), scores)
            return runs.pairs(scores) * scale, dq, dk

        def prepare(start, runs, parts, tile, weights, late, tiles):
            """All that needs only this warpgroup's channels; scores go to `parts`, decayed keys to `tile`."""
            decay_tile, q_tile, k_tile, v_tile, dy_tile, state_tile = tiles
            decays, q, k = (x.at[:, channels] for x in (decay_tile, q_tile, k_tile))
            state = state_tile.at[channels]
            compat.wait(done)
            split_parts(log2_decays(decays), parts)
            pl.when(warpgroup == 0)(lambda: compat.fetch(refs["stretches"], late.at[pl.ds(0, len(STORED))], made))
            write_whole(parts, tile, whole.at[channels], runs)
            scores, dq, dk = inner(start, runs, decays, q, k, parts, tile, weights, late, v_tile, dy_tile)
            compat.arrive(joined)
            compat.wait(joined)
            pl.when(warpgroup == 0)(lambda: fetch_gradients(lax.div(start, CHUNK), late))
            # Reads of the state, and writes that outlive the chunk.
            into = runs.entering(jnp.exp2(exponents(joins_at(start, 0).before(), parts))) * scale
            reads = into * compat.matmul((dy_tile, compat.transposed(state)))
            decays[...] = compat.load_tile(decays) + reads * read(q)
            dq = dq + reads
            out = runs.leaving(jnp.exp2(exponents(joins_at(start, 0).after(), parts)))
            tile[...] = (read(k) * out).astype(jnp.bfloat16)
            compat.wait(landed)
            by_unit = [(late.at[half * units + part], pl.ds(part * COLUMNS, COLUMNS)) for part in range(units)]
            writes = out * compat.matmul(*[(v_tile.at[:, part], compat.transposed(block)) for block, part in by_unit])
            dk = dk + writes
            parts[pl.ds(0, CHUNK)] = scores.astype(jnp.bfloat16)
            written = (writes * read(k)).astype(jnp.bfloat16)
            kept = sum(jnp.sum(read(state.at[:, part]) * read(block), axis=1) for block, part in by_unit)
            whole[channels] = kept * compat.load_rows(whole.at[channels])
            q[...] = dq.astype(jnp.bfloat16)
            k[...] = dk.astype(jnp.bfloat16)
            free = parts.at[pl.ds(CHUNK, CHUNK)]
            free[...] = written
            compat.publish()
            write_decays(start, runs, decays, free, state.at[:, pl.ds(0, COLUMNS)])

        def fetch_gradients(now, late):
            """Starts to fetch the state's gradient after the chunk, by blocks of 64 channels and value columns."""
            for part in range(halves * units):
                rows = pl.ds(part // units * COLUMNS, COLUMNS)
                columns = pl.ds(piece * width + part % units * COLUMNS, COLUMNS)
                compat.fetch(refs["gradients"].at[row, now, head, rows, columns], late.at[part], landed)

        def write_decays(start, runs, decays, written, free):
            """`decays` becomes their gradients, from what rows add to them."""
            total = compat.matmul((joins_at(start, 0).strictly_before(), written))
            rows = compat.load_tile(decays)
            high = rows.astype(jnp.bfloat16)
            for part in (high, (rows - high.astype(jnp.float32)).astype(jnp.bfloat16)):
                free[...] = part
                compat.publish()
                total = compat.matmul((joins_at(start, 0).from_on(), free), start=total)
            total = total + compat.spread_columns(compat.load_columns(whole.at[channels]), total.shape)
            decays[...] = runs.real(total)
            compat.publish()

        def chunk(indices, decay_tile, *tiles):
            *seg, q_tile, k_tile, v_tile, dy_tile, state_tile = tiles
            runs, now = Runs(*(seg or [None])), at(indices[0])
            start = now * CHUNK
            parts, own_tiles, weights, late = (compat.unhoisted(buffer, start) for buffer in buffers)
            every = (decay_tile, q_tile, k_tile, v_tile, dy_tile, state_tile)
            tokens = pl.ds(start, CHUNK)

            prepared = lambda: prepare(start, runs, parts.at[half], own_tiles.at[half], weights.at[half], late, every)
            only_first(halves, warpgroup, prepared, lambda: compat.wait(done))
            compat.arrive(ready)
            compat.wait(ready)
            place = pl.ds(head * plan.key, plan.key)
            for tile, out, storing in ((q_tile, outs[0], 0), (k_tile, outs[1], 0), (decay_tile, outs[3], count - 1)):
                compat.store(tile, out.at[piece, row, tokens, place], warpgroup == storing)

            def values():
                dy_mine = dy_tile.at[:, mine]
                pairs = [(compat.transposed(parts.at[i, pl.ds(0, CHUNK)]), dy_mine) for i in range(halves)]
                for i in range(halves):
                    pairs.append((own_tiles.at[i], late.at[i * units + unit]))
                staged = parts.at[warpgroup, pl.ds(CHUNK, CHUNK)]
                staged[...] = compat.matmul(*pairs).astype(jnp.bfloat16)
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
        specs = specs_of(lanes, block, row, segments, at, *tiles)
        specs.append(compat.tile_spec((None, None, None, plan.key, width), lambda i: (row, at(i), head, 0, piece)))
        loop = lambda *args: chunk(*args[:-1])
        run = compat.pipeline(loop, steps=plan.steps, specs=specs, stages=1, warpgroups=count, around=around)
        run(*[refs[name] for name in names if name not in ("gradients", "stretches")])

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
        compat.tile(1, max(len(STORED), halves * units), CHUNK, CHUNK),
        compat.vector(plan.key),
        compat.barrier(1),
        compat.barrier(halves),
        compat.barrier(halves * units),
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
