"""Comparing with public code, most of it PyTorch: finding it, loading it, measuring how far apart it and ours are."""

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
    dtype: str = "float64"  # float32 where the peer's constants are not better
    missing: tuple[str, ...] = ()  # modules that the file imports and the function does not use
    environment: tuple[tuple[str, str], ...] = ()  # variables that the file reads
    framework: str = "torch"  # or jax
    implementations: tuple[str | None, ...] = ("chunked", "reference")

    def __str__(self):
        return f"{self.ours} - {self.function}"

    def version(self) -> str:
        return importlib.metadata.version(self.package)

    def load(self):
        """The peer's function; the test is skipped where torch, einops or the package is not installed."""
        with _floats(self.dtype):
            return getattr(load_file(self.package, self.file, self.missing, self.environment), self.function)


def load_file(package: str, file: str, missing=(), environment=()):
    """The module of a file of an installed package, or a skipped test."""
    for needed in ("torch", "einops"):
        pytest.importorskip(needed)
    top, _, inside = file.partition("/")
    found = importlib.util.find_spec(top)
    for folder in found.submodule_search_locations if found else ():
        if (Path(folder) / inside).exists():
            return _load_alone(file, Path(folder) / inside, missing, environment)
    pytest.skip(f"{package} is not installed, or has no {file}")


@functools.cache
def _load_alone(file: str, path: Path, missing, environment):
    """A module from its file. The package around it, which may need compiled kernels, is not imported for it."""
    spec = importlib.util.spec_from_file_location(file.removesuffix(".py").replace("/", "."), path)
    module = importlib.util.module_from_spec(spec)
    with _stand_ins(missing), mock.patch.dict(os.environ, environment):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _floats(dtype):
    """Casts to float32, which most references make, cast to float64 where that is asked for."""
    pytest.importorskip("torch")
    import torch

    wide = getattr(torch, dtype)
    with (
        mock.patch.object(torch, "float32", wide),
        mock.patch.object(torch, "float", wide),
        mock.patch.object(torch.Tensor, "float", lambda x: x.to(wide)),
    ):
        default = torch.get_default_dtype()
        torch.set_default_dtype(wide)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


class _Anything:
    """What a stand-in's attributes are: a decorator, a part of an annotation, a module of such."""

    def __getattr__(self, attribute):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return self

    def __call__(self, *args, **options):
        return args[0] if args and callable(args[0]) else self

    def __or__(self, other):
        return self

    def keys(self):
        return ()  # of no options: f(**anything)


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
    an array of noise.
    """
    peer, by_theirs = comparison.load(), {"torch": _by_torch, "jax": _by_jax}[comparison.framework]
    with jax.enable_x64(comparison.dtype == "float64"):
        arrays = comparison.arrays(np.random.default_rng(0))
        arrays = {name: a.astype(comparison.dtype) for name, a in arrays.items()}
        with _floats(comparison.dtype):
            want, want_grads = by_theirs(functools.partial(comparison.run_theirs, peer), arrays)
        values = grads = 0.0
        for implementation in comparison.implementations:
            got, got_grads = _by_jax(functools.partial(comparison.run_ours, implementation), arrays)
            assert len(got) == len(want)
            values = max(values, *map(relative_error, got, want))
            grads = max(grads, *(relative_error(got_grads[name], want_grads[name]) for name in arrays))
    return values, grads


def relative_error(got, want) -> float:
    assert got.shape == want.shape and got.dtype == want.dtype and np.any(want != 0)
    return float(np.max(np.abs(got - want)) / np.max(np.abs(want)))


def _noise(i, y):
    """What output i is weighed with: the same whoever computes it."""
    return np.random.default_rng(i).normal(size=tuple(y.shape))


def _by_torch(run, arrays):
    """The outputs, and the gradients by each array."""
    import torch

    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in arrays.items()}
    outputs = run(**tensors)
    sum((torch.tensor(_noise(i, y), dtype=y.dtype) * y).sum() for i, y in enumerate(outputs)).backward()
    return [y.detach().numpy() for y in outputs], {name: t.grad.numpy() for name, t in tensors.items()}


def _by_jax(run, arrays):
    """The same."""

    def objective(arrays):
        outputs = run(**arrays)
        return sum(jnp.sum(jnp.asarray(_noise(i, y), y.dtype) * y) for i, y in enumerate(outputs)), outputs

    call = jax.jit(jax.value_and_grad(objective, has_aux=True), compiler_options=QUICK)
    (_, outputs), grads = call(arrays)
    return [np.asarray(y) for y in outputs], {name: np.asarray(g) for name, g in grads.items()}
