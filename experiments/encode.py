"""Shards of tokens from tasks of documents, in parallel: each whole or not at all."""

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
from concurrent import futures
from multiprocessing import connection
from pathlib import Path

import numpy as np

from experiments import bpe, files, inputs, progress, shards, textfiles
from experiments import tokenizer as tokenizers

BATCH = 2**22  # bytes of documents that are encoded at once
EXAMPLES = 5  # documents left out of a shard whose reasons are kept


@dataclasses.dataclass(frozen=True)
class Job:
    """What every shard of a folder is made with."""

    out: str
    tokenizer: str  # "bytes" or a path
    fingerprint: str  # of the tokenizer
    field: str
    skip_bad: bool

    def key(self, task):
        """What a shard depends on: the same key, the same shard."""
        return files.json_digest([shards.FORMAT, self.fingerprint, self.field, dataclasses.astuple(task)])


class Stopped(Exception):
    """Another shard failed."""


class Shared:
    """What workers and the main process see: input bytes done, tokens made, and whether to stop."""

    def __init__(self, context):
        self.size, self.tokens, self.stop = context.Value("q"), context.Value("q"), context.Event()
        self.show = None  # called after each addition, where no other process is

    def add(self, size, tokens):
        """Adds to both counts; raises Stopped when asked to stop."""
        for value, more in ((self.size, size), (self.tokens, tokens)):
            with value.get_lock():
                value.value += more
        if self.show:
            self.show()
        if self.stop.is_set():
            raise Stopped


# Workers

_shared = None


def _start(shared):
    global _shared
    _shared = shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process tells
    threading.Thread(target=_follow, args=(multiprocessing.parent_process(),), daemon=True).start()


def _follow(parent):
    """Ends with the main process, whatever killed it: a worker waiting for work would stay for ever."""
    connection.wait([parent.sentinel])
    os._exit(1)


def make_shard(number, task, job, shared=None):
    """Writes shard `number` from a task; returns its entry in the manifest."""
    shared = shared or _shared
    tokenizer = tokenizers.load(job.tokenizer)
    dtype = np.uint16 if tokenizer.vocab <= 2**16 else np.uint32
    writer = shards.Writer(job.out, f"shard-{number:05d}", dtype)
    counts = np.zeros(256, np.int64)
    empty = done = size = 0
    bad, batch = [], []
    try:
        for document, position in inputs.documents(task, job.field):
            if isinstance(document, textfiles.Bad):
                if not job.skip_bad:
                    raise ValueError(f"{document}; --skip-bad leaves such out")
                bad.append(str(document))
                continue
            batch.append(document)
            size += len(document)
            if size >= BATCH:
                empty += _flush(tokenizer, batch, writer, counts, shared, position - done)
                batch, size, done = [], 0, position
        empty += _flush(tokenizer, batch, writer, counts, shared, task.size - done)
        extra = {"empty": empty, "bad": len(bad), "examples": bad[:EXAMPLES], "byte_counts": counts.tolist()}
        return writer.finish(key=job.key(task), **extra)
    except BaseException:
        writer.abandon()
        raise


def _flush(tokenizer, documents, writer, counts, shared, size):
    """Encodes and writes documents; returns how many have no token."""
    empty = tokens = 0
    pieces = [bpe.pieces(document) for document in documents]
    ids = iter(tokenizer.encode_documents([piece for parts in pieces for piece in parts]))
    for document, parts in zip(documents, pieces, strict=True):
        made = [next(ids) for _ in parts]
        total = sum(len(part) for part in made)
        if total == 0:
            empty += 1
            continue
        writer.add(np.concatenate(made), len(document))
        counts += np.bincount(np.frombuffer(document, np.uint8), minlength=256)
        tokens += total
    shared.add(size, tokens)
    return empty


# The main process


def make_all(tasks, job, workers):
    """The entries of all shards in the manifest, in order; those that are made already are kept.

    Raises ValueError for input that is no text, BrokenProcessPool when a worker was killed.
    """
    entries = [_made(job, number, task) for number, task in enumerate(tasks)]
    todo = [number for number, entry in enumerate(entries) if entry is None]
    shared = Shared(multiprocessing.get_context("spawn"))
    total, left = sum(task.size for task in tasks), sum(tasks[number].size for number in todo)
    shown = progress.Work("prepare", "B", total, total - left)
    show = lambda last=False: shown.update(shared.size.value, f"{shared.tokens.value:,} tokens", last)
    if workers == 1 or len(todo) < 2:
        shared.show = show
        for number in todo:
            entries[number] = make_shard(number, tasks[number], job, shared)
    else:
        for number, entry in _in_parallel(todo, tasks, job, min(workers, len(todo)), shared, show):
            entries[number] = entry
    show(last=True)
    return entries


def _in_parallel(todo, tasks, job, workers, shared, show):
    context = multiprocessing.get_context("spawn")
    with futures.ProcessPoolExecutor(workers, context, _start, (shared,)) as pool:
        running = {pool.submit(make_shard, number, tasks[number], job): number for number in todo}
        try:
            while running:
                done, _ = futures.wait(running, timeout=0.5, return_when=futures.FIRST_COMPLETED)
                show()
                for future in done:
                    yield running.pop(future), future.result()
        finally:
            shared.stop.set()
            pool.shutdown(cancel_futures=True)


def _made(job, number, task):
    """The entry of a shard that is made, or None."""
    path = Path(job.out) / f"shard-{number:05d}"
    try:
        entry = json.loads(path.with_suffix(".json").read_text())
        same = entry["key"] == job.key(task) and (job.skip_bad or not entry["bad"])
        whole = path.with_suffix(".array_record").stat().st_size == entry["file_bytes"]
        return entry if same and whole and path.with_suffix(".npy").is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
