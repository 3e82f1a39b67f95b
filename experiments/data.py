"""Text as batches: documents laid end to end and cut into rows, every batch a function of its index alone.

The end-of-document id opens each document and, as the target of its last token, closes it; so every byte is
predicted, and what a row sees never spans two documents. A document longer than a row goes on in another,
as a segment of its own. The order of documents and of rows is drawn anew for each epoch from (seed, epoch).
"""

import dataclasses
import functools
import gzip
import hashlib
import itertools
import json
import lzma
import os
import sysconfig
import zlib
from pathlib import Path

import grain
import numpy as np

from experiments import tokenizer as tokenizers

PACKING = 1  # a number for what this file does to the documents; part of the fingerprint
VAL_SEED = 0  # which validation rows a short evaluation sees does not depend on the run
NO_SOURCE = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
COMPRESSED = 2**24  # the compressors are measured on so many bytes at most


def load(cfg, vocab, align=1):
    """The Dataset of a config's `data` for a model with `vocab` token ids; documents start at multiples of `align`.

    Raises ValueError in one line for text that is missing, empty, binary or too short, and for token ids
    beyond the vocabulary.
    """
    if cfg.seq_len % align:
        raise ValueError(f"data.seq_len: expected a multiple of {align}, as the mixers need, got {cfg.seq_len}")
    documents = _standard_library() if cfg.path is None else _files(Path(cfg.path))
    if not documents:
        raise ValueError(f"data.path: expected text, found none in {cfg.path or 'the standard library'}")
    train, val = _split(documents, cfg.val_fraction)
    tokenizer = tokenizers.load(cfg.tokenizer)
    streams = [Stream.of(tokenizer, [content for _, content in part], align) for part in (train, val)]
    largest = max(int(stream.tokens.max(initial=0)) for stream in streams)
    if largest >= vocab:
        raise ValueError(
            f"data.tokenizer: token ids beyond the vocabulary: model.vocab is {vocab}, "
            f"{cfg.tokenizer} gives ids up to {largest}"
        )
    count, need = streams[0].tokens.size // cfg.seq_len, cfg.batch_size
    if count < need:
        raise ValueError(
            f"data.path: text too short for one batch: {streams[0].tokens.size} training tokens, "
            f"expected at least {need * cfg.seq_len} (data.batch_size x data.seq_len)"
        )
    if not val:
        raise ValueError("data.path: text too short for a validation document")
    held = b"".join(content for _, content in val)
    entropy = _entropy(content for _, content in documents)
    made = Dataset(cfg, *streams, held, entropy, _fingerprint(cfg, tokenizer, documents, align))
    made.names = [name for name, _ in train]  # by the numbers in a batch's "documents"
    return made


@dataclasses.dataclass(frozen=True)
class Stream:
    """Documents end to end: document i is the first lengths[i] of tokens[offsets[i]:offsets[i + 1]], of them the
    very first `eos`; the rest is filled up with `eos`.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    eos: int

    @classmethod
    def of(cls, tokenizer, documents, align=1):
        """The stream of these documents (bytes), each filled up to a multiple of `align`."""
        parts = tokenizer.encode_documents(documents)
        lengths = np.array([part.size + 1 for part in parts], np.int64)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-lengths // align) * align)])
        top = max([tokenizer.eos, *(int(part.max(initial=0)) for part in parts)])
        tokens = np.full(offsets[-1], tokenizer.eos, np.uint16 if top < 2**16 else np.uint32)
        for part, start in zip(parts, offsets):
            tokens[start + 1 : start + 1 + part.size] = part
        return cls(tokens, offsets, lengths, tokenizer.eos)


class Rows(grain.MapDataset):
    """Row i of an epoch: tokens [i T, (i + 1) T) of its stream, as a dict of arrays [T].

    tokens, targets, segment_ids, positions and documents (their numbers in the stream) are int32, mask is float32;
    all are 0 where there is no text.
    With a seed, index // len(self) is the epoch, and its documents come in an order of its own.
    """

    def __init__(self, stream, seq_len, count, seed=None):
        super().__init__()
        self.stream, self.seq_len, self.count, self.seed = stream, seq_len, count, seed
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        epoch, row = divmod(index, self.count)
        order, starts = self._order(epoch)
        stream, total = self.stream, int(self.stream.tokens.size)
        first = row * self.seq_len
        place = np.arange(first, first + self.seq_len + 1)
        inside = place < total
        place = np.minimum(place, total - 1)
        document = np.searchsorted(starts, place, side="right") - 1
        within, which = place - starts[document], order[document]
        ids = stream.tokens[stream.offsets[which] + within].astype(np.int32)
        ids = np.where(inside, ids, stream.eos)  # the last document of an epoch is closed too
        real = (inside & (within < stream.lengths[which]))[:-1]
        begin = np.maximum(starts[document], first)
        columns = {
            "tokens": ids[:-1],
            "targets": ids[1:],
            "segment_ids": document[:-1] - document[0] + 1,
            "positions": (place - begin)[:-1],
            "documents": which[:-1],
        }
        row = {key: np.where(real, value, 0).astype(np.int32) for key, value in columns.items()}
        return row | {"mask": real.astype(np.float32)}

    def _draw_order(self, epoch):
        """(documents in the order of an epoch, where each starts)."""
        lengths = np.diff(self.stream.offsets)  # filled up
        order = np.arange(lengths.size)
        if self.seed is not None:
            # Raw bits, since numpy promises those alone to stay the same.
            draws = np.random.Philox(key=[self.seed, epoch]).random_raw(lengths.size)
            order = np.argsort(draws, kind="stable")
        return order, np.cumsum(lengths[order]) - lengths[order]


class Dataset:
    """Training and validation batches of one corpus: dicts of arrays [B, T] as `Rows` describes."""

    def __init__(self, cfg, train, val, held, entropy, fingerprint):
        batch, seq = cfg.batch_size, cfg.seq_len
        rows = Rows(train, seq, train.tokens.size // seq, cfg.seed)
        self._train = rows.shuffle(seed=cfg.seed).repeat().batch(batch)
        count = -(-val.tokens.size // (seq * batch)) * batch
        self._val = Rows(val, seq, count).shuffle(seed=VAL_SEED).batch(batch)
        self._held, self._entropy = held, entropy
        self.fingerprint = fingerprint
        tokens = [int(stream.lengths.sum()) for stream in (train, val)]
        self.bytes_per_token = len(held) / tokens[1]
        documents = train.lengths.size + val.lengths.size
        self.summary = f"{documents} documents, {tokens[0]:,} tokens to train, {tokens[1]:,} to validate"

    def train_batches(self, start=0):
        """Batches start, start + 1, ... without end."""
        return (self._train[index] for index in itertools.count(start))

    def val_batches(self, count=0):
        """The first `count` validation batches of a fixed random order; 0 or more than there are: all."""
        total = len(self._val)
        return (self._val[index] for index in range(min(count, total) if count else total))

    def stats(self):
        """{"unigram_entropy": of the whole corpus, "gzip_bits", "xz_bits": on the validation text}, in bits a
        byte.
        """
        held = self._held[:COMPRESSED]
        return {
            "unigram_entropy": self._entropy,
            "gzip_bits": 8 * len(gzip.compress(held, 9)) / len(held),
            "xz_bits": 8 * len(lzma.compress(held, preset=9)) / len(held),
        }


def _standard_library():
    root = Path(sysconfig.get_path("stdlib"))
    return _read(root, (path for path in _walk(root) if path.suffix == ".py"))


def _files(path):
    if path.is_dir():
        return _read(path, _walk(path, skip=()))
    if not path.exists():
        raise ValueError(f"data.path: no such file or directory: {path}")
    return _read(path.parent, [path])


def _walk(root, skip=NO_SOURCE):
    """The files under a folder, without hidden ones and without the folders named in `skip`."""
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if name not in skip and not name.startswith(".")]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file())  # no pipes, sockets or dangling links


def _read(root, paths):
    """(name, bytes) of each file that is not empty, by name."""
    named = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    documents = ((name, _text(path)) for name, path in named)
    return [(name, content) for name, content in documents if content]


def _text(path):
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data.path: {path}: {getattr(error, 'strerror', None) or error}") from None
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"data.path: expected UTF-8 text, {path} is not at byte {error.start}") from None
    if b"\0" in content:
        raise ValueError(f"data.path: expected text, {path} is binary (a NUL at byte {content.index(0)})")
    return content


def _split(documents, fraction):
    """(training, validation): in the order of their names' hashes, documents that still fit into `fraction`
    of the bytes validate (the smallest one if none does); a single document is cut, its end validates.
    """
    if len(documents) == 1:
        name, content = documents[0]
        cut = int(len(content) * (1 - fraction))
        cut = content.rfind(b"\n", 0, cut) + 1 or cut
        while 0 < cut < len(content) and content[cut] & 0xC0 == 0x80:  # inside a character
            cut -= 1
        parts = ([(f"{name}, start", content[:cut])], [(f"{name}, end", content[cut:])])
        return tuple([part for part in documents if part[1]] for documents in parts)
    room = fraction * sum(len(content) for _, content in documents)
    val = []
    for name, content in sorted(documents, key=lambda document: hashlib.sha256(document[0].encode()).digest()):
        if len(content) <= room:
            val.append((name, content))
            room -= len(content)
    val = val or [min(documents, key=lambda document: len(document[1]))]
    names = {name for name, _ in val}
    return [document for document in documents if document[0] not in names], val


def _fingerprint(cfg, tokenizer, documents, align):
    digests = [[name, hashlib.sha256(content).hexdigest()] for name, content in documents]
    settings = [cfg.seq_len, cfg.batch_size, cfg.val_fraction, cfg.seed, align]
    whole = json.dumps([PACKING, tokenizer.fingerprint, settings, digests])
    return hashlib.sha256(whole.encode()).hexdigest()


def _entropy(contents):
    counts = sum(np.bincount(np.frombuffer(content, np.uint8), minlength=256) for content in contents)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())
