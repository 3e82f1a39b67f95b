"""Sweeps: the machine shared out, failures named, no process left behind, the way back after a kill."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.quickstart import quickstart
from experiments.sweep import __main__ as command_line
from experiments.sweep import local, plan

ROOT = Path(__file__).parents[2]
FILE = """
from experiments.sweep import grid
from seqmix.mixers.linear.linear_attention import LinearAttention

def pair():
    small = {"model.mixers": (LinearAttention(heads=2, chunk=16),), "model.n_layers": 1}
    for choice in grid(seed=(0, 1)):
        yield small | choice

def space(trial):
    return {"seed": trial.suggest_int("seed", 0, 999), "optim.peak_lr": trial.suggest_float("lr", 1e-3, 1e-2)}
"""
TINY = (
    "--steps=24",
    "--log-every=2",
    "--model.d-model=16",
    "--model.mlp-hidden=0",
    "--data.seq-len=32",
    "--data.batch-size=2",
    "--data.val-fraction=0.2",
    "--optim.warmup=2",
    "--checkpoint.every=4",
    "--eval.every=12",
    "--eval.batches=1",
    "--sample-tokens=0",
)


@pytest.fixture
def sweep(tmp_path):
    path = tmp_path / "pair.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(30):
        (folder / f"{index}.txt").write_text(f"the state of mixer {index} is what it has read\n" * 6)
    return folder


def alive(word):
    """Ids of the processes, but zombies and this one, that have a word in their command."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in command and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def until(condition, seconds=60.0):
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


# The machine


def test_gpus_are_dealt_out(monkeypatch):
    dealt = lambda jobs, **env: [slot.environment for slot in local.slots(jobs, env)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in dealt(2, CUDA_VISIBLE_DEVICES="0,1,2,3")] == ["0,2", "1,3"]
    assert len(dealt(None, CUDA_VISIBLE_DEVICES="0,1,2")) == 3
    shared = dealt(4, CUDA_VISIBLE_DEVICES="5,6")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in shared] == ["5", "6", "5", "6"]
    assert {e["XLA_PYTHON_CLIENT_MEM_FRACTION"] for e in shared} == {"0.45"}
    assert dealt(2, CUDA_VISIBLE_DEVICES="0,1", JAX_PLATFORMS="cpu") == [{}, {}]


def test_cpus_are_dealt_out_whole(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    environment = {"JAX_PLATFORMS": "cpu"}
    assert [slot.cpus for slot in local.slots(2, environment)] == ["0,2,4", "1,3"]
    assert len(local.slots(None, environment)) == 2
    assert [slot.cpus for slot in local.slots(6, environment)] == ["0", "1", "2", "3", "4", "0"]


class Fake(plan.Run):
    """A run that does what its program says, in place of training."""

    programs = {}

    def command(self):
        self.workdir.mkdir(parents=True, exist_ok=True)
        return [sys.executable, "-S", "-c", self.programs[self.cfg.seed], str(self.workdir)]


GOOD = "import sys, pathlib; pathlib.Path(sys.argv[1], 'report.json').write_text('{}')"
BAD = "import sys; print('a word'); sys.exit('no such luck')"
# Trains until it is asked to stop; saves; the second time it finishes.
PATIENT = """
import pathlib, signal, sys, time
saved, report = (pathlib.Path(sys.argv[1], name) for name in ("saved", "report.json"))
def stop(*_):
    saved.write_text("")
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
print("started", flush=True)
if saved.exists():
    report.write_text("{}")
else:
    time.sleep(300)
"""


def fakes(root, *programs):
    Fake.programs = dict(enumerate(programs))
    return [Fake(dataclasses.replace(quickstart(), seed=seed), {"seed": seed}, root) for seed in Fake.programs]


def test_a_run_that_fails_stops_no_other_and_is_named(tmp_path, capfd):
    runs = fakes(tmp_path, GOOD, BAD, "import os; os.abort()", GOOD)
    assert local.Local(tmp_path, local.Listed(runs), jobs=2).run() == 1
    out = capfd.readouterr().out
    assert f"failed: {runs[1].id} (seed=1): exit code 1" in out and "    no such luck" in out
    assert f"failed: {runs[2].id} (seed=2): killed by SIGABRT" in out
    assert "finished 2 of 4 runs" in out
    states = [plan.state(run.workdir, 1).name for run in runs]
    assert states == ["finished", "failed", "failed", "finished"]
    Fake.programs = dict.fromkeys(Fake.programs, GOOD)  # tried again, and well this time
    assert local.Local(tmp_path, local.Listed(runs), jobs=2).run() == 0
    assert [plan.state(run.workdir, 1).name for run in runs] == ["finished"] * 4


def test_a_stopped_sweep_stops_its_runs_and_says_so(tmp_path):
    runs = fakes(tmp_path, PATIENT, GOOD)

    def stop():
        until(lambda: runs[0].log.exists() and "started" in runs[0].log.read_text().splitlines())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    source, told = local.Listed(runs), []
    source.done = lambda run, ok: told.append(run)
    assert local.Local(tmp_path, source, jobs=1).run() == 75
    thread.join()
    assert not told, "a run that was stopped counts as ended"
    assert (runs[0].workdir / "saved").exists() and plan.state(runs[0].workdir, 1).name == "waiting"
    assert plan.state(runs[1].workdir, 1).name == "waiting", "no run starts after the signal"
    assert local.Local(tmp_path, local.Listed(runs), jobs=1).run() == 0


def test_a_run_leaves_no_process_of_its_group(tmp_path):
    worker = f"import time; '{tmp_path}'; time.sleep(600)"
    program = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {worker!r}]);" + GOOD
    (run,) = fakes(tmp_path, program)
    assert local.Local(tmp_path, local.Listed([run])).run() == 0
    assert until(lambda: not alive(str(tmp_path)), 5)


def test_a_child_dies_with_its_parent(tmp_path):
    if sys.platform != "linux":
        pytest.skip("parent death signals are Linux's")
    sleeper = f"'{tmp_path}'; import time; time.sleep(600)"
    start = [sys.executable, "-S", str(local.CHILD)]
    parent = "import os, subprocess, sys; subprocess.run([*%r, str(os.getpid()), '', sys.executable, '-S', '-c', %r])"
    process = subprocess.Popen([sys.executable, "-S", "-c", parent % (start, sleeper)])
    # The sleeper itself: its parent's command has the word too.
    assert until(lambda: any(pid != process.pid for pid in alive(str(tmp_path))))
    process.kill()
    process.wait()
    assert until(lambda: not alive(str(tmp_path)), 5)


def test_a_command_reads_the_machine_it_is_on(tmp_path):
    out = tmp_path / "cpus"
    cpu = min(os.sched_getaffinity(0))
    program = f"import os; open({str(out)!r}, 'w').write(str(os.sched_getaffinity(0)))"
    subprocess.run([sys.executable, "-S", str(local.CHILD), str(os.getpid()), str(cpu), sys.executable, "-c", program])
    assert out.read_text() == str({cpu})


# Other ways to run


def test_submitit_puts_a_job_back_and_it_resumes(tmp_path):
    pytest.importorskip("submitit")
    from experiments.sweep import slurm

    runs = fakes(tmp_path, PATIENT, GOOD)
    runs[1].workdir.mkdir()
    (runs[1].workdir / "report.json").write_text("{}")  # finished: not submitted
    (job,) = slurm.submit(runs, tmp_path, cluster="local")
    assert until(lambda: runs[0].log.exists() and "started" in runs[0].log.read_text())
    (task,) = alive(f"submitit.core._submit {tmp_path}")
    os.kill(task, signal.SIGUSR2)  # what Slurm sends before the time is up
    assert job.result() == 0
    assert runs[0].log.read_text().count("started") == 2
    assert plan.state(runs[0].workdir, 1).name == "finished"


def test_slurm_refuses_what_it_does_not_know(tmp_path):
    pytest.importorskip("submitit")
    from experiments.sweep import slurm

    with pytest.raises(ValueError, match="^--launcher=slurm: "):
        slurm.submit(fakes(tmp_path, GOOD), tmp_path, options={"partitoin": "x"}, cluster="local")


def test_optuna_goes_on_after_a_kill(tmp_path, sweep):
    pytest.importorskip("optuna")
    from experiments.sweep import tuner

    space = plan.function(str(sweep), "space")
    source = lambda total: tuner.Trials(space, quickstart(), tmp_path, (), total)
    before = source(3)
    first, second = before.next(), before.next()

    def finish(study, run, loss):
        run.workdir.mkdir(exist_ok=True)
        (run.workdir / "report.json").write_text(json.dumps({"loss": loss}))
        study.done(run, True)

    finish(before, first, 1.5)  # and then it is killed, the second under way
    after = source(3)
    resumed, third = after.next(), after.next()
    assert resumed.id == second.id and third.id not in (first.id, second.id)
    assert after.next() is None
    finish(after, resumed, 0.5)
    after.done(third, False)
    study = source(3).study
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "COMPLETE", "FAIL"]
    assert study.best_value == 0.5
    assert [run.id for run in source(3).runs()] == [first.id, second.id, third.id]


# The whole


def test_a_sweep_that_was_killed_finishes_by_the_same_command(tmp_path, sweep, corpus, capfd):
    root = tmp_path / "runs"
    arguments = ["--config=quickstart", f"--sweep={sweep}", f"--workdir={root}", f"--data.path={corpus}", *TINY]
    arguments += ["--jobs=1"]
    handler = signal.getsignal(signal.SIGINT)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-m", "experiments.sweep", *arguments]
    process = subprocess.Popen(start, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    assert until(lambda: list(root.glob("*/checkpoints/00000004")) or process.poll() is not None, 300)
    assert process.poll() is None, "it ended before it was killed"
    process.kill()
    process.wait()
    assert until(lambda: not alive(str(root)), 5), "a run outlives its sweep"
    assert not list(root.glob("*/report.json"))

    done = subprocess.run(start, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "finished 2 of 2 runs" in done.stdout and "started" in done.stderr
    folders = [path.parent for path in root.glob("*/report.json")]
    assert len(folders) == 2
    for folder in folders:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 25))
    assert sum("resumed from step" in (folder / "log.txt").read_text() for folder in folders) == 1

    logs = [(folder / "log.txt").read_text() for folder in folders]
    assert command_line.main(arguments) == 0  # nothing is left to do
    assert "was finished already" in capfd.readouterr().err
    assert logs == [(folder / "log.txt").read_text() for folder in folders]
    assert command_line.main([*arguments, "--list"]) == 0
    assert capfd.readouterr().out.count("finished") == 2
    assert signal.getsignal(signal.SIGINT) is handler
