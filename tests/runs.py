"""Training runs as processes, for tests: a corpus, flags of small configs, start, stop, read the log."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CACHE = os.path.join(tempfile.gettempdir(), f"seqmix-compiled-{os.getpid()}")
WORDS = ("the", "state", "of", "a", "mixer", "is", "a", "matrix", "that", "forgets", "and", "remembers")

# A transformer that compiles in two or three seconds and does a step in five milliseconds.
SMALL = (
    "--config=transformer_1b",
    "--steps=60",
    "--log-every=1",
    "--model.n-layers=1",
    "--model.vocab=260",
    "--model.remat=none",
    "--model.mixers.0.heads=1",
    "--model.mixers.0.kv-heads=1",
    "--model.mixers.0.head-dim=8",
    "--model.d-model=16",
    "--model.mlp-hidden=0",
    "--model.compute-dtype=float32",
    "--data.seq-len=16",
    "--data.batch-size=4",
    "--data.val-fraction=0.2",
    "--optim.warmup=2",
    "--checkpoint.every=4",
    "--eval.every=0",
    "--eval.final-batches=1",
    "--sample-tokens=0",
)


def write_corpus(folder):
    """Sixty documents of two hundred words each."""
    draw = random.Random(0)
    for index in range(60):
        (folder / f"{index:02d}.txt").write_text(" ".join(draw.choice(WORDS) for _ in range(200)) + "\n")
    return folder


def command(module, *args):
    """The command line of an entry point; a path runs that file instead."""
    return [sys.executable, *([module] if module.endswith(".py") else ["-m", f"experiments.{module}"]), *args]


def environment(**more):
    """One CPU device; what one process compiled, the others need not."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        **more,
    }


def start(module, *args, **options):
    """The process, its stderr piped."""
    settings = {"cwd": ROOT, "env": environment(), "text": True}
    settings |= {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command(module, *args), **(settings | options))


def launch(module, *args, check=True, timeout=600, **options):
    """The finished process with its output."""
    settings = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True, "timeout": timeout}
    done = subprocess.run(command(module, *args), **(settings | options))
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def interrupt(flags, workdir, number, after):
    """Starts a run, sends it a signal once `after` steps are in its log; returns (exit code, stderr)."""
    log = workdir / "metrics.jsonl"
    process = start("train", *flags, f"--workdir={workdir}")
    limit = time.monotonic() + 500
    while process.poll() is None and time.monotonic() < limit:
        if log.exists() and log.read_text().count('"train"') >= after:
            process.send_signal(number)
            break
        time.sleep(0.005)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def changed(flags, *changes):
    """The flags with some of them given anew."""
    names = {change.split("=")[0] for change in changes}
    return (*(flag for flag in flags if flag.split("=")[0] not in names), *changes)


def records(workdir, kind="train"):
    """(step, loss) of the records of a kind."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in lines if r["kind"] == kind]


def steps(workdir):
    """The steps whose checkpoints are there."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def data_files(checkpoint):
    """The files of a checkpoint that its manifest has the digests of, and that hold anything."""
    files = (path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    return sorted(path for path in files if path != checkpoint / "manifest.json")


def flip(path):
    """Turns one bit of a file around, in its middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def weights(workdir, step=None):
    """The arrays of the newest checkpoint, or of that of `step`, by tree: {"params": [...], "rest": [...]}."""
    import jax
    import orbax.checkpoint as ocp

    path = workdir / "checkpoints" / f"{steps(workdir)[-1] if step is None else step:08d}"
    trees = {}
    for name in ("params", "rest"):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            trees[name] = jax.tree.leaves(checkpointer.restore(path / name))
    return trees


def same_run(workdir, unbroken):
    """Asserts that two runs have the same losses and last weights and moments, to the bit."""
    import numpy as np

    for kind in ("train", "val", "final"):
        assert records(workdir, kind) == records(unbroken, kind)
    ours, theirs = weights(workdir), weights(unbroken)
    for name in ours:
        assert len(ours[name]) == len(theirs[name]) > 0
        for left, right in zip(ours[name], theirs[name]):
            np.testing.assert_array_equal(left, right)
