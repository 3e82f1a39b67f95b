"""Two processes of one run on the CPU: resuming with more or fewer, and one of them failing, hanging or frozen.

Each run here starts `python -m experiments.train --distributed.coordinator=HOST:PORT --distributed.processes=2
--distributed.process=N` twice, with gloo between them.
"""

import re
import signal
import socket
import time

import numpy as np
import pytest

from tests import runs

pytestmark = pytest.mark.faults
INJECT = str(runs.ROOT / "tests" / "faults" / "inject.py")


class Pair:
    """Two processes of a run, the output of each in a file, and of both in one in the order of writing."""

    def __init__(self, folder, module, *args, limit=None):
        folder.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        joined = (f"--distributed.coordinator=127.0.0.1:{port}", "--distributed.processes=2")
        self.log, self.ended = folder / "log.txt", [None, None]
        self.limit = ("--distributed.heartbeat=10",) if limit is None else limit
        self.processes = []
        for rank in range(2):
            own = (*joined, f"--distributed.process={rank}", *self.limit)
            with open(self.log, "a") as log:
                one = runs.start(module, *args, *own, stdout=log, stderr=log)
            self.processes.append(one)

    def until(self, text, seconds=240):
        """Waits until the log holds a text."""
        limit = time.monotonic() + seconds
        while text not in self.text():
            assert time.monotonic() < limit and all(p.poll() is None for p in self.processes), self.text()[-3000:]
            time.sleep(0.05)

    def text(self):
        return self.log.read_text()

    def wait(self, seconds):
        """Exit codes, or None for one that still lives after so many seconds."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and any(p.poll() is None for p in self.processes):
            time.sleep(0.05)
        return [p.poll() for p in self.processes]

    def kill(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.fixture
def pair(tmp_path):
    """Starts pairs and leaves no process behind."""
    made = []

    def start(*args, **options):
        made.append(Pair(tmp_path / f"pair{len(made)}", *args, **options))
        return made[-1]

    yield start
    for one in made:
        one.kill()


def _close(workdir, unbroken):
    """The losses of two runs, in training and of the evaluation after it, agree as float32 sums in another order over
    sixty steps do.
    """
    for kind in ("train", "final"):
        ours, theirs = runs.records(workdir, kind), runs.records(unbroken, kind)
        assert ours and [step for step, _ in ours] == [step for step, _ in theirs]
        np.testing.assert_allclose([loss for _, loss in ours], [loss for _, loss in theirs], rtol=1e-5)


def test_10_one_process_then_two(tmp_path, flags, unbroken, pair):
    workdir = tmp_path / "run"
    runs.interrupt(flags, workdir, signal.SIGTERM, 20)
    at = runs.steps(workdir)[-1]
    two = pair("train", *flags, f"--workdir={workdir}")
    assert two.wait(300) == [0, 0], two.text()[-3000:]
    assert f"resumed from step {at}" in two.text() and "devices: 2 x" in two.text()
    _close(workdir, unbroken)


def test_10_two_processes_then_one(tmp_path, flags, unbroken, pair):
    """SIGTERM to one of the two stops both, at the same step, saved."""
    workdir = tmp_path / "run"
    two = pair("train", *runs.changed(flags, "--steps=60"), f"--workdir={workdir}")
    two.until("step 10/")
    two.processes[1].send_signal(signal.SIGTERM)
    assert two.wait(60) == [75, 75], two.text()[-3000:]
    at = runs.steps(workdir)[-1]
    assert 10 <= at < 60 and runs.records(workdir)[-1][0] == at
    done = runs.launch("train", *flags, f"--workdir={workdir}")
    assert f"resumed from step {at}" in done.stderr
    _close(workdir, unbroken)


def test_11_an_exception_on_one_of_two(tmp_path, flags, pair):
    workdir = tmp_path / "run"
    two = pair(INJECT, "raise", "12", *flags, f"--workdir={workdir}")
    two.until("injected at step 12")
    began = time.monotonic()
    assert two.wait(15) == [1, 1], two.text()[-3000:]
    print(f"both ended {time.monotonic() - began:.1f} s after the exception")
    assert two.text().rstrip().endswith("RuntimeError: injected at step 12")
    assert "process 1: Traceback" in two.text()


def test_12_one_of_two_hangs_in_python(tmp_path, flags, pair):
    """Its heart goes on beating, so only the watchdog can notice."""
    limit = 10
    workdir = tmp_path / "run"
    two = pair(INJECT, "hang", "12", *flags, f"--watchdog={limit}", f"--workdir={workdir}")
    two.until("step 10/")
    began = time.monotonic()
    assert two.wait(limit + 20) == [1, 1], two.text()[-3000:]
    print(f"both ended {time.monotonic() - began:.1f} s after the hang; the limit was {limit} s")
    stacks = [(workdir / f"stacks.{rank}.txt").read_text() for rank in range(2)]
    assert "in train_batches" in stacks[1]  # where it sleeps
    assert "in _loop" in stacks[0]
    assert two.text().count("error: watchdog: no step for") == 2


def test_12_one_of_two_is_frozen(tmp_path, flags, pair):
    """The frozen one cannot act: its peer ends with its stacks, and it does so itself once it may run again.

    No save is under way: its barrier may time out first, which ends the peer with one line and no stacks.
    """
    limit = 8
    changed = runs.changed(flags, "--steps=100000", "--checkpoint.every=100000")
    two = pair("train", *changed, f"--watchdog={limit}", f"--workdir={tmp_path / 'run'}")
    two.until("step 30/")
    two.processes[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    while two.processes[0].poll() is None and time.monotonic() < began + limit + 20:
        time.sleep(0.05)
    assert two.processes[0].poll() not in (None, 0), two.text()[-3000:]
    print(f"the peer ended {time.monotonic() - began:.1f} s after the freeze; the limit was {limit} s")
    assert re.search(r'File ".*train.py", line \d+ in _loop', two.text())
    two.processes[1].send_signal(signal.SIGCONT)
    assert two.wait(limit + 20)[1] not in (None, 0), two.text()[-3000:]


def test_one_of_two_is_killed(tmp_path, flags, pair):
    for rank in range(2):
        two = pair("train", *runs.changed(flags, "--steps=100000"), f"--workdir={tmp_path / f'run{rank}'}")
        two.until("step 10/")
        two.processes[rank].kill()
        began = time.monotonic()
        codes = two.wait(30)
        print(f"process {rank} killed: the other ended {time.monotonic() - began:.1f} s later with {codes[1 - rank]}")
        assert codes[1 - rank] not in (None, 0), two.text()[-3000:]
