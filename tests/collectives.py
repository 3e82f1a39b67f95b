"""What crosses devices in a compiled program: bytes that a device sends, by kind of collective."""

import collections
import math
import re

import jax

from tests.quick import QUICK

_KINDS = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
_OP = re.compile(rf" = (.*?) ({'|'.join(_KINDS)})(-start)?\((.*)")


def both_ways(op, given, rest, shape):
    """The compiled programs of op(*given, *rest) with what the gradient of `given` keeps, and of that gradient.

    given and rest are shapes; shape(*sizes, dtype=) lays out y [B, T, H, V] on the mesh in force.
    """
    forward = lambda given, rest: jax.vjp(lambda *args: op(*args, *rest), *given)
    there = jax.jit(forward).lower(given, rest).compile(QUICK)
    out, pullback = there.out_info
    laid = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    out, pullback = jax.tree.map(laid, (out, pullback), there.output_shardings)
    out = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype) if x.ndim == 4 else x, out)
    return there, jax.jit(lambda pullback, dy: pullback(dy)).lower(pullback, out).compile(QUICK)


def sent(text: str) -> dict[str, int]:
    """{kind: bytes} of an HLO module's text, with what a loop repeats counted each time.

    A permutation sends its operand (on average, where only some devices send); of w devices, each sends (w - 1) / w of
    what an all-gather or an all-to-all results in and of what a reduce-scatter takes, and twice that of what an
    all-reduce sums.
    """
    repeats, found = _repeats(text), collections.Counter()
    devices = re.search(r"num_partitions=(\d+)", text)
    devices = int(devices.group(1)) if devices else 1
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
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
        share = (pairs.group(1).count("{") if pairs else devices) / devices
        factor = {"collective-permute": share, "reduce-scatter": ways - 1, "all-reduce": 2 * (ways - 1) / ways}
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
