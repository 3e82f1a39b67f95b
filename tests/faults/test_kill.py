"""Runs that are killed, stopped, frozen out or doubled: the same command goes on as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import time

import pytest

from tests import runs

KILLS = 20


def _kill(flags, workdir, moment):
    """Starts a run and kills it at a moment: ("save", n): some microseconds after the n-th save of this start
    began; ("step", n): when n steps were logged; ("start", s): s seconds after its process began. Returns whether
    it was killed before it ended by itself.
    """
    kind, count = moment
    process = runs.start("train", *flags, f"--workdir={workdir}", stderr=subprocess.DEVNULL)
    log, folder = workdir / "metrics.jsonl", workdir / "checkpoints"
    began, seen, before = time.monotonic(), set(), None
    while process.poll() is None and time.monotonic() - began < 300:
        if kind == "start":
            due = time.monotonic() - began > count
        elif kind == "save":
            seen |= {path.name for path in folder.glob("tmp.*")} if folder.exists() else set()
            due = len(seen) >= count
        else:
            size = log.stat().st_size if log.exists() else 0
            before = size if before is None else min(before, size)  # a new start cuts the log first
            due = size - before > 150 * count
        if due:
            time.sleep(random.random() * 0.02)
            process.kill()
            break
        time.sleep(0.0005)
    process.wait(timeout=300)
    return process.returncode == -signal.SIGKILL


def _seconds_to_first_step(flags, workdir):
    """How long a start takes when its programs are in the cache."""
    began = time.monotonic()
    assert _kill(flags, workdir, ("step", 1))
    return time.monotonic() - began


def _starts(workdir):
    path = workdir / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.faults
def test_1_sigkill_at_twenty_moments(tmp_path, flags):
    """In the start, between steps and inside saves; weights, moments and the whole log end equal to the bit."""
    flags = runs.changed(flags, "--steps=400")  # more than a fast machine makes between twenty kills
    workdir, unbroken, killed = tmp_path / "run", tmp_path / "unbroken", []
    runs.launch("train", *flags, f"--workdir={unbroken}")  # compiles
    start = _seconds_to_first_step(flags, tmp_path / "timed")
    for index in range(KILLS):
        kind = ("save", "step", "save", "start")[index % 4]
        most = {"save": 2, "step": 6}.get(kind)
        moment = (kind, random.uniform(0.1, 1) * start if kind == "start" else random.randint(1, most))
        assert _kill(flags, workdir, moment), f"it reached its end after {len(killed)} kills"
        left = [path.name for path in (workdir / "checkpoints").glob("tmp.*")]
        killed.append((moment, left))
    began = time.monotonic()
    runs.launch("train", *flags, f"--workdir={workdir}")
    starts = _starts(workdir)
    print(
        f"{len(killed)} kills, {sum(bool(left) for _, left in killed)} inside a save, last start "
        f"{time.monotonic() - began:.1f} s, steps made again {sum(start['redone'] for start in starts)}: {killed}"
    )
    assert any(left for _, left in killed), "no kill fell into a save"
    assert any(start["step"] for start in starts)
    runs.same_run(workdir, unbroken)
    assert not list((workdir / "checkpoints").glob("tmp.*"))


@pytest.mark.faults
def test_1_sigkill_with_every_comfort(tmp_path, flags):
    """Muon, averaged weights and the spike rule have states too: they come back to the bit."""
    more = (
        "--optim.kind=muon",
        "--optim.ema=0.9",
        "--optim.spike-sigma=3",
        "--optim.spike-window=4",
        "--checkpoint.keep-every=10",
        "--checkpoint.keep-best=1",
        "--steps=24",
    )
    flags = runs.changed(flags, *more)
    runs.launch("train", *flags, f"--workdir={tmp_path / 'whole'}")
    assert _kill(flags, tmp_path / "run", ("save", 2))
    runs.launch("train", *flags, f"--workdir={tmp_path / 'run'}")
    runs.same_run(tmp_path / "run", tmp_path / "whole")
    assert runs.steps(tmp_path / "run") == runs.steps(tmp_path / "whole")


@pytest.mark.faults
def test_2_sigterm_loses_no_step(tmp_path, flags, unbroken):
    workdir = tmp_path / "run"
    code, errors = runs.interrupt(flags, workdir, signal.SIGTERM, 6)
    assert code == 75 and "resumable" in errors
    logged = runs.records(workdir)[-1][0]
    assert runs.steps(workdir)[-1] == logged  # what was logged is saved
    done = runs.launch("train", *flags, f"--workdir={workdir}")
    assert f"resumed from step {logged}" in done.stderr
    assert "starts: 2, steps made again after a stop: 0" in done.stdout
    runs.same_run(workdir, unbroken)


@pytest.mark.faults
def test_14_a_bad_command_fails_before_it_compiles(tmp_path, flags, unbroken):
    """In one line that names the flag, within five seconds of this process's time."""
    for change, message in {
        "--optim.peek-lr=1": "did you mean --optim.peak-lr?",
        "--steps=ten": "--steps: expected an integer, got 'ten'",
        "--optim.peak-lr=-1": "--optim.peak-lr: expected a positive number",
        "--model.mixers.0.kv-heads=3": "--model.mixers.0",
        "--mesh.data=3": "mesh: expected at most 1 devices",
        "--data.path=/nowhere": "--data.path: no such file",
    }.items():
        workdir = tmp_path / "run"
        began = os.times()
        done = runs.launch("train", *runs.changed(flags, change), f"--workdir={workdir}", check=False)
        ended = os.times()
        line = done.stderr.splitlines()[-1]
        assert done.returncode == 2 and line.startswith("error: ") and message in line, (change, line)
        assert "compiling" not in done.stderr and not workdir.exists(), change
        spent = ended.children_user - began.children_user + ended.children_system - began.children_system
        assert spent < 5, (change, spent)


@pytest.mark.faults
def test_15_a_second_run_is_refused(tmp_path, flags):
    workdir = tmp_path / "run"
    first = runs.start("train", *runs.changed(flags, "--steps=100000"), f"--workdir={workdir}")
    try:
        for line in first.stderr:
            if line.startswith("step 1/"):
                break
        second = runs.launch("train", *flags, f"--workdir={workdir}", check=False)
    finally:
        first.kill()
        first.communicate()
    assert second.returncode == 2
    assert second.stderr == f"error: workdir {workdir} is in use by another run\n"


@pytest.mark.faults
def test_15_a_clock_that_jumps(tmp_path, flags, unbroken):
    """Back by an hour, then on by a day: schedules and randomness follow steps, so only the times shown change."""
    program = (
        "import time, runpy\n"
        "clock, looks = time.time, [0]\n"
        "def jumping():\n"
        "    looks[0] += 1\n"
        "    return clock() + (0 if looks[0] < 200 else -3600 if looks[0] < 400 else 86400)\n"
        "time.time = jumping\n"
        "runpy.run_module('experiments.train', run_name='__main__')\n"
        "assert looks[0] > 400\n"
    )
    path = tmp_path / "jumping.py"
    path.write_text(program)
    runs.launch(str(path), *flags, f"--workdir={tmp_path / 'run'}")
    runs.same_run(tmp_path / "run", unbroken)
