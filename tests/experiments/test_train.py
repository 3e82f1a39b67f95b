"""The runner end to end: a run that is killed or stopped and started again has an unbroken one's losses."""

import random
import shutil
import signal
from pathlib import Path

import pytest

from tests import runs
from tests.experiments.conftest import STEPS
from tests.runs import changed, data_files, flip, interrupt, launch, records, same_run, start, steps


def test_a_run_reports(unbroken):
    workdir, done = unbroken
    losses = [loss for _, loss in records(workdir)]
    assert [step for step, _ in records(workdir)] == list(range(1, STEPS + 1))
    assert losses[-1] < losses[0]
    bits = float(done.stdout.splitlines()[-1].removeprefix("val_bits_per_byte="))
    assert 0 < bits < 9
    assert "gzip" in done.stdout and "unigram" in done.stdout
    assert "goodput" in done.stdout and "starts: 1" in done.stdout
    assert steps(workdir) == [28, STEPS]


def test_sigkill_and_restart(tmp_path, flags, unbroken):
    after = random.Random().randrange(5, STEPS - 6)
    at_once = "--checkpoint.background=False"  # so that a step's checkpoint is there when the next one is logged
    code, _ = interrupt((*flags, at_once), tmp_path / "run", signal.SIGKILL, after)
    assert code == -signal.SIGKILL, f"killed after {after}"
    done = launch("train", *flags, f"--workdir={tmp_path / 'run'}")
    assert "resumed from step" in done.stderr
    same_run(tmp_path / "run", unbroken[0])


def test_sigterm_saves_and_restart(tmp_path, flags, unbroken):
    code, errors = interrupt(flags, tmp_path / "run", signal.SIGTERM, 6)
    assert code == 75, errors[-2000:]
    assert "resumable" in errors and f"what it saved is in {tmp_path}" in errors
    logged = records(tmp_path / "run")[-1][0]
    done = launch("train", *flags, f"--workdir={tmp_path / 'run'}")
    assert f"resumed from step {logged}" in done.stderr
    same_run(tmp_path / "run", unbroken[0])


def test_what_a_run_compiles_is_read_by_its_next_start(tmp_path, flags, unbroken):
    """As is seen where it is damaged: jax says so, and compiles again."""
    environment, workdir = runs.environment(JAX_COMPILATION_CACHE_DIR=""), tmp_path / "run"
    launch("train", *flags, f"--workdir={workdir}", env=environment)
    (entry,) = (workdir / "compiled").glob("jit__step-*-cache")
    entry.write_bytes(b"damage")
    shutil.rmtree(workdir / "checkpoints")
    done = launch("train", *flags, f"--workdir={workdir}", env=environment)
    assert "Error reading persistent compilation cache entry for 'jit__step'" in done.stderr
    same_run(workdir, unbroken[0])


def test_damaged_checkpoint_falls_back(tmp_path, flags, unbroken):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    newest = workdir / "checkpoints" / f"{STEPS:08d}"
    victim = max(data_files(newest), key=lambda path: path.stat().st_size)
    flip(victim)
    done = launch("train", *flags, f"--workdir={workdir}")
    assert "damaged" in done.stderr and victim.name in done.stderr and "resumed from step 28" in done.stderr
    same_run(workdir, unbroken[0])


@pytest.mark.parametrize(
    "change, field", [("--optim.peak-lr=0.5", "optim.peak_lr"), ("--model.d-model=64", "model.d_model")]
)
def test_another_config_is_refused(flags, unbroken, change, field):
    workdir = unbroken[0]
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and p.name != "lock"}
    done = launch("train", *changed(flags, change), f"--workdir={workdir}", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and field in done.stderr and done.stderr.count("\n") == 1
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and p.name != "lock"}


def test_other_data_is_refused(flags, unbroken):
    folder = Path(next(flag for flag in flags if flag.startswith("--data.path=")).split("=")[1])
    first = sorted(folder.iterdir())[0]
    content = first.read_text()
    try:
        first.write_text(content.replace("mixer", "fixer"))
        done = launch("train", *flags, f"--workdir={unbroken[0]}", check=False)
    finally:
        first.write_text(content)
    assert done.returncode == 2
    assert f"other data: source: {folder}" in done.stderr.splitlines()[-1]


def test_a_signal_before_the_first_step_ends_the_process(tmp_path, flags):
    process = start("train", *flags, f"--workdir={tmp_path / 'run'}")
    for line in process.stderr:
        if line.startswith("initialising the weights ..."):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "resumable" in errors
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_dry_run_looks_at_everything(flags):
    done = launch("train", *flags, "--dry-run")
    assert int(done.stdout.splitlines()[-1].removeprefix("params=")) > 0
    assert "data: 60 documents" in done.stdout and "the mesh takes 1, this machine has 1\n" in done.stdout
    done = launch("train", *flags, "--mesh.data=2", "--dry-run")
    assert "the mesh takes 2, this machine has 1; a run here would be refused" in done.stdout
    done = launch("train", *changed(flags, "--data.path=/nowhere"), "--dry-run", check=False)
    assert done.returncode == 2 and done.stderr == "error: --data.path: no such file or directory: /nowhere\n"
