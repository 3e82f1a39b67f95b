"""The suites by name, and what one is made of.

A suite is a module with NAME, COLUMNS ((key of a row, heading, format), ...), cases(args) -> [Case], and, where a
picture helps, draw(rows, figure). Where rows say something of others, relate(rows) puts it into them, after each new
one. SMALL is true where its cases suit a CPU as well.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

SUITES = {
    "train": "whole training steps on one device, and where their time goes",
    "recurrent": "linear attention, SSD and scans on one device, beside fla and mamba_ssm",
    "attention": "dense, windowed, packed and sparse attention on one device, beside cuDNN and flex_attention",
    "checks": "every kernel that runs here against float64, and 200 times against itself; no times",
    "decode": "one token at a time: ops in the loop of a generation, against the bytes of their states",
    "scaling": "several GPUs of one host against one: training, attention and recurrences over a cut time axis",
}

WITH_PEERS = ("train", "recurrent", "attention")  # what --peers is for


@dataclasses.dataclass(frozen=True)
class Case:
    """A part of a suite that runs by itself: run(args) gives rows, plain dicts."""

    part: str
    label: str
    run: Callable


def load(name):
    """The module of a suite."""
    return importlib.import_module(f"experiments.bench.{name}")


def beside_peers(rows, *case):
    """Puts into our rows how many times as long as ours the best peer's time is, where one of the case has been timed.

    case: the keys that name one. Peers' rows have "peer": True, so that rows can be kept as they come.
    """
    times = {"fwd_ms": "peer_ratio", "fwd_bwd_ms": "peer_ratio_both"}
    of = lambda row: tuple(row.get(key) for key in case)
    best = {}
    for row in rows:
        for key in times if row.get("peer") else ():
            best[of(row), key] = min(row[key], best.get((of(row), key), row[key]))
    for row in rows:
        for key, ratio in times.items():
            if not row.get("peer") and (of(row), key) in best:
                row[ratio] = best[of(row), key] / row[key]


def drawn(seed, shapes):
    """Random arrays of these shapes, bfloat16."""
    return [jax.random.normal(jax.random.key(seed + n), x, jnp.bfloat16) for n, x in enumerate(shapes)]


def supported(call, inputs, names):
    """{label: implementation} that take a call: the default, and those that run by name."""
    return {"default": None} | {name: name for name in taking(call, inputs, names)}


def taking(run, inputs, names):
    """Those of `names` whose run(*inputs, implementation=name) is not refused here, by a ValueError."""
    found = []
    for name in names:
        try:
            jax.eval_shape(functools.partial(run, implementation=name), *inputs)
        except ValueError:
            continue
        found.append(name)
    return found
