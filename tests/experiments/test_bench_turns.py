"""experiments.bench --jobs: cases in processes of their own, of which one at a time measures."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.bench import __main__ as bench
from experiments.bench import turns


@pytest.fixture
def ends_with(tmp_path, monkeypatch):
    """Runs the three cases of SSD, each a shell script that knows its number and folder; gives the exit code."""

    def run(script, *flags):
        process = tmp_path / "process"
        words = "case $word in --out=*) out=${word#--out=};; --case=*) case=${word#--case=};; esac"
        process.write_text(f"#!/bin/sh\nfor word; do {words}; done\nmkdir -p $out\n{script}")
        process.chmod(0o755)
        monkeypatch.setattr(turns.sys, "executable", str(process))
        flags = flags or ("--suite=recurrent", "--only=ssd")
        return bench.main(["run", *flags, "--jobs=3", f"--out={tmp_path / 'out'}"])

    return run


def kept(tmp_path):
    return json.loads((tmp_path / "out/cpu_recurrent.json").read_text())["rows"]


def test_cases_come_in_their_order_and_one_whose_process_dies_is_named(tmp_path, ends_with, capsys):
    script = """
echo started
test $case = 1 && kill -SEGV $$
test $case = 0 && sleep 0.3
echo '{"rows": [{"part": "ssd", "op": "ssd", "batch": '$case'}]}' > $out/found.json
"""
    assert ends_with(script) == 1
    rows = kept(tmp_path)
    assert [row.get("batch") for row in rows] == [0, None, 2]
    assert rows[1]["case"] == "ssd B8 T4096" and "ended with -11: started" in rows[1]["failed"]
    assert "failed: ssd B8 T4096" in capsys.readouterr().err


def test_a_command_that_is_stopped_ends_its_processes_and_keeps_its_rows(tmp_path, ends_with, capsys):
    script = f"""
test $case = 0 && echo '{{"rows": [{{"op": "ssd"}}]}}' > $out/found.json && exit
test $case = 2 && echo $$ > {tmp_path}/lasting
test $case = 1 && sleep 0.5 && kill -TERM {os.getpid()}
exec sleep 60
"""
    assert ends_with(script) == 143
    assert "SIGTERM: bench run of recurrent stopped; rows so far (1) are in" in capsys.readouterr().err
    assert kept(tmp_path) == [{"op": "ssd"}]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "lasting").read_text()), 0)


def test_who_measures_keeps_others_waiting(tmp_path, monkeypatch):
    path = tmp_path / "turn"
    monkeypatch.setenv(turns.TURN, str(path))
    with turns.turn(), turns.turn(), open(path) as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(path) as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_rows_of_cases_that_are_cut_off_are_kept(tmp_path, ends_with):
    rows = '{"rows": [{"op": "ssd", "batch": 1, "tokens": 8, "implementation": "gpu", "fwd_ms": 2.5}]}'
    script = f"[ $case = 1 ] && echo '{rows}' > $out/one.json && sleep 0.2 && kill -TERM $PPID\nexec sleep 30"
    killed = tmp_path / "out/recurrent_cases/2/cpu_recurrent.json"  # of a run before, which kept nothing else
    killed.parent.mkdir(parents=True)
    killed.write_text(rows)
    assert ends_with(script) == 143
    assert [row["fwd_ms"] for row in kept(tmp_path)] == [2.5]
    assert not list((tmp_path / "out").glob("*_cases"))
    assert (tmp_path / "out/recurrent_cases.1/2/cpu_recurrent.json").read_text() == rows


def test_who_measures_stops_the_other_cases_until_it_is_done(tmp_path, monkeypatch):
    path = tmp_path / "turn"
    monkeypatch.setenv(turns.TURN, str(path))
    process = subprocess.Popen(["sleep", "60"])
    for pid in (process.pid, os.getpid(), 2**22 + 1):  # the last is no process
        (tmp_path / f"turn.{pid}").touch()
    try:
        with pytest.raises(KeyError), turns.turn():
            os.waitpid(process.pid, os.WUNTRACED)
            assert state(process.pid) == "T"
            raise KeyError
        os.waitpid(process.pid, os.WCONTINUED)
        assert state(process.pid) in "RS"
    finally:
        process.kill()
        process.wait()


def test_a_case_that_dies_in_its_turn_leaves_no_other_stopped(tmp_path, ends_with):
    script = f"""
test $case = 0 && echo $$ > {tmp_path}/first && sleep 0.5
test $case = 1 && while ! test -s {tmp_path}/first; do sleep 0.05; done \\
  && kill -STOP $(cat {tmp_path}/first) && kill -SEGV $$
echo '{{"rows": [{{"op": "ssd"}}]}}' > $out/found.json
"""
    assert ends_with(script) == 1
    assert len(kept(tmp_path)) == 3


def test_shares_are_of_rows_that_other_processes_gave(tmp_path, ends_with):
    script = """
test $case = 0 && sleep 0.3
times='"fwd_ms": '$((case + 4))', "fwd_bwd_ms": 8'
count='"devices": '$((case + 1))', "tokens": '$((case + 1))
echo '{"rows": [{"part": "recurrences", "what": "scan", "how": "context", '$count', '$times'}]}' > $out/found.json
"""
    assert ends_with(script, "--suite=scaling", "--match=linear_scan on [14]") == 0
    rows = json.loads((tmp_path / "out/cpu_scaling.json").read_text())["rows"]
    assert [row.get("share") for row in rows] == [None, 0.8] and "| 80.0% |" in (
        tmp_path / "out/cpu_scaling.md"
    ).read_text()


def test_devices_are_for_one_process_which_may_measure(tmp_path, monkeypatch):
    monkeypatch.setenv(turns.TURN, str(tmp_path / "turn"))
    with turns.devices(), turns.turn(), open(tmp_path / "turn.devices") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    monkeypatch.delenv(turns.TURN)
    with turns.devices():
        pass


def test_of_those_that_wait_for_the_devices_the_first_case_is_next(tmp_path, monkeypatch):
    monkeypatch.setenv(turns.TURN, str(tmp_path / "turn"))
    code = f"""
from experiments.bench import turns
with turns.devices(), open("{tmp_path}/had", "a") as file:
    file.write(turns.os.environ[turns.PLACE])
"""
    processes = []
    with turns.devices():
        for place in "21":  # the last comes before the first
            here = os.environ | {turns.PLACE: place}
            processes.append(subprocess.Popen([sys.executable, "-c", code], env=here))
            wait_for(lambda: len(list(tmp_path.glob("*.waits"))) == len(processes))
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "had").read_text() == "12" and not list(tmp_path.glob("*.waits"))


def test_processes_of_a_command_that_is_killed_are_killed_too(tmp_path):
    """In the kernel's hands: who is killed can end nothing."""
    words = ["run", "--suite=recurrent", "--only=ssd", "--jobs=2", f"--out={tmp_path / 'out'}"]
    here = os.environ | {"JAX_PLATFORMS": "cpu", turns.TURN: str(tmp_path / "turn")}
    command = subprocess.Popen([sys.executable, "-m", "experiments.bench", *words], env=here, stderr=subprocess.DEVNULL)
    cases = lambda: turns._members(here[turns.TURN])
    wait_for(lambda: len(cases()) == 2)
    command.kill()
    command.wait()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() and state(pid) not in "ZX" for pid in cases()))


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
