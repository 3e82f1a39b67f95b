"""Linear attention with one decay per token and head, forward, on TPUs.

    S_t = exp(log_decay_t) S_{t-1} + w_t k_t v_t^T ;   y_t = scale q_t^T S_t

One grid step takes a chunk of C tokens for several heads, side by side so that the matrix unit works on one while the
vector unit decays another. With g the decays in log2 cumulated in the chunk and c = g - log2 w:

    y = 2^g (q S) + (q k^T * 2^(g_i - c_j), j <= i) v ;   S = 2^(g_last) S + k^T (2^(g_last - c) v)

Chunks are walked in order with all states of the walk on the chip as float32: neither they nor the scores are written
to memory. Heads that share keys (Mamba-2's groups) follow one another within a chunk, whose keys are fetched once.
Arrays are cut as [B, T, heads * width], so nothing is transposed in memory.

The algorithm is the chunked form of Mamba-2 (arXiv 2405.21060) and of GLA (arXiv 2312.06635).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.linear_attention import cost
from pallas_kernels.linear_attention import plan as planning
from pallas_kernels.linear_attention.plan import Plan

CHUNK = 128  # tokens, a multiple of the lanes; 256 takes as many bundles a token forward, a sixth more backward
# Value columns of a grid step, by the bundle counts of tools/tpu_bundles.py. Fewer spill less, but take longer: v5e's
# backward kernel at K = V = 128 with one head a step spills 78 registers in 873 bundles, with eight 154 in 596 a head.
# Spills are stores beside other work; less than half of the bundles have a store.
STEP_COLUMNS = 1024
LANES, SUBLANES = 128, 8
STATE_BYTES = 4 * 2**20  # of the states of one walk, of which a kernel holds up to five copies


def supports(q, k, v, log_decay=None, state=None, run_ids=None, log_write=None, *, scale=1.0) -> str | None:
    """Why `forward` and `tpu_backward.backward` cannot run this call, in a few words; None if they can.

    Takes arrays or shapes with dtypes. It does not look at the device.
    """
    reason = planning.wrong_qkv(q, k, v)
    if reason is not None:
        return reason
    batch, time, key_heads, key = q.shape
    heads, value = v.shape[2:]
    if key not in (64, 128, 256) or value not in (64, 128, 256, 512):
        return f"needs K in (64, 128, 256) and V in (64, 128, 256, 512), got K={key}, V={value}"
    if key_heads == 0 or heads % key_heads:
        return f"needs a number of heads that the key heads divide, got {heads} and {key_heads}"
    if 0 in (batch, time, heads):
        return f"needs at least one row, token and head, got B={batch}, T={time}, H={heads}"
    if Blocks.of(q, v).state_bytes > STATE_BYTES:
        return f"needs the states of heads that share keys in {STATE_BYTES >> 20} MiB, got H={heads}, Hk={key_heads}"
    return planning.wrong_rest(q, v, log_decay, run_ids, scale, state, log_write)


def wasteful(q, v, kind=None) -> str | None:
    """Why a call that is supported is better left to XLA, by the kernels' tiles alone (a kind of `Blocks`), or None."""
    blocks = (kind or Blocks).of(q, v)
    if q.shape[1] < 2 * CHUNK:
        return f"wins nothing below {2 * CHUNK} tokens, got T={q.shape[1]}"
    if blocks.width % LANES or q.shape[3] % LANES:
        return f"leaves registers half empty, with K={q.shape[3]} and V={v.shape[3]}"
    return None


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How heads are dealt to grid steps (row, walk, chunk, turn): a step takes `heads` of them.

    A walk goes over the chunks with its states on the chip; its heads share a key head or are those of one step.
    """

    plan: Plan
    heads: int

    @staticmethod
    def widths(plan):
        """Columns of a head in arrays that are cut by heads."""
        return (plan.value,)

    @classmethod
    def of(cls, q, v, tile=None):
        """The blocks of a call; tile: (tokens of a chunk, heads of a step), None to choose.

        A step's columns of q and of v are a multiple of 128, or all of them.
        """
        batch, time, key_heads, key = q.shape
        heads, value = v.shape[2:]
        chunk = CHUNK if tile is None else tile[0]
        plan = Plan(batch, time, key_heads, heads, key, value, 1, -(-time // chunk), chunk)

        def fits(count):
            keys = max(1, count // plan.group)
            if plan.group % count and count % plan.group or key_heads % keys:
                return False
            full = all(count * width % LANES == 0 for width in cls.widths(plan)) or count == heads
            return full and (keys * key % LANES == 0 or keys == key_heads)

        counts = [count for count in range(1, heads + 1) if heads % count == 0 and fits(count)]
        wanted = max(1, STEP_COLUMNS // value) if tile is None else tile[1]
        return cls(plan, max((count for count in counts if count <= wanted), default=counts[0]))

    @property
    def key_heads(self) -> int:
        """Key heads of a step."""
        return max(1, self.heads // self.plan.group)

    @property
    def together(self) -> int:
        """Heads whose values are one tile of 128 columns: two of width 64 that share their keys, else one."""
        return 2 if self.plan.value == LANES // 2 and math.gcd(self.plan.group, self.heads) % 2 == 0 else 1

    @property
    def width(self) -> int:
        """Columns of such a tile."""
        return self.together * self.plan.value

    @property
    def turns(self) -> int:
        """Steps that share a chunk's keys."""
        return max(1, self.plan.group // self.heads)

    @property
    def walks(self) -> int:
        return self.plan.key_heads // self.key_heads

    @property
    def tiles(self) -> int:
        """Tiles of values of a step."""
        return self.heads // self.together

    @property
    def grid(self):
        return (self.plan.batch, self.walks, self.plan.chunks, self.turns)

    @property
    def state_tile(self):
        """The shape of the states of a tile's heads: side by side."""
        return self.plan.key, self.width

    @property
    def walk_shape(self):
        """All states."""
        return (self.plan.batch, self.plan.heads // self.together, *self.state_tile)

    @property
    def state_bytes(self) -> int:
        return 4 * self.turns * self.heads * self.plan.key * self.plan.value

    def spec(self, kind, array, chunk_at=lambda chunk: chunk):
        """(array, block shape, index map) of an array that is cut by this grid.

        kind: "key" [B, T, Hk * K], "value" [B, T, H * V], "row" [B or 1, H / heads, n, T], "segment" [B, 8, T],
        "walk" [B, tiles, *state_tile] and "chunk_state" [B, chunks, tiles, *state_tile]. chunk_at: the chunk at a place
        of the walk.
        """
        plan, turns = self.plan, self.turns
        at, rows = chunk_at, array.shape[0]
        block, index = {
            "key": ((None, plan.chunk, self.key_heads * plan.key), lambda b, w, c, t: (b, at(c), w)),
            "value": (
                (None, plan.chunk, array.shape[2] // plan.heads * self.heads),
                lambda b, w, c, t: (b, at(c), w * turns + t),
            ),
            "row": (
                (None, None, array.shape[-2], plan.chunk),
                lambda b, w, c, t: (b if rows > 1 else 0, w * turns + t, 0, at(c)),
            ),
            "segment": ((None, SUBLANES, plan.chunk), lambda b, w, c, t: (b, 0, at(c))),
            "walk": ((None, turns * self.tiles, *self.state_tile), lambda b, w, c, t: (b, w, 0, 0)),
            "chunk_state": (
                (None, None, self.tiles, *self.state_tile),
                lambda b, w, c, t: (b, at(c), w * turns + t, 0, 0),
            ),
        }[kind]
        return array, block, index

    def tiles_of(self, key_head):
        """The step's tiles of values whose heads read one of its key heads."""
        each = self.tiles // self.key_heads
        return range(key_head * each, (key_head + 1) * each)

    def place(self, tile):
        """Where the walk keeps a tile's states."""
        return tile if self.turns == 1 else pl.program_id(3) * self.tiles + tile

    def pack(self, states):
        """[B, H, K, V] as [B, tiles, K, width]."""
        if states is None or self.together == 1:
            return states
        batch, heads, key, value = states.shape
        states = states.reshape(batch, -1, self.together, key, value).swapaxes(2, 3)
        return states.reshape(batch, -1, key, self.width)

    def unpack(self, states):
        """[B, tiles, K, width] as [B, H, K, V]."""
        if self.together == 1:
            return states
        batch, _, key, _ = states.shape
        states = states.reshape(batch, -1, key, self.together, self.plan.value).swapaxes(2, 3)
        return states.reshape(batch, -1, key, self.plan.value)


def forward(q, k, v, log_decay=None, state=None, run_ids=None, log_write=None, *, scale=1.0, tile=None):
    """Linear attention, (y [B, T, H, V] bfloat16, final state [B, H, K, V] float32).

    q, k: [B, T, Hk, K]; v: [B, T, H, V], all bfloat16; head h reads key head h // (H // Hk). log_decay: natural
    logarithms <= 0, [B, T, H], [H] or None for no decay. state: [B, H, K, V] float32 or None for zeros. run_ids:
    [B, T] int32, numbers 1, 2, ... of a row's segments and 0 for padding, as `seqmix.core.packing.runs` gives
    them, or None; the state belongs to run 1 and is returned for the last one. log_write: natural logarithms of the
    weights of k v^T in the state, [B, T, H], or None for 1. scale: a number above 0. tile: (tokens of a chunk, heads of
    a grid step), None to choose. The call must be one that `supports` accepts.
    """
    blocks = Blocks.of(q, v, tile)
    plan = blocks.plan
    given = prepare(blocks, log_decay, run_ids, log_write, {"q": q, "k": k, "v": v, "state": state})
    names, kinds = list(given), 1 if log_write is None else 2

    def body(*refs):
        here = dict(zip(names, refs))
        y_ref, states = refs[len(names) :]
        start_walk(states, here.get("state"))
        tokens = Tokens(blocks, here.get("decays"), here.get("segments"), scale, kinds)
        for key_head in range(blocks.key_heads):
            keys = pl.ds(key_head * plan.key, plan.key)
            query, key = here["q"][:, keys], here["k"][:, keys]
            scores, key_columns = dot(query, key, 1, 1), key.T
            for tile in blocks.tiles_of(key_head):
                now, mine = tokens.of(tile), pl.ds(tile * blocks.width, blocks.width)
                value, held = here["v"][:, mine], states[blocks.place(tile)]
                mixed = [dot(now.paired(part, scores)[0].astype(jnp.bfloat16), value, 1, 0) for part in now.parts]
                y = scaled(dot(query, held.astype(jnp.bfloat16), 1, 0), now.carry_in) + now.merge(mixed)
                y_ref[:, mine] = y.astype(jnp.bfloat16)
                written = scaled(value, now.carry_out).astype(jnp.bfloat16)
                states[blocks.place(tile)] = scaled(held, now.kept) + dot(key_columns, written, 1, 0)

    return walked(blocks, given, body, "linear_attention_forward", plan.chunk)


def walked(blocks: Blocks, given, body, name, exponentials):
    """(y [B, T, H, V], final state [B, H, K, V]) of a kernel that reads `given`; exponentials: of a token and head."""
    plan = blocks.plan
    outputs = [("value", given["v"][1]), ("walk", jax.ShapeDtypeStruct(blocks.walk_shape, jnp.float32))]
    sizes = (plan.batch, plan.padded, plan.key_heads, plan.heads, plan.key, plan.value)
    y, last = compat.tpu_kernel(
        body,
        grid=blocks.grid,
        parallel=2,
        inputs=[blocks.spec(*array) for array in given.values()],
        outputs=[blocks.spec(kind, jax.ShapeDtypeStruct(x.shape, x.dtype)) for kind, x in outputs],
        scratch=[],
        name=name,
        flops=cost.forward(*sizes, chunk=plan.chunk).flops,
        exponentials=plan.batch * plan.padded * plan.heads * exponentials,
    )
    return y.reshape(plan.batch, plan.padded, plan.heads, plan.value)[:, : plan.time], blocks.unpack(last)


def prepare(blocks: Blocks, log_decay, run_ids, log_write, arrays):
    """What a kernel reads, {name: (kind, array)} without what is None: time whole chunks, heads side by side."""
    plan = blocks.plan
    given = {"decays": ("row", None), "segments": ("segment", segment_rows(run_ids, plan))}
    if log_decay is not None or log_write is not None:
        decays = planning.chunk_decays(log_decay, log_write, run_ids, plan)
        decays = decays.reshape(decays.shape[0], plan.heads // blocks.heads, -1, plan.padded)
        given["decays"] = ("row", pad(decays, 2, SUBLANES))
    for name, x in arrays.items():
        if name == "state":
            given[name] = ("walk", blocks.pack(x))
        else:
            x = pad(x, 1, plan.chunk).reshape(x.shape[0], plan.padded, -1)
            given[name] = ("key" if name in ("q", "k") else "value", x)
    return {name: entry for name, entry in given.items() if entry[1] is not None}


def pad(x, axis, multiple):
    """x with zeros after its end along an axis, to a multiple."""
    missing = -x.shape[axis] % multiple
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)]) if missing else x


def segment_rows(run_ids, plan: Plan):
    """What a kernel reads of the segments, float32 [B, 8, padded].

    A token's run; whether it reads the chunk's incoming state; whether its write outlives the chunk; whether the
    state does. The other rows are 0.
    """
    if run_ids is None:
        return None
    before, after = (jnp.repeat(x, plan.chunk, axis=1) for x in planning.carried_runs(run_ids, plan))
    runs = pad(run_ids.astype(jnp.int32), 1, plan.chunk)
    rows = jnp.stack([runs, runs == before, runs == after, before == after], axis=1)
    return pad(rows.astype(jnp.float32), 1, SUBLANES)


def start_walk(states, state):
    """Before the first chunk, puts the incoming states of this step's heads (or zeros) where the walk keeps them."""

    @pl.when((pl.program_id(2) == 0) & (pl.program_id(3) == 0))
    def _():
        states[...] = jnp.zeros_like(states) if state is None else state[...]


def dot(left, right, left_axis, right_axis):
    """The product over one axis of each, accumulated in float32."""
    return lax.dot_general(left, right, (((left_axis,), (right_axis,)), ((), ())), preferred_element_type=jnp.float32)


def scaled(tile, factor):
    """tile * factor in float32; None is 1."""
    return tile if factor is None else tile.astype(jnp.float32) * factor


class Tokens:
    """Decays and segments of one chunk, as factors for the rows and columns of its tiles."""

    def __init__(self, blocks: Blocks, decays, segments, scale, kinds):
        """decays: [n, C] of the step's heads, `kinds` rows a head (`planning.chunk_decays`); segments: [8, C]."""
        self.blocks, self.scale, self.kinds = blocks, scale, kinds
        chunk = blocks.plan.chunk
        rows, across = (lax.broadcasted_iota(jnp.int32, (chunk, chunk), axis) for axis in (0, 1))
        self.visible, self.same = rows >= across, None
        self.real, self.reads, self.leaves, self.stays = None, None, None, None
        if segments is not None:
            runs = segments[...]
            down = runs.T
            self.same = (down[:, 0:1] == runs[0:1]) & (runs[0:1] != 0)
            self.visible &= self.same
            self.real, self.reads, self.leaves = (spread(down[:, at : at + 1], LANES) != 0 for at in (0, 1, 2))
            self.stays = runs[3:4, 0:1] != 0
        self.rows = None if decays is None else decays[...]
        self.columns = None if decays is None else self.rows.T

    def of(self, tile):
        """The factors of a tile of values."""
        return Factors(self, tile)


class Factors:
    """Of the tokens of one tile of values, whose heads are its parts. None is 1."""

    def __init__(self, tokens: Tokens, tile):
        self.tokens, blocks = tokens, tokens.blocks
        self.parts = range(blocks.together)
        self.width, chunk = blocks.width, blocks.plan.chunk
        if tokens.rows is None:
            return
        self.down, self.source, self.across, self.end = [], [], [], []
        for part in self.parts:
            first = tokens.kinds * (tile * blocks.together + part)
            last = first + tokens.kinds - 1
            # Spread over lanes once: what is computed from it is cheaper to repeat than to spread.
            self.down.append(spread(tokens.columns[:, first : first + 1], LANES))
            self.source.append(self.down[-1])
            if last > first:
                self.source[-1] = spread(tokens.columns[:, last : last + 1], LANES)
            self.across.append(tokens.rows[last : last + 1])
            self.end.append(tokens.rows[first : first + 1, chunk - 1 :])

    def merge(self, tiles):
        """The tile whose columns of each part are those of that part's tile."""
        if len(tiles) == 1:
            return tiles[0]
        lane = lax.broadcasted_iota(jnp.int32, tiles[0].shape, 1)
        return jnp.where(lane < self.width // 2, *tiles)

    def only(self, part, tile):
        """The tile with 0 in the columns of other parts, so that sums over columns are of this part."""
        if len(self.parts) == 1:
            return tile
        return self.merge([tile if other == part else jnp.zeros_like(tile) for other in self.parts])

    @functools.cached_property
    def carry_in(self):
        """What a token's output reads of the incoming state, scale included: [C, width]."""
        reads = self.tokens.reads
        if self.tokens.rows is None:
            return self.tokens.scale if reads is None else self._wide(jnp.where(reads, self.tokens.scale, 0.0))
        exponent = self.merge(self.down) + math.log2(self.tokens.scale)
        return self._wide(jnp.exp2(exponent if reads is None else jnp.where(reads, exponent, -jnp.inf)))

    @functools.cached_property
    def carry_out(self):
        """What is left of a token's write at the chunk's end: [C, width]."""
        leaves = self.tokens.leaves
        if self.tokens.rows is None:
            return None if leaves is None else self._wide(jnp.where(leaves, 1.0, 0.0))
        exponent = self.merge([end - source for end, source in zip(self.end, self.source)])
        return self._wide(jnp.exp2(exponent if leaves is None else jnp.where(leaves, exponent, -jnp.inf)))

    @functools.cached_property
    def kept(self):
        """What is left of the incoming state at the chunk's end: [1, width]."""
        stays = self.tokens.stays
        if self.tokens.rows is None:
            return None if stays is None else jnp.where(stays, 1.0, 0.0)
        kept = self._wide(jnp.exp2(self.merge([spread(end, LANES) for end in self.end])))
        return kept if stays is None else jnp.where(stays, kept, 0.0)

    def paired(self, part, *products):
        """[i, j] products, each times what token i's output reads of token j's write, scale included."""
        visible, chunk = self.tokens.visible, self.tokens.blocks.plan.chunk
        if self.tokens.rows is None:
            return [jnp.where(visible, x * self.tokens.scale, 0.0) for x in products]
        exponent = repeated(self.down[part] + math.log2(self.tokens.scale), chunk) - self.across[part]
        weights = jnp.exp2(jnp.where(visible, exponent, -jnp.inf))
        return [x * weights for x in products]

    def _wide(self, factor):
        return repeated(factor, self.width)


def spread(column, width):
    """A column (or one number) in each of `width` lanes."""
    return jnp.broadcast_to(column, (column.shape[0], width))


def repeated(lanes, width):
    """128 equal lanes as `width`."""
    return lanes[:, :width] if width <= LANES else jnp.concatenate([lanes] * (width // LANES), axis=1)
