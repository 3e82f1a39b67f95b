"""Weak scaling of whole training steps, and the losses of a batch spread over devices."""

import dataclasses
import functools
import gc
import time

import jax
import numpy as np

from experiments import flags, loop
from experiments.bench import turns
from experiments.bench.suites import Case
from experiments.config import Mesh
from seqmix.core import sharding

CONFIGS = ("mamba2_1b", "transformer_1b")
ROWS, STEPS, WARM = 8, 6, 2  # rows of a device, steps timed, steps before


def counts():
    """1, 2, 4, ... devices, as many as there are."""
    return [2**n for n in range(jax.device_count().bit_length())]


def cases(args):
    """Each config on one device and over fsdp and data on all, one device's batch over all; then on fewer devices."""
    every = counts()
    runs = [("one", 1, ROWS)]
    for n in every[:0:-1]:
        runs += [(how, n, ROWS * n) for how in ("fsdp", "data")]
        runs += [("fsdp, one device's batch", n, ROWS)] * (n == every[-1] and ROWS % n == 0)
    made = lambda name, how, n, rows: functools.partial(_run, name, how, n, rows)
    ordered = [(name, *one) for some in (runs[:4], runs[4:]) for name in CONFIGS for one in some]
    return [Case("train", f"{name} {how} on {n}", made(name, how, n, rows)) for name, how, n, rows in ordered]


def programs(name, how, devices, rows):
    """(trainer, compiled making of its state, compiled step) of a config, for which nothing is on the devices yet."""
    cfg = flags.parse([f"--config={name}"])[0]
    axis = "data" if how == "data" else "fsdp"
    sizes = dict(data=1, fsdp=1, context=1, model=1) | {axis: devices}
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=rows), mesh=Mesh(**sizes))
    trainer = loop.Trainer(cfg, sharding.make_mesh(**sizes, devices=jax.devices()[:devices]))
    step = trainer.compile_step({"params": trainer.params, **trainer.rest}, trainer.abstract_batch())
    return trainer, trainer.compile_init(), step


def _run(name, how, devices, rows, args):
    """One row."""
    trainer, init, step = programs(name, how, devices, rows)
    if args.compile_only:
        return
    model, seq = trainer.cfg.model, trainer.cfg.data.seq_len
    batches = [_batch(index, rows, seq, model.vocab) for index in range(WARM + STEPS)]
    with turns.devices():
        state, _, losses = _steps(trainer, step, init(), batches[:WARM])
        with turns.turn():
            state, seconds, more = _steps(trainer, step, state, batches[WARM:])
    del state
    gc.collect()
    took = float(np.median(seconds))
    row = {"what": name, "how": how, "devices": devices, "tokens": rows * seq, "step_ms": 1e3 * took}
    row |= {"step_ms_each": [1e3 * one for one in seconds], "tokens_per_second": rows * seq / took}
    layers = "unrolled" if model.unroll else "a loop"
    yield row | {"losses": losses + more, "settings": f"remat={model.remat}, layers {layers}"}


def _steps(trainer, step, state, batches):
    """The state after a step for each batch, and the steps' seconds and losses."""
    seconds, losses = [], []
    for batch in batches:
        batch = trainer.put(batch)
        jax.block_until_ready((state, batch))
        begin = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - begin)
        losses.append(float(metrics["loss"]))
    return state, seconds, losses


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
