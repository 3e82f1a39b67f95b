"""Checkpoints that rot and disks that fill: found, named, and the one before it used."""

import os
import shutil
import subprocess

import pytest

from experiments import manifest
from tests import runs

NEWEST, BEFORE = 60, 56


def _resume(flags, workdir, unbroken):
    done = runs.launch("train", *flags, f"--workdir={workdir}")
    assert f"resumed from step {BEFORE}" in done.stderr
    runs.same_run(workdir, unbroken)
    return next(line for line in done.stderr.splitlines() if "damaged" in line)


@pytest.mark.faults
def test_4_one_bit_in_each_file(copy, flags, unbroken):
    """Every file of the newest checkpoint in turn: the digest names it, the step before is taken."""
    newest = copy / "checkpoints" / f"{NEWEST:08d}"
    names = [path.relative_to(newest) for path in runs.data_files(newest)]
    assert len(names) > 8
    for name in names:
        runs.flip(newest / name)
        with pytest.raises(manifest.Damaged, match=f"sha256 of {name} does not match"):
            manifest.verify(newest)
        shutil.copy(unbroken / newest.relative_to(copy) / name, newest / name)
    manifest.verify(newest)
    victim = max(names, key=lambda name: (newest / name).stat().st_size)
    runs.flip(newest / victim)
    line = _resume(flags, copy, unbroken)
    assert f"{newest} is damaged (sha256 of {victim} does not match); trying the one before it" in line


@pytest.mark.faults
@pytest.mark.parametrize("damage", ["truncated", "emptied file", "emptied", "no manifest", "empty directory"])
def test_5_parts_are_missing(copy, flags, unbroken, damage):
    newest = copy / "checkpoints" / f"{NEWEST:08d}"
    victim = max(runs.data_files(newest), key=lambda path: path.stat().st_size)
    if damage == "truncated":
        os.truncate(victim, victim.stat().st_size // 2)
    elif damage == "emptied file":
        os.truncate(victim, 0)
    elif damage == "emptied":
        for path in runs.data_files(newest):
            path.unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    line = _resume(flags, copy, unbroken)
    assert str(newest) in line


@pytest.mark.faults
def test_5_all_of_them(copy, flags):
    """Never a silent fresh start: nothing is changed, and the line says what is wrong."""
    for step in runs.steps(copy):
        os.truncate(copy / "checkpoints" / f"{step:08d}" / "manifest.json", 10)
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != "lock"}
    done = runs.launch("train", *flags, f"--workdir={copy}", check=False)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: no checkpoint in ") and "not starting afresh" in last
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.name != "lock"}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.faults
@pytest.mark.parametrize("background", ["True", "False"])
@pytest.mark.parametrize("action", ["stop", "warn"])
def test_6_a_full_disk(tmp_path, small_disk, flags, unbroken, background, action):
    """The checkpoints fill a disk of 1 MiB; the log lies on another."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "checkpoints").symlink_to(small_disk)
    more = (f"--checkpoint.background={background}", f"--checkpoint.on-failure={action}", "--checkpoint.keep=99")
    done = runs.launch("train", *flags, *more, f"--workdir={workdir}", check=False)
    lines = [line for line in done.stderr.splitlines() if "could not be written" in line]
    assert done.returncode == 1
    assert "bytes) could not be written to" in lines[0] and "no space left on the disk" in lines[0]
    assert "bytes are free" in lines[0]
    assert (len(lines) == 1) == (action == "stop")
    assert all("training goes on" in line for line in lines[:-1])
    last = done.stderr.splitlines()[-1]
    assert last == lines[-1] and last.startswith(
        "error: checkpoint of step"
    )  # the last step has to be saved, whatever the setting
    logged = [step for step, _ in runs.records(workdir)]
    assert (logged[-1] == NEWEST) == (action == "warn")
    saved = runs.steps(workdir)
    assert saved[:2] == [4, 8] and not list((workdir / "checkpoints").glob("tmp.*"))
    for step in saved:
        manifest.verify(workdir / "checkpoints" / f"{step:08d}")
    for step in saved[1:-1]:  # make room, and the same command goes on
        shutil.rmtree(workdir / "checkpoints" / f"{step:08d}")
    done = runs.launch("train", *flags, "--checkpoint.keep=1", f"--workdir={workdir}")
    assert f"resumed from step {saved[-1]}" in done.stderr
    runs.same_run(workdir, unbroken)


@pytest.mark.faults
def test_15_a_directory_that_cannot_be_written(tmp_path, flags):
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid():
        folder.chmod(0o500)
    elif subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", folder], capture_output=True).returncode:
        pytest.skip("root may write anywhere, and mounting is not allowed here")
    try:
        done = runs.launch("train", *flags, f"--workdir={folder / 'run'}", check=False)
    finally:
        if os.geteuid():
            folder.chmod(0o700)
        else:
            subprocess.run(["umount", folder], check=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: workdir {folder / 'run'}: ")
    assert done.stderr.count("\n") == 1
