"""Choices that change a kernel's speed and, beyond rounding, nothing else, from tables of what was timed.

The table of a primitive is its `tuned.json`: {device kind: {key: {choice: value, ..., "ms": milliseconds}}}. A key
names the kernel and the call's shape, batch and time rounded up to powers of two, as `key` writes it. Where a table has
no entry the primitive's own rule decides, and so it does for what an entry leaves out. Nothing is timed by itself.
"ms" is what the op took through the kernel, for a backward kernel forward and backward less the forward.
"""

import contextlib
import contextvars
import functools
import json
import pathlib

import jax

_forced = contextvars.ContextVar("pallas_kernels_tuned_forced", default=None)


@contextlib.contextmanager
def forcing(kernel: str, **choices):
    """Calls of a kernel, such as "linear_attention.forward", traced inside make these choices, whatever tables say.

    A function that was jitted before keeps the choices it was traced with.
    """
    token = _forced.set((_forced.get() or {}) | {kernel: choices})
    try:
        yield
    finally:
        _forced.reset(token)


def key(kernel: str, batch: int, time: int, **sizes: int) -> str:
    """Such as "linear_attention.forward B8 T4096 H64": the name under which a table keeps a call."""
    rounded = {name: 1 << (size - 1).bit_length() for name, size in (("B", batch), ("T", time))}
    return " ".join([kernel, *(f"{name}{size}" for name, size in (rounded | sizes).items())])


def choices(table: pathlib.Path, kernel: str, batch: int, time: int, **sizes: int) -> dict:
    """What is forced for a call, else what the table has for it on the default device, else {}."""
    forced = (_forced.get() or {}).get(kernel)
    if forced is not None:
        return forced
    entry = _read(table).get(jax.devices()[0].device_kind, {}).get(key(kernel, batch, time, **sizes), {})
    return {name: value for name, value in entry.items() if name != "ms"}


@functools.cache
def _read(table: pathlib.Path) -> dict:
    return json.loads(table.read_text()) if table.exists() else {}
