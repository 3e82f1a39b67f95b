"""Neighbourhoods in one, two and three dimensions, as masks over row-major tokens."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from seqmix.core.shapes import boolean
from seqmix.ops.mask_algebra import EMPTY, Mask, grade, library


@dataclass(frozen=True)
class Neighbourhood(Mask):
    """Generalised neighbourhood attention (arXiv 2504.16922; neighbourhoods 2204.07143, fused 2403.04690).

    Token n has the row-major coordinates of n in `grid`. On every axis of length L, with window w, stride s,
    wl = w // 2 and wr = w - 1 - wl, query i sees the keys start_i <= j < end_i:

        not causal:  p = min(i // s * s + s // 2, L - 1),      start = min(max(p - wl, 0), L - w),  end = start + w
        causal:      p = min(i // s * s + s - 1, L - 1),       start = max(p - w + 1, 0),           end = i + 1

    so at a border a window is shifted and keeps its w keys. With a dilation r an axis falls into r groups by i % r,
    and the rule holds for i // r within each. s = 1 is neighbourhood attention, s = w blocks, w = L everything.
    Tokens outside of the grid see and are seen by none: `| ~Sinks(math.prod(grid))` adds keys seen by all.

    grid: 1 to 3 lengths. window, stride, dilation, causal: one value for each axis, or one for all, with
    1 <= stride <= window and window * dilation <= length. Raises ValueError.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...] = 1
    dilation: tuple[int, ...] = 1
    causal: tuple[bool, ...] = False

    def __post_init__(self):
        grid = self.grid if isinstance(self.grid, tuple | list) else (self.grid,)
        object.__setattr__(self, "grid", _whole("grid", grid, len(grid)))
        if not 1 <= len(grid) <= 3:
            raise ValueError(f"grid: expected 1 to 3 lengths, got {grid}")
        for name in ("window", "stride", "dilation"):
            object.__setattr__(self, name, _whole(name, getattr(self, name), len(grid)))
        causal = self.causal if isinstance(self.causal, tuple | list) else (self.causal,) * len(grid)
        if len(causal) != len(grid):
            raise ValueError(f"causal: expected one bool for each axis of grid={grid}, got {causal}")
        object.__setattr__(self, "causal", tuple(boolean("causal", x) for x in causal))
        for length, w, s, r in zip(self.grid, self.window, self.stride, self.dilation, strict=True):
            if s > w:
                raise ValueError(f"stride: expected at most the window {self.window}, got {self.stride}")
            if w * r > length:
                raise ValueError(f"window: expected window * dilation within grid={grid}, got {w} * {r} for {length}")

    def axes(self):
        """(length, window, stride, dilation, causal) of each axis."""
        return zip(self.grid, self.window, self.stride, self.dilation, self.causal, strict=True)

    def visible(self, i, j, data=None):
        a, b = _coordinates(i, self.grid), _coordinates(j, self.grid)
        return _inside(i, self.grid) & _inside(j, self.grid) & _sees(self, a, b)

    def over(self, rows, columns, spans=None):
        return _grade(self, _boxes(*rows, self.grid), _boxes(*columns, self.grid))


@dataclass(frozen=True)
class Boxed(Mask):
    """A neighbourhood over tokens in the order of boxes: box after box, row-major within each (`to_boxes`).

    A tile of prod(box) tokens then is a box of the grid, whose neighbours lie in few other boxes: what makes
    neighbourhoods fast (arXiv 2504.16922, token permutation). The grid is filled up to whole boxes; what is added
    sees and is seen by none. Tiles of whole boxes are graded exactly, others conservatively.

    box: a length for each axis of the grid. Raises ValueError.
    """

    mask: Neighbourhood
    box: tuple[int, ...]

    def __post_init__(self):
        if not isinstance(self.mask, Neighbourhood):
            raise ValueError(f"mask: expected a Neighbourhood, got {type(self.mask).__name__}")
        object.__setattr__(self, "box", _whole("box", self.box, len(self.mask.grid)))

    @property
    def length(self) -> int:
        """Number of tokens in the order of boxes, with those added."""
        return math.prod(self._counts) * math.prod(self.box)

    @property
    def _counts(self):
        return tuple(-(-length // size) for length, size in zip(self.mask.grid, self.box, strict=True))

    def visible(self, i, j, data=None):
        seen, places = True, []
        for index in (i, j):
            which, within = index // math.prod(self.box), index % math.prod(self.box)
            pairs = zip(_coordinates(which, self._counts), _coordinates(within, self.box), self.box, strict=True)
            place = [first * size + rest for first, rest, size in pairs]
            for x, length in zip(place, self.mask.grid, strict=True):
                seen = seen & (x < length)
            seen = seen & (index >= 0) & (index < self.length)
            places.append(place)
        return seen & _sees(self.mask, *places)

    def over(self, rows, columns, spans=None):
        return _grade(self.mask, self._hulls(*rows), self._hulls(*columns))

    def _hulls(self, low, high):
        """As `_boxes`, of the boxes that the indices touch."""
        size = math.prod(self.box)
        hulls, whole = _boxes(low // size, high // size, self._counts)
        out = []
        for there, ends in hulls:
            place = []
            for (first, last), length, side in zip(ends, self.mask.grid, self.box, strict=True):
                last = last * side + side - 1
                whole = whole & (~there | (last < length))
                place.append((first * side, library(last).minimum(last, length - 1)))
            out.append((there, place))
        return out, whole


def to_boxes(x, grid, box):
    """Row-major tokens x [B, prod(grid), ...] in the order of `Boxed`, [B, length, ...], zeros for those added."""
    n, rest = len(grid), x.shape[2:]
    counts = [-(-length // size) for length, size in zip(grid, box, strict=True)]
    x = x.reshape(x.shape[0], *grid, *rest)
    added = [(0, c * size - length) for c, size, length in zip(counts, box, grid, strict=True)]
    x = jnp.pad(x, [(0, 0), *added, *[(0, 0)] * len(rest)])
    x = x.reshape(x.shape[0], *(side for pair in zip(counts, box, strict=True) for side in pair), *rest)
    order = (0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), *range(2 * n + 1, x.ndim))
    return x.transpose(order).reshape(x.shape[0], -1, *rest)


def from_boxes(x, grid, box):
    """Row-major tokens [B, prod(grid), ...] from those in the order of `Boxed`: what `to_boxes` undoes."""
    n, rest = len(grid), x.shape[2:]
    counts = [-(-length // size) for length, size in zip(grid, box, strict=True)]
    x = x.reshape(x.shape[0], *counts, *box, *rest)
    order = (0, *(axis for i in range(1, n + 1) for axis in (i, n + i)), *range(2 * n + 1, x.ndim))
    x = x.transpose(order).reshape(x.shape[0], *(c * size for c, size in zip(counts, box, strict=True)), *rest)
    return x[(slice(None), *(slice(length) for length in grid))].reshape(x.shape[0], -1, *rest)


def speed_up(mask: Mask, sizes: tuple[int, int], time: int, keys: int | None = None) -> float:
    """Tiles of a dense computation for each tile that the mask leaves: the simulator of arXiv 2504.16922.

    It bounds how much faster a kernel with tiles of `sizes` (queries, keys) can be than dense attention.
    """
    table = mask.tiles(*sizes, time, keys)
    return float(table.size / max(1, (table != EMPTY).sum()))


def _inside(index, grid):
    return (index >= 0) & (index < math.prod(grid))


def _sees(mask, a, b):
    """Whether coordinates a see coordinates b."""
    seen = True
    for (length, w, s, r, causal), x, y in zip(mask.axes(), a, b, strict=True):
        if r > 1:
            group = x % r
            seen = seen & (group == y % r)
            x, y, length = x // r, y // r, length // r + (group < length % r)
        start, end = _bounds(x, length, w, s, causal)
        seen = seen & (start <= y) & (y < end)
    return seen


def _grade(mask, rows, columns):
    """Grades of unions of boxes, ([(whether there is one, [(low, high) of each axis])], whether that is all)."""
    some = every = None
    for has_q, box_q in rows[0]:
        for has_k, box_k in columns[0]:
            some_here, every_here = has_q & has_k, True
            # A box of queries meets a box of keys where they meet on each axis, each for itself.
            for axis, a, b in zip(mask.axes(), box_q, box_k, strict=True):
                some_axis, every_axis = _axis(axis, a, b)
                some_here, every_here = some_here & some_axis, every_here & every_axis
            every_here = every_here | ~(has_q & has_k)
            some = some_here if some is None else some | some_here
            every = every_here if every is None else every & every_here
    return grade(some, every & rows[1] & columns[1])


def _whole(name, value, axes) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,) * axes
    good = all(isinstance(x, int | np.integer) and not isinstance(x, bool) and x >= 1 for x in values)
    if len(values) != axes or not good:
        raise ValueError(f"{name}: expected one integer >= 1 or one for each of {axes} axes, got {value!r}")
    return tuple(int(x) for x in values)


def _coordinates(index, grid):
    """Row-major coordinates of indices, one array for each axis."""
    out = []
    for length in reversed(grid):
        out.append(index % length)
        index = index // length
    return out[::-1]


def _bounds(i, length, w, s, causal):
    """(start, end) of the keys that i sees on an axis; both grow with i."""
    xp = library(i, length)
    leader = xp.minimum(i // s * s + (s - 1 if causal else s // 2), length - 1)
    if causal:
        return xp.maximum(leader - w + 1, 0), i + 1
    start = xp.minimum(xp.maximum(leader - w // 2, 0), length - w)
    return start, start + w


def _boxes(low, high, grid):
    """([(whether there is one, [(low, high) of each axis])], whether that is all): boxes of the indices low to high.

    Indices of a row-major grid are a part of a first row, whole rows, and a part of a last one.
    """
    xp, size = library(low, high), math.prod(grid)
    there, whole = (high >= 0) & (low < size), (low >= 0) & (high < size)
    low, high = xp.clip(low, 0, size - 1), xp.clip(high, 0, size - 1)
    if len(grid) == 1:
        return [(there, [(low, high)])], whole
    inner = math.prod(grid[1:])
    first, last = low // inner, high // inner
    stop = xp.where(first == last, high % inner, inner - 1)
    head = [(there & has, [(first, first), *box]) for has, box in _boxes(low % inner, stop, grid[1:])[0]]
    tail = _boxes(xp.zeros_like(high), high % inner, grid[1:])[0]
    tail = [(there & has & (first < last), [(last, last), *box]) for has, box in tail]
    rest = [(xp.zeros_like(low), xp.full_like(low, length - 1)) for length in grid[1:]]
    return [*head, (there & (last - first >= 2), [(first + 1, last - 1), *rest]), *tail], whole


def _axis(axis, rows, columns):
    """(whether some pair, whether every pair is visible) on one axis, of ranges that are not empty."""
    length, w, s, r, causal = axis
    some = False
    every = (rows[0] == rows[1]) & (columns[0] == columns[1]) if r > 1 else True
    for group in range(r):
        (q0, q1), (k0, k1) = (((x[0] - group + r - 1) // r, (x[1] - group) // r) for x in (rows, columns))
        has_q, has_k = q0 <= q1, k0 <= k1
        size = length // r + (group < length % r)
        (start0, end0), (start1, end1) = _bounds(q0, size, w, s, causal), _bounds(q1, size, w, s, causal)
        # Starts and ends grow with i and windows of neighbours touch, so the union of the rows is one interval.
        some = some | (has_q & has_k & (k1 >= start0) & (k0 < end1))
        every = every & (~(has_q | has_k) | (has_q & has_k & (k0 >= start1) & (k1 < end0)))
    return some, every
