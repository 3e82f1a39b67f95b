"""Runs as their directories describe them, whole or not."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import numpy as np

from experiments import serialize
from experiments.config import Train
from experiments.sweep import plan

KINDS = ("train", "val", "speed")


@dataclasses.dataclass
class Run:
    """One run: what it was to do, how far it is, its curves."""

    path: Path
    id: str  # the directory's name, made longer where two are alike
    config: dict  # the JSON form; {} where it cannot be read
    cfg: Train | None  # None where this version of the code cannot build it
    state: plan.State
    curves: dict  # kind: {column: array [records]}
    report: dict  # report.json, {} before the end
    fingerprint: str | None  # of the data

    def column(self, kind, name):
        """(steps, values) of one curve, float64; empty where there is none."""
        table = self.curves[kind]
        if name not in table:
            return np.zeros(0), np.zeros(0)
        keep = np.isfinite(table[name])
        return table["step"][keep], table[name][keep]

    @property
    def steps(self):
        return self.config.get("steps", 0)

    def tokens_per_second(self):
        """Median over the lines of progress; None without any."""
        values = self.column("speed", "tokens_per_second")[1]
        return float(np.median(values)) if values.size else None

    def mfu(self):
        """Median model FLOPs utilisation in [0, 1]; None where the device's peak is not known."""
        values = self.column("speed", "mfu")[1]
        return float(np.median(values)) if values.size else None


def find(folders):
    """The runs in these directories and below them, by path. Raises ValueError where there are none."""
    found = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder}: expected a directory of runs, found none")
        before = len(found)
        for here, below, names in os.walk(folder):
            if "config.json" in names:
                found.append(Path(here))
                below.clear()
            below.sort()
        if len(found) == before:
            raise ValueError(f"{folder}: expected a run (a directory with config.json) in it, found none")
    found = list({path.resolve(): path for path in found}.values())
    names = [path.name for path in found]
    alike = {name for name in names if names.count(name) > 1}
    return [read(path, str(path) if path.name in alike else path.resolve().name) for path in found]


def read(path, name):
    """The Run of one directory; what cannot be read is left out, and said in its state."""
    config = _json(path / "config.json")
    cfg = None
    with contextlib.suppress(ValueError, TypeError):
        cfg = serialize.from_json(config)
    cfg = cfg if isinstance(cfg, Train) else None
    if isinstance(config.get("steps"), int):
        state = plan.state(path, config["steps"])
    else:
        state = plan.State("broken", 0, "config.json cannot be read")
    report, data = _json(path / "report.json"), _json(path / "data.json")
    return Run(path, name, config, cfg, state, _curves(path / "metrics.jsonl"), report, data.get("fingerprint"))


def _json(path):
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _curves(path):
    """{kind: {column: array}}; lines that are no records are skipped, missing values are NaN."""
    records = {kind: [] for kind in KINDS}
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        try:
            record = json.loads(line)
            if record["kind"] == "final":
                record["kind"] = "val"
            if isinstance(record["step"], int):
                records[record["kind"]].append(record)
        except (ValueError, KeyError, TypeError):
            continue
    return {kind: _columns(rows) for kind, rows in records.items()}


def _columns(rows):
    names = {name for row in rows for name, value in row.items() if isinstance(value, (int, float))}
    return {name: np.array([row.get(name, np.nan) for row in rows], np.float64) for name in names}
