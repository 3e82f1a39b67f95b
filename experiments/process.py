"""What a training process does when told to stop, when nothing moves, and when it fails: it ends, says why, and
takes the other processes of the run with it.

An uncaught exception leaves a process of several waiting in jax's exit barrier, its peers in a collective, for
ever; so a failed one ends by `os._exit`, and the others then fail within seconds.
"""

import contextlib
import faulthandler
import fcntl
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from experiments import checkpoint, distributed, signals

STOPPED = 75
RESUMABLE = f"stopped, resumable: run the same command (exit code {STOPPED})"
GRACE = 5.0  # seconds that the other processes' watchdogs have for their stacks
FAILED = "failed.{}.txt"  # what process N died of


class Stop:
    """What SIGTERM and SIGINT do. While `waits`, the first one sets `asked`, which the loop sees after its
    step; otherwise, and the second time, the process ends at once.

    A thread acts on them (`signals.watch`).
    """

    def __init__(self, workdir):
        self.workdir = workdir
        self.asked = self.waits = False
        signals.watch(self._act, signal.SIGTERM, signal.SIGINT)

    def _act(self, number):
        name = signal.Signals(number).name
        if self.asked or not self.waits:
            cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # which the live line hides
            kept = f"what it saved is in {self.workdir}"
            print(f"{cursor}{name}: training {RESUMABLE}; {kept}", file=sys.stderr, flush=True)
            os._exit(STOPPED)
        self.asked = True
        print(f"{name}: saving at the next step", file=sys.stderr, flush=True)


class Watchdog:
    """Ends the process with the stacks of all its threads when `limit` seconds pass without a `beat` (0: never).

    The stacks go to stderr and to stacks.N.txt in `workdir`. All processes of a run stop beating within a step
    of each other, so each waits a little for the others' stacks before it ends. Should this thread not come
    to run because another never lets go of the interpreter, a timer outside Python does the same later.
    """

    def __init__(self, limit, workdir):
        self.limit, self.path = limit, Path(workdir) / f"stacks.{_rank()}.txt"
        self.last = self.armed = 0.0
        self.running = False

    def start(self):
        """Begins to count."""
        if self.limit > 0 and not self.running:
            faulthandler.enable()  # stacks on a crash too: jax aborts when a peer's heart stops
            self.running = True
            self.beat()
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()

    def beat(self):
        """Something was done."""
        self.last = time.monotonic()
        if self.running and self.last - self.armed > self.limit / 10:
            faulthandler.dump_traceback_later(1.5 * self.limit + 2 * GRACE, exit=True)
            self.armed = self.last

    def close(self):
        """Ends the counting."""
        if self.running:
            self.running = False
            faulthandler.cancel_dump_traceback_later()

    def _watch(self):
        while self.running:
            time.sleep(min(self.limit / 10, 1.0))
            silent = time.monotonic() - self.last
            if self.running and silent > self.limit:
                self._end(silent)

    def _end(self, silent):
        print(f"error: watchdog: no step for {silent:.0f} s; process {_rank()} was at", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        with contextlib.suppress(OSError), open(self.path, "w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        time.sleep(GRACE if distributed.several() else 0)
        os._exit(1)


@contextlib.contextmanager
def failing(workdir):
    """Ends the process hard, and with it the others, when the body of a run on several processes fails.

    The one that failed first leaves its traceback in the working directory, and the others print it last.
    """
    path = Path(workdir) / FAILED.format(_rank())
    try:
        yield
    except BaseException as error:
        if not distributed.several() or (isinstance(error, SystemExit) and error.code in (0, STOPPED)):
            raise
        words = "".join(traceback.format_exception(error))
        if isinstance(error, SystemExit):  # `fail` has printed its line
            words = f"exit code {error.code}\n"
        else:
            print(words, file=sys.stderr, flush=True)
        first = _first_failure(path)
        if first:
            print(f"what failed first:\n{first}", file=sys.stderr, flush=True)
        elif getattr(error, "code", None) != 2:  # a directory that was refused may be another run's
            with contextlib.suppress(OSError):
                path.write_text(f"process {_rank()}: {words}")
        sys.stdout.flush()
        os._exit(error.code if isinstance(getattr(error, "code", None), int) else 1)


def keep_compiled(workdir):
    """Lets later starts of a run read what this one compiles from compiled/ in its directory, unless jax has been
    told of another one (JAX_COMPILATION_CACHE_DIR), as by a sweep.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path(workdir).absolute() / "compiled"))


def forget(workdir):
    """Removes what an earlier start of the run left of its failure."""
    for pattern in (FAILED, "stacks.{}.txt"):
        for path in Path(workdir).glob(pattern.format("*")):
            path.unlink(missing_ok=True)


def _first_failure(own):
    """What another process wrote before this one failed, or None."""
    for path in sorted(own.parent.glob(FAILED.format("*"))):
        if path != own:
            with contextlib.suppress(OSError):
                return path.read_text().rstrip()
    return None


def _rank():
    import jax

    return jax.process_index()


@contextlib.contextmanager
def lock(workdir):
    """Holds the working directory's lock; raises checkpoint.Refused when another run does. A directory that was
    made for it and that nothing was written to is removed again.
    """
    workdir = Path(workdir)
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    if workdir.exists() and not workdir.is_dir():
        raise checkpoint.Refused(f"workdir {workdir}: expected a directory, got a file")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / "lock", "a")  # noqa: SIM115
    except OSError as error:
        raise checkpoint.Refused(f"workdir {workdir}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = os.stat(workdir / "lock").st_ino == os.fstat(file.fileno()).st_ino
        except OSError:
            there = False
        if not there:  # or the other run has just removed the file
            raise checkpoint.Refused(f"workdir {workdir} is in use by another run")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if os.listdir(workdir) == ["lock"]:
                    os.remove(workdir / "lock")
                    for folder in made:
                        folder.rmdir()
