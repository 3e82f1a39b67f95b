"""The search for a mesh, a microbatch and a remat policy: all of them on paper, the best of them compiled."""

import dataclasses

from experiments import progress
from experiments.compile import paper, step
from seqmix.models import checks

FREE = 0.05  # share of a chip's memory that stays free
SHRINK = 0.8  # after a layout that did not fit, only those estimated at so much of its memory are tried


def candidates(cfg, topology, remats=checks.REMAT) -> list[dict]:
    """Estimates of every layout that fits on paper, the one with the least to do in all, nothing overlapped,
    first. The batch of a step stays, its microbatches vary.
    """
    found = []
    for mesh in paper.layouts(
        dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, accumulate=1)), topology.size
    ):
        rows = cfg.data.batch_size // (mesh["data"] * mesh["fsdp"])
        for micro in (n for n in range(1, rows + 1) if rows % n == 0):
            for remat in remats:
                one = paper.estimate(_with(cfg, mesh, micro, remat), topology, mesh)
                if one["memory"]["free"] >= FREE:
                    found.append(one)
    return sorted(found, key=lambda one: one["step_seconds"][1])


def best(cfg, topology, tries, devices=None) -> tuple[list[dict], dict | None]:
    """(the estimates, the report on the first of at most `tries` compiled layouts that fits, or None)."""
    listed = candidates(cfg, topology)
    left = listed
    for _ in range(tries):
        if not left:
            break
        first = left[0]
        told = describe(first)
        try:
            with progress.phase(f"compiling {told}"):
                report = step.compiled(config(cfg, first), topology, devices)
            if report["memory"]["free"] >= FREE:
                return listed, report
            progress.say(f"{told}: leaves {report['memory']['free']:.1%} of the memory free")
        except step.TooLarge as error:
            progress.say(f"{told}: {error}")
        limit = SHRINK * first["memory"]["total"]
        left = [one for one in left if one["memory"]["total"] <= limit]
    return listed, None


def config(cfg, estimate):
    """The config of an estimate."""
    return _with(cfg, estimate["mesh"], estimate["accumulate"], estimate["remat"])


def describe(estimate) -> str:
    """A layout as flags."""
    mesh = " ".join(f"--mesh.{axis}={size}" for axis, size in estimate["mesh"].items())
    return f"{mesh} --optim.accumulate={estimate['accumulate']} --model.remat={estimate['remat']}"


def _with(cfg, mesh, micro, remat):
    return dataclasses.replace(
        cfg,
        mesh=dataclasses.replace(cfg.mesh, **mesh),
        optim=dataclasses.replace(cfg.optim, accumulate=micro),
        model=dataclasses.replace(cfg.model, remat=remat),
    )
