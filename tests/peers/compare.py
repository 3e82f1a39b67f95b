"""Comparing with public PyTorch code: finding it, loading it, measuring how far apart it and ours are."""

import functools
import importlib.metadata
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.quick import QUICK

LENGTH = 37  # tokens, in chunks of 16: two whole ones and a part


@dataclass(frozen=True)
class Comparison:
    """One function of the library beside one of a public package: equal values, and equal gradients by every array."""

    ours: str  # what is compared, and in which case
    package: str  # the name under which it is installed
    file: str  # where in it the function is
    function: str
    arrays: Callable  # random generator -> {name: array}, each of which is differentiated by
    run_ours: Callable  # (implementation, **arrays) -> tuple of arrays
    run_theirs: Callable  # (function, **tensors) -> tuple of tensors in the same layout
    dtype: str = "float32"  # what the peer computes in
    missing: tuple[str, ...] = ()  # modules that the file imports and the function does not use
    environment: tuple[tuple[str, str], ...] = ()  # variables that the file reads
    implementations: tuple[str | None, ...] = ("chunked", "reference")

    def __str__(self):
        return f"{self.ours} - {self.function}"

    def version(self) -> str:
        return importlib.metadata.version(self.package)

    def load(self):
        """The peer's function; the test is skipped where torch, einops or the package is not installed."""
        for needed in ("torch", "einops"):
            pytest.importorskip(needed)
        top, _, inside = self.file.partition("/")
        found = importlib.util.find_spec(top)
        if found is None:
            pytest.skip(f"{self.package} is not installed")
        path = Path(found.submodule_search_locations[0]) / inside
        if not path.exists():
            pytest.skip(f"{self.package} {self.version()} has no {self.file}")
        return getattr(_load_alone(self.file, path, self.missing, self.environment), self.function)


@functools.cache
def _load_alone(file: str, path: Path, missing, environment):
    """A module from its file. The package around it, which may need compiled kernels, is not imported for it."""
    spec = importlib.util.spec_from_file_location(file.removesuffix(".py").replace("/", "."), path)
    module = importlib.util.module_from_spec(spec)
    with _stand_ins(missing), mock.patch.dict(os.environ, environment):
        spec.loader.exec_module(module)
    return module


class _Anything:
    """What a stand-in's attributes are: a decorator, a part of an annotation, a module of such."""

    def __getattr__(self, attribute):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return self

    def __call__(self, decorated):
        return decorated

    def __or__(self, other):
        return self


@contextmanager
def _stand_ins(names):
    """Modules of these names that have every attribute, while the context lasts."""
    before = {name: sys.modules.get(name) for name in names}
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__getattr__ = _Anything().__getattr__
    try:
        yield
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def measure(comparison: Comparison) -> tuple[float, float]:
    """The largest relative errors of the values and of the gradients, over our implementations.

    An error is relative to the largest entry of the array. Gradients are those of the sum of all outputs, each times
    a fixed array of noise.
    """
    peer = comparison.load()
    with jax.enable_x64(comparison.dtype == "float64"):
        rng = np.random.default_rng(0)
        arrays = {name: a.astype(comparison.dtype) for name, a in comparison.arrays(rng).items()}
        want, cotangents, want_grads = _theirs(comparison, peer, arrays, rng)
        values = grads = 0.0
        for implementation in comparison.implementations:
            got, got_grads = _ours(comparison, implementation, arrays, cotangents)
            assert len(got) == len(want)
            values = max(values, *map(relative_error, got, want))
            grads = max(grads, *(relative_error(got_grads[name], want_grads[name]) for name in arrays))
    return values, grads


def relative_error(got, want) -> float:
    assert got.shape == want.shape and got.dtype == want.dtype and np.any(want != 0)
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def _theirs(comparison, peer, arrays, rng):
    import torch

    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in arrays.items()}
    outputs = comparison.run_theirs(peer, **tensors)
    cotangents = [rng.normal(size=tuple(y.shape)).astype(comparison.dtype) for y in outputs]
    sum((torch.tensor(w) * y).sum() for w, y in zip(cotangents, outputs, strict=True)).backward()
    return [y.detach().numpy() for y in outputs], cotangents, {name: t.grad.numpy() for name, t in tensors.items()}


def _ours(comparison, implementation, arrays, cotangents):
    def objective(arrays):
        outputs = comparison.run_ours(implementation, **arrays)
        return sum(jnp.sum(w * y) for w, y in zip(cotangents, outputs, strict=True)), outputs

    run = jax.jit(jax.value_and_grad(objective, has_aux=True), compiler_options=QUICK)
    (_, outputs), grads = run(arrays)
    return [np.asarray(y) for y in outputs], {name: np.asarray(g) for name, g in grads.items()}
