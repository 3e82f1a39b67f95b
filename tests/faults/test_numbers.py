"""Losses and weights that go wrong: what is kept, what is written down, what is skipped."""

import json

import numpy as np
import pytest

from experiments import manifest
from tests import runs

INJECT = str(runs.ROOT / "tests" / "faults" / "inject.py")


def test_7_a_loss_that_is_not_finite(tmp_path, flags):
    workdir, at = tmp_path / "run", 11
    done = runs.launch(INJECT, "nan", str(at), *flags, "--checkpoint.keep=1", f"--workdir={workdir}", check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: loss nan") and f"at step {at}" in last
    assert runs.steps(workdir) == [8]  # of the one before, and it was not rotated out
    manifest.verify(workdir / "checkpoints" / "00000008")
    assert all(np.isfinite(leaf).all() for tree in runs.weights(workdir).values() for leaf in tree)
    assert [step for step, _ in runs.records(workdir)] == list(range(1, at))
    listed = json.loads((workdir / f"not_finite.{at}.json").read_text())
    assert (listed["step"], listed["batch"], listed["loss"]) == (at, at - 1, "nan")
    assert len(listed["rows"]) == 4
    for row in listed["rows"]:
        assert len(row["tokens"]) == 16
        assert row["documents"] and all(name.endswith(".txt") for name in row["documents"])


@pytest.mark.faults
def test_7_a_weight_that_is_not_finite_is_not_saved(tmp_path, flags):
    workdir = tmp_path / "run"
    done = runs.launch(INJECT, "overflow", "12", *flags, "--checkpoint.keep=1", f"--workdir={workdir}", check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: params/final_norm/scale is not finite after step 12")
    assert runs.steps(workdir) == [8]


@pytest.mark.faults
def test_8_a_loss_spike(tmp_path, flags):
    """The step whose loss is ten times as large changes no weight and no moment, is counted, and the run goes on."""
    workdir, at = tmp_path / "run", 24
    rule = ("--optim.spike-sigma=6", "--optim.spike-window=16", "--checkpoint.every=1", "--checkpoint.keep=99")
    runs.launch(INJECT, "spike", str(at), *runs.changed(flags, "--steps=30", *rule), f"--workdir={workdir}")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train = {record["step"]: record for record in lines if record["kind"] == "train"}
    assert [train[step]["skipped"] for step in (at - 1, at, 30)] == [0, 1, 1]
    assert train[at]["loss"] > 5 * train[at - 1]["loss"] and train[30]["loss"] < train[1]["loss"]
    held = {step: _learned(workdir, step) for step in (at - 2, at - 1, at, at + 1)}
    same = lambda a, b: all(np.array_equal(x, y) for x, y in zip(held[a], held[b], strict=True))
    assert same(at - 1, at)
    assert not same(at - 2, at - 1) and not same(at, at + 1)


def _learned(workdir, step):
    """Weights and the optimiser's state after a step."""
    import jax
    import orbax.checkpoint as ocp

    path = workdir / "checkpoints" / f"{step:08d}"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        params, rest = checkpointer.restore(path / "params"), checkpointer.restore(path / "rest")
    return jax.tree.leaves((params, rest["opt_state"]))
