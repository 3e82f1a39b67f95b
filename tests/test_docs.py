"""The Python snippets of README.md and WORKSPACE.md run as they stand, each on its own."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
SNIPPETS = [
    (f"{name}:{text[: match.start()].count(chr(10)) + 1}", match.group(1))
    for name in ("README.md", "WORKSPACE.md")
    for text in [(ROOT / name).read_text()]
    for match in BLOCK.finditer(text)
]


def test_both_pages_have_snippets():
    pages = {where.split(":")[0] for where, _ in SNIPPETS}
    assert pages == {"README.md", "WORKSPACE.md"}


@pytest.mark.parametrize("where, code", SNIPPETS, ids=[where for where, _ in SNIPPETS])
def test_snippet(where, code):
    exec(compile(code, where, "exec"), {"__name__": "snippet"})
