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
    Joins,
    Lanes,
    Runs,
    Sums,
    channel_decays,
    exponents,
    log2_decays,
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
    dlog = by_head(dlog, lanes.plan.heads).astype(given_decay.dtype) if need_decay else None
    return dq, dk, dv.reshape(v.shape)[:, :time].reshape(value_shape), dlog, first, None


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
        mine, channels = pl.ds(unit * COLUMNS, COLUMNS), pl.ds(half * COLUMNS, COLUMNS)
        at = lambda i: split * plan.steps + i

        def joins_at(start, level=0):
            return Joins(start, spare[0].at[warpgroup] if spare else None, level)

        def operand(value):
            return compat.as_operand(value, spare[1].at[warpgroup] if spare else None)

        def mild(start, runs, sums, parts, tile, weights, tiles):
            """The gradients of a mild chunk's channels."""
            decays, q, k, v_tile, dy_tile, *_ = tiles
            readers = parts.at[pl.ds(0, CHUNK)]

            def causal(found):
                joins = joins_at(start)
                return (runs.pairs(jnp.where(joins.row >= joins.column, found, 0.0)) * scale).astype(jnp.bfloat16)

            weights[...] = causal(compat.matmul((dy_tile, compat.transposed(v_tile))))
            exponent = exponents(joins_at(start).middle(), parts)
            readers[...] = (read(q) * jnp.exp2(exponent)).astype(jnp.bfloat16)
            tile[...] = (read(k) * jnp.exp2(-exponent)).astype(jnp.bfloat16)
            compat.publish()
            dq = compat.matmul((weights, tile))
            decays[...] = read(readers) * dq
            finish_q(runs, tiles, dq * jnp.exp2(exponent), lambda: sums.entering(jnp.exp2(exponent)))
            dk = compat.matmul((compat.transposed(weights), readers))
            decays[...] = compat.load_tile(decays) - read(tile) * dk
            weights[...] = causal(compat.matmul((readers, compat.transposed(tile))))
            dk = dk * jnp.exp2(-exponent)
            finish_k(runs, parts, tile, tiles, dk, lambda: sums.leaving(jnp.exp2(-exponent)))

        def strong(start, runs, sums, parts, tile, weights, tiles):
            """The gradients of any chunk's channels."""
            decays, q, k, v_tile, dy_tile, *_ = tiles
            joins = joins_at(start)
            same = compat.spread_rows(jnp.sum(read(q) * read(k), axis=1), (CHUNK, CHUNK))
            weights[...] = jnp.where(joins.row == joins.column, same, 0.0).astype(jnp.bfloat16)
            columns = [pl.ds(part * COLUMNS, COLUMNS) for part in range(units)]
            own = sum(jnp.sum(read(dy_tile.at[:, part]) * read(v_tile.at[:, part]), axis=1) for part in columns)
            own = runs.real(compat.spread_rows(own * scale, (CHUNK, CHUNK)))
            decays[...] = compat.zeros((CHUNK, CHUNK))

            def join(level, carry):
                """Adds what pairs of a level are to the scores, to dq and dk, and per row to the decays' gradients."""
                dq, dk = carry
                joins = joins_at(start, level)  # one: the time that layouts are searched for grows with each
                below = compat.matmul((dy_tile, compat.transposed(v_tile)))
                above = compat.matmul((v_tile, compat.transposed(dy_tile)))
                both = runs.pairs(jnp.where(joins.later(level), below, above) * scale)
                both = operand(jnp.where(joins.joined(level), both, 0.0))
                factor = jnp.exp2(exponents(joins.stretch(level), parts))
                later = joins.later(level)
                tile[...] = (jnp.where(later, read(q), read(k)) * factor).astype(jnp.bfloat16)
                compat.publish()
                change = compat.matmul((both, tile))
                one = jnp.where(later, 1.0, 0.0)  # by row: a multiply-add is cheaper than a choice
                decays[...] = compat.load_tile(decays) + read(tile) * change * (2 * one - 1)
                change = change * factor
                met = compat.matmul((tile, compat.transposed(tile))).astype(jnp.bfloat16)
                weights[...] = jnp.where(joins.joined(level), met, compat.load_tile(weights))
                return dq + change * one, dk + change * (1 - one)

            dq, dk = lax.fori_loop(0, LEVELS, join, (read(k) * own, read(q) * own))
            joins = joins_at(start)
            found = jnp.where(joins.row >= joins.column, read(weights), 0.0)
            weights[...] = (runs.pairs(found) * scale).astype(jnp.bfloat16)
            finish_q(runs, tiles, dq, lambda: jnp.exp2(exponents(joins_at(start).before(), parts)))
            finish_k(runs, parts, tile, tiles, dk, lambda: jnp.exp2(exponents(joins_at(start).after(), parts)))

        def finish_q(runs, tiles, dq, into):
            """Adds reads of the state to dq, which becomes `q`, and to the decays' gradients."""
            decays, q, _, _, dy_tile, state, _ = tiles
            reads = compat.matmul((dy_tile, compat.transposed(state)))
            reads = reads * (runs.entering(into()) * scale)
            decays[...] = compat.load_tile(decays) + reads * read(q)
            q[...] = (dq + reads).astype(jnp.bfloat16)

        def finish_k(runs, parts, tile, tiles, dk, out):
            """Adds to dk, which becomes `k`, writes that outlive the chunk; theirs to the decays' go to `parts`."""
            _, _, k, v_tile, _, _, gradient = tiles
            after = runs.leaving(out())
            tile[...] = (read(k) * after).astype(jnp.bfloat16)
            writes = after * compat.matmul((v_tile, compat.transposed(gradient)))
            parts[pl.ds(CHUNK, CHUNK)] = (writes * read(k)).astype(jnp.bfloat16)
            k[...] = (dk + writes).astype(jnp.bfloat16)

        def finish(start, runs, sums, parts, tiles):
            """The decays' gradients, from what rows add to them."""
            decays, *_, state, gradient = tiles
            by_unit = [pl.ds(part * COLUMNS, COLUMNS) for part in range(units)]
            kept = sum(jnp.sum(read(state.at[:, part]) * read(gradient.at[:, part]), axis=1) for part in by_unit)
            kept = kept * sums.kept(runs)
            sums.first[...] = kept
            high, low = parts.at[pl.ds(0, CHUNK)], state.at[:, by_unit[0]]
            rows = compat.load_tile(decays)
            rounded = rows.astype(jnp.bfloat16)
            high[...] = rounded
            low[...] = (rows - rounded.astype(jnp.float32)).astype(jnp.bfloat16)
            compat.publish()
            total = compat.matmul((joins_at(start).strictly_before(), parts.at[pl.ds(CHUNK, CHUNK)]))
            from_on = joins_at(start).from_on()
            total = compat.matmul((from_on, high), (from_on, low), start=total)
            total = total + compat.spread_columns(compat.load_columns(sums.first), total.shape)
            decays[...] = runs.real(total)
            compat.publish()

        def chunk(indices, decay_tile, *tiles):
            *seg, q_tile, k_tile, v_tile, dy_tile, state_tile, gradient_tile = tiles
            runs, now = Runs(*(seg or [None])), at(indices[0])
            start = now * CHUNK
            here = lambda *refs: (compat.unhoisted(ref, now) for ref in refs)
            parts, own_tiles, weights, vectors = here(*buffers)
            decay_tile, q_tile, k_tile, v_tile = here(decay_tile, q_tile, k_tile, v_tile)
            dy_tile, state_tile, gradient_tile = here(dy_tile, state_tile, gradient_tile)
            tokens = pl.ds(start, CHUNK)

            def prepare():
                by_channel = [x.at[:, channels] for x in (decay_tile, q_tile, k_tile)]
                every = (*by_channel, v_tile, dy_tile, state_tile.at[channels], gradient_tile.at[channels])
                sums, own = Sums(vectors, channels), (parts.at[half], own_tiles.at[half])
                compat.wait(done)
                split_parts(log2_decays(every[0]), own[0])
                is_mild = sums.write(*own, joins_at(start))
                work = (start, runs, sums, *own, weights.at[half], every)
                pl.when(is_mild)(lambda: mild(*work))
                pl.when(jnp.logical_not(is_mild))(lambda: strong(*work))
                finish(start, runs, sums, own[0], every)

            only_first(halves, warpgroup, prepare, lambda: compat.wait(done))
            compat.arrive(ready)
            compat.wait(ready)
            place = pl.ds(head * plan.key, plan.key)
            for tile, out, storing in ((q_tile, outs[0], 0), (k_tile, outs[1], 0), (decay_tile, outs[3], count - 1)):
                compat.store(tile, out.at[piece, row, tokens, place], warpgroup == storing)

            def values():
                dy_mine = dy_tile.at[:, mine]
                pairs = [(compat.transposed(weights.at[i]), dy_mine) for i in range(halves)]
                pairs += [(own_tiles.at[i], gradient_tile.at[pl.ds(i * COLUMNS, COLUMNS), mine]) for i in range(halves)]
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
        specs = specs_of(lanes, block, row, segments, at, *tiles, rows=1)
        state_at = lambda i: ((row * plan.chunks + at(i)) * plan.heads + head, 0, piece)
        specs += [compat.tile_spec((1, plan.key, width), state_at)] * 2
        loop = lambda *args: chunk(*args[:-1])
        run = compat.pipeline(
            loop, steps=plan.steps, specs=specs, stages=1, warpgroups=count, around=around, fetching=40
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
