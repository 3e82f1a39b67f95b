"""The real training step of a config, compiled for chips that are not here: what it needs and at best takes."""

import math
import os
import re
import time

import jax
import numpy as np

from experiments import loop
from experiments.compile import chips, hlo, quiet
from seqmix.core import sharding

UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TooLarge(Exception):
    """The step does not fit into a chip's memory; the message says by how much."""


def compiled(cfg, topology, devices=None) -> dict:
    """The report on a step of `cfg` on `topology`, plain values for JSON (`docs/compile.md` names them).

    devices: the topology's, or stand-ins for them. Raises ValueError for what a run would refuse, TooLarge where the
    compiler finds that memory does not suffice.
    """
    devices = chips.devices(topology) if devices is None else devices
    mesh = sharding.make_mesh(**loop.mesh_sizes(cfg, len(devices)), devices=devices)
    trainer = loop.Trainer(cfg, mesh)
    state, batch = {"params": trainer.params, **trainer.rest}, trainer.abstract_batch()
    begin, spent = time.perf_counter(), _cpu_seconds()
    with quiet.stderr() as said:
        try:
            program = trainer.compile_step(state, batch)
        except jax.errors.JaxRuntimeError as error:
            raise _too_large(error, topology) or error from None
    seconds, spent = time.perf_counter() - begin, _cpu_seconds() - spent
    cost = hlo.cost(program.as_text())
    if cost.unsaid:  # kernels that do not say their FLOPs: those of the formulas, with what remat repeats
        passes = 4 if cfg.model.remat == "full" else 3
        cost.flops = max(cost.flops, passes / 3 * trainer.flops_per_step / mesh.size)
    report = {
        **describe(cfg, topology, dict(mesh.shape)),
        "jax": jax.__version__,
        "compile_seconds": round(seconds, 1),
        "compile_cpu_seconds": round(spent, 1),
        "involuntary_resharding": said.count("nvoluntary"),
        "memory": memory(program.memory_analysis(), trainer, batch, topology.chip),
        "kernels": cost.kernels,
        "loops_of_unknown_length": cost.guessed,
    }
    return report | times(cost, topology, mesh, trainer.flops_per_step)


def describe(cfg, topology, mesh) -> dict:
    """What a report or an estimate is of."""
    return {
        "config": cfg.name,
        "topology": str(topology),
        "chips": math.prod(mesh.values()),
        "mesh": mesh,
        "seq_len": cfg.data.seq_len,
        "batch_size": cfg.data.batch_size,
        "accumulate": cfg.optim.accumulate,
        "remat": cfg.model.remat,
    }


def memory(found, trainer, batch, chip) -> dict:
    """Bytes on one chip by kind, their sum beside the chip's memory, and the share of it that stays free."""
    state = {key: _bytes(value) for key, value in trainer.rest.items()}
    kinds = {
        "weights": _bytes(trainer.params),
        "moments": state.pop("opt_state"),
        "rest of the state": sum(state.values()),
        "batch": _bytes(batch),
        "temporary": found.temp_size_in_bytes,
        "outputs beside the state": found.output_size_in_bytes - found.alias_size_in_bytes,
        "program": found.generated_code_size_in_bytes,
    }
    # The compiler's own sizes: what it pads counts too.
    total = found.argument_size_in_bytes + sum(list(kinds.values())[4:])
    kinds["padding of the arguments"] = found.argument_size_in_bytes - sum(list(kinds.values())[:4])
    return {"kinds": kinds, "total": total, "chip": chip.memory, "free": 1 - total / chip.memory}


def times(cost, topology, mesh, model_flops) -> dict:
    """FLOPs, bytes and collectives of a chip, the seconds that each at least takes, and the bound on MFU."""
    chip, places = topology.chip, _places(topology, mesh)
    exchanges = []
    for one in sorted(cost.collectives.values(), key=lambda c: -c.sent):
        axes = _axes(one.group, mesh)
        rate = topology.rate([places[index] for index in one.group])
        entry = {"kind": one.kind, "axes": axes, "devices": len(one.group), "count": one.count, "bytes": one.sent}
        exchanges.append(entry | {"seconds": one.sent / rate})
    terms = {
        "compute": cost.flops / chip.peak,
        "memory": cost.bytes / chip.bandwidth,
        "links": sum(entry["seconds"] for entry in exchanges),
    }
    return {
        "model_flops": model_flops,
        "flops": cost.flops,
        "bytes": cost.bytes,
        "collectives": merged(exchanges),
        "seconds": terms,
        **bounds(terms, model_flops, mesh.size, chip),
    }


def bounds(terms, model_flops, count, chip) -> dict:
    """Step time with everything overlapped and with nothing, and the MFU of the former."""
    best = max(terms.values())
    return {"step_seconds": [best, sum(terms.values())], "mfu_bound": model_flops / (best * count * chip.peak)}


def merged(exchanges) -> list:
    """The exchanges with those of one kind over the same axes added up."""
    found = {}
    for one in exchanges:
        held = found.setdefault((one["kind"], one["axes"]), one | {"count": 0, "bytes": 0, "seconds": 0})
        for key in ("count", "bytes", "seconds"):
            held[key] += one[key]
    return list(found.values())


def _cpu_seconds():
    """Of this process's threads and of the assemblers that it waited for."""
    return sum(os.times()[:4])


def _bytes(tree):
    """Of one device's share of a tree of ShapeDtypeStructs with shardings."""
    share = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
    return sum(share(leaf) for leaf in jax.tree.leaves(tree))


def _places(topology, mesh):
    """Coordinates in the topology of the mesh's devices, in the program's order."""
    flat = list(mesh.devices.flat)
    coords = [getattr(device, "coords", None) for device in flat]
    if topology.chip.dims and None not in coords:
        return [tuple(c[: topology.chip.dims]) for c in coords]
    first = min(device.id for device in flat)
    return [topology.place(device.id - first) for device in flat]


def _axes(group, mesh):
    """The mesh axes over which a group of devices differs, joined by `+`."""
    places = np.stack(np.unravel_index(group, tuple(mesh.shape.values())))
    return "+".join(name for name, row in zip(mesh.shape, places, strict=True) if len(set(row.tolist())) > 1)


def _too_large(error, topology):
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return None
    used = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm", text)
    need = f"{float(used[1]) * UNITS[used[2]] / 2**30:.1f} GiB" if used else "more"
    return TooLarge(f"a chip of {topology} has {topology.chip.memory / 2**30:.1f} GiB, the step needs {need}")
