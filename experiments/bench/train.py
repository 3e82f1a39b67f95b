"""Whole training steps on one device: tokens/s, MFU, memory, and where the time goes.

The step is the runner's own (`loop.Trainer`), with its batch put on the device anew each time. MFU is of three times
the model's FLOPs (`LM.chunkless_flops`), which no chunk size changes, over the card's dense bf16 peak. A second,
traced run of a few steps gives each kernel's time, booked by the scope in the model's code that the kernel is from.
"""

import functools
import os
import statistics
import tempfile
import time

import jax
import numpy as np

from experiments import flags, loop, progress
from experiments.bench import profile, train_peers
from experiments.bench.suites import Case
from seqmix.core import flops, sharding

NAME = "train"
COLUMNS = (
    ("part", "config", ""),
    ("batch", "B", ","),
    ("seq_len", "T", ","),
    ("settings", "settings", ""),
    ("parameters", "weights", ","),
    ("step_ms", "step, ms", ".1f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("mfu", "MFU", ".1%"),
    ("program_gib", "memory, GiB", ".1f"),
    ("shares", "where the time goes, ms", ""),
)
# By name: a config and what is changed in it. 8 rows of 2048 tokens fit into 80 GB with nothing recomputed.
ROWS = "data.batch-size=8"
CASES = {
    "mamba2_1b": ("mamba2_1b", (ROWS, "model.remat=none", "model.unroll=True")),
    "mamba2_1b_loop": ("mamba2_1b", (ROWS, "model.remat=none")),
    "mamba2_1b_dots": ("mamba2_1b", (ROWS, "model.remat=dots")),
    "mamba2_1b_full": ("mamba2_1b", (ROWS, "model.remat=full")),
    "transformer_1b": ("transformer_1b", (ROWS, "model.remat=none", "model.unroll=True")),
    "transformer_1b_full": ("transformer_1b", (ROWS, "model.remat=full")),
}
WARM, STEPS, ROUNDS, TRACED = 3, 10, 3, 3


def cases(args):
    """One for each of CASES; with peers theirs first, for which jax must not hold the memory from the start."""
    found = [
        Case(part, f"{name} {' '.join(changed)}", functools.partial(_run, part))
        for part, (name, changed) in CASES.items()
    ]
    if not args.peers:
        return found
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return [Case(train_peers.LABEL, f"{train_peers.LABEL} B8 T2048", _peer), *found]


def _peer(args):
    yield train_peers.row(8, 2048)


def _run(part, args):
    name, changed = CASES[part]
    row = measure(flags.parse([f"--config={name}", *(f"--{text}" for text in changed)])[0])
    yield row | {"settings": " ".join(changed)}


def measure(cfg):
    """The row of a config."""
    trainer = loop.Trainer(cfg, sharding.make_mesh(devices=jax.devices()[:1]))
    shape = rows, seq = cfg.data.batch_size, cfg.data.seq_len
    state = trainer.init()
    batches = [batch(seed, *shape, cfg.model.vocab) for seed in range(4)]
    begin = time.perf_counter()
    step = trainer.compile_step(state, trainer.put(batches[0]))
    compiled = time.perf_counter() - begin
    state, _ = _steps(trainer, step, state, batches, WARM)
    took = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        state, metrics = _steps(trainer, step, state, batches, STEPS)
        took.append((time.perf_counter() - begin) / STEPS)
    seconds = statistics.median(took)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            state, _ = _steps(trainer, step, state, batches, TRACED)
        found = profile.read(folder, step.as_text(), TRACED)
    peak = progress.peak_memory()
    return {
        "config": cfg.name,
        "batch": rows,
        "seq_len": seq,
        "parameters": cfg.model.count(),
        "step_ms": 1e3 * seconds,
        "step_ms_rounds": [1e3 * one for one in took],
        "tokens_per_second": rows * seq / seconds,
        "mfu": _mfu(trainer, seconds),
        "model_flops": trainer.chunkless_flops,
        "peak_bytes": peak,  # of this process so far
        "program_bytes": _program_bytes(step.memory_analysis()),
        "program_gib": _program_bytes(step.memory_analysis()) / 2**30,
        "compile_s": compiled,
        "loss": float(metrics["loss"]),
        "shares": ", ".join(f"{what} {ms:.1f}" for what, ms in found["parts"].items() if ms >= 0.5),
        "profile": found["parts"],
        "kernels": found["kernels"],
    }


def _program_bytes(memory):
    """What the step needs at once, by the compiler's account: state, batch and temporary buffers."""
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes


def _mfu(trainer, seconds):
    peak = flops.peak_flops(jax.devices()[0].device_kind)
    return trainer.chunkless_flops / seconds / peak if peak else None


def _steps(trainer, step, state, batches, count):
    """The state and last metrics after so many steps, each with its batch from the host, as the runner's loop does."""
    for index in range(count):
        state, metrics = step(state, trainer.put(batches[index % len(batches)]))
    jax.block_until_ready((state, metrics))
    return state, metrics


def batch(seed, rows, seq, vocab):
    """Random tokens as packed documents, three to a row on average."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (rows, seq + 1)).astype(np.int32)
    starts = rng.random((rows, seq)) < 2 / seq
    starts[:, 0] = True
    where = np.arange(seq, dtype=np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32),
        "positions": where - np.maximum.accumulate(np.where(starts, where, 0), axis=1),
        "mask": np.ones((rows, seq), np.float32),
    }


def draw(rows, figure):
    """A bar for each config, of where its step goes."""
    rows = [row for row in rows if "profile" in row]
    figure.set_size_inches(7, 1 + 0.6 * len(rows))
    axes = figure.subplots()
    names = list(dict.fromkeys(name for row in rows for name in row["profile"]))
    left = np.zeros(len(rows))
    for name in names:
        width = np.array([row["profile"].get(name, 0.0) for row in rows])
        axes.barh([row["part"] for row in rows], width, left=left, label=name)
        left += width
    axes.set(xlabel="ms of a step")
    axes.legend(fontsize=5, ncols=2)
