"""What a compiled program costs, read from its HLO text: FLOPs of matrix products, bytes through memory, collectives.

XLA's own analysis counts the body of a loop once; here it counts as often as it runs. A loop whose length depends on
the data counts as often as the longest list of pairs (int32 [n, 2]) that it carries, as attention's list of blocks: all
pairs that a mask leaves without segments. Of a conditional the dearer branch counts. Elementwise work is not counted.
"""

import dataclasses
import functools
import math
import re

import numpy as np

WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "token": 0, "opaque": 0, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "while")
FREE += ("conditional", "call", "copy-done", "iota", "optimization-barrier", "add-dependency", "custom-call-done")
SLICES = ("dynamic-slice", "slice", "gather")
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


@dataclasses.dataclass
class Collective:
    """A kind of exchange among one grouping of devices, over a step."""

    kind: str
    group: tuple[int, ...]  # the first group's places in the program's order of devices; of a permute, its first pair
    count: float = 0  # how often it runs
    sent: float = 0  # bytes that a device sends, as a ring does it


@dataclasses.dataclass
class Cost:
    """Of one device over a step."""

    flops: float = 0
    bytes: float = 0
    collectives: dict = dataclasses.field(default_factory=dict)  # (kind, group) -> Collective
    kernels: dict = dataclasses.field(default_factory=dict)  # name -> how often it runs
    unsaid: int = 0  # kernels in the program that do not say their FLOPs
    guessed: dict = dataclasses.field(default_factory=dict)  # where a loop of unknown length is -> its assumed length

    def add(self, other, times=1):
        """Adds `times` times the other's."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        for key, one in other.collectives.items():
            mine = self.collectives.setdefault(key, Collective(one.kind, one.group))
            mine.count += times * one.count
            mine.sent += times * one.sent
        for name, count in other.kernels.items():
            self.kernels[name] = self.kernels.get(name, 0) + times * count
        self.unsaid += other.unsaid
        self.guessed |= other.guessed


def cost(text: str) -> Cost:
    """The `Cost` of a compiled module, `jax.stages.Compiled.as_text()`."""
    program = Program(text)
    return program.cost(program.entry)


class Program:
    """The computations of a module, by name, each a dict of instructions by name."""

    def __init__(self, text):
        self.computations, self.entry, current = {}, None, None
        for line in text.splitlines():
            head = re.match(rf"(ENTRY )?({NAME}) \(.*\{{$", line)
            if head:
                current = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif current is not None and (made := _instruction(line)):
                current[made.name] = made
        self.cost, self.users = functools.cache(self._cost), functools.cache(self._users)

    def _cost(self, name) -> Cost:
        total, here = Cost(), self.computations[name]
        for one in here.values():
            if one.op == "while":
                times = self._trips(one, here, total)
                total.add(self.cost(one.called("body")[0]), times)
            elif one.op == "conditional":
                branches = one.called("branch_computations", "true_computation", "false_computation")
                total.add(max(map(self.cost, branches), key=lambda c: (c.flops, c.bytes)))
            elif one.op == "call" or (one.op == "async-start" and "calls=" in one.attributes):
                total.add(self.cost(one.called("to_apply", "calls")[0]))
            else:
                self._own(one, here, total)
        return total

    def _own(self, one, here, total):
        """Adds what an instruction that is neither loop nor branch costs."""
        kind = one.op.removesuffix("-start")
        if kind in COLLECTIVES:
            self._exchange(one, here, total, kind)
        elif one.op == "fusion":
            self._fused(one.called("calls")[0], total)
        elif one.op == "custom-call":
            total.flops += _kernel(one, here, total)
        else:
            total.flops += _products(one, here)
        if one.op not in FREE and not one.op.endswith("-done"):
            total.bytes += self._moved(one, here)

    def _fused(self, name, total):
        """Adds the products and exchanges inside a fusion, whatever its depth."""
        here = self.computations[name]
        scatters = any(one.op == "dynamic-slice" for one in here.values())
        for one in here.values():
            kind = one.op.removesuffix("-start")
            if kind in COLLECTIVES:  # a TPU's reduce-scatter is an all-reduce fused with the slice of it
                self._exchange(one, here, total, "reduce-scatter" if kind == "all-reduce" and scatters else kind)
            elif one.op == "fusion":
                self._fused(one.called("calls")[0], total)
            else:
                total.flops += _products(one, here)

    def _exchange(self, one, here, total, kind):
        size = sum(array.bytes for name in one.operands for array in here[name].shape)
        group = _group(one.attributes)
        n = len(group)
        if n < 2 or not size:
            return
        factor = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(kind, (n - 1) / n)
        key = (kind, group)
        found = total.collectives.setdefault(key, Collective(kind, group))
        found.count += 1
        found.sent += size * factor

    def _trips(self, loop, here, total) -> float:
        known = re.search(r'"?known_trip_count"?[:=]\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        compares = [o for o in self.computations[loop.called("condition")[0]].values() if o.op == "compare"]
        if len(compares) == 1 and "direction=LT" in compares[0].attributes:
            limit = self._constant(compares[0].operands[1], self.computations[loop.called("condition")[0]], loop, here)
            if limit is not None:
                return limit
        lists = [a.dims[0] for a in loop.shape if a.dtype == "s32" and len(a.dims) == 2 and a.dims[1] == 2]
        where = re.search(r'op_name="([^"]*)"', loop.attributes)
        times = max(lists, default=1)
        total.guessed[where[1] if where else loop.name] = times
        return times

    def _constant(self, name, inside, loop, here):
        """The integer that `name` in a loop's condition stands for, in there or in what the loop starts from."""
        one = inside[name]
        while one.op in ("copy", "bitcast"):
            one = inside[one.operands[0]]
        if one.op == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", one.attributes)[1])
            start = here.get(loop.operands[0])
            one = here.get(start.operands[index]) if start and start.op == "tuple" else None
        literal = one is not None and one.op == "constant" and re.fullmatch(r"-?\d+", one.inside.strip())
        return int(literal[0]) if literal else None

    def _moved(self, one, here) -> float:
        """Bytes that an instruction reads from and writes to main memory. What is only sliced is read in part, what
        is only updated in place is written in part.
        """
        if one.op == "copy-start":  # source and destination, one of them perhaps in vector memory
            ends = one.shape[:2]
            return sum(array.bytes for array in ends if array.outside)
        reads = [self._outside(here[name]) for name in one.operands if name in here]
        writes = self._outside(one)
        if one.op in SLICES:
            return 2 * writes
        if one.op == "dynamic-update-slice":
            return 2 * self._outside(here[one.operands[1]])
        if one.op == "fusion":
            return self._fusion_moved(one.called("calls")[0], reads, writes)
        return sum(reads) + writes

    def _fusion_moved(self, name, reads, writes):
        body = self.computations[name]
        total = sum(min(size, self._part(name, index)) for index, size in enumerate(reads))
        updates = [i for i in body.values() if i.op == "dynamic-update-slice" and i.operands[1] in body]
        whole = sum(sum(array.bytes for array in i.shape) for i in updates)
        part = sum(sum(array.bytes for array in body[i.operands[1]].shape) for i in updates)
        return total + max(writes - whole, 0) + min(writes, part)

    def _part(self, name, index) -> float:
        """Bytes that a fusion reads of an input: of slices alone those, of what is updated in place nothing."""
        users, inputs = self.users(name)
        return sum(self._used(user, inputs[index], users) for user in users.get(inputs[index], ()))

    def _used(self, user, value, users) -> float:
        if user.op == "bitcast":
            return sum(self._used(next_one, user.name, users) for next_one in users.get(user.name, ()))
        if user.op == "fusion":
            places = [place for place, name in enumerate(user.operands) if name == value]
            return sum(self._part(user.called("calls")[0], place) for place in places)
        if user.op in SLICES and user.operands[0] == value:
            return sum(array.bytes for array in user.shape)
        return 0 if user.op == "dynamic-update-slice" and user.operands[0] == value else math.inf

    def _users(self, name):
        """Of a computation: {name: instructions that take it}, and the names of its parameters by index."""
        users, inputs = {}, {}
        for inner in self.computations[name].values():
            for operand in inner.operands:
                users.setdefault(operand, []).append(inner)
            if inner.op == "parameter":
                inputs[int(inner.inside)] = inner.name
        return users, inputs

    def _outside(self, one):
        return sum(array.bytes for array in one.shape if array.outside)


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


def _group(attributes):
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


# Matrix products


def _products(one, here) -> float:
    if one.op == "dot":
        sizes = here[one.operands[0]].shape[0].dims
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        axes = [int(x) for x in summed[1].split(",") if x] if summed else []
        return 2 * math.prod(one.shape[0].dims) * math.prod(sizes[axis] for axis in axes)
    return _convolution(one, here) if one.op == "convolution" else 0


def _convolution(one, here) -> float:
    """On a TPU every product is one. Taps that fall on padding do not count."""
    left, right, out = (x.shape[0].dims for x in (here[one.operands[0]], here[one.operands[1]], one))
    names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    window = dict(re.findall(r"(\w+)=([\d\-x_]+)", (re.search(r"window=\{([^}]*)\}", one.attributes) or [""])[0]))
    spatial = sorted(label for label in names[3] if label.isdigit())
    listed = lambda key, default: window[key].split("x") if key in window else [default] * len(spatial)
    taps = 1
    for i, label in enumerate(spatial):
        pads = [int(x) for x in listed("pad", "0_0")[i].split("_")]
        stride, base, dilation = (int(listed(key, 1)[i]) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        inputs, kernel, outputs = (
            sizes[labels.index(label)] for sizes, labels in ((left, names[1]), (right, names[2]), (out, names[3]))
        )
        at = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None] * dilation - pads[0]
        taps *= int(np.sum((at >= 0) & (at % base == 0) & (at // base < inputs)))
    summed = right[names[2].index("i")]
    return 2.0 * taps * out[names[3].index("b")] * out[names[3].index("f")] * summed


def _kernel(one, here, total) -> float:
    """FLOPs of a custom call: of a library's matrix product, or what a Pallas kernel says of itself."""
    if "$gemm" in one.attributes or "$lt$matmul" in one.attributes:
        summed = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
        sizes = here[one.operands[0]].shape[0].dims
        return 2 * math.prod(one.shape[0].dims) * math.prod(sizes[int(x)] for x in re.findall(r"\d+", summed[1]))
    target = re.search(r'custom_call_target="([^"]*)"', one.attributes)[1]
    if "mosaic" not in target and "tpu_custom_call" not in target:
        return 0
    path = (re.search(r'op_name="([^"]*)"', one.attributes) or ["", one.name])[1].split("/")
    name = next((part for part in reversed(path) if part not in ("mpmd_map", "pallas_call")), one.name)
    total.kernels[name] = total.kernels.get(name, 0) + 1
    said = re.search(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)', one.attributes)
    total.unsaid += said is None
    return float(said[1]) if said else 0
