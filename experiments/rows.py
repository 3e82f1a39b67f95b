"""Rows of tokens: documents laid end to end and cut, each row a function of its index alone.

The end-of-document id opens each document and, as the target of its last token, closes it; so every token is
predicted. Packed rows keep documents apart by segment ids: a document longer than a row goes on in another, as a
segment of its own. In windows, for mixers that cannot pack, a row is one segment whose documents see each other.
The order of documents is drawn anew for each epoch from (seed, epoch).
"""

import functools

import grain
import numpy as np

MOST = 2**40  # rows: more than any run reads, and a length that fits where grain puts it


class Stream:
    """Documents end to end. Document i is `eos` and then the tokens at places starts[i] to starts[i] + counts[i] - 1
    of what `fetch` (places -> ids) reads, filled up with `eos` to a multiple of `align`.

    offsets [n + 1] is where documents begin in the stream, lengths [n] their tokens with the first `eos`.
    """

    def __init__(self, fetch, starts, counts, eos, align=1):
        self.fetch, self.starts, self.eos = fetch, starts, eos
        self.lengths = np.asarray(counts, np.int64) + 1
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-self.lengths // align) * align)])
        self.size = int(self.offsets[-1])

    def take(self, document, within):
        """Ids at places `within` documents, int32; `eos` where a document has no token."""
        ids = np.full(within.shape, self.eos, np.int32)
        text = (within > 0) & (within < self.lengths[document])
        ids[text] = self.fetch(self.starts[document[text]] + within[text] - 1)
        return ids


class Rows(grain.MapDataset):
    """Row i of an epoch: places [i T, (i + 1) T) of its stream, as a dict of arrays [T].

    tokens, targets, segment_ids, positions and documents (their numbers in the stream, from `first` on) are int32,
    mask is float32; all are 0 where there is no text.
    With a seed, index // len(self) is the epoch, and its documents come in an order of its own.
    """

    def __init__(self, stream, seq_len, count, seed=None, packed=True, first=0):
        super().__init__()
        self.first = first
        self.stream, self.seq_len, self.count, self.seed, self.packed = stream, seq_len, count, seed, packed
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(index, self.count)
        order, starts = self._order(epoch)
        stream, first = self.stream, row * self.seq_len
        place = np.arange(first, first + self.seq_len + 1)
        inside = place < stream.size
        place = np.minimum(place, stream.size - 1)
        document = np.searchsorted(starts, place, side="right") - 1
        within, which = place - starts[document], order[document]
        ids = stream.take(which, within)
        ids = np.where(inside, ids, stream.eos)  # the last document of an epoch is closed too
        real = (inside & (within < stream.lengths[which]))[:-1]
        begin = np.maximum(starts[document], first) if self.packed else first
        columns = {
            "tokens": ids[:-1],
            "targets": ids[1:],
            "segment_ids": document[:-1] - document[0] + 1 if self.packed else 1,
            "positions": (place - begin)[:-1],
            "documents": which[:-1] + self.first,
        }
        row = {key: np.where(real, value, 0).astype(np.int32) for key, value in columns.items()}
        return row | {"mask": real.astype(np.float32)}

    def _draw_order(self, epoch):
        """(documents in the order of an epoch, where each starts)."""
        lengths = np.diff(self.stream.offsets)  # filled up
        order = np.arange(lengths.size)
        if self.seed is not None:
            # Raw bits, since numpy promises those alone to stay the same.
            draws = np.random.Philox(key=[self.seed, epoch]).random_raw(lengths.size)
            order = np.argsort(draws, kind="stable")
        return order, np.cumsum(lengths[order]) - lengths[order]


class Share(grain.MapDataset):
    """The rows that host h of n reads of endless rows, or of so many batches: of every `batch` rows the h-th of n equal
    runs.
    """

    def __init__(self, rows, batch, host, hosts, batches=None):
        super().__init__([rows])
        self.whole, self.host, self.each = batch, host, batch // hosts
        self.length = MOST if batches is None else batches * self.each

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self.each)
        return self._parent[batch * self.whole + self.host * self.each + row]
