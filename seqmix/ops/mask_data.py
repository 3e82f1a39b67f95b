"""Masks that depend on data: segments, an interval for each key, given positions."""

from dataclasses import dataclass

import numpy as np

from seqmix.ops.mask_algebra import PARTIAL, Mask, check_names, check_static, grade

UNKNOWN = np.int8(PARTIAL)


@dataclass(frozen=True)
class Segments(Mask):
    """Queries and keys of one segment: equal ids that are not 0. Ids are taken as they are (see `packing.runs`)."""

    queries: str = "segment_ids"
    keys: str = "kv_segment_ids"

    def __post_init__(self):
        check_names(queries=self.queries, keys=self.keys)

    @property
    def inputs(self):
        return {self.queries: "queries", self.keys: "keys"}

    def visible(self, i, j, data=None):
        q, k = data[self.queries], data[self.keys]
        return (q == k) & (q != 0)

    def over(self, rows, columns, spans=None):
        if not spans or self.queries not in spans or self.keys not in spans:
            return UNKNOWN
        (q0, q1), (k0, k1) = spans[self.queries], spans[self.keys]
        some = (q0 <= k1) & (k0 <= q1) & ((q0 != 0) | (q1 != 0)) & ((k0 != 0) | (k1 != 0))
        return grade(some, some & (q0 == q1) & (k0 == k1))


@dataclass(frozen=True)
class Intervals(Mask):
    """starts_j <= i < ends_j: each key has an interval of queries that see it (FlashMask, arXiv 2410.01359)."""

    starts: str = "starts"
    ends: str = "ends"

    def __post_init__(self):
        check_names(starts=self.starts, ends=self.ends)

    @property
    def inputs(self):
        return {self.starts: "keys", self.ends: "keys"}

    def visible(self, i, j, data=None):
        return (data[self.starts] <= i) & (i < data[self.ends])

    def over(self, rows, columns, spans=None):
        if not spans or self.starts not in spans or self.ends not in spans:
            return UNKNOWN
        (s0, s1), (e0, e1) = spans[self.starts], spans[self.ends]
        some = (s0 <= rows[1]) & (e1 > rows[0])
        return grade(some, (s1 <= rows[0]) & (e0 > rows[1]))


@dataclass(frozen=True)
class Positions(Mask):
    """A static mask at given positions of queries and keys instead of their indices."""

    mask: Mask
    queries: str = "q_positions"
    keys: str = "kv_positions"

    def __post_init__(self):
        check_static(self.mask)
        check_names(queries=self.queries, keys=self.keys)

    @property
    def inputs(self):
        return {self.queries: "queries", self.keys: "keys"}

    def visible(self, i, j, data=None):
        return self.mask.visible(data[self.queries], data[self.keys])

    def over(self, rows, columns, spans=None):
        if not spans or self.queries not in spans or self.keys not in spans:
            return UNKNOWN
        return self.mask.over(spans[self.queries], spans[self.keys])
