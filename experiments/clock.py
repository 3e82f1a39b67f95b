"""Where a run's wall time went, and how many steps it had to repeat."""

import collections
import contextlib
import json
import os
import time
from pathlib import Path

PARTS = ("start-up", "compile", "data wait", "step", "eval", "save")  # of a run's seconds; what is left is "other"


class Clock:
    """Seconds by part since it was made."""

    def __init__(self):
        self.began, self.seconds = time.monotonic(), collections.Counter()

    @contextlib.contextmanager
    def on(self, part):
        """Counts its body to one of PARTS."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - start

    def rows(self):
        """(part, "seconds", "share") for the final table, then the sum."""
        total = time.monotonic() - self.began
        parts = [(part, self.seconds[part]) for part in PARTS]
        parts.append(("other", total - sum(self.seconds.values())))
        return [(name, f"{spent:.1f}", f"{spent / total:.1%}") for name, spent in (*parts, ("all", total))]

    def goodput(self):
        """The share of the wall time that went into steps."""
        return self.seconds["step"] / (time.monotonic() - self.began)


def note_start(workdir, step, logged):
    """Appends this start to starts.jsonl: the step it goes on from, and the last one that an earlier start had
    logged. Returns (starts, steps made more than once), this one included.
    """
    import jax

    path = Path(workdir) / "starts.jsonl"
    record = {
        "step": step,
        "redone": max(logged - step, 0),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "slurm_restarts": int(os.environ.get("SLURM_RESTART_COUNT", 0)),
    }
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return len(records), sum(record["redone"] for record in records)


class Trace:
    """A jax.profiler trace of the steps `window` (first, last; None: no trace) into `folder`."""

    def __init__(self, window, start, folder):
        first, self.last = window or (0, 0)
        self.first, self.folder, self.on = max(first, start + 1), folder, False

    def before(self, step):
        """To be called before each step."""
        import jax

        if step == self.first and step <= self.last:
            jax.profiler.start_trace(str(self.folder))
            self.on = True

    def after(self, step, metrics):
        """To be called after each step; waits for the last one of the window."""
        import jax

        if self.on and step == self.last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self):
        """Ends the trace, if there is one."""
        import jax

        if self.on:
            jax.profiler.stop_trace()
            self.on = False
