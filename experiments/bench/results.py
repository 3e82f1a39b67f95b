"""What a suite measured, kept as it comes: JSON, a table in Markdown, a picture."""

import datetime
import re
import shlex
import sys

import jax

from experiments import files, progress


def platform():
    """Of the first device: "gpu", "tpu" or "cpu"."""
    return jax.devices()[0].platform


class File:
    """The rows of a suite in DIR/<card>_<suite>.json, rewritten after each one; an old file is kept as .json.1, ...."""

    def __init__(self, folder, suite, args):
        self.suite, self.rows = suite, []
        folder.mkdir(parents=True, exist_ok=True)
        self.device = device = jax.devices()[0]
        self.path = folder / f"{short(device.device_kind)}_{suite.NAME}.json"
        files.put_aside(self.path)
        self.head = {
            "command": shlex.join(["python", "-m", "experiments.bench", *sys.argv[1:]]),
            "date": datetime.date.today().isoformat(),
            "card": device.device_kind,
            "devices": jax.device_count(),
            "versions": versions(args.peers),
        }

    def add(self, row):
        """Keeps a row, with what the suite says of it beside others, and shows it in a line."""
        self.rows.append(row)
        if hasattr(self.suite, "relate"):
            self.suite.relate([row for row in self.rows if "failed" not in row])
        shown = ((key, row.get(key)) for key, _, _ in self.suite.COLUMNS)
        line = "  ".join(f"{key} {_cell(value, '.4g')}" for key, value in shown if value is not None)
        progress.say(line if "failed" not in row else f"{row.get('case', line)}: failed: {row['failed']}")
        self.write()

    def write(self):
        """Writes all rows."""
        files.write_json(self.path, {**self.head, "rows": self.rows})

    def finish(self):
        """The table and the picture beside the JSON."""
        text = markdown(self.suite.COLUMNS, self.rows)
        print(text, end="")
        self.path.with_suffix(".md").write_text(f"    {self.head['command']}\n\n{self._where()}\n\n{text}")
        written = [self.path, self.path.with_suffix(".md")]
        if hasattr(self.suite, "draw") and any("failed" not in row for row in self.rows):
            written += picture(self.suite, self.rows, self.path)
        print(*written, sep="\n")

    def _where(self):
        found = ", ".join(f"{name} {version}" for name, version in self.head["versions"].items())
        return f"{self.head['devices']} x {self.head['card']}, {found}, {self.head['date']}."


def short(kind):
    """A device kind as a word: "NVIDIA H100 80GB HBM3" is h100."""
    found = re.search(r"\b([A-Z]{1,2}\d{2,4}[A-Za-z]*|v\d+\w*)\b", kind)
    return (found.group(1) if found else kind.split()[0]).lower()


def versions(peers):
    """Versions of jax, and of the peers' libraries that can be imported."""
    import importlib.metadata as metadata

    found = {}
    for name in ("jax", "flax", *(("torch", "triton", "fla-core", "tokamax", "mamba-ssm") if peers else ())):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def markdown(columns, rows):
    """The rows as a table; a failed one says so in its last cell."""
    used = [column for column in columns if any(row.get(column[0]) is not None for row in rows)]
    lines = [f"| {' | '.join(heading for _, heading, _ in used)} |", "|---" * len(used) + "|"]
    for row in rows:
        cells = [_cell(row.get(key), form) for key, _, form in used]
        if "failed" in row:
            cells = [row.get("case", ""), *cells[1:-1], f"failed: {row['failed']}".replace("|", "/")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value, form):
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return format(value, form) if isinstance(value, float) else str(value)


def picture(suite, rows, path):
    """What the suite draws of its rows, as PNG and SVG; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        progress.say("no picture: pip install '.[report]'")
        return []
    from matplotlib.figure import Figure

    from experiments.report import figures

    with matplotlib.rc_context(figures.PAPER):
        figure = Figure(layout="constrained")
        suite.draw([row for row in rows if "failed" not in row], figure)
        paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
        figure.savefig(paths[0], dpi=200)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths
