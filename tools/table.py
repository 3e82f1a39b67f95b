"""Writes the catalogue's tables into README.md and WORKSPACE.md, between their markers."""

import re
from pathlib import Path

from seqmix import catalog

ROOT = Path(__file__).parents[1]


def short() -> str:
    """The README's table of mechanisms, one line a row."""
    head = ("mechanism", "class", "paper", "group", "causal", "packs", "decoding state")
    rows = []
    for row in catalog.ROWS:
        mixer = row.load()(**row.small)
        traits = [("yes" if trait else "no") for trait in (mixer.causal, mixer.packable)]
        rows.append((row.title, f"`{row.class_name}`", _paper(row), row.group, *traits, _growth(mixer)))
    return _table(head, rows)


def full() -> str:
    """WORKSPACE.md's: what each row can be computed as, what its state holds, what it was compared with."""
    head = ("name", "paper", "forms", "state, elements a sequence", "checked against")
    rows = []
    for row in catalog.ROWS:
        mixer = row.load()(**row.small)
        state = f"`{row.state}`" if row.state else "none"
        rows.append((row.name, _paper(row), ", ".join(forms(mixer)), state, ", ".join(checks(row, mixer))))
    return _table(head, rows)


def forms(mixer) -> list[str]:
    """Ways in which a mixer computes the same thing, from its traits and fields."""
    known = {
        "fft": mixer.fft,
        "chunked": hasattr(mixer, "chunk") or hasattr(mixer, "block"),
        "matrix": mixer.linear_in_v,
        "recurrent": mixer.decodes and _growth(mixer) == "constant",
        "cached": mixer.decodes and _growth(mixer) != "constant",
    }
    return [name for name, there in known.items() if there]


def checks(row, mixer) -> list[str]:
    """The oracles of a row: its own other forms, which conformance compares, and public code."""
    own = [name for name in ("matrix", "recurrent", "cached") if name in forms(mixer)]
    return [f"own {' and '.join(own)} form", *row.checked] if own else list(row.checked)


def _paper(row) -> str:
    return f"[{row.paper}](https://arxiv.org/abs/{row.paper})"


def _growth(mixer) -> str:
    if not mixer.decodes:
        return "none"
    sizes = {"memory": 1} if "memory" in mixer.takes else {}
    short, long = (mixer.state_size(context, **sizes) for context in (1 << 20, 1 << 21))
    if short == long:
        return "constant"
    return "grows with the context" if long > 1.5 * short else "grows with its logarithm"


def _table(head, rows) -> str:
    line = lambda cells: f"| {' | '.join(cells)} |"
    return "\n".join([line(head), "|" + "---|" * len(head), *map(line, rows)])


PAGES = {ROOT / "README.md": short, ROOT / "WORKSPACE.md": full}
PLACE = re.compile(r"(?<=<!-- catalogue -->\n).*?(?=<!-- /catalogue -->)", re.S)


def write(page, table):
    page.write_text(PLACE.sub(lambda _: f"{table}\n", page.read_text()))


if __name__ == "__main__":
    for page, table in PAGES.items():
        write(page, table())
