"""One unbroken run of a small quickstart for all tests of a worker."""

import shutil

import pytest

from tests import runs

STEPS = 30
TINY = (
    "--config=quickstart",
    f"--steps={STEPS}",
    "--log-every=1",
    "--model.d-model=32",
    "--model.mlp-hidden=0",
    "--model.compute-dtype=float32",
    "--data.seq-len=32",
    "--data.batch-size=2",
    "--data.val-fraction=0.2",
    "--optim.warmup=2",
    "--checkpoint.every=4",
    "--checkpoint.keep=2",
    "--eval.every=16",
    "--eval.batches=1",
    "--sample-tokens=8",
)


@pytest.fixture(scope="session", autouse=True)
def compiled():
    """What one process compiled, the others need not."""
    yield
    shutil.rmtree(runs.CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return runs.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def flags(corpus):
    return (*TINY, f"--data.path={corpus}")


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, flags):
    """(working directory, finished process)."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    return workdir, runs.launch("train", *flags, f"--workdir={workdir}")
