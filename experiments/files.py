"""Files written whole or not at all."""

import hashlib
import itertools
import json
import os
from pathlib import Path


def replace(path, content):
    """Writes bytes atomically and durably."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path, value):
    """Writes JSON atomically and durably."""
    replace(path, (json.dumps(value, indent=1) + "\n").encode())


def publish(temporary, final):
    """Makes a file that is written and closed durable, then gives it its name."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)


def put_aside(path):
    """Gives what stands at a path, if anything, the first free one of the names path.1, path.2, ...."""
    if path.exists():
        olds = (path.with_name(f"{path.name}.{n}") for n in itertools.count(1))
        path.rename(next(old for old in olds if not old.exists()))


def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value):
    """Hex digest of a plain value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
