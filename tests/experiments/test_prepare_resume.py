"""Preparation goes on after a kill, which costs at most the shards that were being made; damage is named."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import shards
from tests.corpora import WORDS, made, read, refused, texts, write_jsonl

ROOT = Path(__file__).parents[2]


def test_a_finished_folder_is_left_alone(tmp_path, capsys):
    source = write_jsonl(tmp_path / "x.jsonl", texts())
    made(tmp_path / "out", source)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    made(tmp_path / "out", source)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    write_jsonl(source, texts(41))
    assert "other inputs (or they changed)" in refused(capsys, 2, source, f"--out={tmp_path / 'out'}")


def test_an_unfinished_folder_keeps_what_still_holds(tmp_path, capsys):
    sources = [write_jsonl(tmp_path / f"{index}.jsonl", texts(9, index)) for index in range(3)]
    sources[2].write_text("{")
    refused(capsys, 2, *sources, f"--out={tmp_path / 'out'}", "--workers=1")
    kept = tmp_path / "out" / "shard-00000.array_record"
    before = kept.stat().st_mtime_ns
    write_jsonl(sources[2], texts(9, 2))
    write_jsonl(sources[1], texts(8, 9))
    assert made(tmp_path / "out", *sources) == texts(9, 0) + texts(8, 9) + texts(9, 2)
    assert kept.stat().st_mtime_ns == before
    left = {path.name.split(".")[-1] for path in (tmp_path / "out").iterdir()}
    assert left == {"array_record", "npy", "json", "lock"}
    assert [path.name for path in (tmp_path / "out").glob("*.json")] == ["manifest.json"]


def children(pid):
    """Processes whose parent is `pid`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def launch(*args):
    command = [sys.executable, "-m", "experiments.prepare", *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def until(condition, seconds=60):
    limit = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < limit
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("whom", ["all", "worker"])
def test_a_kill_costs_the_shards_being_made(tmp_path, whom):
    sources = [write_jsonl(tmp_path / f"{index}.jsonl", texts(9, index)) for index in range(3)]
    many = [" ".join(texts(300))] * 2000  # 40 MB
    big = write_jsonl(tmp_path / "big.jsonl", many)
    out = tmp_path / "out"
    flags = (*sources, big, f"--out={out}", "--workers=2")
    process = launch(*flags)
    until(lambda: list(out.glob("shard-0000[0-2].json")))
    workers = [pid for pid in children(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert workers
    for victim in workers if whom == "worker" else [process.pid]:
        os.kill(victim, signal.SIGKILL)
    error = process.communicate(timeout=60)[1]
    if whom == "worker":
        assert process.returncode == 1
        assert error.splitlines()[-1].startswith("error: a worker process was killed")
    until(lambda: not any(alive(pid) for pid in workers), seconds=10)
    with pytest.raises(ValueError, match=f"finish it with: python -m experiments.prepare .*--out={out}"):
        shards.Prepared(out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.npy") if path.with_suffix(".json").exists()}
    expected = [text for index in range(3) for text in texts(9, index)] + many
    assert made(out, *flags[:4]) == expected
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


@pytest.mark.parametrize("damage", ["bit", "cut", "index", "gone", "manifest"])
def test_damage_is_named(tmp_path, damage):
    out = tmp_path / "out"
    documents = ["".join(random.Random(index).choices(WORDS, k=9000)) for index in range(4)]
    made(out, write_jsonl(tmp_path / "x.jsonl", documents))
    data, index = out / "shard-00000.array_record", out / "shard-00000.npy"
    victim = {"bit": data, "cut": data, "gone": data, "index": index, "manifest": out / "manifest.json"}[damage]
    content = bytearray(victim.read_bytes())
    if damage == "gone":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(content[: len(content) // 2])
    elif damage == "manifest":
        victim.write_text(victim.read_text().replace('"documents": 4', '"documents": 5'))
    else:
        content[len(content) // 2 if damage == "index" else 5000] ^= 1
        victim.write_bytes(content)
    if damage != "bit":  # which only reading can find
        with pytest.raises(ValueError) as caught:
            read(out)
        assert str(caught.value).startswith(f"{victim}: ")
        return
    with pytest.raises(shards.Damaged, match=rf"{victim}: record \d+ is damaged: .*hash mismatch"):
        read(out)
