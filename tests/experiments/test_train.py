"""The runner end to end: a run that is killed or stopped and started again has an unbroken one's losses."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
CACHE = os.path.join(tempfile.gettempdir(), f"seqmix-compiled-{os.getpid()}")
STEPS = 30
TINY = (
    f"--steps={STEPS}",
    "--log-every=1",
    "--model.d-model=32",
    "--model.mlp-hidden=0",
    "--model.compute-dtype=float32",
    "--data.seq-len=32",
    "--data.batch-size=2",
    "--optim.warmup=2",
    "--checkpoint.every=4",
    "--checkpoint.keep=2",
    "--eval.every=16",
    "--eval.batches=1",
    "--sample-tokens=8",
)


def command(module, *args):
    return [sys.executable, "-m", f"experiments.{module}", *args]


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """What one process compiled, the others need not."""
    yield
    shutil.rmtree(CACHE, ignore_errors=True)


def environment():
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # one device
        "JAX_COMPILATION_CACHE_DIR": CACHE,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }


def launch(module, *args, check=True, **options):
    done = subprocess.run(
        command(module, *args),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
        **options,
    )
    if check:
        assert done.returncode == 0, done.stderr[-3000:]
    return done


def changed(flags, *changes):
    names = {change.split("=")[0] for change in changes}
    return (*(flag for flag in flags if flag.split("=")[0] not in names), *changes)


def records(workdir, kind="train"):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in lines if r["kind"] == kind]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    words = [
        "the",
        "state",
        "of",
        "a",
        "mixer",
        "is",
        "a",
        "matrix",
        "that",
        "forgets",
        "and",
        "remembers",
        "what",
        "it",
        "has",
        "read",
    ]
    draw = random.Random(0)
    for index in range(60):
        (folder / f"{index:02d}.txt").write_text(" ".join(draw.choice(words) for _ in range(200)) + "\n")
    return folder


@pytest.fixture(scope="module")
def flags(corpus):
    return ("--config=quickstart", *TINY, f"--data.path={corpus}", "--data.val-fraction=0.2")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, flags):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    done = launch("train", *flags, f"--workdir={workdir}")
    return workdir, done


def interrupt(flags, workdir, number, after):
    """Starts a run, sends it a signal once `after` steps are in its log; returns (exit code, stderr)."""
    log = workdir / "metrics.jsonl"
    process = subprocess.Popen(
        command("train", *flags, f"--workdir={workdir}"),
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    limit = time.monotonic() + 500
    while process.poll() is None and time.monotonic() < limit:
        if log.exists() and log.read_text().count('"train"') >= after:
            process.send_signal(number)
            break
        time.sleep(0.005)
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def same_run(workdir, unbroken):
    assert records(workdir) == records(unbroken)
    assert records(workdir, "val") == records(unbroken, "val")
    assert records(workdir, "final") == records(unbroken, "final")


def test_a_run_reports(unbroken):
    workdir, done = unbroken
    steps = [step for step, _ in records(workdir)]
    losses = [loss for _, loss in records(workdir)]
    assert steps == list(range(1, STEPS + 1))
    assert losses[-1] < losses[0]
    bits = float(done.stdout.splitlines()[-1].removeprefix("val_bits_per_byte="))
    assert 0 < bits < 9
    assert "gzip" in done.stdout and "unigram" in done.stdout
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["00000028", "00000030"]


def test_sigkill_and_restart(tmp_path, flags, unbroken):
    after = random.Random().randrange(5, STEPS - 6)
    code, _ = interrupt(flags, tmp_path / "run", signal.SIGKILL, after)
    assert code == -signal.SIGKILL, f"killed after {after}"
    done = launch("train", *flags, f"--workdir={tmp_path / 'run'}")
    assert "resumed from step" in done.stderr
    same_run(tmp_path / "run", unbroken[0])


def test_sigterm_saves_and_restart(tmp_path, flags, unbroken):
    code, errors = interrupt(flags, tmp_path / "run", signal.SIGTERM, 6)
    assert code == 75, errors[-2000:]
    assert "resumable" in errors
    logged = records(tmp_path / "run")[-1][0]
    done = launch("train", *flags, f"--workdir={tmp_path / 'run'}")
    assert f"resumed from step {logged}" in done.stderr
    same_run(tmp_path / "run", unbroken[0])


def test_damaged_checkpoint_falls_back(tmp_path, flags, unbroken):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken[0], workdir)
    newest = workdir / "checkpoints" / f"{STEPS:08d}"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = launch("train", *flags, f"--workdir={workdir}")
    assert "damaged" in done.stderr and victim.name in done.stderr and "resumed from step 28" in done.stderr
    same_run(workdir, unbroken[0])


@pytest.mark.parametrize(
    "change, field", [("--optim.peak-lr=0.5", "optim.peak_lr"), ("--model.d-model=64", "model.d_model")]
)
def test_another_config_is_refused(flags, unbroken, change, field):
    workdir = unbroken[0]
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and p.name != "lock"}
    done = launch("train", *changed(flags, change), f"--workdir={workdir}", check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and field in done.stderr and done.stderr.count("\n") == 1
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file() and p.name != "lock"}


def test_generate_is_deterministic_by_seed(unbroken, capfd):
    from experiments import generate

    args = (f"--workdir={unbroken[0]}", "--prompt=the state", "--max-tokens=24", "--top-k=40", "--top-p=0.9")
    made = []
    for seed in (1, 1, 2):
        assert generate.main([*args, f"--seed={seed}"]) == 0
        made.append(capfd.readouterr().out)
    assert made[0] == made[1] != made[2]
    assert made[0].startswith("the state") and made[0].endswith("\n")


def test_generate_answers_a_typo_in_one_line(unbroken):
    done = launch("generate", f"--workdir={unbroken[0]}", "--promt=x", check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: --promt: unknown flag, did you mean --prompt?\n"


@pytest.mark.parametrize("bad", ["--temperature=0", "--max-tokens=0", "--top-p=1.5", "--top-k=-1", "--tokens=3"])
def test_generate_refuses_in_one_line(unbroken, bad):
    from experiments import generate

    assert generate.main([f"--workdir={unbroken[0]}", bad]) == 2


def test_greedy_is_the_argmax_of_forward(unbroken):
    import jax.numpy as jnp

    from experiments import generate

    cfg, params = generate.load(unbroken[0], print)
    prompt = list(b"the state of a")
    made = generate.sample(cfg.model, params, prompt, max_tokens=10, greedy=True)
    tokens = np.asarray([prompt + made], np.int32)
    hidden, _ = cfg.model.forward(params, tokens)
    logits = cfg.model.logits(params, hidden)[0, :, : cfg.model.vocab]
    assert jnp.argmax(logits, -1)[len(prompt) - 1 : -1].tolist() == made


def test_dry_run_prints_the_count():
    done = launch("train", "--config=quickstart", "--dry-run")
    assert int(done.stdout.splitlines()[-1].removeprefix("params=")) > 0


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, corpus):
    from experiments import checkpoint

    done = launch(
        "train",
        "--config=transformer_1b",
        *(flag for flag in TINY if not flag.startswith("--optim")),
        "--model.n-layers=1",
        "--model.vocab=260",
        "--model.remat=none",
        "--model.mixers.0.heads=1",
        "--model.mixers.0.kv-heads=1",
        "--model.mixers.0.head-dim=8",
        "--optim.peak-lr=1e30",
        "--optim.warmup=0",
        f"--data.path={corpus}",
        f"--workdir={tmp_path / 'run'}",
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: loss ")
    last = records(tmp_path / "run")[-1][0]
    assert all(step <= last for step in checkpoint.Checkpoints(tmp_path / "run").steps())


def test_two_runs_in_one_directory(tmp_path):
    from experiments import checkpoint

    held = checkpoint.lock(tmp_path)
    with pytest.raises(checkpoint.Refused, match="in use"):
        checkpoint.lock(tmp_path)
    held.close()


def test_a_checkpoint_that_does_not_fit_leaves_those_before_it(tmp_path):
    from experiments import checkpoint

    saved = checkpoint.Checkpoints(tmp_path, keep=2)
    small = {"w": np.arange(4.0)}
    saved.save(1, small, {"step": np.int32(1)}, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        large = {"w": np.random.default_rng(0).random(100_000)}
        with pytest.raises(checkpoint.NotSaved, match=r"^checkpoint of step 2 \(800004 bytes\)"):
            saved.save(2, large, {"step": np.int32(2)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in saved.root.iterdir()] == ["00000001"]
    checkpoint.verify(saved.root / "00000001")


def test_a_signal_before_the_first_step_ends_the_process(tmp_path, flags):
    process = subprocess.Popen(
        command("train", *flags, f"--workdir={tmp_path / 'run'}"),
        cwd=ROOT,
        env=environment(),
        text=True,
        stderr=subprocess.PIPE,
    )
    for line in process.stderr:
        if line.startswith("initialising the weights ..."):
            process.send_signal(signal.SIGINT)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "resumable" in errors
    assert not (tmp_path / "run" / "config.json").exists()


def test_other_data_is_refused(flags, unbroken):
    folder = Path(next(flag for flag in flags if flag.startswith("--data.path=")).split("=")[1])
    first = sorted(folder.iterdir())[0]
    content = first.read_text()
    try:
        first.write_text(content.replace("mixer", "fixer"))
        done = launch("train", *flags, f"--workdir={unbroken[0]}", check=False)
    finally:
        first.write_text(content)
    assert done.returncode == 2
    assert f"other data: source: {folder}" in done.stderr.splitlines()[-1]
