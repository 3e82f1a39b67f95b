"""The catalogue: every row is right, every mixer has one, the pages show them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from seqmix import catalog
from seqmix.core.mixer import Mixer
from tools import table

ROOT = Path(__file__).parents[1]


def test_listing_imports_no_mixer_and_no_jax():
    code = "import sys; from seqmix import catalog; catalog.find('mamba2'); print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("row", catalog.ROWS, ids=lambda row: row.name)
def test_rows_are_right(row):
    mixer_class = row.load()
    assert issubclass(mixer_class, Mixer) and mixer_class.__name__ == row.class_name
    assert row.name == row.name.lower() and re.fullmatch(r"\d{4}\.\d{4,5}", row.paper) and row.title
    source = (ROOT / f"{row.target.partition(':')[0].replace('.', '/')}.py").read_text()
    assert row.paper in source.split('"""')[1], "the file's docstring names the paper"
    for fields in (row.small, *(row.small | variant for variant in row.variants), row.medium or row.small):
        assert mixer_class(**fields).d_model > 0
    assert catalog.load(row.name) is catalog.load(row.class_name) is mixer_class


def test_every_mixer_file_has_a_row_and_names_are_unique():
    files = {p.relative_to(ROOT).with_suffix("") for p in (ROOT / "seqmix/mixers").rglob("*.py")}
    modules = {".".join(path.parts) for path in files if path.name != "__init__"}
    assert modules == {row.target.partition(":")[0] for row in catalog.ROWS}
    names = [name for row in catalog.ROWS for name in (row.name, row.class_name)]
    assert len(names) == len(set(names))


def test_unknown_names_are_told_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'mamba2'"):
        catalog.find("mamba22")
    with pytest.raises(ValueError, match="did you mean 'Attention'"):
        catalog.load("Atention")
    with pytest.raises(ValueError, match="the known ones are attention, .*, mosa"):
        catalog.find("zzz")


@pytest.mark.parametrize("page", table.PAGES, ids=lambda page: page.name)
def test_the_pages_show_their_tables(page):
    """`make table` refreshes them."""
    assert table.PLACE.findall(page.read_text()) == [table.PAGES[page]() + "\n"]


class Fields(dict):
    """The fields of a mixer by name; where one is left to its default, None, what the mixer makes of it."""

    def __init__(self, mixer, **sizes):
        super().__init__(min=min, max=max, **sizes)
        self.mixer = mixer

    def __missing__(self, name):
        value = getattr(self.mixer, name)
        if value is not None:
            return value
        if hasattr(self.mixer, f"_{name}"):
            return getattr(self.mixer, f"_{name}")
        return self.mixer.sizes[{"heads": 0, "key_dim": 0, "value_dim": 1}[name]]


@pytest.mark.parametrize("row", catalog.ROWS, ids=lambda row: row.name)
def test_the_formula_of_the_state_is_its_size(row):
    """At the two sizes that a row has, and contexts on both sides of a chunk."""
    instances = [row.load()(**fields) for fields in (row.small, row.medium) if fields]
    assert bool(row.state) == instances[0].decodes, f"{row.name}: a row that decodes says what its state holds"
    for mixer in instances if row.state else ():
        sizes = {"memory": 6} if "memory" in mixer.takes else {}
        for context in (64, 200, 1024):
            size = eval(row.state, {"__builtins__": {}}, Fields(mixer, context=context, **sizes))
            assert size == mixer.state_size(context, **sizes), (mixer, context)


@pytest.mark.parametrize("row", [row for row in catalog.ROWS if row.checked], ids=lambda row: row.name)
def test_what_a_row_was_checked_against_is_on_the_page(row):
    """As a comparison of this class, or with "(op)" of an op that its module calls."""
    page = (ROOT / "docs/peer_checks.md").read_text()
    done = re.findall(r"^\| (\w+)([^|]*) \| (\S+) [^|]+ \| `([^`]+)` \|", page, re.M)
    source = (ROOT / f"{row.target.partition(':')[0].replace('.', '/')}.py").read_text()
    for check in row.checked:
        package, function, of_op = re.fullmatch(r"(\S+): (\w+)( \(op\))?", check).groups()
        ours = [name for name, rest, *peer in done if peer == [package, function] and ("mixer" in rest) != bool(of_op)]
        assert ours, f"{check}: not in docs/peer_checks.md"
        assert ours == [row.class_name] if not of_op else any(name in source for name in ours), (check, ours)
