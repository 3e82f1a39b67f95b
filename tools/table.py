"""Writes the catalogue's table into README.md, between its markers."""

import re
from pathlib import Path

from seqmix import catalog

page = Path(__file__).parents[1] / "README.md"
text = re.sub(
    r"(<!-- catalogue -->\n).*?(<!-- /catalogue -->)",
    lambda match: f"{match.group(1)}{catalog.markdown()}\n{match.group(2)}",
    page.read_text(),
    flags=re.S,
)
page.write_text(text)
