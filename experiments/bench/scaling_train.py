"""Weak scaling of whole training steps, and the losses of a batch spread over devices."""

import dataclasses
import functools
import gc
import time

import jax
import numpy as np

from experiments import flags, loop
from experiments.bench.suites import Case
from experiments.config import Mesh
from seqmix.core import sharding

CONFIGS = ("mamba2_1b", "transformer_1b")
ROWS, STEPS, WARM = 8, 6, 2  # rows of a device, steps timed, steps before


def counts():
    """1, 2, 4, ... devices, as many as there are."""
    return [2**n for n in range(jax.device_count().bit_length())]


def cases(args):
    """Each config over data and fsdp, then one device's batch over all."""
    every = counts()
    found = []
    for name in CONFIGS:
        runs = [("one", 1, ROWS)]
        runs += [("fsdp", n, ROWS * n) for n in every[1:]] + [("data", n, ROWS * n) for n in every[-1:] if n > 1]
        runs += [("fsdp, one device's batch", every[-1], ROWS)] if len(every) > 1 and ROWS % every[-1] == 0 else []
        for how, n, rows in runs:
            label = f"{name} {how} on {n}"
            found.append(Case("train", label, functools.partial(_run, name, how, n, rows)))
    return found


@functools.cache
def program(name, how, devices, rows):
    """(trainer, compiled step) of a config."""
    cfg = flags.parse([f"--config={name}"])[0]
    axis = "data" if how == "data" else "fsdp"
    sizes = dict(data=1, fsdp=1, context=1, model=1) | {axis: devices}
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=rows), mesh=Mesh(**sizes))
    trainer = loop.Trainer(cfg, sharding.make_mesh(**sizes, devices=jax.devices()[:devices]))
    return trainer, trainer.compile_step({"params": trainer.params, **trainer.rest}, trainer.abstract_batch())


def _run(name, how, devices, rows, args):
    """One row."""
    trainer, step = program(name, how, devices, rows)
    if args.compile_only:
        return
    seq, vocab = trainer.cfg.data.seq_len, trainer.cfg.model.vocab
    state, seconds, losses = trainer.init(), [], []
    for index in range(WARM + STEPS):
        batch = trainer.put(_batch(index, rows, seq, vocab))
        jax.block_until_ready((state, batch))
        begin = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begin)
        losses.append(float(metrics["loss"]))
    del state, batch
    gc.collect()
    took = float(np.median(seconds[WARM:]))
    row = {"what": name, "how": how, "devices": devices, "tokens": rows * seq, "step_ms": 1e3 * took}
    row |= {"tokens_per_second": rows * seq / took, "losses": losses}
    yield row


def relate(rows):
    """Shares of one device's rate, or errors of the losses where its tokens are spread over several."""
    one = {row["what"]: row for row in rows if row["devices"] == 1}
    for row in rows:
        if row["devices"] == 1 or row["what"] not in one:
            continue
        base = one[row["what"]]
        if row["tokens"] == base["tokens"]:
            row["loss_error"] = max(abs(a / b - 1) for a, b in zip(row["losses"], base["losses"], strict=True))
        else:
            row["share"] = row["tokens_per_second"] / row["devices"] / base["tokens_per_second"]


def _batch(seed, rows, seq, vocab):
    """Random tokens, the same first rows whatever their number."""
    draw = np.stack([np.random.default_rng((seed, row)).integers(0, vocab, seq + 1) for row in range(rows)])
    return {
        "tokens": draw[:, :-1].astype(np.int32),
        "targets": draw[:, 1:].astype(np.int32),
        "segment_ids": np.ones((rows, seq), np.int32),
        "positions": np.tile(np.arange(seq, dtype=np.int32), (rows, 1)),
        "mask": np.ones((rows, seq), np.float32),
    }
