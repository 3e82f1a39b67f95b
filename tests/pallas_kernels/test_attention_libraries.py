"""Lowered for H100s and compiled for TPUs that are not here, attention's calls are the libraries' kernels."""

import collections
import json
import os
import re
import subprocess

import jax
import jax.numpy as jnp
import pytest

from seqmix.core import sharding
from seqmix.ops import attention, dispatch, softmax_choice
from tests.pallas_kernels.test_tpu_compiled import PYTHON
from tools import tpu_bundles

SHAPE = (8, 256, 4, 128)
CALLS = {
    "causal": ({}, True),
    "dense": ({"causal": False}, True),
    "window": ({"window": 64}, True),
    "heads": ({"context": "heads"}, True),
    "ring": ({"context": "ring"}, False),
    "zigzag": ({"context": "zigzag"}, False),
    "cap": ({"soft_cap": 5.0}, False),
    "lse": ({"return_lse": True}, False),
    "packed": ({"segment_ids": jnp.ones(SHAPE[:2], jnp.int32)}, False),
}


@pytest.fixture
def cudnn(monkeypatch):
    """As if cuDNN were installed, which takes no part in lowering."""
    versions = pytest.importorskip("jax_cuda13_plugin._versions")
    monkeypatch.setattr(versions, "cudnn_get_version", lambda: 91000)


@pytest.mark.parametrize("case", CALLS)
def test_what_cudnn_takes_is_a_call_of_it_for_eight_gpus_and_nothing_else_is(h100s, cudnn, case):
    options, taken = CALLS[case]
    context = 2 if "context" in options else 1
    mesh = sharding.make_mesh(fsdp=4 // context, context=context, model=2, devices=h100s(8))
    with sharding.use_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, sharding.spec(("batch", "time", "heads", None), SHAPE, mesh))
        x = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16, sharding=place)
        loss = lambda *a: sum(jnp.sum(y.astype(jnp.float32)) for y in jax.tree.leaves(attention(*a, **options)))
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).as_text()
    found = set(re.findall(r"custom_call @([^(]*)", text)) & {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
    assert len(found) == (2 if taken else 0)


@pytest.mark.parametrize(
    ("tokens", "options", "calls"),
    # At home causally, then two pairs of chunks; nothing forward. cuDNN's gradient takes even lengths alone.
    [(256, {}, 3), (264, {}, 3), (252, {}, 0), (256, {"implementation": "gpu"}, 0)],
    ids=["whole tiles", "even chunks", "odd chunks", "named"],
)
def test_long_stretches_of_a_zigzag_have_gradients_by_cudnn(h100s, cudnn, monkeypatch, tokens, options, calls):
    monkeypatch.setattr(softmax_choice, "STRETCH", 64)
    monkeypatch.setattr(dispatch, "_chosen", {})
    mesh, shape = sharding.make_mesh(context=2, devices=h100s(2)), (SHAPE[0], tokens, *SHAPE[2:])
    with sharding.use_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, sharding.spec(("batch", "time", None, None), shape, mesh))
        x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
        loss = lambda *a: jnp.sum(attention(*a, context="zigzag", **options).astype(jnp.float32))
        text = jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).as_text()
    found = collections.Counter(re.findall(r"custom_call @([^(]*)", text))
    assert found["__cudnn$fmhaSoftmaxBackward"] == calls and found["__cudnn$fmhaSoftmax"] == 0
    assert found["mosaic_gpu_v2"] > 0
    assert dispatch.chosen("attention") == (("cudnn", "gpu") if calls else ("gpu",))


@pytest.mark.tpu
@pytest.mark.skipif(PYTHON is None, reason="needs libtpu, here or in the Python that SEQMIX_TPU_PYTHON names")
def test_splash_is_in_the_programs_of_tpus():
    command = [PYTHON, "-m", "tools.tpu_attention"]
    env = os.environ | tpu_bundles.ENVIRONMENT
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tpu_bundles.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == 5
    for row in rows:
        assert row["kernels"] == (0 if row["call"] == "lse" else 3), row
        assert row["moved"] == row["call"].startswith("heads"), row
