"""Files of text and of JSON lines, plain or packed (.gz, .zst), cut into tasks and read document by document."""

import dataclasses
import gzip
import io
import json
import zlib
from pathlib import Path

TASK_BYTES = 2**26  # of input, about, in a task
PIECE = 2**20  # bytes read at a time of a packed file
PACKED = (".gz", ".zst")
EXTRA = "needs: pip install 'seqmix[data]'"


class Bad(ValueError):
    """A file, line or row that holds no text; the message is one line that names it."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Part of the inputs: files of text, or [start, end) of one other source: bytes of JSONL, row groups of
    Parquet, rows of a data set. A packed file is one task.
    """

    kind: str  # text, jsonl, parquet, hf
    sources: tuple  # (path, size, mtime in ns) each; for hf (name, config, split, fingerprint)
    start: int = 0
    end: int = 0
    size: int = 0  # bytes of input, to show progress by


def read_text(path):
    """The bytes of a file of UTF-8 text, unpacked; raises Bad in one line naming it."""
    try:
        file, raw = _open(path)
        with file, raw:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise Bad(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise Bad(f"expected UTF-8 text, {path} is not at byte {error.start}") from None
    if b"\0" in content:
        raise Bad(f"expected text, {path} is binary (a NUL at byte {content.index(0)})")
    return content


def stamp(path):
    """What tells whether a file changed: (path, size, time of its last change in ns)."""
    state = path.stat()
    return str(path), state.st_size, state.st_mtime_ns


def _open(path):
    """(file of unpacked bytes, the file beneath it)."""
    raw = open(path, "rb")  # noqa: SIM115
    if Path(path).suffix == ".gz":
        return gzip.open(raw), raw
    if Path(path).suffix == ".zst":
        return io.BufferedReader(_Zstandard(raw, path), PIECE), raw
    return raw, raw


class _Zstandard(io.RawIOBase):
    """Frames of zstd, one after another. The library's own reader takes a file that was cut for a whole one."""

    def __init__(self, raw, path):
        try:
            import zstandard
        except ImportError:
            raise ValueError(f"{path}: a .zst file {EXTRA}") from None
        self._new = lambda: zstandard.ZstdDecompressor().decompressobj()
        self._error = zstandard.ZstdError
        self._raw, self._frame, self._left = raw, None, b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self._left:
            packed = (self._frame.unused_data if self._frame and self._frame.eof else b"") or self._raw.read(PIECE)
            if not packed:
                if self._frame and not self._frame.eof:
                    raise EOFError("zstd: the file ends inside a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new()
            try:
                self._left = self._frame.decompress(packed)
            except self._error as error:
                raise EOFError(str(error)) from None
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def read_texts(task, field):
    """`inputs.documents` of a task of whole files."""
    position = 0
    for path, size, _ in task.sources:
        position += size
        try:
            yield read_text(path), position
        except Bad as error:
            yield error, position


# JSONL


def jsonl_tasks(path, field):
    """Tasks of about TASK_BYTES each of a plain file of JSON lines; one of a packed file."""
    made = stamp(path)
    if path.suffix in PACKED or made[1] == 0:
        return [Task("jsonl", (made,), size=made[1])]
    bounds = [*range(0, made[1], TASK_BYTES), made[1]]
    return [Task("jsonl", (made,), a, b, b - a) for a, b in zip(bounds, bounds[1:], strict=False)]


def read_jsonl(task, field):
    """`inputs.documents` of the lines that begin in [start, end) of a plain file; of all lines of a packed one."""
    path = task.sources[0][0]
    number = 0
    try:
        file, raw = _open(path)
        with file, raw:
            place = task.start
            if task.start:  # the line before it belongs to the task before, unless it ends just here
                file.seek(task.start - 1)
                place += len(file.readline()) - 1
            first = place
            while not task.end or place < task.end:
                line = file.readline()
                if not line:
                    return
                number += 1
                place += len(line)
                if line.strip():
                    done = place - task.start if task.end else raw.tell()
                    yield _json_text(line, field, path, first, number), min(done, task.size)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        yield Bad(f"{path}: {reason}" + (f" (after line {number})" if number else "")), task.size


def _json_text(line, field, path, first, number):
    try:
        value = json.loads(line)
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {type(value).__name__}")
        if field not in value:
            raise ValueError(f"no field {field!r}, only {', '.join(value)[:80] or 'none'} (--field=NAME chooses)")
        return encoded(value[field], field)
    except (ValueError, RecursionError) as error:
        reason = first_line(error)
        if isinstance(error, json.JSONDecodeError):
            reason = f"not JSON: {error.msg} at column {error.colno}"
        return Bad(f"{path}:{_lines_before(path, first) + number}: {reason}")


def encoded(value, field):
    """A field's text in UTF-8, nothing for a null; raises ValueError for what is no text."""
    if value is None:
        return b""
    if not isinstance(value, str):
        raise ValueError(f"expected text in {field!r}, got {type(value).__name__}")
    return value.encode()  # a lone surrogate is a ValueError too


def _lines_before(path, place):
    """Newlines in the first `place` bytes of a file."""
    with open(path, "rb") as file:
        return sum(file.read(min(PIECE, place - at)).count(b"\n") for at in range(0, place, PIECE))


def first_line(error):
    """What an error says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
