"""A lazy list of every mechanism. Rows are strings and numbers; a mixer is imported when its row is loaded.

What a mixer can do is on its class (the traits), not here: a row only says where it is, what it came from and
which small instances the tests build.
"""

import difflib

from seqmix.catalog.row import Row
from seqmix.catalog.rows import ROWS

__all__ = ["ROWS", "Row", "find", "load"]


def find(name: str) -> Row:
    """The row with this name, or whose class has it; ValueError with the nearest name if there is none."""
    for row in ROWS:
        if name in (row.name, row.class_name):
            return row
    known = [known for row in ROWS for known in (row.name, row.class_name)]
    near = difflib.get_close_matches(name, known, 1) or difflib.get_close_matches(name.lower(), known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"the known ones are {', '.join(row.name for row in ROWS)}"
    raise ValueError(f"name: no mixer is called {name!r}; {hint}")


def load(name: str) -> type:
    """The class of the mixer with this name, or of this class name; raises as `find` does."""
    return find(name).load()
