"""What a run shows and keeps: a live line, metrics.jsonl, TensorBoard curves, the final table.

metrics.jsonl has one record per step ({"kind": "train", "step", "loss", ...}), one per line of progress ("speed"),
one per evaluation ("val") and one at the end ("final"); "step" counts finished updates. A resumed run first cuts
the records past the restored step.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

_muted = False  # process 0 alone speaks for a run


def mute():
    """Ends what this process shows."""
    global _muted
    _muted = True


class Curves:
    """Appends records to metrics.jsonl and TensorBoard, and to `also` (an object with write and close)."""

    def __init__(self, workdir, start, also=None):
        from tensorboardX import SummaryWriter

        self.also = also
        self.path = Path(workdir) / "metrics.jsonl"
        truncate(self.path, start)
        self.file = open(self.path, "a")  # noqa: SIM115
        self.board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=start + 1 if start else None)

    def write(self, record):
        """One record; its numbers also become TensorBoard scalars named kind/key."""
        self.file.write(json.dumps(record) + "\n")
        for key, value in record.items():
            if key not in ("kind", "step") and isinstance(value, (int, float)):
                self.board.add_scalar(f"{record['kind']}/{key}", value, record["step"])
        if self.also:
            self.also.write(record)

    def show(self):
        """Lets other processes read what was written."""
        self.file.flush()

    def flush(self):
        """Makes what was written durable (called before a checkpoint is)."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.board.flush()

    def close(self):
        """Flushes and closes both."""
        self.flush()
        self.file.close()
        self.board.close()
        if self.also:
            self.also.close()


class NoCurves:
    """What the other processes of a run have in place of Curves."""

    def write(self, record):
        """Nothing."""

    show = flush = close = lambda self: None


def last_logged(workdir):
    """The last step that metrics.jsonl holds; 0 where there is none."""
    path = Path(workdir) / "metrics.jsonl"
    last = 0
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            last = max(last, int(json.loads(line)["step"]))
    return last


def truncate(path, step):
    """Keeps the whole records of metrics.jsonl up to `step`, without a final one; written atomically."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= step and record["kind"] != "final":
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Progress:
    """A live line on a terminal, plain lines elsewhere; both on stderr, so that stdout stays for results."""

    def __init__(self, steps, start, flops_per_step=None, peak=None):
        self.steps, self.flops, self.peak = steps, flops_per_step, peak
        self.console = Console(stderr=True)
        self.live = sys.stderr.isatty() and not _muted
        self.time, self.step = time.monotonic(), start
        self.bar = None
        if self.live:
            self.bar = Bar(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                console=self.console,
                transient=True,
            )
            self.task = self.bar.add_task("train", total=steps, completed=start, text="")
            self.bar.start()

    def restart_clock(self, step):
        """Leaves out of the speed what happened since the last line (compilation, evaluation, saving)."""
        self.time, self.step = time.monotonic(), step

    def update(self, step, loss, tokens):
        """Shows the state after `step` updates; `tokens` were read since the last call. Returns {"tokens_per_second"}
        and, where the device's peak is known, "mfu" in [0, 1].
        """
        seconds = max(time.monotonic() - self.time, 1e-9)
        done = max(step - self.step, 1)
        rate = tokens / seconds
        text = f"loss {loss:.4f}  {_short(rate)} tokens/s"
        speed = {"tokens_per_second": rate}
        if self.peak and self.flops:
            speed["mfu"] = self.flops * done / seconds / self.peak
            text += f"  MFU {100 * speed['mfu']:.1f}%"
        memory = peak_memory()
        if memory:
            text += f"  peak {memory / 2**30:.1f} GiB"
        text += f"  ETA {clock((self.steps - step) * seconds / done)}"
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        else:
            say(f"step {step}/{self.steps}  {text}")
        self.restart_clock(step)
        return speed

    def say(self, text):
        """A line that stays."""
        if self.bar:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            say(text)

    def close(self):
        """Ends the live line; may be called twice."""
        if self.bar:
            self.bar.stop()
            self.bar = None


def _speed(rate, unit):
    """So many a second, or the seconds of one where it takes longer than that."""
    if rate >= 1:
        return f"{_short(rate)} {unit}/s"
    return f"{1 / rate:.1f} s/{unit.removesuffix('s')}" if rate else f"0 {unit}/s"


class Work:
    """The share of some work that is done, its speed and the time left, on stderr: a live line on a terminal, a
    line every `seconds` elsewhere. `unit` is what is counted; `before` of `total` was done by an earlier process.
    """

    def __init__(self, title, unit, total, before=0, seconds=10):
        self.title, self.unit, self.total, self.before, self.seconds = title, unit, total, before, seconds
        self.live = sys.stderr.isatty()
        self.begun = self.told = time.monotonic()

    def update(self, done, more="", last=False):
        """Shows that `done` was done since the start, when it is time to; `more` is text behind it."""
        now = time.monotonic()
        if not last and now - self.told < (0.2 if self.live else self.seconds):
            return
        self.told = now
        rate = done / max(now - self.begun, 1e-9)
        whole = self.before + done
        share = int(100 * whole / max(self.total, 1))
        text = f"{self.title} {share}%  {_short(whole)} of {_short(self.total)} {self.unit}"
        text += f"  {_speed(rate, self.unit)}  {more}"
        text += f"  {clock(now - self.begun)}" if last else f"  ETA {clock((self.total - whole) / max(rate, 1e-9))}"
        clear = "\r\x1b[K" if self.live else ""
        print(f"{clear}{text}", end="" if self.live and not last else "\n", file=sys.stderr, flush=True)


def peak_memory():
    """Most bytes in use at once on the first device so far; None where the device does not say (a CPU)."""
    import jax

    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def say(text):
    """A line on stderr, for phases outside the loop."""
    if not _muted:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def phase(text):
    """Says on stderr what a long phase is, and how long it took."""
    say(f"{text} ...")
    start = time.monotonic()
    yield
    say(f"{text}: {time.monotonic() - start:.1f} s")


def table(title, columns, rows, left=1):
    """Prints a rich table on stdout: the first `left` columns to the left, the others to the right."""
    made = Table()
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*(str(cell) for cell in row))
    print(title)
    Console(width=None if sys.stdout.isatty() else 120, markup=False).print(made)
    sys.stdout.flush()


def _short(number):
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def clock(seconds):
    """Seconds as 1h02m or 3m04s."""
    seconds = int(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds % 60:02d}s"
