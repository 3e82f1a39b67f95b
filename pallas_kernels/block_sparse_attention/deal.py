"""How kernels of block-sparse attention deal their work to thread blocks that take several lists each.

To start a thread block and to fill its shared memory took some 6 microseconds on an H100, as much as two tiles of 128 x
128. One that goes from list to list has the next one's tiles fetched while it ends the last.
"""

import dataclasses
import heapq

import numpy as np

from pallas_kernels.block_sparse_attention import plan

LONG = 64  # blocks of 128 tokens of a list, beyond which a thread block takes one
UNSURE = 32  # the same of lists whose lengths are not known while tracing
STARTING = 128  # tokens of a list that take as long as beginning and ending it
UNEVEN = 1.1  # most that a thread block's work may be of the mean
LISTED = 64  # items a thread block, up to which it is listed who takes which where the lists' lengths are known
ROW = 16  # bits of a card's head, above which its row is
TURNS = 128  # most cards of a thread block, of 16 bytes
TOGETHER = 16 << 20  # bytes of what is listed that are walked at a time, so that L2 keeps them


@dataclasses.dataclass(frozen=True)
class Deal:
    """Work dealt out to as many thread blocks as the chip has multiprocessors: owners, or two, of a head and row."""

    owners: int
    heads: int
    rows: int
    together: int  # heads that are walked at a time
    order: np.ndarray | None = dataclasses.field(default=None, compare=False)  # `shared_out`; None: every so many-th

    @property
    def items(self) -> int:
        return self.owners * self.heads * self.rows

    def place(self, index, div=np.floor_divide, rem=np.mod):
        """(owner, head, row) of an item, for arrays and, with lax.div and lax.rem, in kernels.

        The owners of `together` heads follow each other, every next heads beginning 0.6 of the way further: so each
        thread block meets all sorts of owners, wherever the long lists are.
        """
        n = lambda value: np.int32(value)
        lap, within = div(index, n(self.owners * self.together)), rem(index, n(self.owners * self.together))
        owner = rem(div(within, n(self.together)) + lap * n(round(0.618 * self.owners)), n(self.owners))
        laps = n(self.heads // self.together)
        return owner, rem(lap, laps) * n(self.together) + rem(within, n(self.together)), div(lap, laps)


def shared_out(loads, together, workers):
    """Items [thread blocks, turns], each list ending with -1 or several: always to that which has the least to do.

    loads: work of each item; of so many that are walked together those with most come first, so that the last are
    short.
    """
    lap = np.arange(loads.size) // together
    heap, taken = [(0, worker) for worker in range(workers)], [[] for _ in range(workers)]
    for item in np.lexsort((-loads, lap)).tolist():
        load, worker = heap[0]
        heapq.heapreplace(heap, (load + int(loads[item]), worker))
        taken[worker].append(item)
    order = np.full((workers, max(map(len, taken)) + 1), -1, np.int32)
    for worker, items in enumerate(taken):
        order[worker, : len(items)] = items
    return order


def dealt(call, count, entries, others, owners, heads, rows):
    """The `Deal` of a gradient kernel's call; None where items are few, or lists long or uneven: one thread block each.

    count: of lists, [b, h, n], entries: of all of a row's, others: the arrays that are listed, [B, T, H, K]. The rest
    is the grid: thread blocks' owners, heads that own, rows.
    """
    row = others[0].shape[1] * sum(x.shape[-1] * x.dtype.itemsize for x in others)  # bytes of a head
    row *= others[0].shape[2] // heads if call.keys_own else 1
    fit = [n for n in range(1, heads + 1) if heads % n == 0 and n * row <= TOGETHER]
    deal = Deal(owners, heads, rows, max(fit, default=1))
    if call.shares > 1 or call.keys_own and call.deep:  # registers are too few
        return None
    if deal.items <= plan.SMS or entries * call.other > LONG * 128 * count.shape[2]:
        return None
    if not isinstance(count, np.ndarray):
        return deal if count.shape[1] == 1 and others[0].shape[1] <= UNSURE * 128 else None
    index = np.arange(deal.items)
    owner, head, row = deal.place(index)
    owner = owner[:, None] * call.owners + np.arange(call.owners)
    lengths = np.pad(count, ((0, 0), (0, 0), (0, -count.shape[2] % call.owners)))
    which = (row * (count.shape[0] > 1))[:, None], (head * count.shape[1] // heads)[:, None], owner
    work = lengths[which].max(1) * call.other * (call.ratio if call.keys_own else 1) + STARTING
    if deal.items <= LISTED * plan.SMS:
        deal = dataclasses.replace(deal, order=shared_out(work, owners * deal.together, plan.SMS))
        loads = np.where(deal.order >= 0, work[deal.order], 0).sum(1)
    else:
        loads = np.bincount(index % plan.SMS, work)
    return deal if loads.max() <= UNEVEN * loads.mean() else None


def cards(deal, begin, count):
    """(owner, or -1 at the end; head and row; begin and count of the list) of each turn, [thread blocks, turns, 4].

    None where the items are not listed, the lists not known, or turns too many.
    """
    if deal.order is None or not isinstance(begin, np.ndarray) or deal.order.shape[1] > TURNS:
        return None
    # A copy is of so many times 128 bytes.
    order = np.pad(deal.order, ((0, 0), (0, -deal.order.shape[1] % 8)), constant_values=-1)
    owner, head, row = deal.place(np.maximum(order, 0))
    at = row * (count.shape[0] > 1), head * count.shape[1] // deal.heads, owner
    found = np.where(order < 0, -1, owner), head + (row << ROW), begin[at], count[at]
    return np.stack(found, axis=-1).astype(np.int32)
