"""Prepared text: a folder of ArrayRecord shards of tokens under a manifest.

`shard-00000.array_record` holds the tokens of its documents end to end, in records of BLOCK tokens (the last one
may be shorter), without any token between documents; `shard-00000.npy` holds [tokens, bytes] of each document,
int64. `manifest.json` has counts, digests, the tokenizer and the source; it is written last, so a folder with one
is complete, and its digest is one of what is read: of the tokens, where documents end, and the tokenizer. While
a folder is made, `shard-00000.json` says that this shard is, and `prepare.json` holds the command to finish.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from experiments import files

BLOCK = 8192  # tokens of a record: what one read costs
FORMAT = "seqmix tokens 1"
MANIFEST, UNFINISHED = "manifest.json", "prepare.json"
CACHED = 256  # records that a reader keeps unpacked


class Damaged(OSError):
    """A record that is not what was written; the message is one line that names the file and the record."""


class Writer:
    """Writes one shard of `folder` under temporary names; `finish` gives it its own."""

    def __init__(self, folder, name, dtype):
        self.path = {kind: Path(folder) / f"{name}.{kind}" for kind in ("array_record", "npy", "json")}
        self.temporary = Path(folder) / f"{name}.array_record.tmp"
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.records = ArrayRecordWriter(str(self.temporary), "group_size:1,zstd:3")
        self.digest, self.documents, self.waiting, self.room = hashlib.sha256(), [], [], BLOCK
        self.largest = 0

    def add(self, ids, size):
        """Appends a document of `size` bytes: its token ids."""
        self.documents.append((len(ids), size))
        ids = np.asarray(ids).astype(self.dtype)
        self.largest = max(self.largest, int(ids.max(initial=0)))
        while ids.size:
            part, ids = ids[: self.room], ids[self.room :]
            self.waiting.append(part)
            self.room -= part.size
            if not self.room:
                self._write()

    def finish(self, **extra):
        """The shard's entry in the manifest, with `extra` in it; from now on the shard counts as made."""
        if self.room < BLOCK:
            self._write()
        self.records.close()
        index = io.BytesIO()
        np.save(index, np.asarray(self.documents, np.int64).reshape(-1, 2))
        files.publish(self.temporary, self.path["array_record"])
        files.replace(self.path["npy"], index.getvalue())
        tokens, size = (int(total) for total in np.sum(np.asarray(self.documents).reshape(-1, 2), axis=0))
        entry = {
            "name": self.path["npy"].stem,
            "documents": len(self.documents),
            "tokens": tokens,
            "bytes": size,
            "largest": self.largest,
            "file_bytes": self.path["array_record"].stat().st_size,
            "file_sha256": files.sha256(self.path["array_record"]),
            "index_sha256": hashlib.sha256(index.getvalue()).hexdigest(),
            "tokens_sha256": self.digest.hexdigest(),
        }
        files.write_json(self.path["json"], entry | extra)
        return entry | extra

    def abandon(self):
        """Forgets what was written."""
        with contextlib.suppress(RuntimeError):  # on a full disk, it cannot
            self.records.close()
        self.temporary.unlink(missing_ok=True)

    def _write(self):
        content = np.concatenate(self.waiting).tobytes()
        self.records.write(content)
        self.digest.update(content)
        self.waiting, self.room = [], BLOCK


def digest(tokenizer, dtype, shards):
    """The digest of prepared text: of what is in it, not of how it was packed."""
    parts = [[shard["documents"], shard["index_sha256"], shard["tokens_sha256"]] for shard in shards]
    return files.json_digest([FORMAT, tokenizer, str(dtype), parts])


def is_prepared(path):
    """Whether a folder is prepared text, or is about to be."""
    path = Path(path)
    return path.is_dir() and any((path / name).is_file() for name in (MANIFEST, UNFINISHED))


class Prepared:
    """A complete folder, open for reading. For document i: lengths[i] tokens from place starts[i] on, made of
    sizes[i] bytes. Raises ValueError in one line for a folder that is incomplete or whose files are not those
    of its manifest.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.manifest = manifest(path)
        shards = [shard for shard in self.manifest["shards"] if shard["tokens"]]
        indices = [self._index(shard) for shard in shards]
        self.lengths, self.sizes = np.concatenate([np.zeros((0, 2), np.int64), *indices]).T
        self._blocks = [-(-shard["tokens"] // BLOCK) for shard in shards]
        self._first = np.cumsum([0, *self._blocks])
        within = [np.cumsum(index[:, 0]) - index[:, 0] for index in indices]
        places = [block * BLOCK + place for block, place in zip(self._first, within, strict=False)]
        self.starts = np.concatenate([np.zeros(0, np.int64), *places])
        self._shards, self._dtype = shards, np.dtype(self.manifest["dtype"])
        self._block = functools.lru_cache(CACHED)(self._read)
        self._source = self._open()

    def read(self, places):
        """Token ids at these places, int32 of the same shape. Raises Damaged."""
        block, within = np.divmod(places, BLOCK)
        ids = np.empty(places.shape, np.int32)
        for number in np.unique(block):
            here = block == number
            ids[here] = self._block(int(number))[within[here]]
        return ids

    def _open(self):
        from grain.sources import ArrayRecordDataSource

        paths = [str(self.path / f"{shard['name']}.array_record") for shard in self._shards]
        parts = zip(paths, self._blocks, strict=True)
        return ArrayRecordDataSource([_Part(path, 0, count, count) for path, count in parts])

    def _read(self, number):
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        record = number - int(self._first[shard])
        expected = min(BLOCK, self._shards[shard]["tokens"] - record * BLOCK)
        try:
            ids = np.frombuffer(self._source[number], self._dtype)
            reason = "" if ids.size == expected else f"{ids.size} tokens, expected {expected}"
        except Exception as error:  # the library raises RuntimeError, IndexError, ValueError, at times without a text
            reason = str(error).strip() or type(error).__name__
        if reason:
            name = self._shards[shard]["name"]
            raise Damaged(f"{self.path / name}.array_record: record {record} is damaged: {' '.join(reason.split())}")
        return ids

    def _index(self, shard):
        """[documents, 2] of a shard, whose files are checked."""
        data, index = (self.path / f"{shard['name']}.{kind}" for kind in ("array_record", "npy"))
        for file in (data, index):
            if not file.is_file():
                raise ValueError(f"{file}: missing, though {MANIFEST} lists it; prepare it again")
        size = data.stat().st_size
        if size != shard["file_bytes"]:
            raise ValueError(f"{data}: expected {shard['file_bytes']} bytes, got {size}; prepare it again")
        if files.sha256(index) != shard["index_sha256"]:
            raise ValueError(f"{index}: damaged, its sha256 is not that in {MANIFEST}; prepare it again")
        return np.load(index)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Which records of a file to read; with it, the library need not open all files to count them."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


def manifest(path):
    """The manifest of a complete folder; raises ValueError in one line, with the command to finish it if it is
    incomplete.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        try:
            command = json.loads((path / UNFINISHED).read_text())["command"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{path}: no {MANIFEST} there, so it is not prepared text") from None
        raise ValueError(f"{path}: its preparation is unfinished; finish it with: {command}")
    try:
        made = json.loads((path / MANIFEST).read_text())
        known = made["format"] == FORMAT and made["block"] == BLOCK
        whole = made["digest"] == digest(made["tokenizer"]["fingerprint"], made["dtype"], made["shards"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path / MANIFEST}: not a manifest of prepared text") from None
    if not known:
        raise ValueError(f"{path / MANIFEST}: expected the format {FORMAT!r}; prepare it again")
    if not whole:
        raise ValueError(f"{path / MANIFEST}: damaged, its digest is not that of what it lists; prepare it again")
    return made
