"""The chips that programs are compiled for, how many stand together, and the devices of such a topology.

Rates are those of the makers' data sheets; of TPU links the rate one way (Austin et al., "How to Scale Your Model",
2025, chapter 2). Nothing here needs a chip: libtpu and jax's CUDA plug-in compile for one that is absent.
"""

import dataclasses
import difflib
import importlib.util
import math
import os
import re

from experiments.compile import quiet
from seqmix.core import flops


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do."""

    name: str
    kind: str  # as `jax.Device.device_kind` begins
    memory: float  # bytes that a program may use
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s one way: of a TPU's link, or of all links of a GPU to its host's others
    dims: int = 0  # of the torus, 0 where a switch joins all
    outward: float = 0.0  # bytes/s one way of a GPU to other hosts
    most: int = 256  # chips of the largest slice that can be asked for

    @property
    def peak(self) -> float:
        """Dense bfloat16 FLOP/s."""
        return flops.peak_flops(self.kind)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5e", 15.75 * 2**30, 819e9, 45e9, dims=2),
        Chip("v5p", "TPU v5p", 95.7 * 2**30, 2765e9, 90e9, dims=3),
        Chip("v6e", "TPU v6e", 31.25 * 2**30, 1640e9, 90e9, dims=2),
        Chip("h100", "NVIDIA H100", 79.1 * 2**30, 3352e9, 450e9, outward=50e9),
    )
}

# What XLA wants to know of an H100 that is not there.
H100 = """
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


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of a kind: a TPU slice by the sides of its box, GPUs as (hosts, GPUs of each)."""

    chip: Chip
    sides: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of chips."""
        return math.prod(self.sides)

    def __str__(self):
        return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

    def place(self, index: int) -> tuple[int, ...]:
        """Coordinates of the chip that comes so far in the order of a program's devices, by the box alone."""
        place = []
        for side in reversed(self.sides):
            index, at = divmod(index, side)
            place.append(at)
        return tuple(reversed(place))

    def rate(self, places) -> float:
        """Bytes/s that each of a group of chips can send to the others, as a ring or ring of rings does it.

        places: their coordinates. On a torus each side that the group spans adds its links, both ways round where
        they close; among GPUs the slower of the links inside a host and between hosts counts.
        """
        if not self.chip.dims:
            return self.chip.outward if len({place[0] for place in places}) > 1 else self.chip.link
        links = 0
        for side, at in zip(self.sides, zip(*places, strict=True), strict=True):
            # A side closes to a ring in whole cubes of 4 of v5p, and in whole pods of v5e and v6e.
            closes = len(set(at)) == side and (side % 4 == 0 if self.chip.dims == 3 else side == 16)
            links += (2 if closes else 1) if len(set(at)) > 1 else 0
        return self.chip.link * max(links, 1)


def parse(text: str) -> Topology:
    """The topology of `v5p:4x4x4`, `v5e:16x16`, `v6e:8x8` or `h100:1x8`; raises ValueError in one line."""
    name, _, box = text.partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(name, CHIPS, 1, 0)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"--topology: expected one of {', '.join(CHIPS)} before the colon, got {name!r}{hint}")
    chip = CHIPS[name]
    count = chip.dims or 2
    example = {"v5p": "v5p:4x4x4", "h100": "h100:1x8 (hosts x GPUs)"}.get(name, f"{name}:4x4")
    if not re.fullmatch(r"\d+(x\d+)" + f"{{{count - 1}}}", box) or "0" in re.findall(r"\d+", box):
        raise ValueError(f"--topology: expected {count} positive sides as in {example}, got {text!r}")
    made = Topology(chip, tuple(map(int, box.split("x"))))
    if made.size > chip.most:
        raise ValueError(f"--topology: expected at most {chip.most} chips, got {made.size} in {text}")
    return made


def standard(chip: str, size: int) -> Topology:
    """A box of so many chips, a power of two, as near to a cube or square as there is; GPUs eight to a host."""
    kind = CHIPS[chip]
    if not kind.dims:
        return Topology(kind, (max(size // 8, 1), min(size, 8)))
    sides = [1] * kind.dims
    for _ in range(size.bit_length() - 1):
        sides[sides.index(min(sides))] *= 2
    return Topology(kind, tuple(sorted(sides)))


def environment():
    """Settings without which no compiler for an absent chip starts; to be called before jax is imported."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks a metadata server for the chips
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else two processes at once refuse each other
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def devices(topology: Topology) -> list:
    """Devices that can be compiled for and not run on; raises ValueError in one line where no compiler is at hand or
    the topology does not exist.
    """
    from jax.experimental import topologies

    try:
        if topology.chip.dims:
            if not _installed("libtpu"):
                raise ValueError("--topology: TPUs need libtpu: make targets, then .venv-targets/bin/python")
            with quiet.stderr():
                return list(topologies.get_topology_desc(platform="tpu", topology_name=str(topology)).devices)
        if not _installed("jax_plugins.xla_cuda13"):
            raise ValueError("--topology: GPUs need jax's CUDA plug-in: make targets, then .venv-targets/bin/python")
        box = "{}x1x{}".format(*topology.sides)
        with quiet.stderr():
            found = topologies.get_topology_desc(platform="cuda", topology_name="", target_config=H100, topology=box)
            return list(found.devices)
    except ValueError:
        raise
    except Exception as error:  # whatever the plug-in throws at a box that it does not know
        raise ValueError(f"--topology: {topology} cannot be described: {str(error).splitlines()[0]}") from None


def _installed(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package around it
        return False
