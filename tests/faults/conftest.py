"""One unbroken run of a small transformer for all faults."""

import shutil

import pytest

from tests import runs


@pytest.fixture(scope="session", autouse=True)
def compiled():
    """What one process compiled, the others need not."""
    yield
    shutil.rmtree(runs.CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def flags(tmp_path_factory):
    """Of the run that every fault befalls."""
    return (*runs.SMALL, f"--data.path={runs.write_corpus(tmp_path_factory.mktemp('corpus'))}")


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, flags):
    """The working directory of the run that nothing befell."""
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    runs.launch("train", *flags, f"--workdir={workdir}")
    return workdir


@pytest.fixture
def copy(tmp_path, unbroken):
    """A copy of it to damage."""
    return shutil.copytree(unbroken, tmp_path / "run")
