"""Two processes that Open MPI starts find each other, and compute what one does."""

import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests import runs


@pytest.mark.faults
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI (Debian: openmpi-bin)")
def test_mpirun_starts_two_processes_of_one_run(tmp_path, flags, unbroken):
    workdir = tmp_path / "run"
    start = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m", "experiments.train"]
    flags = runs.changed(flags, f"--workdir={workdir}", "--distributed.heartbeat=10")
    done = subprocess.run(
        [*start, *flags], env=runs.environment(), capture_output=True, text=True, cwd=runs.ROOT, timeout=400
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "devices: 2 x" in done.stderr + done.stdout
    ours, theirs = runs.records(workdir), runs.records(unbroken)
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    # two processes sum the same float32 numbers in another order
    np.testing.assert_allclose([loss for _, loss in ours], [loss for _, loss in theirs], rtol=1e-5)
