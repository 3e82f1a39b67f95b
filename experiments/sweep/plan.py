"""The runs of a sweep: what each overrides, its resolved config, its id, its directory, and how far it is."""

import dataclasses
import difflib
import fcntl
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import shlex
import sys
from pathlib import Path

from experiments import config, flags, serialize

SWEEPS = flags.CONFIGS / "sweeps"
TAIL = 1 << 16  # bytes at the end of metrics.jsonl that hold its last record


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep."""

    cfg: config.Train
    overrides: dict  # dotted field: value
    root: Path  # of the sweep
    common: frozenset = frozenset()  # overrides that all runs of the sweep share

    @functools.cached_property
    def id(self):
        """Twelve hexadecimal digits of the sha256 of the resolved config."""
        whole = json.dumps(serialize.to_json(self.cfg), sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:12]

    @property
    def workdir(self):
        """Its config, weights, curves and log."""
        return self.root / self.id

    @property
    def log(self):
        """What the run printed, over all its starts."""
        return self.workdir / "log.txt"

    def describe(self):
        """What sets it apart from the other runs, in one line."""
        own = {name: value for name, value in self.overrides.items() if name not in self.common}
        return " ".join(f"{name}={brief(value)}" for name, value in own.items())

    def command(self):
        """What trains it on this machine; writes the config that it names."""
        from experiments import files

        self.workdir.mkdir(parents=True, exist_ok=True)
        path = self.workdir / "config.json"
        if not path.exists():
            files.write_json(path, serialize.to_json(self.cfg))
        return [sys.executable, "-m", "experiments.train", f"--config={path}", f"--workdir={self.workdir}"]


@dataclasses.dataclass(frozen=True)
class State:
    """How far a run is: finished, running, failed, unfinished or waiting; steps done; why it failed."""

    name: str
    step: int = 0
    reason: str = ""


def function(name, kind=None):
    """The function of a sweep's file (a path, or a name in configs/sweeps) called like the file, or `kind`."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"--sweep: no such file: {name}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        names = sorted(path.stem for path in SWEEPS.glob("*.py") if not path.stem.startswith("_"))
        if name not in names:
            nearest = difflib.get_close_matches(name, names, 1, 0)[0]
            raise ValueError(f"--sweep: unknown sweep {name!r}, did you mean {nearest!r}? ({', '.join(names)})")
        module, path = importlib.import_module(f"configs.sweeps.{name}"), SWEEPS / f"{name}.py"
    wanted = kind or path.stem
    if not callable(getattr(module, wanted, None)):
        raise ValueError(f"--sweep: expected a function {wanted} in {path}, found none")
    return getattr(module, wanted)


def runs(made, base, root, fixed=()):
    """The runs that a sweep's function yields, without repetitions, in its order.

    `fixed` names fields that the command line has set, which the sweep may not set as well. Raises ValueError
    in one line that names the run with overrides that do not fit.
    """
    found = {}
    for index, overrides in enumerate(made):
        try:
            run = resolve(overrides, base, root, fixed)
        except ValueError as error:
            raise ValueError(f"run {index} of the sweep: {error}") from None
        found.setdefault(run.id, run)
    if not found:
        raise ValueError("--sweep: expected at least one run, got none")
    first = next(iter(found.values())).overrides
    shared = {name for run in found.values() for name in run.overrides} if len(found) > 1 else set()
    absent = object()
    for run in found.values():
        shared = {n for n in shared if run.overrides.get(n, absent) == first.get(n, absent)}
    return [dataclasses.replace(run, common=frozenset(shared)) for run in found.values()]


def resolve(overrides, base, root, fixed=()):
    """The run of these overrides (a dict, one string of flags, or a list of flags)."""
    if isinstance(overrides, str):
        overrides = shlex.split(overrides)
    if isinstance(overrides, (list, tuple)):
        overrides = flags.split(overrides)
        if None in overrides.values():
            raise ValueError(f"expected --FIELD=VALUE, got {' '.join(f for f in overrides if overrides[f] is None)}")
    if not isinstance(overrides, dict):
        raise ValueError(f"expected a dict of overrides or flags, got {type(overrides).__name__}")
    overrides = {name.replace("-", "_"): value for name, value in overrides.items()}
    for name in fixed:
        name = name.replace("-", "_")
        if any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in overrides):
            raise ValueError(f"--{name}: the sweep sets it, so the command line cannot")
    return Run(flags.override(base, overrides), overrides, root)


def state(folder, steps):
    """The State of a run of so many steps, from its directory alone."""
    step = last_step(folder / "metrics.jsonl")
    if (folder / "report.json").exists():
        return State("finished", steps)
    if held(folder):
        return State("running", step)
    outcome = folder / "outcome.json"
    if outcome.exists():
        return State("failed", step, json.loads(outcome.read_text())["reason"])
    return State("unfinished", step) if step else State("waiting")


def last_step(path):
    """The step of the last training record of a metrics.jsonl; 0 where there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(os.path.getsize(path) - TAIL, 0))
            lines = file.read().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            record = json.loads(line)
            if record["kind"] == "train":
                return record["step"]
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def held(folder):
    """Whether a process has the lock of a run's directory."""
    try:
        with open(folder / "lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def brief(value):
    """A value in few letters: of a dataclass the class and the fields that are not at their defaults."""
    if isinstance(value, tuple):
        return "+".join(map(brief, value)) if value else "()"
    if not dataclasses.is_dataclass(value):
        return f"{value:g}" if isinstance(value, float) else str(value)
    given = (f for f in dataclasses.fields(value) if f.name != "d_model" and getattr(value, f.name) != f.default)
    inside = ",".join(f"{f.name}={brief(getattr(value, f.name))}" for f in given)
    return f"{type(value).__name__}({inside})" if inside else type(value).__name__
