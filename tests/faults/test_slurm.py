"""A job of two nodes that Slurm takes away and starts again: it finishes by itself, with the losses of a whole run."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import runs, slurm

HOSTS = Path("/etc/hosts")


@pytest.fixture
def nodes():
    """The nodes' names resolve, as process 0 listens on the first one's."""
    before = HOSTS.read_text()
    try:
        HOSTS.write_text(before.rstrip("\n") + "\n127.0.0.1 n1 n2\n")
    except OSError:
        pytest.skip("/etc/hosts cannot be written")
    yield
    HOSTS.write_text(before)


@pytest.mark.faults
def test_3_slurm_puts_a_job_back(tmp_path, flags, unbroken, nodes):
    workdir, log, script = tmp_path / "run", tmp_path / "log.txt", tmp_path / "job.sh"
    flags = runs.changed(flags, "--steps=60", f"--workdir={workdir}", "--distributed.heartbeat=10")
    script.write_text(f"#!/bin/bash\nexec srun {sys.executable} -m experiments.train {' '.join(flags)}\n")
    with slurm.loopback(tmp_path / "slurm") as conf:
        environment = runs.environment(SLURM_CONF=str(conf))

        def ask(*command):
            options = dict(env=environment, capture_output=True, text=True, cwd=runs.ROOT)
            return subprocess.run(command, check=True, **options).stdout.strip()

        def until(what, seconds=240):
            limit = time.monotonic() + seconds
            while not what():
                assert time.monotonic() < limit, log.read_text()[-3000:] if log.exists() else "no log"
                time.sleep(0.1)

        sized = ("-N2", "-n2", "--ntasks-per-node=1", "--requeue", "--open-mode=append", f"--output={log}")
        job = ask("sbatch", "--parsable", *sized, str(script))
        until(lambda: log.exists() and "step 10/" in log.read_text())
        ask("scontrol", "requeue", job)
        until(lambda: "saving at the next step" in log.read_text(), 30)
        state = lambda: ask("squeue", "-h", "-j", job, "-o", "%T")
        until(lambda: state() == "PENDING", 60)
        ask("scontrol", "update", f"job={job}", "StartTime=now")  # else it waits for two minutes
        until(lambda: "val_bits_per_byte" in log.read_text())
        until(lambda: state() in ("", "COMPLETED"), 60)
    starts = [json.loads(line) for line in (workdir / "starts.jsonl").read_text().splitlines()]
    assert [start["slurm_restarts"] for start in starts] == [0, 1] and starts[1]["processes"] == 2
    assert starts[1]["step"] >= 10 and starts[1]["redone"] == 0
    assert "starts: 2, steps made again after a stop: 0" in log.read_text()
    ours, theirs = runs.records(workdir), runs.records(unbroken)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    # two processes sum the same float32 numbers in another order
    np.testing.assert_allclose([loss for _, loss in ours], [loss for _, loss in theirs], rtol=1e-5)
