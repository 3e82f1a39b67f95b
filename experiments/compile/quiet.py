"""What compilers write to stderr, kept from the terminal."""

import contextlib
import os
import sys
import tempfile


class Said:
    """The text that was caught."""

    text = ""

    def count(self, word) -> int:
        """How often a word is in it."""
        return self.text.count(word)


@contextlib.contextmanager
def stderr():
    """Catches what is written to stderr, below Python's own too; read the `Said` when the block is over."""
    said, kept = Said(), os.dup(2)
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.text = file.read().decode(errors="replace")
