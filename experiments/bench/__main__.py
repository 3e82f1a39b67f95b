"""Times what the project claims, beside its peers: `python -m experiments.bench run --suite=NAME [--out=DIR]`.

`python -m experiments.bench tune` refills the tables from which kernels take their choices (`tune.py`).

A suite is a list of cases; each gives rows, which are written to DIR/<card>_<suite>.json as they come, with the
command, versions and card. At the end come a table (.md, and printed) and, with matplotlib, a picture (.png, .svg). A
case that fails is a row that says why. With --jobs=N cases compile side by side, and measure in turn. Exit codes: 0
done, 1 a case failed (the others are kept), 2 a mistake in the command, 143 ended by SIGTERM and 130 by Ctrl-C, after a
line that says what is kept.
"""

import argparse
import concurrent.futures
import difflib
import os
import re
import signal
import sys
import time
from pathlib import Path

from experiments import cli, progress, signals
from experiments.bench import results, suites, tune, turns

OUT = "runs/bench"


def main(argv=None):
    """Parses, runs the cases, writes; returns the exit code."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        if args.command == "tune":
            with signals.last_words(lambda: "bench tune stopped; the calls that it named are in the tables"):
                return tune.run(args)
        if args.jobs > 1 or args.case is not None:  # before jax is asked for the devices
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # one device's memory is for all of them
        suite = suites.load(args.suite)
        cases = suite.cases(args)
        check_parts(args.only, dict.fromkeys(case.part for case in cases), suite.NAME)
        wanted = [case for case in cases if not args.only or case.part in args.only]
        wanted = [case for case in wanted if re.search(args.match, case.label)]
        if not wanted:
            raise ValueError(f"--match: expected a pattern that a case of --list has, got {args.match!r}")
        if args.peers and suite.NAME not in suites.WITH_PEERS:
            raise ValueError(f"--peers: expected a suite with some ({', '.join(suites.WITH_PEERS)}), got {suite.NAME}")
        if args.peers and not args.list and (platform := results.platform()) != "gpu":
            raise ValueError(f"--peers: expected an NVIDIA GPU, where they run, the device is a {platform}")
        if args.case is not None and not 0 <= args.case < len(wanted):
            raise ValueError(f"--case: expected 0 to {len(wanted) - 1}, got {args.case}")
        if args.list:
            print(*(f"{case.part}: {case.label}" for case in wanted), sep="\n")
            return 0
    except ValueError as error:
        return cli.refuse(error)
    if args.compile_only:
        kept = "what was compiled is in JAX's cache of programs where there is one (JAX_COMPILATION_CACHE_DIR)"
        with signals.last_words(lambda: f"bench run --compile-only stopped; {kept}, and the same command goes on"):
            return compiled(wanted, args)
    if args.case is not None:
        wanted = wanted[args.case : args.case + 1]
        os.environ[turns.PLACE] = str(cases.index(wanted[0]))
    try:
        kept = results.File(Path(args.out), suite, args)
    except OSError as error:
        return cli.refuse(f"--out: expected a folder that can be written, got {args.out!r} ({error.strerror})")
    if kept.device.platform == "cpu" and not getattr(suite, "SMALL", False):
        progress.say("the device is a CPU: the cases are sized for a GPU of 80 GB and will take long")
    line = lambda: stopped(suite, kept)
    try:
        if args.jobs > 1:
            failed = turns.run(suite, wanted, args, kept)
        else:
            with signals.last_words(line):
                failed = run(suite, wanted, args, kept)
    except KeyboardInterrupt:
        if kept.rows and args.case is None:
            kept.finish()
        print(line(), file=sys.stderr)
        return 130
    except SystemExit as error:  # SIGTERM, after `turns` has ended its processes
        if error.code != 128 + signal.SIGTERM:
            raise
        print(f"SIGTERM: {line()}", file=sys.stderr)
        return error.code
    if args.case is None:
        kept.finish()
    for label, reason in failed:
        print(f"failed: {label}: {reason}", file=sys.stderr)
    return 1 if failed else 0


def stopped(suite, kept):
    """What is said of a run that ends before its last case."""
    if not kept.rows:
        return f"bench run of {suite.NAME} stopped; nothing was measured, the same command begins anew"
    rest = "--only and --match (of --list) name the cases that are left"
    return f"bench run of {suite.NAME} stopped; rows so far ({len(kept.rows)}) are in {kept.path}; {rest}"


def parse(argv):
    """The command's arguments; raises ValueError in one line, and ends the process after --help."""
    parser = cli.Parser(prog="python -m experiments.bench", description=__doc__.splitlines()[0])
    commands = "; ".join(f"{name}: {about}" for name, about in suites.SUITES.items())
    about = "run a suite, or refill the kernels' tables of choices on this GPU"
    parser.add_argument("command", nargs="?", choices=("run", "tune"), help=about)
    add = parser.add_argument
    add("--suite", choices=tuple(suites.SUITES), help=commands)
    add("--out", help=f"folder of the results (default: {OUT})")
    parts = "parts of the suite (of --list, before the colon), joined by commas; all of them without it"
    add("--only", type=_words, default=(), help=parts)
    add("--match", type=_pattern, default="", help="cases with this regular expression in their names (of --list)")
    add("--peers", action="store_true", help="time the PyTorch peers that can be imported, in the same run")
    add(
        "--jobs",
        type=int,
        help="cases at once, each in a process; one at a time measures (not of train); with"
        " --compile-only programs compiled at once (default: 1, and there a quarter of the cores)",
    )
    add("--case", type=int, help=argparse.SUPPRESS)  # of --jobs
    add("--list", action="store_true", help="name the cases and end")
    add("--compile-only", action="store_true", help="compile the suite's programs (scaling), and time nothing")
    args = parser.parse(argv)
    if args.command is None:
        raise ValueError("command: expected run or tune, got none")
    if args.command == "run" and args.suite is None:
        raise ValueError(f"--suite: expected one of {', '.join(suites.SUITES)}, got none")
    if args.command == "tune":
        for flag, given in (
            ("--suite", args.suite),
            ("--match", args.match),
            ("--peers", args.peers),
            ("--list", args.list),
            ("--out", args.out),
        ):
            if given:
                raise ValueError(f"{flag}: belongs to run, tune takes --only alone")
    if args.compile_only and args.out is not None:
        raise ValueError(f"--out: expected none with --compile-only, which measures nothing, got {args.out!r}")
    if args.out == "":
        raise ValueError("--out: expected a folder, got none")
    args.out = OUT if args.out is None else args.out
    args.threads = max(1, (os.cpu_count() or 1) // 4) if args.jobs is None else args.jobs  # of --compile-only
    args.jobs = 1 if args.jobs is None else args.jobs
    if args.jobs < 1:
        raise ValueError(f"--jobs: expected at least 1, got {args.jobs}")
    if args.jobs > 1 and args.suite in (None, turns.ALONE):
        raise ValueError(f"--jobs: {args.suite or args.command} runs one case after the other, got {args.jobs}")
    if args.compile_only and (args.command, args.suite) != ("run", "scaling"):
        raise ValueError(f"--compile-only: expected --suite=scaling, got {args.suite or args.command}")
    return args


def check_parts(only, parts, name):
    """Raises ValueError for a part that is none of a suite's."""
    for word in only:
        if word not in parts:
            near = difflib.get_close_matches(word, parts, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            here = ", ".join(parts) or "none on this machine"
            raise ValueError(f"--only: expected parts of {name}, which are {here}, got {word!r}{hint}")


def _words(text):
    words = tuple(word for word in text.split(",") if word)
    if not words:
        raise argparse.ArgumentTypeError(f"expected words joined by commas, got {text!r}")
    return words


def _pattern(text):
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r} ({error})") from None
    return text


def compiled(cases, args):
    """Compiles the programs of the cases, several at once, for a later run to find in JAX's compilation cache."""
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(args.threads) as pool:
        waiting = {pool.submit(lambda case: list(case.run(args)), case): case.label for case in cases}
        for index, done in enumerate(concurrent.futures.as_completed(waiting)):
            error = done.exception()
            failed += error is not None
            text = "compiled" if error is None else f"failed: {type(error).__name__}: {str(error)[:200]}"
            progress.say(f"{index + 1} of {len(cases)}: {waiting[done]} {text}")
    return 1 if failed else 0


def run(suite, cases, args, kept):
    """Runs the cases one after the other; the failed ones as (label, reason)."""
    failed, work = [], progress.Work(suite.NAME, "cases", len(cases), seconds=0)
    for index, case in enumerate(cases):
        begin = time.monotonic()
        try:
            for row in case.run(args):
                kept.add({"part": case.part, **row})
        except Exception as error:  # what cannot run is a finding, not the end of the table
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            failed.append((case.label, reason))
            kept.add({"part": case.part, "case": case.label, "failed": reason})
        work.update(index + 1, f"{case.label} took {time.monotonic() - begin:.1f} s", last=index + 1 == len(cases))
    return failed


if __name__ == "__main__":
    sys.exit(main())
