"""Gradients of block-sparse attention, on Hopper GPUs.

    p_ij = exp(s_ij - lse_i),  s_ij = scale q_i k_j,  ds_ij = p_ij (dy_i v_j - delta_i)
    dq_i = scale sum_j ds_ij k_j,  dk_j = scale sum_i ds_ij q_i,  dv_j = sum_i p_ij dy_i

(arXiv 2307.08691, algorithm 2), over the pairs of listed tiles. One kernel walks, for each block of queries, its key
blocks and adds up dq; the other walks, for each block of keys, the query blocks that list it and adds up dk and dv.
Both compute the scores anew, so seven matrix products are done where five are needed, but nothing is added in
memory: every result is the same in every run.

A warpgroup owns 64 rows of its block and keeps their gradients in registers as float32; p and ds go from registers
straight into the next product. One more warpgroup reads the list and fetches tiles by TMA. Where a list says so, the
warpgroup of one half of a block passes over a tile, or half a tile, of which the other half sees some. Where lists are
short, a thread block goes from one to the next, and has the next one's tiles fetched meanwhile: the owner's too, from
the last step on. Blocks of keys that are too few to fill the chip are shared out: each takes some of the heads, or a
part of the list, to sums that XLA adds up.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers
from pallas_kernels.block_sparse_attention import plan
from pallas_kernels.block_sparse_attention.deal import cards, dealt
from pallas_kernels.block_sparse_attention.listed import MARKS, ROWS, WARPGROUPS, Call, List
from pallas_kernels.block_sparse_attention.plan import BLOCKS, LOG2_E, Visibility, pieces, walks

# Registers of a thread. Three warpgroups start with 168 each; were these more together, the last would wait forever.
FETCHING, COMPUTING = 24, 240
DEEP = 12  # operations of a mask, above which a tile of 128 keys needs too many registers
VECTOR = 6  # as many operations as that a vector of keys, beyond one, takes in registers
SHARED_BYTES = 225 * 1024
SHORT = 8192  # tokens whose indices may be a constant of the program
COLUMNS = 64  # of a result that are stored at a time where the next owner's tiles may arrive meanwhile


def backward(
    q,
    k,
    v,
    rows,
    dy,
    walk,
    turned,
    *,
    sizes,
    visible=None,
    q_data=None,
    k_data=None,
    scale,
    soft_cap=None,
    slopes=None,
    turned_queries=None,
):
    """Gradients (dq, dk, dv) of block-sparse attention in the shapes of q, k and v, bfloat16.

    q [B, T, H, K], k [B, S, Hk, K], v [B, S, Hk, V], dy [B, T, H, V] bfloat16; head h reads key head h // (H // Hk).
    rows: [B, H, 2, T] float32, as `plan.rows` of lse and delta and `rows_gpu.rows` make them, or, of which the kernel
    of dq makes them, (y [B, T, H, V] bfloat16, lse and its cotangent [B, H, T] float32). sizes: tokens of a block of
    queries and of keys, each 64 or 128, which T and S are multiples of. walk: (begin, count [b, h, owners], other,
    full [b, h, n]) of blocks of queries: owner o reads the key blocks other[begin[o] : begin[o] + count[o]]; b is B or
    1, h is Hk or 1; no pair of a `full` tile is hidden. full may be int32 instead: 1 and 2 for the first and the second
    half of an owner of 128 to which the tile is full, 4 and 8 for those that see nothing of its first half (of all of
    it, if it has 64), 16 and 32 for those that see nothing of its second half, added. turned: the same of blocks of
    keys, which list blocks of turned_queries (None: sizes[0]) queries. visible: None if no pair is hidden, else
    visible(i, j, values) as in `gpu.forward`, with values from q_data {name: [B or 1, T]} and k_data {name: [B or 1,
    S]}, int32. soft_cap: None, or s is replaced by soft_cap tanh(s / soft_cap). slopes: must be None.

    Raises ValueError.
    """
    if slopes is not None:
        raise ValueError("slopes: expected None, got slopes, whose gradients these kernels do not compute")
    if any(size not in BLOCKS for size in sizes) or q.shape[1] % sizes[0] or k.shape[1] % sizes[1]:
        shapes = f"{tuple(sizes)} for T={q.shape[1]}, S={k.shape[1]}"
        raise ValueError(f"sizes: expected 64 or 128 each, of which T and S are multiples, got {shapes}")
    data, seen, inputs, facts = (dict(q_data or {}), dict(k_data or {})), None, (), None
    lengths = q.shape[1], k.shape[1]
    if visible is not None:
        seen, *data = Visibility(visible, *data).prepared(*data, *lengths)
        inputs = tuple(_asked(seen, *side) for side in (("queries", "i"), ("keys", "j")))
        facts = [_facts(*side) for side in zip(inputs, data, lengths)]
    shared = dict(scale=scale, soft_cap=soft_cap, seen=seen, inputs=inputs, ratio=q.shape[2] // k.shape[2])
    call = _cut(shared, sizes, False, q, v)
    if isinstance(rows, tuple):
        dq, rows = _gradients(dataclasses.replace(call, makes_rows=True), walk, (q, dy), (k, v), rows, facts)
    else:
        (dq,) = _gradients(call, walk, (q, dy), (k, v), (rows,), facts)
    call = _cut(shared, (turned_queries or sizes[0], sizes[1]), True, q, v)
    if soft_cap is None:  # else registers are too few
        found = walks(turned[1], call.owners, k.shape[2] * k.shape[0])
        steps = turned[2].shape[2] // turned[1].shape[2] * call.parts
        call = dataclasses.replace(call, pieces=pieces(*found, call.ratio, steps))
    dk, dv = _gradients(call, turned, (k, v), (q, dy), (rows,), facts)
    return dq, dk, dv


def _asked(seen, side, index):
    """Names of what a mask asks of one side, at least one."""
    found = seen.asked(side)
    # Four vectors beside each other cost ptxas a register more than five; two one less than three.
    return found if len(found) in (1, 2) or index in found else (index, *found)


def _facts(names, values, length):
    """What a mask asks of one side's tokens, [B or 1, names or more, length] int32; "i" and "j" are their indices."""
    if names in (("i",), ("j",)) and length <= SHORT:
        # Of indices alone XLA makes an iota, and a launch to write it in each call; a row of zeros keeps it a constant.
        return np.stack([np.arange(length, dtype=np.int32), np.zeros(length, np.int32)])[None]
    indices = dict.fromkeys("ij", jnp.arange(length, dtype=jnp.int32)[None])
    rows = [jnp.asarray((indices | values)[name], jnp.int32) for name in names]
    batch = max(x.shape[0] for x in rows)
    return jnp.stack([jnp.broadcast_to(x, (batch, length)) for x in rows], axis=1)


def _cut(shared, sizes, keys_own, q, v, step=None, stages=None):
    """How one of the kernels cuts its work."""
    own, other = sizes[::-1] if keys_own else sizes
    cost, vectors = (shared["seen"].root.cost, len(shared["inputs"][1])) if shared["seen"] is not None else (0, 1)
    deep = shared["soft_cap"] is not None or cost > DEEP
    small = keys_own or deep or cost + VECTOR * (vectors - 1) > DEEP or own == ROWS
    step = step or (64 if small else other)  # as many as registers and shared memory hold
    width = 2 * (q.shape[-1] + v.shape[-1])  # bytes of a token
    rings = WARPGROUPS * ROWS // own
    stages = stages or min(4, (SHARED_BYTES - WARPGROUPS * ROWS * width) // (rings * step * (width + 8)))
    return Call(own=own, other=other, step=step, stages=stages, deep=deep, keys_own=keys_own, **shared)


def _heavy_first(count, multiple):
    """Owners, those with the longest lists first, then -1 up to a multiple."""
    if isinstance(count, np.ndarray):
        order = np.argsort(-count.max((0, 1)), kind="stable")
    else:
        order = jnp.argsort(-jnp.max(count, axis=(0, 1)), stable=True)
    missing = -order.size % multiple
    order = order.astype(np.int32)
    return jnp.pad(order, (0, missing), constant_values=-1) if missing else order


def _gradients(call: Call, walk, own, others, rows, facts):
    """What a kernel adds up: [dq], or [dk, dv]; and rows, if it makes them."""
    begin, count, other, marks = walk
    full = (1 << WARPGROUPS) - 1
    if marks.dtype != bool and (call.soft_cap is not None or call.seen is None):  # too few registers to pass over tiles
        marks = marks & full == full
    if marks.dtype == bool:
        marks = marks * full
    else:
        call = dataclasses.replace(call, skips=True)
    of_rows = ["y", "lse", "dlse"] if call.makes_rows else ["rows"]
    names = ["a", "b", "other_a", "other_b", *of_rows, "order", "begin", "count", "entries"]
    entries = (other << MARKS) + marks  # number of the block, and what is known of it
    order = _heavy_first(count, call.owners)
    grid = {"owner": order.size // call.owners, "head": own[0].shape[2] * call.shares, "row": own[0].shape[0]}
    deal = dealt(call, count, other.shape[2], others, *grid.values())
    known = isinstance(count, np.ndarray)  # else it took longer on an H100, 0.99 ms for 0.97 in documents
    early = deal is not None and known and not call.fetches_rows  # which take registers that are too few then
    call = dataclasses.replace(call, deal=deal, early=early)
    if call.deal is not None:
        grid, order = {"worker": plan.SMS}, np.int32([[0]]) if deal.order is None else deal.order
        held = cards(deal, begin, count) if call.owners == 1 else None
        if held is not None:
            call, order = dataclasses.replace(call, turns=held.shape[1]), held
    arrays = [*own, *others, *rows, order, begin, count, entries.astype(np.int32)]
    if call.seen is not None:
        names += ["own_facts", "other_facts"]
        arrays += facts[::-1] if call.keys_own else facts
    outs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (own if call.keys_own else own[:1])]
    if call.shares > 1:
        outs = [jax.ShapeDtypeStruct((call.shares, call.levels, *x.shape), x.dtype) for x in outs]
    if call.makes_rows:
        outs.append(jax.ShapeDtypeStruct((*rows[1].shape[:2], 2, rows[1].shape[2]), jnp.float32))

    def body(*refs):
        given = dict(zip(names, refs))
        results = refs[len(names) : len(names) + len(outs)]
        _Block(call, given, results, *refs[len(names) + len(outs) :]).run()

    a, b = (x.shape[-1] for x in own)
    hides, slots = call.seen is not None, call.owners * call.stages
    alone = WARPGROUPS if call.deal is not None else 1  # barriers of what is fetched for a warpgroup alone
    scratch = [
        compat.tile(WARPGROUPS, ROWS, a),
        compat.tile(WARPGROUPS, ROWS, b),
        compat.tile(slots, call.step, a),
        compat.tile(slots, call.step, b),
        compat.vector(slots, 2, call.step) if call.keys_own else compat.vector(WARPGROUPS, 2, ROWS),
        compat.barriers(alone, WARPGROUPS // alone * (2 + call.fetches_rows + hides)),
        compat.barriers(slots, 2 + call.keys_own + hides),
        compat.barriers(slots, call.units),
    ]
    if hides:
        scratch += [
            compat.vector(WARPGROUPS, len(call.names(True)), ROWS, dtype=jnp.int32),
            compat.vector(slots, len(call.names(False)), call.step, dtype=jnp.int32),
            compat.vector(slots, dtype=jnp.int32),
        ]
    if compat.interpreting():
        scratch += [compat.tile(WARPGROUPS, ROWS, call.step)] * 2
    if call.deal is not None:
        scratch.append(compat.barriers(WARPGROUPS))
    if call.turns:
        scratch += [compat.vector(*order.shape[1:], dtype=jnp.int32), compat.barrier(1)]
    if call.early:
        scratch.append(compat.tile(WARPGROUPS, ROWS, COLUMNS))
    found = compat.kernel(
        body,
        grid=tuple(grid.values()),
        names=tuple(grid),
        out=tuple(outs),
        scratch=scratch,
        warpgroups=WARPGROUPS,
        name="block_sparse_attention_dkv" if call.keys_own else "block_sparse_attention_dq",
    )(*map(jnp.asarray, arrays))
    return found if call.shares == 1 else [_added(x) for x in found]


def _added(shares):
    """The sum of shares [n, levels, ...] of a walk, in float32 and in their order."""
    parts = [level.astype(jnp.float32) for share in shares for level in share]
    return functools.reduce(jnp.add, parts).astype(shares.dtype)


class _Block:
    """One thread block of either kernel: a block or two of tokens of one row and head."""

    def __init__(self, call, given, results, a, b, other_a, other_b, rows, loaded, ready, free, *more):
        self.call, self.given, self.results = call, given, results
        self.a, self.b, self.other_a, self.other_b, self.rows = a, b, other_a, other_b, rows
        self.loaded, self.ready, self.free = loaded, ready, free
        *more, self.staged = more if call.early else (*more, None)
        *more, self.cards, self.told = more if call.turns else (*more, None, None)
        *more, self.used = more if call.deal is not None else (*more, None)
        self.warpgroup = compat.warpgroup(WARPGROUPS)
        self.own_facts, self.other_facts, self.marks = more[:3] if call.seen is not None else (None,) * 3
        spares = more[3 * (call.seen is not None) :]
        self.spares = [spare.at[self.warpgroup] for spare in spares] or [None, None]

    def run(self):
        fetches = compat.fetching_warpgroup(WARPGROUPS)

        @pl.when(fetches)
        def _():
            compat.registers(FETCHING, more=False)
            self.fetch()

        @pl.when(jnp.logical_not(fetches))
        def _():
            compat.registers(COMPUTING, more=True)
            self.compute()

    def item(self, turn):
        """What the thread block takes at a turn: its number, or where its card is."""
        if self.call.turns:
            return turn
        worker = lax.axis_index("worker")
        return turn * plan.SMS + worker if self.call.deal.order is None else self.given["order"][worker, turn]

    def turns(self, body, start):
        """Runs body(turn, item, carry) -> (next item or None, carry) for each item of the thread block."""
        deal, first = self.call.deal, jnp.int32(0)
        if deal is None:
            return body(0, 0, start)[1]
        if self.call.turns:
            compat.wait(self.told)
            once = lambda carry: (carry[0] + 1, body(carry[0], carry[0], carry[1])[1])
            return lax.while_loop(lambda carry: self.cards[carry[0], 0] >= 0, once, (first, start))[1]
        more = lambda item: item < deal.items if deal.order is None else item >= 0

        def step(carry):
            turn, item, rest = carry
            following, rest = body(turn, item, rest)
            return turn + 1, self.item(turn + 1) if following is None else following, rest

        return lax.while_loop(lambda carry: more(carry[1]), step, (first, self.item(first), start))[2]

    def row_of(self, ref, mine):
        return mine.row if ref.shape[0] > 1 else 0

    def fetch(self):
        call = self.call

        def turn(number, item, before):
            lists = [List(self, place, item, before[place]) for place in range(call.owners)]
            units = [(unit, lists[unit // call.units]) for unit in range(WARPGROUPS)]
            for unit, mine in units:
                if call.deal is None:
                    self.fetch_own(mine, unit)
                elif call.early:
                    for source in self.own_tiles(mine, unit, "aby" if call.makes_rows else "ab"):
                        compat.prefetch(source)

            def step(n, entries):
                later = tuple(mine.entry(n + 1) for mine in lists)  # here, not after the copies
                if call.deal is not None:
                    # Tiles of the list first, as many as find room: the item before may still need its own.
                    for unit, mine in units:
                        room = call.stages - call.early  # the last step's tile leaves its own after the owner's
                        at = jnp.where(number == 0, 0, jnp.minimum(mine.steps, room))
                        pl.when(n == at)(functools.partial(self.fetch_own, mine, unit))
                for mine, entry in zip(lists, entries):
                    if call.owners == 1 and call.deal is None:
                        self.fetch_step(mine, n, entry)
                    else:
                        pl.when(n < mine.steps)(functools.partial(self.fetch_step, mine, n, entry))
                return later

            steps = lists[0].steps
            for mine in lists[1:]:
                steps = jnp.maximum(steps, mine.steps)
            first = tuple(mine.entry(0) for mine in lists)
            lax.fori_loop(0, steps + (call.deal is not None), step, first)
            return None, tuple(mine.before + mine.steps for mine in lists)

        if call.turns:
            compat.fetch(self.given["order"].at[lax.axis_index("worker")], self.cards, self.told)
        self.turns(turn, (0 if call.deal is None else jnp.int32(0),) * call.owners)
        for slot in range(call.owners * call.stages):  # no arrival is left behind
            compat.wait(self.free.at[slot])
        if call.deal is not None:
            for unit in range(WARPGROUPS):
                compat.wait(self.used.at[unit])

    def own_tokens(self, mine, unit):
        """Those of a warpgroup, which may be known in the kernel alone."""
        return pl.ds(mine.start + (unit if self.call.owners == 1 else 0) * ROWS, ROWS)

    def own_tiles(self, mine, unit, names="ab"):
        """What a warpgroup needs of its rows, in global memory."""
        at = mine.row, self.own_tokens(mine, unit), mine.own_head
        return [self.given[name].at[at] for name in names]

    def fetch_own(self, mine, unit):
        """The 64 rows of a warpgroup."""
        call, given = self.call, self.given
        tokens = self.own_tokens(mine, unit)
        copies = [*zip(self.own_tiles(mine, unit), (self.a, self.b))]
        if call.fetches_rows:
            copies.append((given["rows"].at[mine.row, mine.own_head, :, tokens], self.rows))
        if call.seen is not None:
            facts = given["own_facts"]
            names = pl.ds(0, self.own_facts.shape[1])
            copies.append((facts.at[self.row_of(facts, mine), names, tokens], self.own_facts))
        if call.deal is not None:
            compat.wait(self.used.at[unit])
        for source, target in copies:
            compat.fetch(source, target.at[unit], self.loaded.at[unit if call.deal is not None else 0])

    def fetch_step(self, mine, n, entry):
        call, given, row = self.call, self.given, mine.row
        slot = mine.slot(mine.before + n)
        head = mine.head + n % mine.heads if call.keys_own else mine.own_head // call.ratio
        tokens = pl.ds(mine.other_start(entry, n), call.step)
        copies = [(given["other_a"].at[row, tokens, head], self.other_a)]
        copies.append((given["other_b"].at[row, tokens, head], self.other_b))
        if call.keys_own:
            copies.append((given["rows"].at[row, head, :, tokens], self.rows))
        if call.seen is not None:
            facts = given["other_facts"]
            names = pl.ds(0, self.other_facts.shape[1])
            copies.append((facts.at[self.row_of(facts, mine), names, tokens], self.other_facts))
        compat.wait(self.free.at[slot])
        if call.seen is not None:  # the copies' arrivals tell of it too
            self.marks[slot] = mine.marks(entry, n)
        for source, target in copies:
            compat.fetch(source, target.at[slot], self.ready.at[slot])

    def compute(self):
        call = self.call
        place = self.warpgroup if call.owners > 1 else 0
        for slot in range(call.stages):
            compat.arrive(self.free.at[place * call.stages + slot])
        if call.deal is not None:
            compat.arrive(self.used.at[self.warpgroup])

        # 0, which the compiler does not know: what is found with it is not found before the loop over items and kept.
        hidden_zero = lambda count: 0 if call.deal is None else jnp.minimum(count, 0)
        # Found anew for each item: kept, it is spilled, and read again in the loop over tiles.
        index = lambda: self.warpgroup if call.deal is None else compat.warpgroup(WARPGROUPS)

        def turn(number, item, before):
            mine = List(self, place, item)
            steps = mine.steps
            last = before + steps
            self.unit = index() + hidden_zero(steps)
            self.mine = self.unit if call.early else self.warpgroup  # the same, from what is kept anyway
            loaded = self.loaded.at[self.unit if call.deal is not None else 0]
            self.make_rows(mine, loaded) if call.makes_rows else compat.wait(loaded)
            sums = self.walk(place, before, last)
            # Again, so that nothing has to be kept through the loop.
            number += hidden_zero(last)
            following = self.item(number + 1) if call.deal is not None else None
            mine = List(self, place, item if call.deal is None else self.item(number))
            unit = index() + hidden_zero(last)
            sums = [total * scale for total, scale in zip(sums, (call.scale, 1.0))]
            for level in range(call.levels):
                if level:
                    compat.stores_read()
                lead = () if call.shares == 1 else (mine.share, level)
                sums = self.store(mine, unit, sums, lead)
            if call.early:
                compat.arrive(self.used.at[unit], mine.steps == 0)  # else that was so in the last step
            elif call.deal is not None:
                compat.stores_read()  # and what was read by loads was so before the stores were published
                compat.arrive(self.used.at[unit])
            return following, last

        self.turns(turn, 0 if call.deal is None else jnp.int32(0))
        compat.stores_done()

    def make_rows(self, mine, loaded):
        """Makes lse in log2 and delta of a warpgroup's rows, as `rows_gpu.rows` does, once their tiles are there."""
        tokens = self.own_tokens(mine, self.unit)
        at = mine.row, mine.own_head, tokens
        (y,) = self.own_tiles(mine, self.unit, "y")
        y = registers.load_tile(y, shared=False)  # before the wait, as dy is on its way
        lse, shift = (registers.load_rows_of(self.given[name].at[at]) for name in ("lse", "dlse"))
        some = jnp.abs(lse) < jnp.inf
        compat.wait(loaded)
        dy = registers.load_tile(self.b.at[self.unit])
        delta = jnp.sum(y.astype(jnp.float32) * dy.astype(jnp.float32), axis=1) - shift
        lse, delta = jnp.where(some, lse * LOG2_E, jnp.inf), jnp.where(some, delta, 0.0)
        for n, vector in enumerate((lse, delta)):
            self.rows[self.unit, n] = vector
        compat.publish()
        target = self.results[-1].at[mine.row, mine.own_head, :, tokens]
        compat.store(self.rows.at[self.unit], target, None if self.call.owners == 1 else mine.exists)

    def own_done(self, ends):
        """Where ends says that this is the last step: nothing will be read of the owner's tiles any more."""
        if self.call.early:
            compat.arrive(self.used.at[self.unit], ends)

    def walk(self, place, first, last):
        """The sums after the list's tiles, whose numbers in the thread block are from first to last."""
        call = self.call
        widths = [x.shape[-1] for x in ((self.a, self.b) if call.keys_own else (self.a,))]
        sums = [registers.zeros((ROWS, width)) for width in widths]
        step = self.keys_step if call.keys_own else self.queries_step()
        if call.seen is None:
            turn = lambda slot, sums, ends: step(slot, False, sums, ends)
        else:  # two copies of the step: a branch around the mask alone costs registers while products are running
            copies = [lambda sums, *at, hides=hides: step(at[0], hides, sums, *at[1:]) for hides in (True, False)]

            def over(sums, slot, ends):
                self.own_done(ends)
                return sums

            def turn(slot, sums, ends):
                marks = self.marks[slot] >> (self.mine if call.units > 1 else 0)
                looks = lambda *given: lax.cond(marks & 1 == 1, copies[1], copies[0], *given)
                if not call.skips:
                    return looks(sums, slot, ends)
                empty, *second = ((marks >> n * WARPGROUPS) & 1 for n in range(1, 1 + call.step // ROWS))
                if not second:
                    return lax.cond(empty == 1, over, looks, sums, slot, ends)
                half = lambda *given: copies[0](*given, empty * ROWS)
                some = lambda *given: lax.cond(empty & second[0] == 1, over, half, *given)
                return lax.cond(empty | second[0] == 1, some, looks, sums, slot, ends)

        def visit(n, sums):
            slot = place * call.stages + lax.rem(n, call.stages)
            compat.wait(self.ready.at[slot])
            sums = turn(slot, sums, n == last - 1)
            compat.arrive(self.free.at[slot])
            return sums

        return lax.fori_loop(first, last, visit, sums)

    def store(self, mine, unit, sums, lead):
        """Writes the sums, rounded to bfloat16, to a part of the results; what that leaves of them."""
        call, left = self.call, []
        at = *lead, mine.row, self.own_tokens(mine, unit), mine.own_head
        exists = None if call.owners == 1 else mine.exists
        for total, staged, out in zip(sums, (self.a, self.b), self.results):
            rounded = total.astype(jnp.bfloat16)
            left.append(total - rounded.astype(jnp.float32))
            for start in range(0, rounded.shape[1], COLUMNS) if call.early else ():
                compat.stores_read()
                self.staged[unit] = rounded[:, start : start + COLUMNS]
                compat.publish()
                compat.store(self.staged.at[unit], out.at[(*at, pl.ds(start, COLUMNS))], exists)
            if not call.early:
                staged[unit] = rounded
                compat.publish()
                compat.store(staged.at[unit], out.at[at], exists)
        return left

    def keys_step(self, slot, hides, sums, ends):
        """dk and dv of 64 keys after one more tile of queries; tiles here are [keys, queries]."""
        call = self.call
        k, v = self.a.at[self.unit], self.b.at[self.unit]
        q, dy, rows = self.other_a.at[slot], self.other_b.at[slot], self.rows.at[slot]
        shape = (ROWS, call.step)

        def products(add, read):
            early = not call.deep  # else registers are too few for the second product meanwhile
            add(2, k, registers.transposed(q))
            if early:
                add(3, v, registers.transposed(dy))
            lse = registers.spread_columns(registers.load_columns(rows.at[0]), shape)
            p, graded = self.weights(read(2, int(early)), lse, slot, hides)
            add(1, registers.as_operand(p, self.spares[0]), dy)
            if not early:
                add(3, v, registers.transposed(dy))
            gradient = read(3, int(early))
            delta = registers.spread_columns(registers.load_columns(rows.at[1]), shape)
            compat.reads_done()  # of the rows' facts, before the slot is free
            self.own_done(ends)
            add(0, registers.as_operand(graded * (gradient - delta), self.spares[1]), q)

        return registers.accumulate(products, *sums, registers.zeros(shape), registers.zeros(shape))[:2]

    def queries_step(self):
        """dq of 64 queries after one more tile of keys: the step, with what stays the same loaded."""
        call = self.call
        q, dy = (x.at[self.unit] for x in (self.a, self.b))
        row = lambda n: registers.load_rows(self.rows.at[self.unit, n])
        if call.makes_rows:  # not kept: registers are few
            lse, delta = lambda: row(0), lambda: row(1)
        else:
            kept = row(0), row(1)
            lse, delta = lambda: kept[0], lambda: kept[1]

        def step(slot, hides, sums, ends, start=None):
            """start: first key of the half that is seen; None: all are."""
            keys = pl.ds(*(0, call.step) if start is None else (pl.multiple_of(start, ROWS), ROWS))
            k, v, shape = self.other_a.at[slot, keys], self.other_b.at[slot, keys], (ROWS, keys.size)

            def products(add, read):
                add(1, q, registers.transposed(k))
                add(2, dy, registers.transposed(v))
                _, graded = self.weights(read(1, 1), registers.spread_rows(lse(), shape), slot, hides, keys)
                if hides:
                    compat.reads_done()
                gradient = read(2, 0)
                self.own_done(ends)
                ds = graded * (gradient - registers.spread_rows(delta(), shape))
                add(0, registers.as_operand(ds, self.spares[0]), k)

            return registers.accumulate(products, *sums, registers.zeros(shape), registers.zeros(shape))[:1]

        return step

    def weights(self, products, lse, slot, hides, others=slice(None)):
        """p of a tile from q k^T and log2 sums, 0 where hidden; and p times the derivative of the soft cap."""
        call = self.call
        hide = (lambda p: self.hide(slot, p, others)) if hides else lambda p: p
        if call.soft_cap is None:
            p = hide(jnp.exp2(products * (call.scale * LOG2_E) - lse))
            return p, p
        # tanh from exp2: the hardware's own is too coarse for what is exponentiated next.
        below = 1 / (1 + jnp.exp2(products * (2 * LOG2_E * call.scale / call.soft_cap)))  # (1 - tanh) / 2
        top = call.soft_cap * LOG2_E
        p = hide(jnp.exp2((top - lse) - below * (2 * top)))
        return p, 4 * p * (below - below * below)

    def hide(self, slot, p, others):
        """p with 0 at hidden pairs; others: which of the step's."""
        own, other = self.own_facts.at[self.mine], self.other_facts.at[slot]
        vectors = {"own": lambda n: lambda: registers.load_rows(own.at[n])}
        vectors["other"] = lambda n: lambda: registers.load_columns(other.at[n, others])
        values = {}
        for side, names in (("own", self.call.names(True)), ("other", self.call.names(False))):
            values |= {name: vectors[side](n) for n, name in enumerate(names)}
        i, j = (values.pop(name, None) for name in "ij")
        sizes = p.shape[::-1] if self.call.keys_own else p.shape
        return jnp.where(self.call.seen(i, j, values, sizes, turned=self.call.keys_own), p, 0.0)
