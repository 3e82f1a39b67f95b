"""Files written whole or not at all."""

import hashlib
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


def sha256(path):
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value):
    """Hex digest of a plain value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
