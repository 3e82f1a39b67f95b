"""Several cases at once, each in a process of its own, of which one at a time measures: `--jobs`.

Most of a suite's time goes into compiling, which several cores share. Who measures holds the turn, a lock on a file
that the environment names (already set, it joins several commands), and stops the others meanwhile (SIGSTOP), for what
they run on the device or the cores would be in the times; the first call of a program, which compiles it, runs without
the turn. A case whose process dies, as after an illegal address, is a failed row like any other. A case's rows are in
DIR/SUITE_cases until they are among all, and stay there where this process is killed.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments import files, progress
from experiments.sweep.local import CHILD

TURN = "SEQMIX_BENCH_TURN"  # the path of the file
PLACE = "SEQMIX_BENCH_PLACE"  # a case's place in its suite: of those that wait for the devices the first is next
ALONE = "train"  # the suite whose cases run one after the other
SETTLE = 0.2  # seconds until what the others had queued on the device is done
_held = False


@contextlib.contextmanager
def turn():
    """Waits until no other process measures, and keeps the others of the turn stopped; nothing without --jobs."""
    global _held
    path = os.environ.get(TURN)
    if path is None or _held:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _held, stopped = True, [pid for pid in _members(path) if pid != os.getpid() and _sent(pid, signal.SIGSTOP)]
        if stopped:
            time.sleep(SETTLE)
        try:
            yield
        finally:
            _held = False
            for pid in stopped:
                _sent(pid, signal.SIGCONT)


@contextlib.contextmanager
def devices():
    """Keeps the other processes that ask for it off the devices, and does not stop them; nothing without --jobs.

    For cases of several devices, of which each would wait for the others on one, and for those that fill one's memory.
    Of those that wait the first in the suite's order comes next.
    """
    path = os.environ.get(TURN)
    if path is None:
        yield
        return
    place = int(os.environ.get(PLACE, 0))
    waiting = Path(f"{path}.{os.getpid()}.{place}.waits")
    waiting.touch()
    with open(f"{path}.devices", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        while any(other < place for other in _waiting(path)):
            fcntl.flock(file, fcntl.LOCK_UN)
            time.sleep(0.02)
            fcntl.flock(file, fcntl.LOCK_EX)
        waiting.unlink(missing_ok=True)
        yield


def _waiting(path):
    """The places of the cases that wait for the devices."""
    return [int(file.suffixes[-2][1:]) for file in Path(path).parent.glob(f"{Path(path).name}.*.waits")]


def _members(path):
    """The numbers of the processes of a turn's cases: each has a file beside the turn's."""
    return [
        int(file.suffix[1:]) for file in Path(path).parent.glob(f"{Path(path).name}.*") if file.suffix[1:].isdigit()
    ]


def _sent(pid, number):
    """Whether the process was there to get the signal."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def run(suite, cases, args, kept):
    """As `__main__.run`: the failed cases as (label, reason). Rows are kept as cases end, in the order of the cases."""
    failed, order, running = [], {}, set()
    work = progress.Work(suite.NAME, "cases", len(cases), seconds=0)
    logs, rows_of = (Path(args.out) / name for name in ("logs", f"{suite.NAME}_cases"))
    logs.mkdir(exist_ok=True)
    files.put_aside(rows_of)  # of a run that was killed

    def keep(index, rows):
        case = cases[index]
        for row in rows:
            kept.add({"part": case.part, "case": case.label, **row} if "failed" in row else row)
            order[id(kept.rows[-1])] = index
        kept.rows.sort(key=lambda row: order[id(row)])
        kept.write()

    with tempfile.TemporaryDirectory() as folder:
        start = lambda index: _case(index, Path(folder), rows_of, logs / f"{suite.NAME}_{index}.log", args, running)
        try:
            with _together(args.jobs, running) as pool:
                waiting = {pool.submit(start, index): index for index in range(len(cases))}
                for count, done in enumerate(concurrent.futures.as_completed(waiting)):
                    index, (rows, seconds) = waiting[done], done.result()
                    keep(index, rows)
                    failed += [(cases[index].label, row["failed"]) for row in rows if "failed" in row]
                    took = f"{cases[index].label} took {seconds:.1f} s"
                    work.update(count + 1, took, last=count + 1 == len(cases))
        finally:  # what cases had measured when they were ended
            for index in sorted(set(range(len(cases))) - set(order.values())):
                keep(index, _rows(rows_of / str(index)))
            shutil.rmtree(rows_of, ignore_errors=True)
    return failed


def _rows(folder):
    return [row for path in folder.glob("*.json") for row in json.loads(path.read_text())["rows"]]


@contextlib.contextmanager
def _together(jobs, running):
    """A pool of threads; where it is left before its end, by a signal too, the processes in `running` end with it."""
    held = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(running):
            process.terminate()
            process.send_signal(signal.SIGCONT)  # else one that is stopped would not end
        raise
    finally:
        pool.shutdown()
        signal.signal(signal.SIGTERM, held)


def _case(index, folder, rows_of, log, args, running):
    """(rows, seconds) of the case of that number, run by a process, which is in `running` meanwhile."""
    out, begin = rows_of / str(index), time.monotonic()
    words = [sys.executable, "-S", str(CHILD), str(os.getpid()), ""]  # the kernel kills it when this process dies
    words += [sys.executable, "-m", "experiments.bench", "run", f"--suite={args.suite}", f"--out={out}"]
    words += [f"--only={','.join(args.only)}"] * bool(args.only) + ["--peers"] * args.peers
    words += [f"--match={args.match}"] * bool(args.match) + [f"--case={index}"]
    path = os.environ.get(TURN, str(folder / "turn"))
    own = {TURN: path, "TORCHINDUCTOR_CACHE_DIR": str(folder / f"inductor{index}")}
    with open(log, "w") as file:
        process = subprocess.Popen(words, env=os.environ | own, stdout=file, stderr=subprocess.STDOUT)
        running.add(process)
        member = Path(f"{path}.{process.pid}")
        member.touch()
        process.wait()
        for file in (member, *member.parent.glob(f"{member.name}.*.waits")):
            file.unlink(missing_ok=True)
        running.discard(process)
        for pid in _members(path) if process.returncode else ():  # it may have died in its turn
            _sent(pid, signal.SIGCONT)
    found = _rows(out)
    if process.returncode and not any("failed" in row for row in found):
        found.append({"failed": f"its process ended with {process.returncode}: {_last(log)}"})
    return found, time.monotonic() - begin


def _last(log):
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1][:200]} ({log})" if lines else f"it printed nothing ({log})"
