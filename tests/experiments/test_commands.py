"""What commands say at their ends and edges: when stopped, when slow, in --help, and where something is missing."""

import importlib.util
import subprocess
import sys
import types

import pytest

from experiments import cli, progress
from experiments.bench import __main__ as bench
from tools import needs, tpu_bundles

STOPPED = """
import hashlib, os, signal
from experiments import signals
with signals.last_words(lambda: "the work stopped, half of it is done"):
    os.kill(os.getpid(), signal.SIGTERM)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
"""


def test_a_command_that_sigterm_ends_says_so_in_one_line():
    """Even where the main thread does not come back for long, as in a compiler."""
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr == "SIGTERM: the work stopped, half of it is done\n"


def test_a_stopped_bench_says_what_is_kept_and_how_to_go_on():
    suite = types.SimpleNamespace(NAME="recurrent")
    none = bench.stopped(suite, types.SimpleNamespace(rows=[], path="x.json"))
    assert none == "bench run of recurrent stopped; nothing was measured, the same command begins anew"
    some = bench.stopped(suite, types.SimpleNamespace(rows=[{}, {}], path="x.json"))
    assert "recurrent stopped; rows so far (2) are in x.json; --only and --match" in some


def test_compile_only_takes_jobs_and_refuses_a_folder(capsys):
    for words in (["--out=x"], ["--out=runs/bench"]):
        assert bench.main(["run", "--suite=scaling", "--compile-only", *words]) == 2
        assert "error: --out: expected none with --compile-only" in capsys.readouterr().err
    args = bench.parse(["run", "--suite=scaling", "--compile-only", "--jobs=3"])
    assert (args.threads, args.out) == (3, bench.OUT)
    args = bench.parse(["run", "--suite=recurrent"])
    assert (args.jobs, args.out) == (1, bench.OUT)


def test_less_than_one_a_second_is_said_in_seconds_of_one():
    assert progress._speed(0.4, "cases") == "2.5 s/case" and progress._speed(2.0, "cases").endswith("2 cases/s")
    assert progress._speed(0.0, "cases") == "0 cases/s"


def test_help_is_in_words(capsys):
    parser = cli.Parser(prog="x")
    for name, default in {
        "--words": (),
        "--text": "",
        "--number": 0,
        "--few": [1, 2],
        "--many": list(range(9)),
    }.items():
        parser.add_argument(name, default=default, help="what it is")
    text = parser.format_help()
    assert text.count("default") == 2 and "(default: 0)" in text and "(default: 1,2)" in text
    with pytest.raises(SystemExit):
        bench.parse(["run", "--help"])
    assert "()" not in capsys.readouterr().out


def test_a_tool_without_libtpu_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["tpu_bundles"])
    with pytest.raises(SystemExit) as ended:
        tpu_bundles.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: tools.tpu_bundles needs libtpu") and said.count("\n") == 1
    assert "make targets" in said
    monkeypatch.setattr(needs, "libtpu", lambda tool: None)
    wrong = {"--cases=none": "--cases: expected names", "--chips=v9": "--chips: expected", "--tile=a": "--tile"}
    for word, message in wrong.items():
        monkeypatch.setattr(sys, "argv", ["tpu_bundles", word])
        with pytest.raises(SystemExit):
            tpu_bundles.main()
        assert f"error: {message}" in capsys.readouterr().err
