"""Batches of a task as a dataset of `experiments.data`: every batch a function of its index alone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from experiments import identity, serialize

VAL_SEED = 2**31  # what every run validates on; no seed of a config reaches it
VAL_BATCHES = 64


class Dataset:
    """Training and validation batches of a config's task: dicts of arrays [B, T], as of text."""

    def __init__(self, cfg, vocab, align=1):
        if cfg.task.vocab > vocab:
            raise ValueError(f"data.task.vocab: expected at most model.vocab, {vocab}, got {cfg.task.vocab}")
        if cfg.seq_len % align:
            raise ValueError(f"data.task.seq_len: expected a multiple of {align}, got {cfg.seq_len}")
        self.pairs = cfg.task.pairs
        self._seed = cfg.seed
        self._task, self._rows = cfg.task, cfg.batch_size
        task = {f"task.{name}": value for name, value in serialize.to_json(cfg.task).items()}
        self.identity = identity.Identity([], {**task, "batch_size": cfg.batch_size, "seed": cfg.seed})
        self.fingerprint = self.identity.fingerprint
        self.summary = f"{type(cfg.task).__name__}: rows of {cfg.seq_len} tokens with {cfg.task.pairs} pairs"

    def train_batches(self, start=0, host=0, hosts=1):
        """Batches start, start + 1, ... without end; of several hosts, each gets its own batch_size / hosts rows."""
        return (self._batch(self._seed, index, host, hosts) for index in itertools.count(start))

    def val_batches(self, count=0, host=0, hosts=1):
        """The first `count` batches of a fixed sequence; 0: 64 of them. Of several hosts, each gets its own rows."""
        return (self._batch(VAL_SEED, index, host, hosts) for index in range(count or VAL_BATCHES))

    def _batch(self, seed, index, host, hosts):
        drawn = jax.device_get(_draw(self._task, self._rows, np.uint32(seed), index))
        rows, time = drawn["tokens"].shape
        drawn["segment_ids"] = np.ones((rows, time), np.int32)
        drawn["positions"] = np.broadcast_to(np.arange(time, dtype=np.int32), (rows, time))
        each = rows // hosts
        return {key: value[host * each : (host + 1) * each] for key, value in drawn.items()}


def key(seed, index):
    """What batch `index` of a stream is drawn from."""
    return jax.random.fold_in(jax.random.key(jnp.uint32(seed)), index)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(task, rows, seed, index):
    return task.batch(key(seed, index), rows)
