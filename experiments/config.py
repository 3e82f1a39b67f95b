"""What an experiment is: frozen dataclasses whose fields are the flags. A value that no run could use raises
ValueError in one line that names its field.
"""

import math
import re
from dataclasses import dataclass

from seqmix.models import LM
from seqmix.tasks import MQAR

SCHEDULES = ("cosine", "wsd", "linear", "constant")
OPTIMIZERS = ("adamw", "muon")
METRICS = ("val_loss", "loss")
FAILURES = ("stop", "warn")
LIMIT = 2**31


def _require(ok, name, expected, value):
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _whole(value):
    return isinstance(value, int) and not isinstance(value, bool)


def _integers(section, owner, least, *names):
    for name in names:
        value = getattr(owner, name)
        ok = _whole(value) and least <= value < LIMIT
        expected = f"an integer of at least {least}" if _whole(value) and value < least else "an integer below 2**31"
        _require(ok, f"{section}.{name}".lstrip("."), expected, value)


def _number(section, owner, name, expected, ok):
    value = getattr(owner, name)
    real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    _require(real and ok(value), f"{section}.{name}".lstrip("."), expected, value)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Text, and how it becomes batches."""

    path: str | None = None  # text (file, folder), or a folder experiments.prepare made; None: the standard library
    mixture: tuple[str, ...] = ()  # several paths instead, each WEIGHT:PATH, a share of the rows
    tokenizer: str = "bytes"  # "bytes", or the path of a JSON file of the `tokenizers` library
    seq_len: int = 256  # tokens of a row, at least 2
    rows: str = "auto"  # packed, windows (documents of a row see each other), auto: packed if all mixers can
    batch_size: int = 8  # rows of a step, over all devices and microbatches
    val_fraction: float = 0.05  # share of the text that validates, whole documents, in (0, 1)
    seed: int = 0  # of the order of documents and rows, in [0, 2**31)
    threads: int = 2  # that read ahead; 0: none. The order does not depend on it

    def __post_init__(self):
        _require(self.path is None or self.path, "data.path", "a path or None", self.path)
        for entry in self.mixture:
            expected = "WEIGHT:PATH with a positive weight"
            _require(re.fullmatch(r"[0-9.]*[1-9][0-9.]*(e-?[0-9]+)?:.+", entry), "data.mixture", expected, entry)
        _require(not (self.path and self.mixture), "data.path", "None beside data.mixture", self.path)
        _require(self.rows in ("auto", "packed", "windows"), "data.rows", "auto or packed or windows", self.rows)
        _require(self.tokenizer, "data.tokenizer", "'bytes' or a path", self.tokenizer)
        _integers("data", self, 2, "seq_len")
        _integers("data", self, 1, "batch_size")
        _number("data", self, "val_fraction", "a number in (0, 1)", lambda x: 0 < x < 1)
        _integers("data", self, 0, "seed", "threads")


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """Batches that a task draws: batch i depends on the seed and i alone."""

    task: MQAR  # seqmix.tasks
    batch_size: int = 128  # rows of a step, a multiple of the task's numbers of pairs
    seed: int = 0  # of the rows, in [0, 2**31)

    def __post_init__(self):
        _integers("data", self, 1, "batch_size")
        _integers("data", self, 0, "seed")
        turns = len(self.task.pairs)
        _require(self.batch_size % turns == 0, "data.batch_size", f"a multiple of {turns} (pairs)", self.batch_size)

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""
        return self.task.seq_len


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser and its schedule."""

    peak_lr: float  # learning rate after the warmup, positive
    kind: str = "adamw"  # adamw, or muon (Muon for matrices, AdamW for the rest)
    warmup: int = 0  # steps of linear rise to it
    schedule: str = "cosine"  # after the warmup: cosine, linear, constant, or wsd (constant, then linear decay)
    decay_steps_fraction: float = 0.2  # wsd: share of the run that decays, in (0, 1]
    end_lr_ratio: float = 0.1  # the last learning rate over the peak, in [0, 1]
    b1: float = 0.9  # decay of the first moment, in [0, 1)
    b2: float = 0.95  # decay of the second moment, in [0, 1)
    eps: float = 1e-8  # added to the root of the second moment, positive
    weight_decay: float = 0.1  # decoupled, times the learning rate; at least 0
    clip: float = 1.0  # largest global norm of the gradient; 0: no clipping
    accumulate: int = 1  # microbatches of a step, a divisor of data.batch_size
    ema: float = 0.0  # decay per step of the averaged weights that evaluation reads, in [0, 1); 0: no average
    spike_sigma: float = 0.0  # a step whose loss lies so many deviations above the recent mean is skipped; 0: none
    spike_window: int = 64  # losses that the mean and deviation are of, at least 2

    def __post_init__(self):
        _require(self.kind in OPTIMIZERS, "optim.kind", " or ".join(OPTIMIZERS), self.kind)
        _require(self.schedule in SCHEDULES, "optim.schedule", " or ".join(SCHEDULES), self.schedule)
        for name in ("peak_lr", "eps"):
            _number("optim", self, name, "a positive number", lambda x: x > 0)
        for name in ("weight_decay", "clip", "spike_sigma"):
            _number("optim", self, name, "a number of at least 0", lambda x: x >= 0)
        for name in ("b1", "b2", "ema"):
            _number("optim", self, name, "a number in [0, 1)", lambda x: 0 <= x < 1)
        _number("optim", self, "end_lr_ratio", "a number in [0, 1]", lambda x: 0 <= x <= 1)
        _number("optim", self, "decay_steps_fraction", "a number in (0, 1]", lambda x: 0 < x <= 1)
        _integers("optim", self, 0, "warmup")
        _integers("optim", self, 1, "accumulate")
        _integers("optim", self, 2, "spike_window")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many ways each axis splits the devices; one of them may be -1, what the others leave."""

    data: int = -1  # rows of a batch; the weights are copied
    fsdp: int = 1  # rows of a batch; the weights are split too
    context: int = 1  # time
    model: int = 1  # heads and hidden widths

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "context", "model")}
        for name, size in sizes.items():
            _require(_whole(size) and (size > 0 or size == -1), f"mesh.{name}", "a positive size or -1", size)
        free = [name for name, size in sizes.items() if size == -1]
        _require(len(free) < 2, "mesh", "at most one axis of -1", " and ".join(free))


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Validation during and after the run."""

    every: int = 100  # steps between evaluations; 0: only at the end
    batches: int = 8  # batches of an evaluation during the run, a fixed random sample; 0: all
    final_batches: int = 0  # batches of the last one; 0: all

    def __post_init__(self):
        _integers("eval", self, 0, "every", "batches", "final_batches")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Saving; the last step is always saved."""

    every: int = 100  # steps between checkpoints; 0: only at the end and when stopped
    keep: int = 2  # newest checkpoints that stay
    keep_every: int = 0  # checkpoints of multiples of this step stay too; 0: none
    keep_best: int = 0  # so many with the lowest metric stay too; each save then evaluates
    metric: str = "val_loss"  # of keep_best: val_loss, or loss (of the training step)
    background: bool = True  # write while training goes on
    on_failure: str = "stop"  # when one cannot be written: stop, or warn and train on (the last one always stops)

    def __post_init__(self):
        _integers("checkpoint", self, 0, "every", "keep_every", "keep_best")
        _integers("checkpoint", self, 1, "keep")
        _require(self.metric in METRICS, "checkpoint.metric", " or ".join(METRICS), self.metric)
        _require(self.on_failure in FAILURES, "checkpoint.on_failure", " or ".join(FAILURES), self.on_failure)


@dataclass(frozen=True, kw_only=True)
class Distributed:
    """The processes of a run. Slurm's srun and Open MPI's mpirun are noticed; elsewhere all three are given."""

    coordinator: str | None = None  # host:port that process 0 listens on
    processes: int | None = None  # how many there are
    process: int | None = None  # which of them this one is, from 0
    heartbeat: int = 30  # seconds of silence after which a process counts as dead

    def __post_init__(self):
        given = [name for name in ("coordinator", "processes", "process") if getattr(self, name) is not None]
        missing = [name for name in ("coordinator", "processes", "process") if getattr(self, name) is None]
        if not given:
            _integers("distributed", self, 1, "heartbeat")
            return
        _require(not missing, f"distributed.{given[0]}", f"distributed.{' and '.join(missing)} beside it", "none")
        ok = re.fullmatch(r"\S+:\d+", self.coordinator)
        _require(ok, "distributed.coordinator", "host:port", self.coordinator)
        _integers("distributed", self, 1, "processes", "heartbeat")
        _integers("distributed", self, 0, "process")
        _require(self.process < self.processes, "distributed.process", f"below {self.processes}", self.process)


@dataclass(frozen=True, kw_only=True)
class Train:
    """A training run."""

    name: str  # of the run; the default workdir is runs/NAME
    model: LM
    data: Data | Synthetic
    optim: Optim
    mesh: Mesh = Mesh()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    distributed: Distributed = Distributed()
    steps: int  # updates in all, at least 1
    seed: int = 0  # of the weights and of dropout-like noise, in [0, 2**31)
    log_every: int = 10  # steps between lines of progress; the curves have every step
    sample_prompt: str = ""  # text that the sample at the end continues
    sample_tokens: int = 128  # tokens of the sample; 0: no sample
    watchdog: float = 600.0  # seconds without a step after which stacks are dumped and the run ends; 0: no limit
    profile: tuple[int, int] | None = None  # first and last step of a jax.profiler trace in WORKDIR/profile
    wandb: str | None = None  # project of Weights & Biases that the curves go to as well

    def __post_init__(self):
        _require(re.fullmatch(r"\w[\w.-]*", self.name), "name", "letters, digits, '_', '-', '.'", self.name)
        _integers("", self, 1, "steps", "log_every")
        _integers("", self, 0, "seed", "sample_tokens")
        _number("", self, "watchdog", "a number of at least 0", lambda x: x >= 0)
        if self.profile is not None:
            ok = len(self.profile) == 2 and all(map(_whole, self.profile)) and 1 <= self.profile[0] <= self.profile[1]
            _require(ok, "profile", "two steps, first and last", self.profile)
        rows, count = self.data.batch_size, self.optim.accumulate
        _require(rows % count == 0, "optim.accumulate", f"a divisor of data.batch_size {rows}", count)
