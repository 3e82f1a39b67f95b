"""HLO text read into instructions: shapes, operands, called computations, groups of devices."""

import dataclasses
import math
import re

import numpy as np

WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
NAME = r"%[\w.\-]+"


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape."""

    dtype: str
    dims: tuple[int, ...]
    outside: bool  # lies in the chip's main memory, not in a vector memory of a TPU

    @property
    def bytes(self) -> float:
        bits = re.search(r"\d+", self.dtype)
        width = WIDTHS.get(self.dtype, 1 if self.dtype.startswith("f8") else int(bits[0]) / 8 if bits else 0)
        return width * math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = shape op(operands), attributes`; operands are names."""

    name: str
    shape: tuple[Array, ...]
    op: str
    operands: tuple[str, ...]
    inside: str  # what the parentheses hold
    attributes: str

    def called(self, *keys) -> list[str]:
        """Names of the computations under these attributes."""
        found = []
        for key in keys:
            for text in re.findall(rf"\b{key}=(\{{[^}}]*\}}|{NAME})", self.attributes):
                found += re.findall(NAME, text)
        return found


def computations(text):
    """(the computations of a module by name, each a dict of instructions by name; the name of the first to run)."""
    found, entry, current = {}, None, None
    for line in text.splitlines():
        head = re.match(rf"(ENTRY )?({NAME}) \(.*\{{$", line)
        if head:
            current = found.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and (made := _instruction(line)):
            current[made.name] = made
    return found, entry


def group(attributes):
    """Places of the first group of devices, in any of the ways that XLA writes groups."""
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^)]*\))? \{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        names = [name for name in re.findall(r"'(\w+)'", mesh[2]) if name in sizes]
        places = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        index = tuple(slice(None) if name in names else 0 for name in sizes)
        return tuple(places[index].ravel().tolist())
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        rows, sizes, order = ([int(x) for x in part.split(",")] if part else None for part in iota.groups())
        places = np.arange(math.prod(sizes)).reshape(sizes)
        places = places if order is None else places.transpose(order)
        return tuple(places.reshape(rows)[0].tolist())
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes)
    return tuple(int(x) for x in listed[1].split(",")) if listed else ()


def _instruction(line):
    line = re.sub(r"/\*.*?\*/", "", line)
    head = re.match(rf"\s+(?:ROOT )?({NAME}) = ", line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    call = re.match(r"\s*([\w\-]+)\(", rest[end:])
    if not call:
        return None
    begin = end + call.end()
    close = _closing(rest, begin - 1)
    inside = rest[begin:close]
    operands = () if call[1] in ("constant", "parameter") else tuple(re.findall(NAME, inside))
    return Instruction(head[1], _arrays(rest[:end]), call[1], operands, inside, rest[close + 1 :])


def _closing(text, begin):
    depth = 0
    for index in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)


def _arrays(text):
    found = re.findall(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?", text)
    dims = lambda sizes: tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)
    return tuple(Array(dtype, dims(sizes), "S(" not in layout) for dtype, sizes, layout in found)
