"""A sweep of four mixers, two learning rates and two seeds, killed twice: some eight minutes on two cores. And one
through a real Slurm whose jobs are put back into the queue.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.report import __main__ as report
from experiments.sweep import plan, slurm
from tests.browser import look
from tests.experiments.test_sweep import GOOD, PATIENT, alive, fakes, until
from tests.slurm import loopback

ROOT = Path(__file__).parents[2]
STEPS = 20
FLAGS = (
    "--config=quickstart",
    "--sweep=mixers",
    "--jobs=2",
    f"--steps={STEPS}",
    "--log-every=5",
    "--data.seq-len=128",
    "--data.batch-size=4",
    "--optim.warmup=5",
    "--checkpoint.every=5",
    "--eval.every=10",
    "--eval.batches=2",
    "--eval.final-batches=8",
    "--sample-tokens=16",
)


@pytest.mark.faults
def test_sixteen_runs_finish_after_two_kills(tmp_path):
    root = tmp_path / "mixers"
    start = [sys.executable, "-m", "experiments.sweep", *FLAGS, f"--workdir={root}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    finished = lambda: {path.parent.name for path in root.glob("*/report.json")}
    training = lambda: {path.parents[1].name for path in root.glob("*/checkpoints/0*")} - finished()

    def kill(least):
        """Kills the sweep once so many runs are finished and another has a checkpoint."""
        process = subprocess.Popen(start, env=environment, cwd=ROOT)
        assert until(lambda: (len(finished()) >= least and training()) or process.poll() is not None, 1500)
        assert process.poll() is None, "it ended before it was killed"
        process.kill()
        process.wait()
        assert until(lambda: not alive(str(root)), 10), "a run outlives its sweep"
        return finished()

    first, kept = kill(2), kill(7)
    assert first < kept and len(kept) < 16
    logs = {name: (root / name / "log.txt").read_text() for name in kept}
    done = subprocess.run(start, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=3000)
    assert done.returncode == 0 and "finished 16 of 16 runs" in done.stdout
    assert len(finished()) == 16
    assert logs == {name: (root / name / "log.txt").read_text() for name in kept}  # finished runs were left alone
    assert any("resumed from step" in (root / name / "log.txt").read_text() for name in finished())
    for name in finished():
        records = map(json.loads, (root / name / "metrics.jsonl").read_text().splitlines())
        assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, STEPS + 1))
    out = tmp_path / "report.html"
    assert report.main([str(root), f"--out={out}"]) == 0
    dom, console = look(out)
    assert console == [] and all(f"<code>{name}</code>" in dom for name in finished())
    assert "16 runs: 16 finished" in dom


@pytest.mark.faults
@pytest.mark.parametrize(
    "how", [["scancel", "--signal=USR2"], ["scontrol", "requeue"]], ids=["time is up", "preempted"]
)
def test_slurm_puts_a_job_back_and_it_resumes(tmp_path, monkeypatch, how):
    pytest.importorskip("submitit")
    with loopback(tmp_path / "slurm") as config:
        monkeypatch.setenv("SLURM_CONF", str(config))
        root = tmp_path / "sweep"
        root.mkdir()
        runs = fakes(root, PATIENT, GOOD)
        jobs = slurm.submit(runs, root, options={"partition": "cpu", "timeout-min": "10"})
        first = runs[0].workdir
        assert until(lambda: runs[0].log.exists() and "started" in runs[0].log.read_text())
        assert until(lambda: plan.state(runs[1].workdir, 1).name == "finished")
        subprocess.run([*how, jobs[0].job_id], check=True)
        assert until((first / "saved").exists), "the run was not asked to save"

        def finished():
            # Slurm lets a job that was put back wait for two minutes.
            now = ["scontrol", "update", f"job={jobs[0].job_id}", "StartTime=now"]
            subprocess.run(now, capture_output=True)
            time.sleep(1)
            return (first / "report.json").exists()

        assert until(finished, 120)
        assert runs[0].log.read_text().count("started") == 2
        assert not slurm.submit(runs, root), "what is finished is not submitted"
