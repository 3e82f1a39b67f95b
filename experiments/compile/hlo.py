"""What a compiled program costs, read from its HLO text: FLOPs of matrix products, bytes through memory, collectives.

XLA's own analysis counts the body of a loop once; here it counts as often as it runs. A loop whose length depends on
the data counts as often as the longest list of pairs (int32 [n, 2]) that it carries, as attention's list of blocks: all
pairs that a mask leaves without segments. Of a conditional the dearer branch counts. Elementwise work is not counted.
"""

import dataclasses
import functools
import math
import re

from experiments.compile import products, text

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "while")
FREE += ("conditional", "call", "copy-done", "iota", "optimization-barrier", "add-dependency", "custom-call-done")
SLICES = ("dynamic-slice", "slice", "gather")


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


def cost(module: str) -> Cost:
    """The `Cost` of a compiled module's text, `jax.stages.Compiled.as_text()`."""
    program = Program(module)
    return program.cost(program.entry)


class Program:
    """The computations of a module, by name, each a dict of instructions by name."""

    def __init__(self, module):
        self.computations, self.entry = text.computations(module)
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
        else:
            total.flops += products.flops(one, here) + _kernel(one, total)
        if one.op not in FREE and not one.op.endswith("-done"):
            total.bytes += self._moved(one, here)

    def _fused(self, name, total):
        """Adds the products and exchanges inside a fusion, whatever its depth."""
        here = self.computations[name]
        scatters = any(one.op == "dynamic-slice" for one in here.values())
        starts = any('"AsyncCollectiveStart"' in one.attributes for one in here.values())
        for one in here.values():
            kind = one.op.removesuffix("-start")
            if kind in COLLECTIVES:
                if "async_collective_fusion_config" in one.attributes and not starts:
                    continue  # a piece of one that a TPU spreads over many fusions; it counts where it starts
                # A TPU's reduce-scatter is an all-reduce fused with the slice of it.
                self._exchange(one, here, total, "reduce-scatter" if kind == "all-reduce" and scatters else kind)
            elif one.op == "fusion":
                self._fused(one.called("calls")[0], total)
            else:
                total.flops += products.flops(one, here)

    def _exchange(self, one, here, total, kind):
        size = sum(array.bytes for name in one.operands for array in here[name].shape)
        group = text.group(one.attributes)
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
        condition = self.computations[loop.called("condition")[0]]
        compares = [one for one in condition.values() if one.op == "compare"]
        if len(compares) == 1 and "direction=LT" in compares[0].attributes:
            limit = self._constant(compares[0].operands[1], condition, loop, here)
            if limit is not None:
                return limit
        lists = [a.dims[0] for a in loop.shape if a.dtype == "s32" and len(a.dims) == 2 and a.dims[1] == 2]
        where = re.search(r'op_name="([^"]*)"', loop.attributes)
        # What a flag alone keeps going is there for rows that a packer does not make.
        flag = all(one.op in ("parameter", "get-tuple-element", "copy", "bitcast") for one in condition.values())
        times = 0 if flag else max(lists, default=1)
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


def _kernel(one, total) -> float:
    """FLOPs that a Pallas kernel says it has; it is noted in `total`. 0 for any other custom call."""
    target = re.search(r'custom_call_target="([^"]*)"', one.attributes)
    if target is None or not any(name in target[1] for name in ("mosaic", "tpu_custom_call")):
        return 0
    said = re.search(r'op_name="([^"]*)"', one.attributes)
    path = said[1].split("/") if said else [re.sub(r"\.\d+$", "", one.name.lstrip("%"))]
    name = next((part for part in reversed(path) if part not in ("mpmd_map", "pallas_call")), one.name)
    total.kernels[name] = total.kernels.get(name, 0) + 1
    said = re.search(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)', one.attributes)
    total.unsaid += said is None
    return float(said[1]) if said else 0
