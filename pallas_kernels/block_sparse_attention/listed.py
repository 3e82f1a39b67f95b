"""A list of tiles, as a warpgroup of the gradient kernels of block-sparse attention reads it."""

import jax.numpy as jnp
from jax import lax

HALVES = 2  # of a block, one for each warpgroup
# What a list may say of a tile, bit by bit: whether it is full for each half of its owner, then whether these see
# nothing of its first half, or of a tile of 64, then the same of the second half.
MARKS = 3 * HALVES


class List:
    """An owner of a thread block and its list, as one warpgroup reads it, at a turn, after `before` steps of others.

    Read wherever it is needed: what is known before the warpgroups' ways part would be spilled.
    """

    def __init__(self, block, place, item, before=0):
        call, given, deal = block.call, block.given, block.call.deal
        self.call, self.place, self.before = call, place, before
        if deal is None:
            owner, head, self.row = (lax.axis_index(name) for name in ("owner", "head", "row"))
            owner = given["order"][owner * call.owners + place]
        else:
            owner, head, self.row = deal.place(item, lax.div, lax.rem)
            owner = owner * call.owners + place
        # With several shares of a walk, they are the faster part of the index.
        self.own_head, self.share = (f(head, jnp.int32(call.shares)) for f in (lax.div, lax.rem))
        if call.owners > 1:
            last = given["count"].shape[2] - 1
            self.exists = owner >= 0 if deal is None else owner <= last
            owner = jnp.clip(owner, 0, last)
        head = self.own_head if call.keys_own else self.own_head // call.ratio
        b, h = given["begin"].shape[:2]
        lead = (self.row if b > 1 else 0), (head if h > 1 else 0)
        self.start = owner * call.own
        self.heads = call.ratio // call.pieces[0] if call.keys_own else 1  # query heads that are walked, from `head` on
        self.head = self.own_head * call.ratio
        self.begin, count = given["begin"][*lead, owner], given["count"][*lead, owner]
        if call.pieces[0] > 1:
            self.head += lax.rem(self.share, jnp.int32(call.pieces[0])) * self.heads
        if call.pieces[1] > 1:
            part = lax.div(self.share, jnp.int32(call.pieces[0]))
            first, last = (lax.div(count * n, jnp.int32(call.pieces[1])) for n in (part, part + 1))
            self.begin, count = self.begin + first, last - first
        self.steps = count * (self.heads * call.parts)
        if call.owners > 1:
            self.steps = jnp.where(self.exists, self.steps, 0)
        self.entries = given["entries"].at[*lead]

    def entry(self, step):
        """What is listed for a step: the block's number, times 64, and its marks."""
        last = self.entries.shape[-1] - 1  # where an empty list may begin past
        return self.entries[jnp.minimum(self.begin + step // (self.heads * self.call.parts), last)]

    def part(self, step):
        """Which part of the listed block a step takes."""
        return (step // self.heads) % self.call.parts

    def other_start(self, entry, step):
        """First token of a step."""
        return (entry >> MARKS) * self.call.other + self.part(step) * self.call.step

    def marks(self, entry, step):
        """What is known of a step's tile; if that is half of a listed one, of this half."""
        known = entry & ((1 << MARKS) - 1)
        if not self.call.skips or self.call.parts == 1:
            return known
        own = (1 << HALVES) - 1
        empty = (known >> HALVES * (1 + self.part(step))) & own
        return (known & own) + (empty << HALVES)

    def slot(self, step):
        """Where in shared memory the tiles of a step lie, of those of the whole thread block."""
        return self.place * self.call.stages + lax.rem(step, self.call.stages)
