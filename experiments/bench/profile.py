"""A jax.profiler trace read into milliseconds by part of the model: which scope of its code each kernel is from."""

import collections
import gzip
import json
import re
from pathlib import Path

from experiments.compile import text

PRODUCTS = re.compile(r"nvjet|gemm|cutlass|xmma|cublas", re.IGNORECASE)
COPIES = re.compile(r"mem(cpy|set)|copy|dynamic_(update_)?slice|loop_slice|wrapped_slice", re.IGNORECASE)
# Named scopes of the model and of the step, the innermost of which a kernel is booked under.
SCOPES = (
    "embedding",
    "norm",
    "convolution",
    "gates",
    "gated_norm",
    "mixer",
    "mlp",
    "loss",
    "gradient_norm",
    "optimiser",
)
KEPT = 40  # kernels that are listed, the longest first


def read(folder, program, steps) -> dict:
    """{"parts": {part: ms a step}, longest first, with "idle"; "kernels": the longest ones by themselves}.

    folder: of a trace of `steps` steps on one GPU; program: the text of the compiled step. Where kernels run at once,
    as copies may beside others, the parts and "idle" add up to more than a step; "at once" is what there is too much.
    """
    sources, events = op_names(program), device_events(folder)
    parts, kernels, spans = collections.Counter(), {}, []
    for event in events:
        name, ms = event["name"], event["dur"] / 1e3 / steps
        where = sources.get(name) or sources.get(event.get("args", {}).get("hlo_op"), "")
        part = part_of(name, where)
        parts[part] += ms
        held = kernels.setdefault(name, {"part": part, "ms": 0.0, "count": 0.0, "from": where})
        held["ms"] += ms
        held["count"] += 1 / steps
        spans.append((event["ts"], event["ts"] + event["dur"]))
    if spans:
        busy, whole = _union(spans), max(end for _, end in spans) - min(start for start, _ in spans)
        at_once = sum(parts.values()) - busy / 1e3 / steps
        parts |= {"idle": (whole - busy) / 1e3 / steps, "at once": at_once}
    longest = sorted(kernels.items(), key=lambda item: -item[1]["ms"])[:KEPT]
    return {
        "parts": {part: round(ms, 3) for part, ms in sorted(parts.items(), key=lambda item: -item[1])},
        "kernels": [{"kernel": name, **held, "ms": round(held["ms"], 3)} for name, held in longest],
    }


def part_of(kernel: str, op_name: str) -> str:
    """What a kernel is booked under: products, Pallas kernels by name, copies, else the innermost known scope."""
    path = re.findall(r"\w+", op_name)
    scope = next((name for name in reversed(path) if name in SCOPES), "other")
    pallas = re.match(r"(\w+)_mosaic_gpu_kernel", kernel)
    if pallas:
        return f"kernel {pallas[1]}"
    if PRODUCTS.search(kernel):
        return "products of the loss" if scope == "loss" else "products"
    if scope == "other" or COPIES.match(kernel):
        return "copies" if COPIES.search(kernel) else "filling with zeros" if "broadcast" in kernel else "other"
    return f"{scope} backward" if "transpose" in path else scope


def op_names(program: str) -> dict:
    """{name of a kernel or instruction: op_name}, from a compiled program's text; a fusion that has none, has its last
    instruction's.
    """
    computations, _ = text.computations(program)
    own = lambda one: (re.search(r'op_name="([^"]*)"', one.attributes) or ["", ""])[1]
    found = {}
    for body in computations.values():
        for one in body.values():
            inner = [own(part) for name in one.called("calls") for part in computations.get(name, {}).values()]
            name = own(one) or next(filter(None, reversed(inner)), "")
            if name:
                plain = one.name.lstrip("%")
                found[plain] = found[re.sub(r"[.\-]", "_", plain)] = name
    return found


def device_events(folder) -> list:
    """The kernels and copies on a trace's GPU streams. Raises ValueError where there is no trace."""
    files = sorted(Path(folder).rglob("*.trace.json.gz"))
    if not files:
        raise ValueError(f"folder: expected a trace, found none in {folder}")
    with gzip.open(files[-1]) as file:
        events = json.load(file)["traceEvents"]
    named = [event for event in events if event.get("ph") == "M"]
    of = lambda kind, word: [e for e in named if e["name"] == kind and word in str(e["args"].get("name"))]
    devices = {event["pid"] for event in of("process_name", "/device:GPU")}
    streams = {(event["pid"], event["tid"]) for event in of("thread_name", "Stream") if event["pid"] in devices}
    return [event for event in events if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams]


def _union(spans):
    busy, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return busy
