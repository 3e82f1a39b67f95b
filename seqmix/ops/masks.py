"""One mask language for static patterns, block lists, ring schedules and counts.

    mask = Causal() & (Window(512) | Sinks(4)) & Segments()

Indices i are those of queries and j those of keys, from 0 on. A mask is a frozen dataclass, so it may be a static
argument of jit; what depends on data names its `inputs` and takes their values when it is evaluated
(`mask_algebra.Mask` has the methods). Bad parameters raise ValueError.
"""

from dataclasses import dataclass

import numpy as np

from seqmix.core.shapes import boolean, described, positive
from seqmix.ops.mask_algebra import EMPTY, FULL, MOST, PARTIAL, And, Mask, Not, Or, check_static, grade, library
from seqmix.ops.mask_data import Intervals, Positions, Segments
from seqmix.ops.mask_grid import Boxed, Neighbourhood

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "And",
    "Blocks",
    "BlockTable",
    "Boxed",
    "Causal",
    "Coarse",
    "Dilated",
    "Intervals",
    "Mask",
    "Neighbourhood",
    "Not",
    "Or",
    "Positions",
    "Powers",
    "Prefix",
    "Segments",
    "Sinks",
    "Strided",
    "Transpose",
    "Window",
]


def _distances(rows, columns):
    """(least, greatest) i - j in rectangles; every whole number between occurs."""
    return rows[0] - columns[1], rows[1] - columns[0]


@dataclass(frozen=True)
class Causal(Mask):
    """j <= i + offset. offset = S - T aligns the last query with the last key."""

    offset: int = 0

    def __post_init__(self):
        positive("offset", self.offset, -MOST, MOST)

    def visible(self, i, j, data=None):
        return j <= i + self.offset

    def over(self, rows, columns, spans=None):
        least, greatest = _distances(rows, columns)
        return grade(greatest >= -self.offset, least >= -self.offset)


@dataclass(frozen=True)
class Window(Mask):
    """0 <= i - j < size; not causal: |i - j| < size."""

    size: int
    causal: bool = True

    def __post_init__(self):
        positive("size", self.size, 1, MOST)
        boolean("causal", self.causal)

    def visible(self, i, j, data=None):
        distance = i - j
        return (distance < self.size) & (distance > (-1 if self.causal else -self.size))

    def over(self, rows, columns, spans=None):
        least, greatest = _distances(rows, columns)
        low = 0 if self.causal else 1 - self.size
        return grade((greatest >= low) & (least < self.size), (least >= low) & (greatest < self.size))


@dataclass(frozen=True)
class Dilated(Mask):
    """(i - j) % rate == 0, before and after i: the strided pattern of Sparse Transformers, with `Causal`."""

    rate: int

    def __post_init__(self):
        positive("rate", self.rate, 1, MOST)

    def visible(self, i, j, data=None):
        return (i - j) % self.rate == 0

    def over(self, rows, columns, spans=None):
        least, greatest = _distances(rows, columns)
        some = greatest // self.rate * self.rate >= least
        return grade(some, some & ((least == greatest) | (self.rate == 1)))


@dataclass(frozen=True)
class Strided(Mask):
    """(j - offset) % stride < width: every stride-th column of `width` keys, whatever the query.

    The summary columns of Sparse Transformers' fixed pattern are Strided(l, width=c, offset=l - c), with `Causal`.
    """

    stride: int
    width: int = 1
    offset: int = 0

    def __post_init__(self):
        positive("stride", self.stride, 1, MOST)
        positive("width", self.width, 1, MOST)
        positive("offset", self.offset, 0, MOST)
        if self.width > self.stride:
            raise ValueError(f"width: expected at most stride={self.stride}, got {self.width}")

    def visible(self, i, j, data=None):
        return (j - self.offset) % self.stride < self.width

    def over(self, rows, columns, spans=None):
        def before(j):  # visible columns below j, up to a constant
            whole, rest = (j - self.offset) // self.stride, (j - self.offset) % self.stride
            return whole * self.width + library(rest).minimum(rest, self.width)

        count = before(columns[1] + 1) - before(columns[0])
        return grade(count > 0, count == columns[1] - columns[0] + 1)


@dataclass(frozen=True)
class Sinks(Mask):
    """j < count: the first keys, for every query. `~Sinks(0)` hides nothing."""

    count: int

    def __post_init__(self):
        positive("count", self.count, 0, MOST)

    def visible(self, i, j, data=None):
        return j < self.count

    def over(self, rows, columns, spans=None):
        return grade(columns[0] < self.count, columns[1] < self.count)


@dataclass(frozen=True)
class Prefix(Mask):
    """j < length or j <= i: a prefix that sees itself whole, then causal (prefix-LM)."""

    length: int

    def __post_init__(self):
        positive("length", self.length, 0, MOST)

    def visible(self, i, j, data=None):
        return (j < self.length) | (j <= i)

    def over(self, rows, columns, spans=None):
        some = (columns[0] < self.length) | (columns[0] <= rows[1])
        return grade(some, (columns[1] < self.length) | (columns[1] <= rows[0]))


@dataclass(frozen=True)
class Blocks(Mask):
    """i // size == j // key_size: a block diagonal (key_size None: size). With `| Causal()` it is block-causal."""

    size: int
    key_size: int | None = None

    def __post_init__(self):
        positive("size", self.size, 1, MOST)
        if self.key_size is not None:
            positive("key_size", self.key_size, 1, MOST)

    def visible(self, i, j, data=None):
        return i // self.size == j // (self.key_size or self.size)

    def over(self, rows, columns, spans=None):
        (r0, r1), (c0, c1) = (x // self.size for x in rows), (x // (self.key_size or self.size) for x in columns)
        some = (r0 <= c1) & (c0 <= r1)
        return grade(some, some & (r0 == r1) & (c0 == c1))


@dataclass(frozen=True)
class BlockTable(Mask):
    """table[i // size, j // key_size], an explicit table [nq, nk] of bool; hidden outside of it.

    `table` is any array or nested sequence of 0 and 1; it is kept as a tuple of bytes, one for each row.
    """

    table: tuple[bytes, ...]
    size: int
    key_size: int | None = None

    def __post_init__(self):
        positive("size", self.size, 1, MOST)
        if self.key_size is not None:
            positive("key_size", self.key_size, 1, MOST)
        rows = self.table
        if not (isinstance(rows, tuple) and rows and all(isinstance(row, bytes) for row in rows)):
            try:
                array = np.asarray(rows)
            except ValueError:
                raise ValueError(f"table: expected [nq, nk] of 0 and 1, got {described(rows)}") from None
            if array.ndim != 2 or not array.size:
                raise ValueError(f"table: expected [nq, nk] of 0 and 1, got shape {array.shape} of {array.dtype}")
            if not np.isin(array, (0, 1)).all():
                raise ValueError(f"table: expected 0 and 1, got {described(array[~np.isin(array, (0, 1))][0].item())}")
            rows = tuple(row.tobytes() for row in array.astype(np.uint8))
            object.__setattr__(self, "table", rows)

    def _array(self):
        return np.stack([np.frombuffer(row, np.uint8) for row in self.table]).astype(bool)

    def visible(self, i, j, data=None):
        xp = library(i, j)
        table = xp.asarray(self._array())
        i, j = i // self.size, j // (self.key_size or self.size)
        inside = (i >= 0) & (i < table.shape[0]) & (j >= 0) & (j < table.shape[1])
        return inside & table[xp.clip(i, 0, table.shape[0] - 1), xp.clip(j, 0, table.shape[1] - 1)]

    def over(self, rows, columns, spans=None):
        xp = library(*rows, *columns)
        table = self._array()
        # With sums over all rectangles from the corner, four look-ups count what is visible in one.
        total = xp.asarray(np.pad(table.cumsum(0).cumsum(1), ((1, 0), (1, 0))).astype(np.int32))
        (r0, r1), (c0, c1) = (x // self.size for x in rows), (x // (self.key_size or self.size) for x in columns)

        def below(i, j):
            return total[xp.clip(i, 0, table.shape[0]), xp.clip(j, 0, table.shape[1])]

        count = below(r1 + 1, c1 + 1) - below(r0, c1 + 1) - below(r1 + 1, c0) + below(r0, c0)
        return grade(count > 0, count == (r1 - r0 + 1) * (c1 - c0 + 1))


@dataclass(frozen=True)
class Powers(Mask):
    """i - j is 0 or a power of two (PowerAttention, with `Coarse`)."""

    def visible(self, i, j, data=None):
        distance = i - j
        return (distance >= 0) & (distance & (distance - 1) == 0)

    def over(self, rows, columns, spans=None):
        least, greatest = _distances(rows, columns)
        xp = library(least, greatest)
        power = xp.maximum(greatest, 0)
        for shift in (1, 2, 4, 8, 16):  # set all bits below the highest, then keep that one alone
            power = power | (power >> shift)
        power = power - (power >> 1)
        some = (greatest >= 0) & (power >= least)
        # 0, 1 and 2 are all such numbers; above, none is followed by another.
        return grade(some, some & (least >= 0) & ((greatest <= 2) | (least == greatest)))


@dataclass(frozen=True)
class Coarse(Mask):
    """A static mask of blocks: i sees j where block i // size sees block j // size."""

    mask: Mask
    size: int

    def __post_init__(self):
        positive("size", self.size, 1, MOST)
        check_static(self.mask)

    def visible(self, i, j, data=None):
        return self.mask.visible(i // self.size, j // self.size)

    def over(self, rows, columns, spans=None):
        return self.mask.over(tuple(x // self.size for x in rows), tuple(x // self.size for x in columns))


@dataclass(frozen=True)
class Transpose(Mask):
    """The mask with i and j exchanged: Transpose(Sinks(n)) lets the first n queries see every key."""

    mask: Mask

    def __post_init__(self):
        if not isinstance(self.mask, Mask):
            raise ValueError(f"mask: expected a mask, got {described(self.mask)}")

    @property
    def inputs(self):
        return {name: "keys" if side == "queries" else "queries" for name, side in self.mask.inputs.items()}

    def visible(self, i, j, data=None):
        return self.mask.visible(j, i, data)

    def over(self, rows, columns, spans=None):
        return self.mask.over(columns, rows, spans)
