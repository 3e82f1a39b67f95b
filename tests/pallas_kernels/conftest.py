"""Compiling ahead of time for an H100, through ptxas, on a machine without a GPU."""

import functools
import re

import jax
import pytest

from pallas_kernels import compat

TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@pytest.fixture
def h100s(monkeypatch):
    """h100s(count): so many H100s of one host, that can be compiled for but not run on."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs jax-cuda13-plugin to compile for a GPU")
    if compat.unavailable() is not None:
        pytest.skip(compat.unavailable())
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax.experimental import topologies

    describe = functools.partial(topologies.get_topology_desc, platform="cuda", topology_name="", target_config=TARGET)
    return lambda count: describe(topology=f"1x{count}x1").devices


@pytest.fixture
def spilled(h100s, monkeypatch, capfd):
    """spilled(function, *shapes): compiles it for an H100 and gives the bytes that each of its kernels spills."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    h100 = jax.sharding.SingleDeviceSharding(h100s(1)[0])

    def compiled(function, *shapes):
        put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h100)
        capfd.readouterr()
        jax.jit(function).lower(*jax.tree.map(put, shapes)).compile()
        text = "".join(capfd.readouterr())
        kernel = r"Compiling entry function '(\w+)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores"
        return {name: int(stores) for name, stores in re.findall(kernel, text, re.DOTALL)}

    return compiled
