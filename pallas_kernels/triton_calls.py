"""The one place that touches Triton and jax-triton: how kernels are called on NVIDIA GPUs that Mosaic GPU leaves out.

Both are optional (the extra "triton") and slow to import, so nothing here imports them before it is called. Kernels
lie in modules of their own (`<primitive>/triton_kernels.py`), which import Triton when they are themselves imported.

`compat.interpret()` holds for these kernels too: Triton's interpreter then runs them through NumPy on the host.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import importlib.util
import os
import threading
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compat

EXTRA = "needs the extra triton: pip install 'seqmix[triton]'"
OLDEST, NEWEST = (8, 0), (9, 0)  # compute capabilities: the first with bfloat16 matrix products, and the last tried
_target = contextvars.ContextVar("pallas_kernels_triton_target", default=None)
_one_at_a_time = threading.Lock()  # the interpreter's state is global, and XLA may call back from several threads


def unsupported(capability) -> str | None:
    """Why no Triton kernel can run here, in a few words; None if one can.

    capability: (major, minor) of the GPU that will run it; None asks the default device.
    """
    interpreting = compat.interpreting()
    if not interpreting:
        capability = capability or target()
        if capability is None:
            return "needs an NVIDIA GPU, the default device is none"
        if not OLDEST <= capability <= NEWEST:
            return f"needs a GPU of compute capability 8.0 to 9.0, this one has {capability[0]}.{capability[1]}"
    needed = ("triton",) if interpreting else ("triton", "jax_triton")
    return None if all(importlib.util.find_spec(name) for name in needed) else EXTRA


def target() -> tuple[int, int] | None:
    """(major, minor) of the GPU that kernels are compiled for; None if the default device is no NVIDIA GPU."""
    return _target.get() or compat.capability()


def hopper() -> bool:
    """Whether kernels are compiled for a Hopper GPU, whose products read their operands from shared memory."""
    return (target() or OLDEST) >= (9, 0)


@contextlib.contextmanager
def compiling_for(capability: tuple[int, int]):
    """Kernels traced inside are compiled for a GPU of this compute capability, which need not be here."""
    token = _target.set(capability)
    try:
        yield
    finally:
        _target.reset(token)


def call(module: str, kernel: str, *arrays, out, grid, warps: int, stages: int, **constants):
    """Results of a kernel, arrays of the shapes and dtypes `out` (a tuple), from arrays; the rest is known to Triton.

    module, kernel: the names of a module of kernels and of one in it, whose parameters are the arrays, the results and
    the constants, in this order; an array that is None is given as the first one, for a kernel that does not read it.
    """
    arrays = [arrays[0] if x is None else x for x in arrays]
    if compat.interpreting():
        run = functools.partial(_interpreted, module, kernel, out, grid, constants)
        return jax.pure_callback(run, out, *arrays, vmap_method="sequential")
    options = dict(num_warps=warps, num_stages=stages, compute_capability=_number(target()), name=kernel)
    function = getattr(importlib.import_module(module), kernel)

    @jax.custom_batching.sequential_vmap
    def run(*arrays):
        return tuple(
            _jax_triton().triton_call(*arrays, kernel=function, out_shape=out, grid=grid, **options, **constants)
        )

    return run(*arrays)


def _number(capability):
    return None if capability is None else 10 * capability[0] + capability[1]


@functools.cache
def _jax_triton():
    with kept_cache():
        import jax_triton
    return jax_triton


@contextlib.contextmanager
def kept_cache():
    """Around an import of jax_triton, which empties a variable that is other users' of Triton too."""
    before = os.environ.get("TRITON_CACHE_DIR")
    try:
        yield
    finally:
        os.environ.pop("TRITON_CACHE_DIR", None)
        if before is not None:
            os.environ["TRITON_CACHE_DIR"] = before


# The interpreter. It wants PyTorch tensors, of which it uses little.


class _Tensor:
    """An array of the host as Triton's interpreter wants to see one; it is its own storage and its own copy."""

    def __init__(self, array):
        self.array = array
        self.dtype = str(array.dtype)

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def _nothing(self, *_):
        return None

    set_ = storage_offset = size = stride = copy_ = _nothing


def _interpreted(module, kernel, out, grid, constants, *arrays):
    given = [np.array(x) for x in arrays]
    # What a kernel fails to write shows.
    results = [np.full(x.shape, np.nan if jnp.issubdtype(x.dtype, jnp.floating) else -1, x.dtype) for x in out]
    with _one_at_a_time, _mended() as interpreted:
        function = getattr(_interpreted_module(module, interpreted), kernel)
        function[grid](*map(_Tensor, [*given, *results]), **constants)
    return tuple(results)


@contextlib.contextmanager
def _mended():
    """Triton's interpreter with bfloat16 as the hardware has it: it multiplies its bits and rounds it wrongly."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, handle = interpreter._convert_float, interpreter.TensorHandle

    def converted(values, given, wanted, rounding):
        if (given, wanted) == (tl.float32, tl.bfloat16):
            return values.astype(jnp.bfloat16).view(np.uint16)
        if (given, wanted) == (tl.bfloat16, tl.float32):
            return wide(values)
        return convert(values, given, wanted, rounding)

    def wide(values):
        return (values.astype(np.uint32) << 16).view(np.float32)

    def dot(_, a, b, d, *options):
        a, b = (wide(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
        return handle(np.matmul(a, b, dtype=d.data.dtype) + d.data, d.dtype.scalar)

    # Tiny shapes overflow nothing, and looking after each sum takes as long as the sums.
    quick = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    with (
        mock.patch.object(interpreter.interpreter_builder, "options", quick),
        mock.patch.object(interpreter, "_convert_float", converted),
        mock.patch.object(interpreter.InterpreterBuilder, "create_dot", dot),
        mock.patch.object(tl, "sum", _inner()(tl.sum.fn)),
    ):
        yield _inner()


@functools.cache
def _inner():
    """A kernel in the interpreter that others may call: Triton's own then leaves the language patched."""
    from triton.runtime.interpreter import InterpretedFunction

    class Interpreted(InterpretedFunction):
        def __call__(self, *args, **kwargs):
            return self.rewrite()(*args, **kwargs)

    return Interpreted


@functools.cache
def _interpreted_module(name, interpreted):
    """A copy of a module of kernels, with all of them `interpreted`."""
    import triton

    spec = importlib.util.find_spec(name)
    copy = importlib.util.module_from_spec(spec)
    with mock.patch.object(triton, "jit", interpreted):
        spec.loader.exec_module(copy)
    for key, value in vars(copy).items():
        if isinstance(value, triton.language.constexpr):
            setattr(copy, key, value.value)
    return copy
