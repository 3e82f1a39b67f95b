"""Gradients of linear attention with one decay per token and head, on TPUs.

A first kernel walks time and writes the state before each chunk, in bf16; a second walks time from the right and makes
all gradients of a chunk at once. With S the state before the chunk, D its gradient after it, g the cumulated decays,
c those less the logarithms of the writes' weights, P_ij = scale 2^(g_i - c_j) for j <= i and a_i, w_j the factors of
carry in and out:

    dq = a (dy S^T) + (P * dy v^T) k ;    dk = (w v) D^T + (P * dy v^T)^T q ;    dv = w (k D) + (P * q k^T)^T dy
    D <- 2^(g_last) D + q^T (a dy)

Heads that share keys add up their dq and dk on the chip.

The gradient of log_decay_t is the sum of everything that crosses t: pairs i >= t > j within the chunk, reads of S by
tokens i >= t, writes of j < t that outlive the chunk, and <S, D> kept through it. No two large sums are subtracted.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.linear_attention import cost
from pallas_kernels.linear_attention import plan as planning
from pallas_kernels.linear_attention.tpu import LANES, SUBLANES, Blocks, Tokens, dot, prepare, scaled, start_walk

CROSSING, READS, WRITES, OWN = range(4)  # rows of a head's sums; the last, <v, dv>, only where writes have weights


def backward(q, k, v, log_decay, state, run_ids, log_write, dy, dstate=None, *, scale=1.0, need_decay=True, tile=None):
    """Gradients (dq, dk, dv, dlog_decay, dstate, dlog_write) of `tpu.forward`, from its arguments alone.

    Arguments as in `forward`; dy [B, T, H, V] bfloat16 and dstate [B, H, K, V] float32 (or None for zeros) are the
    cotangents of its results. Results: dq, dk, dv bfloat16 in their arguments' shapes; dlog_decay float32 in
    log_decay's shape, None if log_decay is None or need_decay is false; the initial state's gradient [B, H, K, V]
    float32, also where state is None; dlog_write float32, None if log_write is None.
    """
    blocks = Blocks.of(q, v, tile)
    plan = blocks.plan
    given = prepare(blocks, log_decay, run_ids, log_write, {"q": q, "k": k, "v": v, "state": state, "dy": dy})
    kinds = 1 if log_write is None else 2
    given = second(blocks, given, _states(blocks, given, kinds), dstate)
    need_decay = need_decay and log_decay is not None
    count = 4 if log_write is not None else 3 if need_decay else 0
    dq, dk, dv, first, *sums = _gradients(blocks, given, scale, kinds, count)
    dlog = dwrite = None
    if count:
        rows = sums_by_head(blocks, sums[0], count)
        dwrite = by_token(plan, rows[:, :, OWN], run_ids) if count == 4 else None
    if need_decay:
        dlog = by_token(plan, _decay_gradient(plan, rows), run_ids)
        dlog = jnp.sum(dlog, axis=(0, 1)) if log_decay.ndim == 1 else dlog
    return *by_width(plan, dq, dk, dv), dlog, blocks.unpack(first), dwrite


def second(blocks: Blocks, given, states, dstate):
    """What the second kernel reads, from what the first one did and the states that it made."""
    given = {name: entry for name, entry in given.items() if name != "state"} | {"states": ("chunk_state", states)}
    return given if dstate is None else given | {"state": ("walk", blocks.pack(dstate))}


def by_width(plan, dq, dk, dv):
    """Gradients as the kernel cuts them, in their arguments' shapes."""
    widths = (plan.key, plan.key, plan.value)
    return [x.reshape(plan.batch, plan.padded, -1, n)[:, : plan.time] for x, n in zip((dq, dk, dv), widths)]


def sums_by_head(blocks: Blocks, rows, count):
    """A kernel's `count` sums a head and token, [B, H, count, padded]."""
    plan = blocks.plan
    rows = rows.reshape(plan.batch, plan.heads // blocks.heads, -1, plan.padded)[:, :, : count * blocks.heads]
    return rows.reshape(plan.batch, plan.heads, count, plan.padded)


def by_token(plan, sums, run_ids):
    """[B, H, padded] as [B, T, H], 0 at padding."""
    sums = sums.swapaxes(1, 2)[:, : plan.time]
    return sums if run_ids is None else jnp.where(run_ids[..., None] != 0, sums, 0.0)


def _decay_gradient(plan, rows):
    """Gradient of the log decays, [B, H, padded], from a chunk's sums at its tokens."""
    by_chunk = rows.reshape(*rows.shape[:3], plan.chunks, plan.chunk)
    later = planning.cumulate("bhcs,st->bhct", by_chunk[:, :, READS], lambda source, target: source >= target)
    earlier = planning.cumulate("bhcs,st->bhct", by_chunk[:, :, WRITES], lambda source, target: source < target)
    return (by_chunk[:, :, CROSSING] + later + earlier).reshape(*rows.shape[:2], plan.padded)


def _states(blocks: Blocks, given, kinds):
    """The state before each chunk, bfloat16 [B, chunks, tiles, K, width]."""
    plan = blocks.plan
    names = [name for name in given if name not in ("q", "dy")]

    def body(*refs):
        here = dict(zip(names, refs))
        out, states = refs[len(names) :]
        start_walk(states, here.get("state"))
        tokens = Tokens(blocks, here.get("decays"), here.get("segments"), 1.0, kinds)
        for key_head in range(blocks.key_heads):
            key_columns = here["k"][:, pl.ds(key_head * plan.key, plan.key)].T
            for tile in blocks.tiles_of(key_head):
                now, mine = tokens.of(tile), pl.ds(tile * blocks.width, blocks.width)
                held = states[blocks.place(tile)]
                out[tile] = held.astype(jnp.bfloat16)
                written = scaled(here["v"][:, mine], now.carry_out).astype(jnp.bfloat16)
                states[blocks.place(tile)] = scaled(held, now.kept) + dot(key_columns, written, 1, 0)

    return walked_states(blocks, given, names, body, "linear_attention_states", 1)


def walked_states(blocks: Blocks, given, names, body, name, exponentials):
    """The state before each chunk, bfloat16, by a kernel that reads `names` of `given`; exponentials as in `walked`."""
    plan = blocks.plan
    shape = (plan.batch, plan.chunks, *blocks.walk_shape[1:])
    return compat.tpu_kernel(
        body,
        grid=blocks.grid,
        parallel=2,
        inputs=[blocks.spec(*given[name]) for name in names],
        outputs=[blocks.spec("chunk_state", jax.ShapeDtypeStruct(shape, jnp.bfloat16))],
        scratch=[compat.tpu_scratch(blocks.turns * blocks.tiles, *blocks.state_tile)],
        name=name,
        flops=2 * plan.batch * plan.padded * plan.heads * plan.key * plan.value,
        exponentials=plan.batch * plan.padded * plan.heads * exponentials,
    )[0]


def _gradients(blocks: Blocks, given, scale, kinds, count):
    """dq, dk, dv as the kernel cuts them, the first state's gradient, and `count` sums a head and token."""
    plan = blocks.plan
    names = list(given)

    def body(*refs):
        here = dict(zip(names, refs))
        dq_ref, dk_ref, dv_ref, gradients, *rest = refs[len(names) :]
        start_walk(gradients, here.get("state"))
        tokens = Tokens(blocks, here.get("decays"), here.get("segments"), scale, kinds)
        sums = Sums(blocks, count)
        for key_head in range(blocks.key_heads):
            keys = pl.ds(key_head * plan.key, plan.key)
            found = _of_key_head(blocks, key_head, here, tokens, dv_ref, gradients, sums)
            for out, value, kept in zip((dq_ref, dk_ref), found, rest[bool(count) :] or (None, None)):
                add_turns(blocks, out, value, keys, kept)
        if count:
            rest[0][...] = sums.rows()

    return walked_gradients(blocks, given, body, "linear_attention_backward", plan.chunk, count)


def walked_gradients(blocks: Blocks, given, body, name, exponentials, count, more=()):
    """What a kernel that walks time from the right makes of all of `given`, a list; exponentials as in `walked`.

    dq, dk, dv and the first state's gradient, `count` sums a head and token as rows, then `more` outputs, (kind, shape)
    in float32.
    """
    plan = blocks.plan
    outputs = [(kind, given[name][1].shape, jnp.bfloat16) for kind, name in zip(("key", "key", "value"), "qkv")]
    outputs.append(("walk", blocks.walk_shape, jnp.float32))
    if count:
        rows = count * blocks.heads + -count * blocks.heads % SUBLANES
        outputs.append(("row", (plan.batch, plan.heads // blocks.heads, rows, plan.padded), jnp.float32))
    outputs += [(*output, jnp.float32) for output in more]
    sizes = (plan.batch, plan.padded, plan.key_heads, plan.heads, plan.key, plan.value)
    from_right = lambda chunk: plan.chunks - 1 - chunk
    return compat.tpu_kernel(
        body,
        grid=blocks.grid,
        parallel=2,
        inputs=[blocks.spec(*array, from_right) for array in given.values()],
        outputs=[blocks.spec(kind, jax.ShapeDtypeStruct(*array), from_right) for kind, *array in outputs],
        scratch=[compat.tpu_scratch(plan.chunk, plan.key)] * (2 if blocks.turns > 1 else 0),
        name=name,
        flops=cost.backward(*sizes, chunk=plan.chunk).flops,
        exponentials=plan.batch * plan.padded * plan.heads * exponentials,
    )


def add_turns(blocks, out, value, keys, kept):
    """Writes a chunk's dq or dk; where steps share its keys, once the last of them has added its own."""
    if blocks.turns == 1:
        out[:, keys] = value.astype(jnp.bfloat16)
        return
    turn = pl.program_id(3)

    @pl.when(turn == 0)
    def _():
        kept[...] = value

    @pl.when(turn > 0)
    def _():
        kept[...] += value

    @pl.when(turn == blocks.turns - 1)
    def _():
        out[...] = kept[...].astype(jnp.bfloat16)


def _of_key_head(blocks, key_head, here, tokens, dv_ref, gradients, sums):
    """dq and dk [C, K] of one key head of a step; writes dv and the states' gradients of the heads that read it."""
    plan = blocks.plan
    keys = pl.ds(key_head * plan.key, plan.key)
    query, key = here["q"][:, keys], here["k"][:, keys]
    scores, query_columns = dot(query, key, 1, 1), query.T
    crossed, dq, dk = 0.0, 0.0, 0.0
    for tile in blocks.tiles_of(key_head):
        now, mine = tokens.of(tile), pl.ds(tile * blocks.width, blocks.width)
        value, dy, state = here["v"][:, mine], here["dy"][:, mine], here["states"][tile]
        place = blocks.place(tile)
        gradient = gradients[place]
        rounded = gradient.astype(jnp.bfloat16)
        read = scaled(dy, now.carry_in).astype(jnp.bfloat16)
        written = value if now.carry_out is None else scaled(value, now.carry_out).astype(jnp.bfloat16)
        later = scaled(dot(key, rounded, 1, 0), now.carry_out)
        mixed = []
        for part in now.parts:
            slopes = dot(now.only(part, dy), value, 1, 1)
            pairs, weights = now.paired(part, slopes, scores)
            crossed = crossed + pairs
            mixed.append(dot(_turned(plan, weights), dy, 1, 0))
            sums.add_pairs(tile, part, pairs * scores)
        dv = later + now.merge(mixed)
        dv_ref[:, mine] = dv.astype(jnp.bfloat16)
        dq = dq + dot(read, state, 1, 1)
        dk = dk + dot(written, rounded, 1, 1)
        sums.add_carried(tile, now, query, state, gradient, read, value, later, dv)
        gradients[place] = scaled(gradient, now.kept) + dot(query_columns, read, 1, 0)
    dq = dq + dot(crossed.astype(jnp.bfloat16), key, 1, 0)
    dk = dk + dot(_turned(plan, crossed), query, 1, 0)
    return dq, dk


def _turned(plan, tile):
    """tile.T as an operand, of the same bits either way: by the bundle counts, rounding first is slower for K = 256."""
    return tile.astype(jnp.bfloat16).T if plan.key <= LANES else tile.T.astype(jnp.bfloat16)


class Sums:
    """The sums that the gradients of decays and writes are made of: for each head `count` columns of tokens."""

    def __init__(self, blocks: Blocks, count):
        self.blocks, self.count = blocks, count
        self.lane = lax.broadcasted_iota(jnp.int32, (blocks.plan.chunk, LANES), 1)
        self.columns = jnp.zeros((blocks.plan.chunk, LANES), jnp.float32)

    def rows(self):
        """[n, C], a head's sums below one another."""
        count = self.count * self.blocks.heads
        return self.columns.T[: count + -count % SUBLANES]

    def add_pairs(self, tile, part, pairs):
        """pairs[i, j]: what i's output and its slope make of j's write; those with i >= t > j cross t."""
        if not self.count:
            return
        down, across = (lax.broadcasted_iota(jnp.int32, pairs.shape, axis) for axis in (0, 1))
        over = dot(jnp.where(across >= down, 1.0, 0.0).astype(jnp.bfloat16), pairs.astype(jnp.bfloat16), 1, 0)
        self.add(tile, part, CROSSING, jnp.sum(jnp.where(across < down, over, 0.0), axis=1, keepdims=True))

    def add_carried(self, tile, now, query, state, gradient, read, value, later, dv):
        """What passes a tile's states: read and written by its tokens, and kept through the chunk."""
        if not self.count:
            return
        reads = dot(query, state, 1, 0) * read.astype(jnp.float32)
        writes = later * value.astype(jnp.float32)
        kept = jnp.sum(scaled(state.astype(jnp.float32) * gradient, now.kept), axis=0, keepdims=True)
        found = {CROSSING: kept, READS: reads, WRITES: writes}
        if self.count == 4:
            found[OWN] = dv * value.astype(jnp.float32)
        for part in now.parts:
            for kind, terms in found.items():
                self.add(tile, part, kind, jnp.sum(now.only(part, terms), axis=1, keepdims=True))

    def add(self, tile, part, kind, column):
        place = (tile * self.blocks.together + part) * self.count + kind
        self.columns = jnp.where(self.lane == place, self.columns + column, self.columns)
