"""What a tool needs of its Python, said in one line where it is not there."""

import importlib.util
import sys

TARGETS = "make targets, then .venv-targets/bin/python -m {}; or pip install libtpu"


def libtpu(tool):
    """Ends the process with one line and exit code 2 where libtpu, which compiles for TPUs, is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        refuse(f"{tool} needs libtpu, which is not installed in {sys.executable}: {TARGETS.format(tool)}")


def refuse(text):
    """Prints `error: ...` on stderr in one line and ends the process with exit code 2."""
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    sys.exit(2)
