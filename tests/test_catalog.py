"""The catalogue: every row is right, every mixer has one, the README shows them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from seqmix import catalog
from seqmix.core.mixer import Mixer

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
    with pytest.raises(ValueError, match=f"{len(catalog.ROWS)} known ones"):
        catalog.find("zzz")


def test_the_readme_shows_the_table():
    """Refresh it with `python -c "from seqmix import catalog; print(catalog.markdown())"`."""
    found = re.search(r"<!-- catalogue -->\n(.*?)\n?<!-- /catalogue -->", (ROOT / "README.md").read_text(), re.S)
    assert found and found.group(1) == catalog.markdown()
