"""The watchdog ends a process that does nothing, with its stacks; a beating one is left alone."""

import subprocess
import sys
import time

import pytest

from tests import runs

PROGRAM = """
import ctypes, sys, time
from experiments import process
dog = process.Watchdog(float(sys.argv[1]), sys.argv[2])
dog.start()
def stuck():
    print("stuck", flush=True)
    {}
for _ in range(20):
    time.sleep(0.1)
    dog.beat()
{}
dog.close()
print("done")
"""


def _run(folder, limit, action, end):
    program = PROGRAM.format(action, end)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program, str(limit), str(folder)],
        env=runs.environment(),
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, time.monotonic() - began


def test_a_process_that_does_nothing_is_ended(tmp_path):
    done, _ = _run(tmp_path, 1, "time.sleep(60)", "stuck()")
    assert done.returncode == 1 and done.stdout == "stuck\n"
    assert "error: watchdog: no step for 1 s; process 0 was at" in done.stderr and "in stuck" in done.stderr
    assert "in stuck" in (tmp_path / "stacks.0.txt").read_text()


@pytest.mark.parametrize("limit", [1, 0])
def test_a_process_that_beats_is_left_alone(tmp_path, limit):
    done, _ = _run(tmp_path, limit, "pass", "")
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.faults
def test_a_process_that_keeps_the_interpreter_is_ended_too(tmp_path):
    """PyDLL calls hold the interpreter's lock, so no Python thread can run: the timer outside Python acts."""
    done, seconds = _run(tmp_path, 1, "ctypes.PyDLL(None).sleep(60)", "stuck()")
    assert done.returncode == 1 and "in stuck" in done.stderr and seconds < 40
