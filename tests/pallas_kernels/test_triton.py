"""The Triton kernels, without a GPU: against float64 in Triton's interpreter, and compiled for an A100 through ptxas.

Tolerances: see `test_linear_attention_gpu.py` and `test_linear_scan_gpu.py`, whose references are used.
"""

import importlib.util
import re
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, triton_calls
from pallas_kernels.linear_attention import triton, triton_backward
from pallas_kernels.linear_scan import triton as scan
from seqmix.core import sharding
from seqmix.ops import linear_kernels, scan_kernels, targets
from tests.pallas_kernels import test_linear_attention_gpu as attention_gpu
from tests.pallas_kernels import test_linear_scan_gpu as scan_gpu
from tests.pallas_kernels.test_linear_attention_gpu import BOUND, error, packed
from tests.pallas_kernels.test_linear_scan_gpu import GATES, masks

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason=triton_calls.EXTRA)
A100 = (8, 0)
SHARED = 99 * 2**10  # bytes that a block may have on the smallest of these GPUs, of compute capability 8.6 and 8.9


@needs_triton
@pytest.mark.parametrize(
    ("batch", "time", "heads", "key", "value", "full", "splits"),
    [(2, 133, 2, 64, 64, True, 2), (1, 130, 1, 128, 128, False, 1)],
    ids=["grouped_packed_weighted_split", "wide"],
)
def test_linear_attention_and_its_gradients_match_float64(batch, time, heads, key, value, full, splits):
    *inputs, dy, dstate = attention_gpu.draw(batch, time, 1, heads, key, value)
    run_ids = packed(time) if full else None
    log_write = jnp.log(jax.random.uniform(jax.random.key(7), (batch, time, heads), minval=1e-4)) if full else None
    with compat.interpret():
        values = triton.forward(*inputs, run_ids, log_write, scale=0.5, splits=splits)
        got = triton_backward.backward(*inputs, run_ids, log_write, dy, dstate, scale=0.5, splits=splits)
    inputs = (*inputs, log_write) if full else inputs
    wants = (*attention_gpu.exact(inputs, run_ids, 0.5), *attention_gpu.exact(inputs, run_ids, 0.5, (dy, dstate)))
    got = (*values, *got) if full else (*values, *got[:-1])
    for one, want in zip(got, wants, strict=True):
        assert error(one, want) < BOUND
    if full:
        assert not np.any(np.asarray(got[0])[np.asarray(run_ids) == 0])


@needs_triton
@pytest.mark.parametrize(
    ("time", "dtype", "splits", "packed"),
    [(44, jnp.bfloat16, 2, True), (33, jnp.float32, 1, False)],
    ids=["packed_split", "float32"],
)
def test_scan_and_its_gradients_match_float64(time, dtype, splits, packed):
    x, log_a, state, dh, dstate = scan_gpu.draw(2, time, 128, dtype, GATES)
    real, opened = masks(2, time) if packed else (np.ones((2, time), bool), np.zeros((2, time), bool))
    marks = (jnp.asarray(real), jnp.asarray(opened)) if packed else (None, None)
    x = jnp.where(real[..., None], x, jnp.nan).astype(dtype)  # what stands at padding is not read
    with compat.interpret():
        h, last = scan.forward(x, log_a, state, *marks, splits=splits)
        got = scan.backward(log_a, h, state, *marks, dh, dstate, splits=splits)
    wants = scan_gpu.exact(x, log_a, state, real, opened, np.where(real[..., None], dh, 0), dstate)
    for one, want in zip((h, last, *got), wants, strict=True):
        assert error(one, want) < (BOUND if dtype == jnp.bfloat16 else 5e-6)


def test_calls_that_cannot_run_are_refused_with_the_reason(monkeypatch):
    shape = jax.ShapeDtypeStruct
    q, v = shape((2, 64, 1, 128), jnp.bfloat16), shape((2, 64, 2, 64), jnp.bfloat16)
    x = shape((2, 64, 128), jnp.bfloat16)
    assert "default device" in triton.supports(q, q, v)
    assert "7.5" in scan.supports(x, x, capability=(7, 5)) and "10.0" in scan.supports(x, x, capability=(10, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'seqmix[triton]'" in scan.supports(x, x, capability=A100)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for capability in (A100, (8, 9), (9, 0)):
        assert triton.supports(q, q, v, capability=capability) is None
        assert scan.supports(x, x, capability=capability) is None
    assert "K=96" in triton.supports(*[shape((2, 64, 1, 96), jnp.bfloat16)] * 2, v, capability=A100)
    assert "decay" in triton.supports(q, q, v, shape((2, 64, 2, 128), jnp.float32), capability=A100)
    assert "D=200" in scan.supports(shape((2, 64, 200), x.dtype), shape((2, 64, 200), x.dtype), capability=A100)
    assert "float16" in scan.supports(x, shape(x.shape, jnp.float16), capability=A100)


def test_gpus_before_hopper_take_them_by_themselves_where_jax_triton_is_installed(monkeypatch):
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    q, x = array(2, 64, 2, 128), array(2, 64, 512)
    monkeypatch.setattr(sharding, "on_one_device", lambda: True)

    def taken(capability, installed):
        device = types.SimpleNamespace(platform="gpu", compute_capability=capability)
        monkeypatch.setattr(sharding, "device", lambda: device)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if installed else None)
        options = dict(scale=1.0, normalize=False, causal=True)
        attention = linear_kernels.reasons(None, q, q, q, None, None, None, None, **options)
        return {targets.chosen(reasons, None) for reasons in (attention, scan_kernels.reasons(x, x, False))}

    assert taken("8.6", installed=True) == {"triton"}
    assert taken("8.6", installed=False) == taken("7.5", installed=True) == {None}
    monkeypatch.setattr(compat, "unavailable", lambda: None)
    assert taken("9.0", installed=True) == {"gpu"}


def test_time_is_cut_where_rows_and_channels_are_few():
    whole, long = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 4096, 4096), (1, 32768, 4096)))
    assert scan.make_plan(whole).splits == 1
    plan = scan.make_plan(long)
    assert plan.splits > 8 and plan.splits * plan.steps * scan.ROWS >= 32768


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """compiled(function, *shapes): of each kernel for an A100, what a thread spills and a block shares, in bytes."""
    pytest.importorskip("triton", reason=triton_calls.EXTRA)
    pytest.importorskip("jax_plugins.xla_cuda13", reason="jax-triton needs jax's CUDA plug-in")
    library = pytest.importorskip("jax_triton", reason=triton_calls.EXTRA).triton_lib
    monkeypatch.setattr(library, "_JAX_TRITON_DUMP_DIR", str(tmp_path))  # else of the environment, once
    monkeypatch.setattr(library, "_COMPILED_KERNEL_CACHE", {})
    from triton import knobs

    def compile(function, *shapes):
        with triton_calls.compiling_for(A100):
            text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        found = {}
        for ptx in tmp_path.rglob("*.ptx"):
            command = [knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_80", str(ptx), "-o", str(tmp_path / "out")]
            spilled = re.search(
                r"(\d+) bytes spill stores", subprocess.run(command, capture_output=True, text=True).stderr
            )
            shared = re.search(r"shared_mem_bytes: (\d+)", ptx.with_suffix(".compile_info").read_text())
            found[ptx.stem] = int(spilled[1]), int(shared[1])
        assert text.count("triton_kernel_call") >= len(found) > 0
        return found

    return compile


def test_linear_attention_compiles_for_an_a100_without_spills(compiled):
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    q, v, decay = array(8, 4096, 16, 128), array(8, 4096, 16, 128), array(8, 4096, 16, dtype=jnp.float32)

    def run(q, k, v, decay, dy):
        return triton.forward(q, k, v, decay), triton_backward.backward(q, k, v, decay, None, None, decay, dy)

    found = compiled(run, q, q, v, decay, v)
    assert found.keys() == {"outputs", "states", "key_gradients", "value_gradients"}
    for spilled, shared in found.values():
        assert spilled == 0 and shared <= SHARED


def test_scan_compiles_for_an_a100_without_spills_and_under_vmap(compiled):
    x = jax.ShapeDtypeStruct((2, 8, 1024, 512), jnp.bfloat16)

    def run(x, log_a):
        h, _ = scan.forward(x, log_a)
        return scan.backward(log_a, h, None, None, None, h)

    found = compiled(jax.vmap(run), x, x)
    assert found.keys() == {"stretches", "forward", "backward"}
    for spilled, shared in found.values():
        assert spilled == 0 and shared <= SHARED
