"""What crosses devices in a compiled program: bytes that a device sends, by kind of collective."""

import collections
import math
import re

_KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_OP = re.compile(rf" = (.*?) ({'|'.join(_KINDS)})(-start)?\((.*)")


def sent(text: str) -> dict[str, int]:
    """{kind: bytes} of an HLO module's text, with what a loop repeats counted each time.

    A permutation sends its operand; of w devices, each sends (w - 1) / w of what an all-gather or an all-to-all
    results in and of what a reduce-scatter takes, and twice that of what an all-reduce sums.
    """
    repeats, found = _repeats(text), collections.Counter()
    for name, line in _lines(text):
        match = _OP.search(line)
        if not match:
            continue
        result, kind, start, rest = match.groups()
        if start:
            raise ValueError(f"expected synchronous collectives, got {line.strip()[:80]}")
        if math.isnan(repeats[name]):
            raise ValueError(f"expected a loop with a known count around {line.strip()[:80]}")
        ways = 1 if kind == "collective-permute" else _ways(rest)
        factor = {"collective-permute": 1, "reduce-scatter": ways - 1, "all-reduce": 2 * (ways - 1) / ways}
        found[kind] += int(_bytes(result) * factor.get(kind, (ways - 1) / ways)) * repeats[name]
    return {kind: count for kind, count in found.items() if count}


def _ways(rest):
    """Devices in a group of a collective, in the three ways that XLA writes groups."""
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]", rest)
    named = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest)
    if listed:
        return len(listed.group(1).split(","))
    if tiled:
        return int(tiled.group(1))
    if not named:
        raise ValueError(f"expected replica_groups, got {rest[:80]}")
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))}
    return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", named.group(2)))


def _bytes(shapes):
    found = re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes)
    return sum(_SIZES[kind] * math.prod(int(n) for n in sizes.split(",") if n) for kind, sizes in found)


def _lines(text):
    """(name of the computation, line of it)."""
    name = None
    for line in text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        name = head.group(1) if head else name
        yield name, line


def _repeats(text):
    """How many times each computation runs; NaN within a loop whose count is not known."""
    calls = {}
    for name, line in _lines(text):
        count = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
        for callee in re.findall(r"(?:body|to_apply|calls|branch_computations)=\{?%?([\w.\-]+)", line):
            loop = " while(" in line
            calls[callee] = (name, int(count.group(1)) if loop and count else math.nan if loop else 1)
    repeats = collections.defaultdict(lambda: 1)
    for callee in calls:
        times, at = 1, callee
        while at in calls:
            at, factor = calls[at]
            times *= factor
        repeats[callee] = times
    return repeats
