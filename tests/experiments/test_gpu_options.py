"""What XLA is told of steps on several GPUs, and what happens where it does not understand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import gpu_options


def mesh(platform="gpu", **sizes):
    device = types.SimpleNamespace(platform=platform)
    return types.SimpleNamespace(shape=sizes, devices=np.array([device]))


def test_they_are_for_weights_that_gpus_share(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    assert gpu_options.options(mesh(fsdp=2)) == gpu_options.FSDP
    assert not any(map(gpu_options.options, (mesh(fsdp=1, data=8), mesh("cpu", fsdp=2), mesh("tpu", fsdp=2))))


def test_the_environment_says_more(monkeypatch):
    name = "xla_gpu_all_gather_combine_threshold_bytes"
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=1000 --xla_other=1")
    assert gpu_options.options(mesh(fsdp=2)) == {k: v for k, v in gpu_options.FSDP.items() if k != name}


@pytest.mark.parametrize("option", [{"xla_gpu_unheard_of": 1}, {"xla_gpu_pipeline_all_gather": "unheard_of"}], ids=str)
def test_an_xla_without_them_compiles_without_them(monkeypatch, option):
    monkeypatch.setattr(gpu_options, "FSDP", option)
    lowered = jax.jit(lambda x: x + 1).lower(jnp.zeros(3))
    with pytest.raises(jax.errors.JaxRuntimeError):
        lowered.compile(option)
    assert gpu_options.compiled(lowered, mesh(fsdp=2))(jnp.zeros(3)).tolist() == [1, 1, 1]


def test_other_errors_come_through():
    class Broken:
        def compile(self, chosen=None):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        gpu_options.compiled(Broken(), mesh(fsdp=2))
