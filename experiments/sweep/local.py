"""Runs of a sweep as processes of this machine, with its devices shared out among them.

Each run is a process group of its own that the kernel kills with the sweep, so a killed sweep leaves nothing
behind; started again, it skips what is finished and the runs resume from their checkpoints.
"""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from experiments import progress
from experiments.sweep import plan

CHILD = Path(__file__).with_name("child.py")
POLL = 0.1  # seconds
BEAT = 30.0  # seconds between lines of progress where there is no terminal
GRACE = 120.0  # seconds for a run that is asked to stop; it saves first
FREE = 10.0  # seconds that a killed run may take to let go of its directory
STOPPED = 75
LINES = 8  # of a failed run's log that are shown


@dataclasses.dataclass
class Slot:
    """A share of the machine, and the run in it."""

    environment: dict
    cpus: str
    run: plan.Run | None = None
    process: subprocess.Popen | None = None


def slots(jobs=None, environment=None):
    """The machine in `jobs` shares (None: one for each GPU, without GPUs one for every two CPUs).

    GPUs are dealt out by CUDA_VISIBLE_DEVICES; where there are more jobs than GPUs, jobs that share one get a
    part of its memory each. CPUs are dealt out by affinity, which is also how many threads XLA starts.
    """
    environment = os.environ if environment is None else environment
    gpus = _gpus(environment)
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    jobs = jobs or len(gpus) or max(1, len(cpus) // 2)
    made = []
    for index in range(jobs):
        own = {}
        if gpus:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(_share(gpus, index, jobs))
            if jobs > len(gpus):
                own["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.9 / -(-jobs // len(gpus)):.2f}"
        made.append(Slot(own, ",".join(map(str, _share(cpus, index, jobs)))))
    return made


def _share(things, index, jobs):
    if not things:
        return []
    return things[index::jobs] if jobs <= len(things) else [things[index % len(things)]]


def _gpus(environment):
    """Names of the GPUs that runs may use."""
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    if "CUDA_VISIBLE_DEVICES" in environment:
        return [name for name in environment["CUDA_VISIBLE_DEVICES"].split(",") if name and name != "-1"]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return [str(i) for i, _ in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU "))]


class Listed:
    """The runs of a list, in its order: what `Local` asks for the next one."""

    def __init__(self, runs):
        self.total, self.waiting = len(runs), list(runs)

    def next(self):
        """A run to start, or None: nothing now (and nothing ever, when no run is under way)."""
        return self.waiting.pop(0) if self.waiting else None

    def done(self, run, ok):
        """Told once about every run that was returned and has ended."""


class Local:
    """Runs what a source gives until it gives no more; see `Listed` for what a source is."""

    def __init__(self, root, source, jobs=None):
        self.root, self.source = root, source
        self.slots = slots(jobs)
        self.finished, self.failed = [], []
        self.signals = 0
        self.start = time.monotonic()
        self.work = 0.0  # runs' worth of steps made by this process
        self.begun = {}  # the step at which a run was started here

    def run(self):
        """Returns the exit code: 0 all finished, 1 some failed, 75 stopped by a signal."""
        shown = Shown(self)
        before = {number: signal.signal(number, self._signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self.signals:
                self._fill(shown)
                if not any(slot.run for slot in self.slots):
                    break
                time.sleep(POLL)
                self._collect(shown)
                shown.beat()
            if self.signals:
                self._stop(shown)
        finally:
            for slot in self.slots:
                _kill(slot.process)
            for number, handler in before.items():
                signal.signal(number, handler)
            shown.close()
        return self._end()

    def _signal(self, number, _):
        self.signals += 1

    def _fill(self, shown):
        for slot in self.slots:
            while slot.run is None and not self.signals:
                run = self.source.next()
                if run is None:
                    return
                if (run.workdir / "report.json").exists():
                    self._ended(run, 0, shown, "was finished already")
                else:
                    self._launch(slot, run)
                    shown.say(f"started {run.id}  {run.describe()}")

    def _launch(self, slot, run):
        limit = time.monotonic() + FREE
        while plan.held(run.workdir) and time.monotonic() < limit:
            time.sleep(POLL)
        command = run.command()
        (run.workdir / "outcome.json").unlink(missing_ok=True)
        self.begun[run.id] = plan.last_step(run.workdir / "metrics.jsonl")
        wrapper = [sys.executable, "-S", str(CHILD), str(os.getpid()), slot.cpus]
        with open(run.log, "a") as log:
            print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {' '.join(command)}", file=log, flush=True)
            slot.process = subprocess.Popen(
                [*wrapper, *command],
                env=os.environ | shared_cache(self.root) | slot.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        slot.run = run

    def _collect(self, shown):
        for slot in self.slots:
            if slot.run is None or slot.process.poll() is None:
                continue
            _kill(slot.process)  # what is left of its group
            run, code = slot.run, slot.process.returncode
            slot.run = slot.process = None
            self._ended(run, code, shown)

    def _ended(self, run, code, shown, how="finished"):
        ok = code == 0 and (run.workdir / "report.json").exists()
        self.work += self._made(run)
        self.begun.pop(run.id, None)
        if ok:
            self.finished.append(run)
            shown.say(f"{how} {run.id}  {run.describe()}")
        elif not self.signals:
            from experiments import files

            reason = _reason(code)
            files.write_json(run.workdir / "outcome.json", {"code": code, "reason": reason})
            self.failed.append((run, reason))
            shown.say(f"failed {run.id} ({reason})  {run.describe()}")
        if ok or not self.signals:  # a run that was stopped has not ended
            self.source.done(run, ok)

    def _stop(self, shown):
        """Asks the runs to save and end; a second signal, or none of them ending, kills them."""
        shown.say("stopping: the runs save first; a second signal kills them")
        for slot in self.slots:
            if slot.run:
                _send(slot.process, signal.SIGTERM)
        limit = time.monotonic() + GRACE
        while any(slot.run for slot in self.slots) and self.signals < 2 and time.monotonic() < limit:
            time.sleep(POLL)
            self._collect(shown)

    def _made(self, run):
        """Which share of a run's steps this process has seen made."""
        begun = self.begun.get(run.id)
        if begun is None:
            return 0.0
        return max(plan.last_step(run.workdir / "metrics.jsonl") - begun, 0) / run.cfg.steps

    def left(self):
        """Seconds until the end if all goes on as it went; None before anything can be said."""
        under_way = [slot.run for slot in self.slots if slot.run]
        made = self.work + sum(map(self._made, under_way))
        begun = sum(self.begun[run.id] / run.cfg.steps for run in under_way)
        rest = self.source.total - len(self.finished) - len(self.failed) - begun - sum(map(self._made, under_way))
        return (time.monotonic() - self.start) * max(rest, 0) / made if made else None

    def _end(self):
        for run, reason in self.failed:
            print(f"failed: {run.id} ({run.describe()}): {reason}; the end of {run.log}:")
            for line in run.log.read_text(errors="replace").splitlines()[-LINES:]:
                print(f"    {line}")
        if self.signals:
            done = f"{len(self.finished)} of {self.source.total} runs are finished"
            kept = f"what the others saved is in {self.root}"
            print(f"sweep stopped, resumable: run the same command; {done}, {kept}", file=sys.stderr)
            return STOPPED
        print(f"finished {len(self.finished)} of {self.source.total} runs in {self.root}", flush=True)
        return 1 if self.failed else 0


class Shown:
    """The sweep's progress: a live line on a terminal, elsewhere a line now and then; both on stderr."""

    def __init__(self, local):
        self.local, self.last = local, time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            columns = (progress.BarColumn(), progress.TextColumn("{task.fields[text]}"))
            self.bar = progress.Bar(*columns, console=progress.Console(stderr=True), transient=True)
            self.task = self.bar.add_task("runs", total=local.source.total, text="")
            self.bar.start()

    def say(self, text):
        """A line that stays."""
        if self.bar:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            progress.say(text)

    def beat(self):
        """Shows how far the sweep is, if it is time to."""
        wait = 1.0 if self.bar else BEAT
        if time.monotonic() - self.last < wait:
            return
        self.last = time.monotonic()
        local = self.local
        here = [slot.run for slot in local.slots if slot.run]
        steps = "  ".join(f"{r.id} {plan.last_step(r.workdir / 'metrics.jsonl')}/{r.cfg.steps}" for r in here)
        left = local.left()
        text = f"{len(local.finished)}/{local.source.total} finished, {len(local.failed)} failed  "
        text += f"{steps}  time left {'?' if left is None else progress.clock(left)}"
        if self.bar:
            self.bar.update(self.task, completed=len(local.finished) + len(local.failed), text=text)
        else:
            progress.say(text)

    def close(self):
        """Ends the live line."""
        if self.bar:
            self.bar.stop()


def shared_cache(root):
    """Environment variables by which runs share, in the sweep's directory, what they compile."""
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(root / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return {name: os.environ.get(name, value) for name, value in own.items()}


def _send(process, number):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _kill(process):
    if process is not None:
        _send(process, signal.SIGKILL)
        process.wait()


def _reason(code):
    if code == STOPPED:
        return "stopped by a signal"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (", perhaps for want of memory" if name == "SIGKILL" else "")
