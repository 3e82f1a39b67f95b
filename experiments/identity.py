"""What a run's batches depend on: kept beside the run, compared when it resumes."""

import json
from pathlib import Path

from experiments import files

FLAG = "--allow-data-change"


class Identity:
    """Sources (label, digest, weight) and facts (a dict of plain values); labels do not count.

    `fingerprint` is the digest of all that counts; `changes` are those that were allowed so far, oldest first.
    """

    def __init__(self, sources, facts):
        self.sources, self.facts, self.changes = sources, facts, []
        self.fingerprint = files.json_digest([[source[1:] for source in sources], facts])

    def record(self):
        """The content of <workdir>/data.json."""
        return {
            "fingerprint": self.fingerprint,
            "sources": [list(source) for source in self.sources],
            **self.facts,
            "changes": self.changes,
        }

    def check(self, workdir, allow=False):
        """Compares with the data that a working directory holds, if any; returns its differences.

        Raises ValueError in one line, `field: was -> is`, for other data, unless that is allowed: then the change
        is noted in `changes`.
        """
        path = Path(workdir) / "data.json"
        if not path.exists():
            return []
        try:
            held = json.loads(path.read_text())
            self.changes = list(held.get("changes", []))
            if held["fingerprint"] == self.fingerprint:
                return []
            found = self._differences(held)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is not the record of a run's data") from None
        shown = "; ".join(found)
        if not allow:
            raise ValueError(f"workdir {workdir} was trained on other data: {shown} ({FLAG} goes on with it)")
        self.changes.append({"fingerprint": held["fingerprint"], "differences": found})
        return found

    def resumed(self, step, fingerprint):
        """Notes the step at which a change took place. Raises ValueError when the checkpoint is of data that this
        run never had.
        """
        if fingerprint not in (self.fingerprint, *(change["fingerprint"] for change in self.changes)):
            raise ValueError(f"checkpoint {step} was made on other data than the run: fingerprint {fingerprint}")
        if self.changes:
            self.changes[-1].setdefault("step", step)

    def _differences(self, held):
        """`field: was -> is` of every field that differs."""
        found = []
        was, now = (_named(sources) for sources in (held.get("sources", []), self.sources))
        if [s[1:] for s in was] != [s[1:] for s in now]:
            found.append(f"source: {_shown(was)} -> {_shown(now)}")
        for name, value in self.facts.items():
            before = held.get(name, "absent")
            if before != value:
                found.append(f"{name}: {_short(before)} -> {_short(value)}")
        return found or [f"fingerprint: {held['fingerprint'][:12]} -> {self.fingerprint[:12]}"]


def _named(sources):
    return [tuple(source) for source in sources]


def _shown(sources):
    many = len(sources) > 1
    parts = [f"{label} ({digest[:12]})" + (f" x {weight:g}" if many else "") for label, digest, weight in sources]
    return ", ".join(parts) or "none"


def _short(value):
    text = str(value)
    return text if len(text) <= 40 else text[:12]
