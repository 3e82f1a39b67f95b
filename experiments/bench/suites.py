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


def attempted(call, *arguments):
    """(what the call of a peer gives, None), or ({}, why it failed): our rows are kept, and then the case fails."""
    try:
        return call(*arguments), None
    except Exception as error:
        return {}, error


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
