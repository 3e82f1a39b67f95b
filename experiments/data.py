"""Batches of a run: rows of its sources, mixed by weight and shuffled, every batch a function of its index alone.

The global order does not depend on how many hosts or threads read it: host h of n takes its rows of the same
batch.
"""

import itertools

import grain
import numpy as np

from experiments import config, identity, sources, synthetic
from experiments import tokenizer as tokenizers
from experiments.rows import Rows, Share

PACKING = 1  # a number for what `rows` does to the documents; part of the fingerprint


def load(cfg, vocab, align=1, packs=True):
    """The Dataset of a config's `data` for a model with `vocab` token ids; documents start at multiples of `align`,
    and rows are packed if the model `packs`.

    Raises ValueError in one line for text that is missing, empty, binary or too short, for prepared text that is
    incomplete, damaged or of another tokenizer, and for token ids beyond the vocabulary.
    """
    if isinstance(cfg, config.Synthetic):
        return synthetic.Dataset(cfg, vocab, align)
    if cfg.seq_len % align:
        raise ValueError(f"data.seq_len: expected a multiple of {align}, as the mixers need, got {cfg.seq_len}")
    packed = packs if cfg.rows == "auto" else cfg.rows == "packed"
    if packed and not packs:
        raise ValueError("data.rows: a mixer of this model cannot pack, expected auto or windows, got packed")
    tokenizer = tokenizers.load(cfg.tokenizer)
    parts, weights = load_sources(cfg, tokenizer)
    check_vocab(parts, tokenizer, vocab, cfg.tokenizer)
    align = align if packed else 1
    train = [part.stream(~part.val, tokenizer.eos, align) for part in parts]
    val = [part.stream(part.val, tokenizer.eos, align) for part in parts]
    need = cfg.batch_size if len(parts) == 1 else 1
    for part, stream in zip(parts, train, strict=True):
        if stream.size // cfg.seq_len < need:
            flag, batch = ("data.mixture", "a row") if len(parts) > 1 else ("data.path", "one batch")
            raise ValueError(
                f"{flag}: text too short for {batch}: {stream.size} training tokens in {part.label}, "
                f"expected at least {need * cfg.seq_len} (data.batch_size x data.seq_len)"
            )
        if not part.val.any():
            raise ValueError("data.path: text too short for a validation document")
    facts = {
        "tokenizer": tokenizer.fingerprint,
        "seq_len": cfg.seq_len,
        "batch_size": cfg.batch_size,
        "val_fraction": cfg.val_fraction,
        "seed": cfg.seed,
        "rows": "packed" if packed else "windows",
        "align": align,
        "packing": PACKING,
    }
    made = identity.Identity([(part.label, part.digest, w) for part, w in zip(parts, weights, strict=True)], facts)
    return Dataset(cfg, parts, weights, train, val, packed, made)


def check_vocab(parts, tokenizer, vocab, spec):
    """Raises ValueError in one line for token ids beyond a model's vocabulary."""
    largest = max([tokenizer.eos, *(part.largest for part in parts)])
    if largest >= vocab:
        raise ValueError(
            f"data.tokenizer: token ids beyond the vocabulary: model.vocab is {vocab}, {spec} gives ids up to {largest}"
        )


def load_sources(cfg, tokenizer):
    """(sources of a config's `data`, their weights, which sum to 1). Raises ValueError in one line."""
    if not cfg.mixture:
        return [sources.load(cfg.path, tokenizer, cfg.tokenizer, cfg.val_fraction)], [1.0]
    pairs = [entry.partition(":")[::2] for entry in cfg.mixture]
    parts = [sources.load(path, tokenizer, cfg.tokenizer, cfg.val_fraction, flag="data.mixture") for _, path in pairs]
    total = sum(float(weight) for weight, _ in pairs)
    return parts, [float(weight) / total for weight, _ in pairs]


class Names:
    """names[n]: what the training document is called that has the number n in a batch's "documents"."""

    def __init__(self, parts):
        self._parts = parts
        self._trains = [np.flatnonzero(~part.val) for part in parts]
        self.first = np.cumsum([0, *(len(trains) for trains in self._trains)])

    def __getitem__(self, number):
        part = int(np.searchsorted(self.first, number, side="right")) - 1
        return self._parts[part].name(int(self._trains[part][number - self.first[part]]))


class Dataset:
    """Training and validation batches: dicts of arrays [B, T] as `Rows` describes.

    `identity` is what the batches depend on, `fingerprint` its digest; `names` has the documents' names.
    """

    pairs = ()  # no task with answers that are right or wrong

    def __init__(self, cfg, parts, weights, train, val, packed, made):
        batch, seq = cfg.batch_size, cfg.seq_len
        self._cfg, self._parts = cfg, parts
        self.identity, self.fingerprint = made, made.fingerprint
        self.names = Names(parts)
        each = []
        for index, stream in enumerate(train):
            seed = cfg.seed + (index << 32)  # an order of its own for each source
            rows = Rows(stream, seq, stream.size // seq, seed, packed, self.names.first[index])
            each.append(rows.shuffle(seed=(cfg.seed + index) % 2**32).repeat())
        self._train = each[0] if len(each) == 1 else grain.MapDataset.mix(each, weights)
        counts = [-(-stream.size // seq) for stream in val]
        counts[-1] += -sum(counts) % batch  # the last batch is filled up with rows without text
        rows = [Rows(stream, seq, count, packed=packed) for stream, count in zip(val, counts, strict=True)]
        rows = rows[0] if len(rows) == 1 else grain.MapDataset.concatenate(rows)
        self._val = rows.shuffle(seed=sources.VAL_SEED)
        tokens = [sum(int(stream.lengths.sum()) for stream in streams) for streams in (train, val)]
        self.bytes_per_token = sum(int(part.sizes[part.val].sum()) for part in parts) / tokens[1]
        documents = sum(len(part.counts) for part in parts)
        self.summary = f"{documents} documents, {tokens[0]:,} tokens to train, {tokens[1]:,} to validate"

    def train_batches(self, start=0, host=0, hosts=1):
        """Batches start, start + 1, ... without end; of several hosts, each reads its own batch_size / hosts rows.

        Raises shards.Damaged, an OSError, for a damaged record.
        """
        batches = self._shared(self._train, host, hosts)
        if not self._cfg.threads:
            return (batches[index] for index in itertools.count(start))
        options = grain.ReadOptions(num_threads=self._cfg.threads, prefetch_buffer_size=2 * self._cfg.threads)
        return iter(batches[start:].to_iter_dataset(options))

    def val_batches(self, count=0, host=0, hosts=1):
        """The first `count` validation batches of a fixed random order, as `train_batches` for each of several hosts; 0
        or more than there are: all.
        """
        total = len(self._val) // self._cfg.batch_size
        batches = self._shared(self._val, host, hosts, total)
        return (batches[index] for index in range(min(count, total) if count else total))

    def _shared(self, rows, host, hosts, count=None):
        batch = self._cfg.batch_size
        if batch % hosts or not 0 <= host < hosts:
            raise ValueError(f"hosts: expected a divisor of data.batch_size {batch} and a host below it, got {hosts}")
        return Share(rows, batch, host, hosts, count).batch(batch // hosts)

    def held(self):
        """Some of the validation text."""
        return b"".join(part.held() for part in self._parts)[: sources.COMPRESSED]

    def stats(self):
        """{"unigram_entropy": of the whole corpus, "gzip_bits", "xz_bits": on validation text}, in bits a byte."""
        histogram = np.sum([part.histogram for part in self._parts], axis=0)
        return {"unigram_entropy": sources.entropy(histogram), **sources.compressed(self.held())}
