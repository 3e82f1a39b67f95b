"""Compiling ahead of time for an H100, through ptxas, on a machine without a GPU."""

import collections
import functools
import re

import jax
import pytest

from experiments.compile import chips
from pallas_kernels import compat


@pytest.fixture
def h100s(monkeypatch):
    """h100s(count): so many H100s of one host, that can be compiled for but not run on."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="needs jax-cuda13-plugin to compile for a GPU")
    if compat.unavailable() is not None:
        pytest.skip(compat.unavailable())
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from jax.experimental import topologies

    absent = dict(platform="cuda", topology_name="", target_config=chips.H100)
    describe = functools.partial(topologies.get_topology_desc, **absent)
    return lambda count: describe(topology=f"1x{count}x1").devices


@pytest.fixture
def spilled(h100s, monkeypatch, capfd):
    """spilled(function, *shapes): compiles it for an H100 and gives what kernels of a name spill at most, in bytes.

    No kernel may have `lost_instructions`.
    """
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTX", "1")
    h100 = jax.sharding.SingleDeviceSharding(h100s(1)[0])

    def compiled(function, *shapes):
        put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=h100)
        capfd.readouterr()
        jax.jit(function).lower(*jax.tree.map(put, shapes)).compile()
        text = "".join(capfd.readouterr())
        assert ".entry " in text and not lost_instructions(text)
        kernel = r"Compiling entry function '(\w+)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores"
        most = {}
        for name, stores in re.findall(kernel, text, re.DOTALL):
            most[name] = max(most.get(name, 0), int(stores))
        return most

    return compiled


def lost_instructions(ptx):
    """Instructions that ptxas 13.0 takes for an equal one of the same registers, which a wgmma between them changed."""
    lost = []
    for kernel in ptx.split(".entry ")[1:]:
        made, added, seen = collections.Counter(), collections.Counter(), {}
        for line in kernel.splitlines():
            product = re.search(r"wgmma\.mma_async\S+ \{([^}]*)\}", line)
            if product:
                added.update(re.findall(r"%\w+", product[1]))
                continue
            plain = re.match(r"\s*((?:add|sub|mul|fma|neg|abs|min|max|cvt|ex2|setp|selp)\S*)\s+%\w+, (.*);", line)
            if plain:
                registers = re.findall(r"%\w+", plain[2])
                now = [made[name] for name in registers], [added[name] for name in registers]
                before = seen.get(plain.groups(), now)
                if before[0] == now[0] and before[1] != now[1]:
                    lost.append(line.strip())
                seen[plain.groups()] = now
            target = re.match(r"\s*[a-z]\S*\s+(\{[^}]*\}|%\w+),", line)
            if target:
                made.update(re.findall(r"%\w+", target[1]))
    return lost
