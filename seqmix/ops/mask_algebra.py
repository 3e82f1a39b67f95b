"""What every mask can do: be evaluated, combined by & | ~, cut into tiles, and counted.

A tile is graded EMPTY, PARTIAL or FULL. In this order the grades of combined masks are Kleene's three-valued logic:
`and` is the minimum, `or` the maximum, `not` is 2 - grade. They are never wrong, but a combination may call
PARTIAL what is EMPTY or FULL; `tiles(refine=True)` looks into those tiles.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.core.shapes import boolean, described, is_array, positive

EMPTY, PARTIAL, FULL = 0, 1, 2
MOST = 2**31 - 1  # of numbers of a mask, which meet indices of int32
_TILE = 128  # of the counts
_BATCH = 1 << 22  # pairs evaluated at once


def library(*values):
    """jax.numpy where a value is a JAX array, else numpy."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np


def grade(some, every):
    """Grades, int8, of rectangles in which some pair, or every pair, is visible."""
    xp = library(some, every)
    return xp.where(every, FULL, xp.where(some, PARTIAL, EMPTY)).astype(np.int8)


class Mask:
    """Which key j a query i sees. Subclasses are frozen dataclasses: equal, hashable, static arguments of jit.

    A mask is static, or depends on data: then `inputs` names the arrays it needs, and whether they belong to
    "queries" or "keys".
    """

    @property
    def inputs(self) -> dict[str, str]:
        """{name: "queries" or "keys"} of the arrays that the mask depends on; {} for a static mask."""
        return {}

    def visible(self, i, j, data=None):
        """Whether i sees j: bool that broadcasts with the integer arrays i and j (numpy or JAX).

        data: {name: the values at i, or at j}, which broadcast with i and j, for each name of `inputs`.
        """
        raise NotImplementedError

    def over(self, rows, columns, spans=None):
        """Grades, which broadcast with the ends, of the rectangles i in rows = (low, high), j in columns = (low, high).

        Ends are included. spans: {name: (lowest, highest) value of that input in the rectangle}; what depends on
        an input without one is PARTIAL. Exact for the constructors of static masks (`Boxed`: where the rectangle
        is of whole boxes), else conservative.
        """
        raise NotImplementedError

    def __and__(self, other):
        return And(self, other) if isinstance(other, Mask) else NotImplemented

    def __or__(self, other):
        return Or(self, other) if isinstance(other, Mask) else NotImplemented

    def __invert__(self):
        return Not(self)

    def __bool__(self):
        raise TypeError("a mask is neither true nor false: join masks by & and |, not by `and` and `or`")

    def dense(self, time: int, keys: int | None = None, data=None):
        """The whole matrix, [T, S] bool, or [..., T, S] with `data` of shapes [..., T] and [..., S]."""
        time, keys = lengths(time, keys)
        data = check_data(self, time, keys, data, need=True)
        values = {
            name: x[..., :, None] if self.inputs[name] == "queries" else x[..., None, :] for name, x in data.items()
        }
        seen = self.visible(np.arange(time)[:, None], np.arange(keys)[None], values)
        xp = library(seen)
        return xp.broadcast_to(seen, np.broadcast_shapes(seen.shape, (time, keys)))

    def tiles(self, bq: int, bk: int, time: int, keys: int | None = None, *, data=None, refine: bool = False):
        """Grades of the tiles of bq queries and bk keys, [ceil(T / bq), ceil(S / bk)] int8.

        A ragged last tile is graded by the pairs that exist. With `data` of shapes [..., T] and [..., S] the
        table is [..., nq, nk], conservative, and may be traced; without, what depends on data is PARTIAL.
        refine: evaluate PARTIAL tiles, so that the table is exact (static masks only). Raises ValueError.
        """
        positive("bq", bq)
        positive("bk", bk)
        boolean("refine", refine)
        time, keys = lengths(time, keys)
        data = check_data(self, time, keys, data)
        if refine and self.inputs:
            raise ValueError(f"refine: expected a static mask, got one that needs {', '.join(self.inputs)}")
        rows, columns = (tuple(x[:, None] for x in ranges(time, bq)), tuple(x[None] for x in ranges(keys, bk)))
        spans = {}
        for name, values in data.items():
            on_rows = self.inputs[name] == "queries"
            low_high = span(values, bq if on_rows else bk)
            spans[name] = tuple(x[..., :, None] if on_rows else x[..., None, :] for x in low_high)
        table = self.over(rows, columns, spans)
        table = library(table).broadcast_to(table, np.broadcast_shapes(table.shape, (rows[0].size, columns[0].size)))
        if refine:
            table = np.array(table)
            for at, seen, exist in evaluated(self, table == PARTIAL, bq, bk, time, keys):
                table[at] = grade((seen & exist).any((1, 2)), (seen | ~exist).all((1, 2)))
        return table

    def keys_per_row(self, time: int, keys: int | None = None) -> np.ndarray:
        """Number of visible keys of each query, [T] int64; static masks only. Full tiles are not looked into."""
        time, keys = lengths(time, keys)
        check_data(self, time, keys, None, need=True)
        table = self.tiles(_TILE, _TILE, time, keys)
        low, high = ranges(keys, _TILE)
        count = np.zeros((table.shape[0], _TILE), np.int64)
        count += ((table == FULL) @ (high - low + 1))[:, None]
        for at, seen, exist in evaluated(self, table == PARTIAL, _TILE, _TILE, time, keys):
            np.add.at(count, at[0], (seen & exist).sum(2))
        return count.reshape(-1)[:time]

    def pairs(self, time: int, keys: int | None = None) -> int:
        """Number of visible pairs; static masks only."""
        return int(self.keys_per_row(time, keys).sum())

    def flops(self, time: int, keys: int | None = None, *, key_dim: int, value_dim: int) -> int:
        """FLOPs of the two products of attention that the mask leaves, per head and row: 2 (K + V) * pairs."""
        positive("key_dim", key_dim)
        positive("value_dim", value_dim)
        return 2 * (key_dim + value_dim) * self.pairs(time, keys)


@dataclass(frozen=True)
class And(Mask):
    """Visible where both masks see: `a & b`."""

    a: Mask
    b: Mask

    def __post_init__(self):
        merged(self.a, self.b)

    @property
    def inputs(self):
        return merged(self.a, self.b)

    def visible(self, i, j, data=None):
        return self.a.visible(i, j, data) & self.b.visible(i, j, data)

    def over(self, rows, columns, spans=None):
        a, b = (m.over(rows, columns, spans) for m in (self.a, self.b))
        return library(a, b).minimum(a, b)


@dataclass(frozen=True)
class Or(Mask):
    """Visible where one of two masks sees: `a | b`."""

    a: Mask
    b: Mask

    def __post_init__(self):
        merged(self.a, self.b)

    @property
    def inputs(self):
        return merged(self.a, self.b)

    def visible(self, i, j, data=None):
        return self.a.visible(i, j, data) | self.b.visible(i, j, data)

    def over(self, rows, columns, spans=None):
        a, b = (m.over(rows, columns, spans) for m in (self.a, self.b))
        return library(a, b).maximum(a, b)


@dataclass(frozen=True)
class Not(Mask):
    """Visible where the mask is not: `~a`."""

    a: Mask

    @property
    def inputs(self):
        return self.a.inputs

    def visible(self, i, j, data=None):
        return ~self.a.visible(i, j, data)

    def over(self, rows, columns, spans=None):
        return FULL - self.a.over(rows, columns, spans)


def check_static(mask):
    """Raises ValueError for what is no mask, and for a mask that depends on data."""
    if not isinstance(mask, Mask):
        raise ValueError(f"mask: expected a mask, got {described(mask)}")
    if mask.inputs:
        raise ValueError(f"mask: expected a static mask, got one that needs {', '.join(mask.inputs)}")


def check_names(**names):
    """Raises ValueError unless the names of a mask's inputs are words, and no two the same."""
    for name, value in names.items():
        if not isinstance(value, str) or not value:
            raise ValueError(f"{name}: expected the name of an array of data, got {described(value)}")
    if len({*names.values()}) < len(names):
        raise ValueError(f"{', '.join(names)}: expected different names, got {[*names.values()]}")


def merged(a: Mask, b: Mask) -> dict[str, str]:
    """The inputs of both masks. Raises ValueError for a name that means queries in one and keys in the other."""
    for name in a.inputs:
        if b.inputs.get(name, a.inputs[name]) != a.inputs[name]:
            raise ValueError(f"{name}: expected the input of queries or of keys, got both in one mask")
    return a.inputs | b.inputs


def lengths(time, keys) -> tuple[int, int]:
    """(T, S), S = T where it is None. Raises ValueError unless both are positive integers."""
    keys = time if keys is None else keys
    positive("time", time)
    positive("keys", keys)
    return time, keys


def check_data(mask: Mask, time: int, keys: int, data, *, need: bool = False) -> dict:
    """The entries of `data` that the mask takes. Raises ValueError for other lengths and, `need`, missing ones."""
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"data: expected a dict of arrays by name, got {type(data).__name__}")
    data = {} if data is None else {name: x for name, x in data.items() if name in mask.inputs}
    for name, side in mask.inputs.items():
        length = time if side == "queries" else keys
        if name not in data:
            if need:
                raise ValueError(f"data: expected {name!r}, of the {side}, for this mask, got none")
        elif not is_array(data[name]) or data[name].shape[-1:] != (length,):
            got = getattr(data[name], "shape", type(data[name]).__name__)
            raise ValueError(
                f"data[{name!r}]: expected shape (..., {length}), one value for each of the {side}, got {got}"
            )
        elif not jnp.issubdtype(data[name].dtype, jnp.integer):
            raise ValueError(f"data[{name!r}]: expected integers, got {data[name].dtype}")
    return data


def ranges(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """(first, last) index of each block of `size`, the last block cut at `length`."""
    first = np.arange(0, length, size)
    return first, np.minimum(first + size, length) - 1


def span(values, size: int):
    """(lowest, highest) of each block of `size` along the last axis."""
    xp = library(values)
    width = -values.shape[-1] % size
    values = xp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, width)], mode="edge")
    values = values.reshape(*values.shape[:-1], -1, size)
    return values.min(-1), values.max(-1)


def evaluated(mask: Mask, chosen, bq: int, bk: int, time: int, keys: int):
    """Yields (indices, visible [n, bq, bk], exist [n, bq, bk]) of the chosen tiles, some at a time."""
    where = np.argwhere(chosen)
    step = max(1, _BATCH // (bq * bk))
    for first in range(0, len(where), step):
        part = where[first : first + step]
        i = part[:, 0, None, None] * bq + np.arange(bq)[:, None]
        j = part[:, 1, None, None] * bk + np.arange(bk)[None]
        exist = (i < time) & (j < keys)
        seen = mask.visible(np.minimum(i, time - 1), np.minimum(j, keys - 1))
        yield tuple(part.T), np.broadcast_to(seen, exist.shape), exist
