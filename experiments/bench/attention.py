"""Softmax attention under mask patterns of LongCA-bench, on one device, beside cuDNN and flex_attention.

Ours is what `attention` takes by itself (`default`), and every implementation by name that takes the call. Rates count
the pairs that the mask leaves, 2 (K + V) FLOPs a pair and head. Each pattern is of 32,768 tokens, B rows of T, H16
D128, bfloat16. The neighbourhood's tokens come in boxes (`masks.to_boxes`).
"""

import functools

import jax.numpy as jnp
import numpy as np

from experiments.bench import attention_heads, attention_moba, attention_nsa, attention_peers, errors, timing
from experiments.bench.suites import Case, beside_peers, drawn, supported
from seqmix import ops
from seqmix.ops import masks

NAME = "attention"
COLUMNS = (
    ("pattern", "pattern", ""),
    ("batch", "B", ","),
    ("tokens", "T", ","),
    ("density", "pairs left", ".1%"),
    ("implementation", "implementation", ""),
    ("fwd_ms", "forward, ms", ".3f"),
    ("fwd_bwd_ms", "with gradients, ms", ".3f"),
    ("tflops", "TFLOP/s, forward", ".0f"),
    ("peer_ratio", "best peer's time over ours, forward", ".2f"),
    ("peer_ratio_both", "with gradients", ".2f"),
    ("error", "error, output", ".1e"),
    ("gradient_error", "worst of the gradients", ".1e"),
)
HEADS, WIDTH, TOKENS = 16, 128, 32768
LENGTHS = (2048, 4096, 8192, 16384, 32768)  # of dense causal attention
T = 4096  # of the patterns
SIDE, NEAR, BOX = 64, 13, (8, 8)  # of the neighbourhood: T = SIDE**2 tokens, in boxes of 64
DOCUMENTS, WINDOW, PREFIX, SINK_TOKENS, BLOCK = 8, 512, 1024, 64, 128
DENSITIES = (0.125, 0.25, 0.5)
ERROR_T = 512
NAMES = ("gpu", "tpu", "cudnn", "tokamax", "splash", "chunked")
SETS = 2


def random_table(density, length):
    """Blocks of which a share is visible, the diagonal always, as bool [T / BLOCK, T / BLOCK]."""
    count = length // BLOCK
    table = np.random.default_rng(0).random((count, count)) < density
    np.fill_diagonal(table, True)
    return table


def patterns(length):
    """{name: (options of `attention`, the mask that it means)} at a length."""
    causal, every = masks.Causal(), ~masks.Sinks(0)
    window = causal & (masks.Window(WINDOW) | masks.Sinks(SINK_TOKENS))
    side = int(length**0.5)
    near = masks.Boxed(masks.Neighbourhood((side, side), min(NEAR, side)), tuple(min(b, side) for b in BOX))
    found = {
        "full": ({"causal": False}, every),
        "causal": ({}, causal),
        "window": ({"window": WINDOW}, causal & masks.Window(WINDOW)),
        "documents": ({"segment_ids": documents(length)}, causal & masks.Blocks(-(-length // DOCUMENTS))),
        "prefix": ({"mask": masks.Prefix(min(PREFIX, length // 4))}, None),
        "sinks and window": ({"window": WINDOW, "sinks": SINK_TOKENS}, window),
    }
    if side * side == length:
        found["neighbourhood"] = ({"mask": near, "block": 64}, None)
    for density in DENSITIES:
        found[f"random blocks {density:.1%}"] = ({"mask": masks.BlockTable(random_table(density, length), BLOCK)}, None)
    return {name: (options, options.get("mask", mask)) for name, (options, mask) in found.items()}


def documents(length):
    """Ids of equal documents."""
    return (np.arange(length) * DOCUMENTS // length + 1).astype(np.int32)[None]


def cases(args):
    """Dense causal attention at each length, then the patterns, shared key heads, MoBA, native sparse attention."""
    made = [("causal", length) for length in LENGTHS] + [(name, T) for name in patterns(T) if name != "causal"]
    return [
        Case("dense" if name in ("causal", "full") else "patterns", f"{name} T={t}", functools.partial(_case, name, t))
        for name, t in made
    ] + [*attention_heads.cases(args), *attention_moba.cases(args), *attention_nsa.cases(args)]


def _call(options, batch):
    """The function of q, k, v of a pattern."""
    if "segment_ids" in options:
        ids = jnp.broadcast_to(jnp.asarray(options["segment_ids"]), (batch, options["segment_ids"].shape[1]))
        options = options | {"segment_ids": ids}

    def call(q, k, v, implementation=None):
        return ops.attention(q, k, v, **options, implementation=implementation)

    return call


def _case(name, length, args):
    options, mask = patterns(length)[name]
    batch = TOKENS // length
    shape = batch, length, HEADS, WIDTH
    call = _call(options, batch)
    pairs = mask.pairs(length)
    flops = 4 * WIDTH * HEADS * batch * pairs
    wrong = measured_errors(name, length) if length == min(T, *LENGTHS) or name != "causal" else {}
    base = {"pattern": name, "batch": batch, "tokens": length, "density": pairs / length**2}
    rate = lambda times: {"tflops": flops / times["fwd_ms"] / 1e9}
    sets = [drawn(4 * seed, [shape] * 4) for seed in range(SETS)]
    for label, implementation in supported(call, sets[0][1:], NAMES).items():
        times = timing.both_ms(functools.partial(call, implementation=implementation), sets)
        yield base | {"implementation": label, **times, **rate(times), **wrong.get(label, {})}
    del sets
    for label, times in attention_peers.times(name, batch, length).items() if args.peers else ():
        yield base | {"implementation": label, **times, **rate(times), "peer": True}


def relate(rows):
    """Puts the ratios to the best peer of the same case into our rows."""
    beside_peers(rows, "part", "pattern", "tokens")


def measured_errors(name, length):
    """{label: errors to float64} of a pattern at a short length."""
    length = min(length, ERROR_T)
    if name not in patterns(length):
        length = int(length**0.5) ** 2
    call, arrays = _call(patterns(length)[name][0], 1), drawn(40, [(1, length, 2, WIDTH)] * 4)
    return errors.measured(call, arrays, supported(call, arrays[1:], NAMES))


def draw(rows, figure):
    """Time by pattern of the default and of the best peer; rate of dense causal attention by length."""
    names = [name for name in dict.fromkeys(row["pattern"] for row in rows) if name != "causal"]
    figure.set_size_inches(9, max(3.4, 0.2 * len(names)))
    left, right = figure.subplots(1, 2)
    labels = list(dict.fromkeys(row["implementation"] for row in rows))
    for label in labels:
        dense = sorted(
            (r["tokens"], r["tflops"]) for r in rows if (r["pattern"], r["implementation"]) == ("causal", label)
        )
        if dense:
            left.plot(*zip(*dense, strict=True), marker=".", label=label)
    left.set_xscale("log", base=2)
    left.set(xlabel="T", ylabel="TFLOP/s, forward", title="causal")
    if left.has_data():
        left.legend(fontsize=6)
    for offset, label in enumerate(labels):
        times = {r["pattern"]: r["fwd_bwd_ms"] for r in rows if r["implementation"] == label}
        places = [index + 0.8 * offset / len(labels) for index, name in enumerate(names) if name in times]
        right.barh(places, [times[n] for n in names if n in times], 0.8 / len(labels), label=label)
    right.set_yticks([index + 0.4 for index in range(len(names))], names, fontsize=6)
    right.set(xlabel="forward and backward, ms", xscale="log")
