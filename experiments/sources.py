"""Where a run's documents come from: Python's standard library, files of text, or prepared text."""

import dataclasses
import gzip
import hashlib
import lzma
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments import files, inputs, rows, shards, textfiles

VAL_SEED = 0  # which documents of prepared text validate, and which rows, does not depend on the run
NO_SOURCE = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
COMPRESSED = 2**24  # the compressors are measured on so many bytes at most


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents in tokens: document i has counts[i] tokens from place starts[i] of what `fetch` reads, of sizes[i]
    bytes of text; those where `val` is true validate.
    """

    label: str  # what the user calls it
    digest: str  # of the text, and of the tokens if they were prepared
    fetch: Callable  # places (int array) -> ids of the same shape
    starts: np.ndarray
    counts: np.ndarray
    sizes: np.ndarray
    val: np.ndarray  # bool
    text: Callable  # document index -> its bytes
    name: Callable  # document index -> what to call it
    histogram: np.ndarray  # [256] of the bytes of all documents
    largest: int  # token id

    def stream(self, which, eos, align=1):
        """The stream of the documents where `which` is true."""
        return rows.Stream(self.fetch, self.starts[which], self.counts[which], eos, align)

    def held(self):
        """Some of the text that validates, at most COMPRESSED bytes."""
        parts, room = [], COMPRESSED
        for index in np.flatnonzero(self.val):
            parts.append(self.text(index)[:room])
            room -= len(parts[-1])
            if not room:
                break
        return b"".join(parts)


def load(path, tokenizer, spec, fraction, flag="data.path"):
    """The Source of a path (None: the standard library) for a tokenizer, called `spec`; documents of a share
    `fraction` of it validate, all of them if that is None. Raises ValueError in one line that begins with `flag`.
    """
    try:
        if path is not None and shards.is_prepared(path):
            return _prepared(Path(path), tokenizer, spec, fraction)
        if path is not None and any(Path(path).glob("*.array_record")):
            shards.manifest(path)  # which refuses
        return _text(path, tokenizer, fraction)
    except textfiles.Bad as error:
        hint = f"; `python -m experiments.prepare {path} --out=DIR --skip-bad` leaves such files out"
        raise ValueError(f"{flag}: {error}" + (hint if path and Path(path).is_dir() else "")) from None
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def compressed(held):
    """{"gzip_bits", "xz_bits"} of some text, in bits a byte."""
    sizes = {"gzip_bits": len(gzip.compress(held, 9)), "xz_bits": len(lzma.compress(held, preset=9))}
    return {name: 8 * size / len(held) for name, size in sizes.items()}


def entropy(histogram):
    """Of single bytes, in bits, from their counts."""
    share = histogram[histogram > 0] / histogram.sum()
    return float(-(share * np.log2(share)).sum())


# Prepared text


def _prepared(path, tokenizer, spec, fraction):
    held = shards.Prepared(path)
    made = held.manifest["tokenizer"]
    if made["fingerprint"] != tokenizer.fingerprint:
        fits = path / made["file"] if made["file"] else "bytes"
        raise ValueError(f"{path} was prepared with another tokenizer than {spec}: expected data.tokenizer={fits}")
    starts, counts, sizes = held.starts, held.lengths, held.sizes
    decode = lambda start, count: tokenizer.decode_bytes(held.read(np.arange(start, start + count)))
    if fraction is None:
        val = np.ones(len(counts), bool)
    elif len(counts) == 1:
        cut = int(counts[0] * (1 - fraction))
        starts, counts = starts[0] + np.array([0, cut]), np.array([cut, counts[0] - cut])
        end = len(decode(starts[1], counts[1]))
        sizes, val = np.array([sizes[0] - end, end]), np.array([False, True])
    else:
        val = _draw(counts, fraction)
    return Source(
        label=str(path),
        digest=held.manifest["digest"],
        fetch=held.read,
        starts=starts,
        counts=counts,
        sizes=sizes,
        val=val,
        text=lambda index: decode(starts[index], min(counts[index], COMPRESSED)),
        name=lambda index: f"document {index} of {path}",
        histogram=np.asarray(held.manifest["byte_counts"]),
        largest=max(shard["largest"] for shard in held.manifest["shards"]),
    )


def _draw(counts, fraction):
    """Documents in a fixed random order until they have that share of the tokens; the smallest one if the first
    has more.
    """
    order = np.argsort(np.random.Philox(key=[VAL_SEED, 0]).random_raw(len(counts)), kind="stable")
    val = np.zeros(len(counts), bool)
    val[order[np.cumsum(counts[order]) <= fraction * counts.sum()]] = True
    if not val.any():
        val[np.argmin(counts)] = True
    return val


# Text


def _text(path, tokenizer, fraction):
    documents = _standard_library() if path is None else _files(Path(path))
    if not documents:
        raise ValueError(f"expected text, found none in {path or 'the standard library'}")
    named = [[name, hashlib.sha256(content).hexdigest()] for name, content in documents]
    if fraction is None:
        val = np.ones(len(documents), bool)
    else:
        documents, val = _split(documents, fraction)
    contents = [content for _, content in documents]
    parts = tokenizer.encode_documents(contents)
    counts = np.array([len(part) for part in parts], np.int64)
    tokens = np.concatenate(parts)
    histogram = sum(np.bincount(np.frombuffer(content, np.uint8), minlength=256) for content in contents)
    return Source(
        label=str(path) if path else "the standard library",
        digest=files.json_digest(named),
        fetch=tokens.__getitem__,
        starts=np.cumsum(counts) - counts,
        counts=counts,
        sizes=np.array([len(content) for content in contents], np.int64),
        val=val,
        text=contents.__getitem__,
        name=lambda index: documents[index][0],
        histogram=histogram,
        largest=int(tokens.max(initial=0)),
    )


def _standard_library():
    root = Path(sysconfig.get_path("stdlib"))
    return _read(root, (path for path in inputs.walk(root, NO_SOURCE) if path.suffix == ".py"))


def _files(path):
    if path.is_dir():
        return _read(path, inputs.walk(path))
    if not path.exists():
        raise ValueError(f"no such file or directory: {path}")
    return _read(path.parent, [path])


def _read(root, paths):
    """(name, bytes) of each file that is not empty, by name."""
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    documents = ((name, textfiles.read_text(path)) for name, path in named)
    return [(name, content) for name, content in documents if content]


def _split(documents, fraction):
    """(documents, which of them validate): those that do come last, in the order of their names' hashes. They are
    those that still fit into `fraction` of the bytes, in that order (the smallest one if none does); a single
    document is cut, its end validates.
    """
    if len(documents) == 1:
        name, content = documents[0]
        cut = int(len(content) * (1 - fraction))
        cut = content.rfind(b"\n", 0, cut) + 1 or cut
        while 0 < cut < len(content) and content[cut] & 0xC0 == 0x80:  # inside a character
            cut -= 1
        train, val = [(f"{name}, start", content[:cut])], [(f"{name}, end", content[cut:])]
        train, val = ([part for part in parts if part[1]] for parts in (train, val))
    else:
        room, val = fraction * sum(len(content) for _, content in documents), []
        for document in sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest()):
            if len(document[1]) <= room:
                val.append(document)
                room -= len(document[1])
        val = val or [min(documents, key=lambda document: len(document[1]))]
        names = {name for name, _ in val}
        train = [document for document in documents if document[0] not in names]
    return train + val, np.arange(len(train) + len(val)) >= len(train)
