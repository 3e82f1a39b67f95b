"""What the gradient kernels of block-sparse attention know of a call, and a list as a warpgroup reads it."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from pallas_kernels.block_sparse_attention.deal import ROW, Deal
from pallas_kernels.block_sparse_attention.plan import Visibility

ROWS = 64  # of a warpgroup
WARPGROUPS = 2  # that compute, in a thread block
# What a list may say of a tile, bit by bit: whether it is full for each half of its owner, then whether these see
# nothing of its first half, or of a tile of 64, then the same of the second half.
MARKS = 3 * WARPGROUPS


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of a call."""

    scale: float
    soft_cap: float | None
    seen: Visibility | None
    inputs: tuple  # names of what `seen` needs of queries, and of keys
    own: int  # tokens of an owner's block
    other: int  # tokens of a listed block
    step: int  # tokens that are fetched at a time, a part of `other`
    stages: int
    deep: bool  # scores take more registers than usual on their way to p
    keys_own: bool  # the owners are blocks of keys
    ratio: int  # query heads to a key head
    makes_rows: bool = False  # the kernel makes lse and delta of its rows, and writes them
    skips: bool = False  # lists say that halves see nothing of some tiles
    pieces: tuple = (1, 1)  # parts into which the query heads of a key head, and each list, are cut
    deal: Deal | None = None  # how thread blocks go through several items; None: each has one
    turns: int = 0  # of a thread block whose lists are told on cards in shared memory; 0: they are not
    early: bool = False  # with a deal: an owner's tiles may be fetched while the results of the one before are stored

    @property
    def units(self) -> int:
        """Warpgroups of an owner."""
        return self.own // ROWS

    @property
    def owners(self) -> int:
        """Owners of a thread block; each has its own list and tiles, one warpgroup could not keep the chip busy."""
        return WARPGROUPS // self.units

    @property
    def parts(self) -> int:
        """Steps in a listed block."""
        return self.other // self.step

    @property
    def shares(self) -> int:
        """Thread blocks of a block of keys."""
        return self.pieces[0] * self.pieces[1]

    @property
    def levels(self) -> int:
        """bfloat16 numbers of a result: of shares two, of 16 bits together, which take no register more than one."""
        return 2 if self.shares > 1 else 1

    @property
    def fetches_rows(self) -> bool:
        """Whether facts of an owner's rows are fetched with its tiles."""
        return not (self.keys_own or self.makes_rows)

    def names(self, own: bool) -> tuple[str, ...]:
        """Inputs of the mask for the owners or for what they list."""
        return self.inputs[own == self.keys_own]


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
        elif call.turns:
            owner, head, begin, count = (block.cards[item, n] for n in range(4))
            head, self.row = head & (1 << ROW) - 1, head >> ROW
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
        if not call.turns:
            begin, count = given["begin"][*lead, owner], given["count"][*lead, owner]
        self.begin = begin
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
        return self.entries[jnp.minimum(self.begin + lax.div(step, jnp.int32(self.heads * self.call.parts)), last)]

    def part(self, step):
        """Which part of the listed block a step takes."""
        return lax.rem(lax.div(step, jnp.int32(self.heads)), jnp.int32(self.call.parts))

    def other_start(self, entry, step):
        """First token of a step."""
        return (entry >> MARKS) * self.call.other + self.part(step) * self.call.step

    def marks(self, entry, step):
        """What is known of a step's tile; if that is half of a listed one, of this half."""
        known = entry & ((1 << MARKS) - 1)
        if not self.call.skips or self.call.parts == 1:
            return known
        own = (1 << WARPGROUPS) - 1
        empty = (known >> WARPGROUPS * (1 + self.part(step))) & own
        return (known & own) + (empty << WARPGROUPS)

    def slot(self, step):
        """Where in shared memory the tiles of a step lie, of those of the whole thread block."""
        return self.place * self.call.stages + lax.rem(step, self.call.stages)
