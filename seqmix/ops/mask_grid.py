"""Neighbourhoods in one, two and three dimensions, as masks over row-major tokens."""

import math
from dataclasses import dataclass

import numpy as np

from seqmix.ops.mask_algebra import Mask, grade, library


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
        object.__setattr__(self, "causal", tuple(bool(x) for x in causal))
        for length, w, s, r in zip(self.grid, self.window, self.stride, self.dilation, strict=True):
            if s > w:
                raise ValueError(f"stride: expected at most the window {self.window}, got {self.stride}")
            if w * r > length:
                raise ValueError(f"window: expected window * dilation within grid={grid}, got {w} * {r} for {length}")

    def _axes(self):
        return zip(self.grid, self.window, self.stride, self.dilation, self.causal, strict=True)

    def visible(self, i, j, data=None):
        size = math.prod(self.grid)
        seen = (i >= 0) & (i < size) & (j >= 0) & (j < size)
        for (length, w, s, r, causal), a, b in zip(
            self._axes(), *(_coordinates(x, self.grid) for x in (i, j)), strict=True
        ):
            group = a % r
            start, end = _bounds(a // r, length // r + (group < length % r), w, s, causal)
            seen = seen & (group == b % r) & (start <= b // r) & (b // r < end)
        return seen

    def over(self, rows, columns, spans=None):
        size = math.prod(self.grid)
        some = every = None
        outside = (rows[0] < 0) | (rows[1] >= size) | (columns[0] < 0) | (columns[1] >= size)
        for has_q, box_q in _boxes(*rows, self.grid):
            for has_k, box_k in _boxes(*columns, self.grid):
                some_here, every_here = has_q & has_k, True
                # A box of queries meets a box of keys where they meet on each axis, each for itself.
                for axis, a, b in zip(self._axes(), box_q, box_k, strict=True):
                    some_axis, every_axis = _axis(axis, a, b)
                    some_here, every_here = some_here & some_axis, every_here & every_axis
                every_here = every_here | ~(has_q & has_k)
                some = some_here if some is None else some | some_here
                every = every_here if every is None else every & every_here
        return grade(some, every & ~outside)


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
    """[(whether there is one, [(low, high) of each axis])]: boxes that together hold the indices low to high.

    Indices of a row-major grid are a part of a first row, whole rows, and a part of a last one.
    """
    xp, size = library(low, high), math.prod(grid)
    there = (high >= 0) & (low < size)
    low, high = xp.clip(low, 0, size - 1), xp.clip(high, 0, size - 1)
    if len(grid) == 1:
        return [(there, [(low, high)])]
    inner = math.prod(grid[1:])
    first, last = low // inner, high // inner
    stop = xp.where(first == last, high % inner, inner - 1)
    head = [(there & has, [(first, first), *box]) for has, box in _boxes(low % inner, stop, grid[1:])]
    tail = _boxes(xp.zeros_like(high), high % inner, grid[1:])
    tail = [(there & has & (first < last), [(last, last), *box]) for has, box in tail]
    rest = [(xp.zeros_like(low), xp.full_like(low, length - 1)) for length in grid[1:]]
    return [*head, (there & (last - first >= 2), [(first + 1, last - 1), *rest]), *tail]


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
