"""Linear attention with a decay per channel of the keys (GLA), forward, on TPUs.

    S_t = diag(exp(log_decay_t)) S_{t-1} + w_t k_t v_t^T ;   y_t = scale q_t^T S_t

Cut and walked as by `tpu`: a grid step takes a chunk of C tokens of several heads. With b what the chunk's decays
through a token leave of a channel, a what those after it leave of the token, and k weighted by w:

    y = scale ((q b) S + A v) ;   S = b_last S + (k a)^T v ;   A_ij = sum_c q_ic k_jc (what is left of j at i)_c, j <= i

Blocks of 1, 2, ... C / 2 tokens are joined two by two. Between the later block's rows and the earlier one's lies their
boundary; later rows are q times what is left of the boundary there, earlier ones k times what is left of them at the
boundary. Both are rows of one tile X, and X X^T is A wherever a row meets a row of its neighbour block. What is left
is a product of exp(log_decay), built up as the blocks are: it never exceeds 1, whatever the decays, and no digit of a
small decay is lost beside a large one. Where blocks are whole registers (8 tokens) no row has to move for it.

States lie on the chip as [V, K], so that their decays are a row. The algorithm is that of GLA (arXiv 2312.06635) with
another way through A.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.linear_attention import plan as planning
from pallas_kernels.linear_attention import tpu
from pallas_kernels.linear_attention.tpu import (
    SUBLANES,
    Blocks,
    Tokens,
    dot,
    pad,
    prepare,
    repeated,
    start_walk,
    walked,
)


def supports(q, k, v, log_decay=None, state=None, run_ids=None, log_write=None, *, scale=1.0) -> str | None:
    """Why `forward` and `tpu_channel_backward.backward` cannot run this call, in a few words; None if they can.

    Takes arrays or shapes with dtypes. It does not look at the device.
    """
    reason = tpu.supports(q, k, v, None, state, run_ids, log_write, scale=scale)
    return reason or planning.wrong_channel_decay(q, v, log_decay)


def wasteful(q, v) -> str | None:
    """As `tpu.wasteful`."""
    return tpu.wasteful(q, v, ChannelBlocks)


@dataclasses.dataclass(frozen=True)
class ChannelBlocks(Blocks):
    """As `Blocks`, a tile being the values of one head, its state transposed."""

    @staticmethod
    def widths(plan):
        return plan.value, plan.key

    @property
    def together(self) -> int:
        return 1

    @property
    def state_tile(self):
        return self.plan.value, self.plan.key

    @property
    def levels(self):
        """Blocks of 2^level tokens are joined two by two."""
        return range(self.plan.chunk.bit_length() - 1)

    def pack(self, states):
        return None if states is None else states.swapaxes(2, 3)

    unpack = pack


def forward(q, k, v, log_decay, state=None, run_ids=None, log_write=None, *, scale=1.0, tile=None):
    """Linear attention with a decay per channel, (y [B, T, H, V] bfloat16, final state [B, H, K, V] float32).

    As `tpu.forward`, but log_decay is [B, T, H, K], and the chunk of `tile` is a power of two from 16 on.
    """
    blocks = ChannelBlocks.of(q, v, tile)
    given = gather(blocks, log_decay, run_ids, log_write, {"q": q, "k": k, "v": v, "state": state})
    names, chunk = list(given), blocks.plan.chunk

    def body(*refs):
        here = dict(zip(names, refs))
        y_ref, states = refs[len(names) :]
        start_walk(states, here.get("state"))
        tokens = Tokens(blocks, here.get("decays"), here.get("segments"), scale, 2)
        for head in range(blocks.heads):
            now = Head(blocks, here, tokens, head)
            tree, value = Tree(now.left), here["v"][:, now.values]
            scores = own(now.query, now.key, chunk)
            for level in blocks.levels:
                scores, *_ = tree.join(level, now.query, now.key, scores)
            scores = jnp.where(tokens.visible, flat(scores), 0.0).astype(jnp.bfloat16)
            held = states[blocks.place(head)]
            read = (flat(now.query) * now.reads(tree)).astype(jnp.bfloat16)
            y = dot(read, held.astype(jnp.bfloat16), 1, 1) + dot(scores, value, 1, 0)
            y_ref[:, now.values] = y.astype(jnp.bfloat16)
            states[blocks.place(head)] = now.carried(held, tree, value)

    return walked(blocks, given, body, "linear_attention_channel_forward", blocks.plan.key)


def gather(blocks: ChannelBlocks, log_decay, run_ids, log_write, arrays):
    """What a kernel reads, as `prepare` gives it: log_decay among the values, writes in odd rows of decays."""
    plan = blocks.plan
    log_decay = pad(log_decay.astype(jnp.float32), 1, plan.chunk).reshape(plan.batch, plan.padded, -1)
    return {"log_decay": ("value", log_decay)} | prepare(blocks, None, run_ids, log_write, arrays)


class Head:
    """One head's part of a chunk: its keys and decays, and the factors between them and its state."""

    def __init__(self, blocks: ChannelBlocks, here, tokens: Tokens, head):
        plan, self.tokens, self.here = blocks.plan, tokens, here
        self.key_head = head // (blocks.heads // blocks.key_heads)
        self.keys = pl.ds(self.key_head * plan.key, plan.key)
        self.values = pl.ds(head * plan.value, plan.value)
        self.channels = pl.ds(head * plan.key, plan.key)
        self.key = registers(here["k"][:, self.keys].astype(jnp.float32))
        self.weight = None
        if tokens.columns is not None:
            self.weight = registers(jnp.exp2(-tokens.columns[:, 2 * head + 1 : 2 * head + 2]))
            self.key = self.key * self.weight

    @functools.cached_property
    def query(self):
        """Times the scale."""
        return registers(self.here["q"][:, self.keys].astype(jnp.float32) * self.tokens.scale)

    @functools.cached_property
    def log_decay(self):
        return self.only(self.tokens.real, self.here["log_decay"][:, self.channels])

    @property
    def left(self):
        """What each token's decay leaves, [C / 8, 8, K]."""
        return registers(jnp.exp(self.log_decay))

    @property
    def kept(self):
        """What is left of the incoming state at the chunk's end, [1, K]; not a product, whose errors would grow."""
        kept = jnp.exp(jnp.sum(self.log_decay, axis=0, keepdims=True))
        return kept if self.tokens.stays is None else jnp.where(self.tokens.stays, kept, 0.0)

    def reads(self, tree):
        """What the rows read of the incoming state's, [C, K]."""
        return self.only(self.tokens.reads, flat(tree.before))

    def leaves(self, tree):
        """What is left of the rows' writes at the chunk's end, [C, K]."""
        return self.only(self.tokens.leaves, flat(tree.after))

    def carried(self, state, tree, value):
        """The state [V, K] at the chunk's end."""
        written = (flat(self.key) * self.leaves(tree)).astype(jnp.bfloat16)
        return state * self.kept + dot(value.T, written, 1, 0)

    def only(self, rows, tile):
        """The rows of a tile [C, K] that are in a mask [C, 128], 0 in others; None: all."""
        return tile if rows is None else jnp.where(repeated(rows, tile.shape[1]), tile, 0.0)


class Tree:
    """Blocks of a chunk's tokens that are joined two by two, and what decays leave within them, [C / 8, 8, K].

    before: what is left of the block's start at a token; after: what is left of the token at its block's end; whole:
    what is left of the start at the end, in each row of the block, or one register a block where blocks are registers.
    """

    def __init__(self, left):
        """Blocks are single tokens, of which `left` is left."""
        self.before, self.after, self.whole = left, jnp.ones_like(left), left

    def join(self, level, query, key, scores, later=1):
        """Scores [C / 8, 8, C], also between blocks of 2^level tokens, right below the diagonal; later=0: above it.

        Also X, bfloat16 [C, K], and the factors of its rows.
        """
        left = halves(level, self.before, self.after)
        tile = halves(level, query, key) * left
        rounded = flat(tile).astype(jnp.bfloat16)
        size = 1 << level
        if size < SUBLANES:
            met = registers(dot(rounded, rounded, 1, 1))
            scores = jnp.where(apart(scores.shape) >= size, met, scores)
        else:
            parts = blocks_of(level, tile)[later::2]
            met = registers(dot(flat(jnp.concatenate(parts)).astype(jnp.bfloat16), rounded, 1, 1))
            lane = lax.broadcasted_iota(jnp.int32, (1, 1, scores.shape[2]), 2) >> level
            found = blocks_of(level, scores)
            for at, part in enumerate(blocks_of(level, met)):
                mine = 2 * at + later
                found[mine] = jnp.where(lane != mine, part, found[mine])
            scores = jnp.concatenate(found)
        self.double(level)
        return scores, rounded, left

    def double(self, level):
        """Joins blocks of 2^level tokens."""
        if 1 << level < SUBLANES:
            other = exchanged(level, self.whole)
            self.before = halves(level, self.before * other, self.before)
            self.after = halves(level, self.after, self.after * other)
            self.whole = self.whole * other
            return
        whole, before, after = blocks_of(3, self.whole), blocks_of(level, self.before), blocks_of(level, self.after)
        for at in range(0, len(whole), 2):
            before[at + 1] = before[at + 1] * whole[at]
            after[at] = after[at] * whole[at + 1]
        self.before, self.after = jnp.concatenate(before), jnp.concatenate(after)
        self.whole = jnp.concatenate([one * other for one, other in zip(whole[::2], whole[1::2])])


def own(query, key, chunk):
    """Scores of tokens with themselves, [C / 8, 8, C]."""
    return jnp.broadcast_to(jnp.sum(query * key, axis=2, keepdims=True), (*query.shape[:2], chunk))


def registers(tile):
    """[C, n] as [C / 8, 8, n]."""
    return tile.reshape(-1, SUBLANES, tile.shape[1])


def flat(tile):
    return tile.reshape(-1, tile.shape[2])


def apart(shape):
    """i ^ j of tokens, [C / 8, 8, C]: from 2^level on where they are of different blocks."""
    register, row, across = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1, 2))
    return (SUBLANES * register + row) ^ across


def blocks_of(level, tile):
    """Blocks of 2^level >= 8 tokens, a list."""
    size = (1 << level) // SUBLANES
    return [tile[at : at + size] for at in range(0, tile.shape[0], size)]


def halves(level, later, earlier):
    """Rows of `later` in the later of two blocks of 2^level tokens, else those of `earlier`."""
    size = 1 << level
    if size < SUBLANES:
        row = lax.broadcasted_iota(jnp.int32, (1, *later.shape[1:]), 1)
        return jnp.where((row & size) != 0, later, earlier)
    pairs = zip(blocks_of(level, earlier)[::2], blocks_of(level, later)[1::2])
    return jnp.concatenate([block for pair in pairs for block in pair])


def exchanged(level, tile):
    """Rows i and i ^ 2^level < 8 in each other's place."""
    size = 1 << level
    down = compat.tpu().roll(tile, size, 1)
    return down if 2 * size == SUBLANES else halves(level, down, compat.tpu().roll(tile, SUBLANES - size, 1))
