"""Attention through other libraries: what goes where, what is refused, and that a call's meaning survives the way."""

import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from seqmix.core import sharding
from seqmix.ops import softmax_library, targets
from seqmix.ops.softmax import attention
from tests.quick import QUICK

T = 64
PACKED = jnp.asarray([[0] * 10 + [3] * 40 + [0] * 4 + [3] * 20 + [7] * 40 + [0] * 14])


def tensors(
    time=T, keys=T, heads=2, key_heads=1, value_heads=None, key_dim=8, value_dim=8, dtype=jnp.bfloat16, batch=2
):
    of_keys, of_values = (batch, keys, key_heads, key_dim), (batch, keys, value_heads or key_heads, value_dim)
    shapes = (batch, time, heads, key_dim), of_keys, of_values
    draw = lambda seed, shape: np.random.default_rng(seed).normal(size=shape).astype(dtype)
    return [jnp.asarray(draw(seed, shape)) for seed, shape in enumerate(shapes)]


def pulled(q, k, v, **options):
    """y and the gradients of q, k and v, in float64, for a cotangent that bfloat16 holds."""

    def run(q, k, v):
        y, pull = jax.vjp(lambda q, k, v: attention(q, k, v, **options), q, k, v)
        weight = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(jnp.bfloat16)
        return y, *pull(weight.astype(y.dtype))

    return [np.asarray(x, np.float64) for x in jax.jit(run, compiler_options=QUICK)(q, k, v)]


def close(got, want, bound):
    for a, b in zip(got, want, strict=True):
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


@pytest.fixture
def hopper(monkeypatch):
    """As on an H100, but that jax.nn's plain form computes the calls of both libraries; the names that were called."""
    called = []
    plain = jax.nn.dot_product_attention

    def stand_in(name):
        def attend(*arrays, implementation, logits_soft_cap=None, **options):
            assert implementation == name and logits_soft_cap is None
            called.append(name)
            return plain(*arrays, implementation="xla", **options)

        return attend

    monkeypatch.setattr(sharding, "device", lambda: SimpleNamespace(platform="gpu"))
    monkeypatch.setattr(targets, "capability", lambda: (9, 0))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(softmax_library, "_missing", lambda: None)
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in("cudnn"))
    monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace(dot_product_attention=stand_in("mosaic")))
    return called


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="not on a CPU")
@pytest.mark.parametrize(
    ("name", "needs"),
    [("cudnn", "an NVIDIA GPU from Ampere on"), ("tokamax", "an NVIDIA GPU from Ampere on"), ("splash", "a TPU")],
)
def test_without_the_device_a_library_is_refused_with_the_reason(name, needs):
    with pytest.raises(ValueError, match=f"cannot run '{name}': needs {needs}, the device is a cpu$"):
        attention(*tensors(), implementation=name)


REFUSED = {
    "cap": ({"soft_cap": 3.0}, {}, {"cudnn": "has no form for soft_cap"}),
    "around": ({"window": 5, "causal": False}, {}, {"cudnn": "has no form for a window that looks ahead"}),
    "packed": ({"segment_ids": jnp.ones((2, T), jnp.int32)}, {}, dict.fromkeys(("cudnn", "tokamax"), "segment_ids")),
    "lse": ({"return_lse": True}, {}, dict.fromkeys(("cudnn", "tokamax"), "has no form for return_lse")),
    "sinks": ({"window": 5, "sinks": 1}, {}, dict.fromkeys(("cudnn", "tokamax"), "has no form for sinks")),
    "sink logits": ({"sink_logits": jnp.ones(2)}, {}, dict.fromkeys(("cudnn", "tokamax"), "form for sink_logits")),
    "float32": ({}, {"dtype": jnp.float32}, dict.fromkeys(("cudnn", "tokamax"), "bfloat16 or float16, got float32")),
    "more keys": ({}, {"keys": 80}, dict.fromkeys(("cudnn", "tokamax"), "as many keys as queries .* T=64, S=80")),
    "one token": ({}, {"time": 1, "keys": 1}, dict.fromkeys(("cudnn", "tokamax"), "at least 64 tokens, got T=1")),
    "wide": ({}, {"key_dim": 264}, {"cudnn": "at most 256 channels, got K=264", "tokamax": "at most 128 channels"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_library_does_not_take_is_refused_in_a_line_and_goes_to_the_chunked_form(hopper, case):
    options, shapes, reasons = REFUSED[case]
    arrays = tensors(**shapes)
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=rf"^implementation: attention cannot run '{name}': .*{reason}[^\n]*$"):
            attention(*arrays, implementation=name, **options)
    if len(reasons) == 2:
        jax.eval_shape(lambda: attention(*arrays, **options))
        assert hopper == []


def test_a_mask_of_the_language_goes_to_no_library(hopper):
    with pytest.raises(ValueError, match="cannot run 'cudnn': has no form for mask, bias, slopes and normalizer$"):
        attention(*tensors(), bias=jnp.zeros((1, 1, T, T)), implementation="cudnn")


def test_by_itself_a_call_goes_to_cudnn_then_to_tokamax_and_there_in_no_short_window(hopper):
    def called(**options):
        hopper.clear()
        jax.eval_shape(lambda: attention(*tensors(), **options))
        return hopper[-1] if hopper else "chunked"

    assert called() == called(window=7) == "cudnn"
    assert called(window=8, causal=False) == "mosaic"
    assert called(window=7, causal=False) == "chunked"


def test_a_jax_without_cudnn_is_found_out_before_the_call(hopper, monkeypatch):
    def absent(*arrays, **options):
        raise RuntimeError("cuDNN is not detected.\nInstall it.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", absent)
    with pytest.raises(ValueError, match=r"cannot run 'cudnn': is refused by jax.nn: cuDNN is not detected\.$"):
        attention(*tensors(), implementation="cudnn")


CALLS = {
    "causal": ({}, {}),
    "window": ({"window": 7}, {}),
    "a window over everything": ({"window": T, "causal": False}, {}),
    "other keys": ({"causal": False, "scale": 0.3}, {"keys": 80}),
    "odd widths": ({}, {"key_dim": 12, "value_dim": 5}),
    "around": ({"window": 7, "causal": False}, {}),
    "more heads of values": ({}, {"value_heads": 2}),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_keeps_its_meaning(hopper, case):
    """The arguments that a library is given, computed by jax.nn's plain form, against the definition."""
    options, shapes = CALLS[case]
    arrays = tensors(**shapes)
    want = pulled(*arrays, implementation="reference", **options)
    for name, called in {"cudnn": "cudnn", "tokamax": "mosaic"}.items():
        if (case, name) in {("around", "cudnn"), ("odd widths", "tokamax")}:  # refused; no form with V != K in jax.nn
            continue
        hopper.clear()
        close(pulled(*arrays, implementation=name, **options), want, 0.02)
        assert set(hopper) == {called}


@pytest.mark.parametrize(("context", "options"), [(1, {}), (2, {"context": "heads"})])
def test_on_a_mesh_each_device_calls_the_library_on_its_share(hopper, context, options):
    arrays = tensors(heads=8, key_heads=4, batch=4)
    want = pulled(*arrays, implementation="reference")
    mesh = sharding.make_mesh(data=2, fsdp=2 // context, context=context, model=2)
    with sharding.use_mesh(mesh):
        close(pulled(*arrays, implementation="cudnn", **options), want, 0.02)
        if context == 2:
            with pytest.raises(ValueError, match="'cudnn': has no form for time cut over a mesh by 'gather'"):
                attention(*arrays, implementation="cudnn")
    assert "cudnn" in hopper


def test_splash_agrees_with_the_reference_and_keeps_padding_out():
    """Interpreted; 5e-3 is what bfloat16 operands leave."""
    q, k, v = tensors(128, 128, key_dim=32, value_dim=16, batch=1)
    options = {"segment_ids": PACKED}
    with jax.enable_x64(True):
        want = pulled(*(x.astype(jnp.float64) for x in (q, k, v)), implementation="reference", **options)
    with compat.interpret():
        got = pulled(q, k, v, implementation="splash", **options)
    close(got, want, 5e-3)
    assert all((x[0, np.asarray(PACKED[0] == 0)] == 0).all() for x in got)


def test_splash_takes_windows_and_soft_caps_without_segments():
    q, k, v = tensors(128, 128, key_dim=32, value_dim=16, batch=1)
    options = {"window": 30, "soft_cap": 2.0, "causal": False}

    def called(name, *arrays):
        run = jax.jit(lambda *a: attention(*a, implementation=name, **options), compiler_options=QUICK)
        return np.asarray(run(*arrays), np.float64)

    with compat.interpret():
        got = called("splash", q, k, v)
        with pytest.raises(ValueError, match="padding within a segment is no token"):
            attention(q, k, v, implementation="splash", segment_ids=PACKED, window=30)
        with pytest.raises(ValueError, match="multiples of 128 queries and keys, got T=100, S=100"):
            attention(*tensors(100, 100), implementation="splash")
    close([got], [called("reference", *(x.astype(jnp.float32) for x in (q, k, v)))], 5e-3)
