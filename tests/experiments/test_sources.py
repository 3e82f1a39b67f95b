"""Batches of prepared text: one order whatever reads it, mixtures by weight, folders that are broken refused."""

import collections
import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from experiments import data, shards
from tests.corpora import documents, prepared, small

ROOT = Path(__file__).parents[2]
EOS = 258


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("corpus") / "a", documents())


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("corpus") / "b", documents(20, seed=1, letters="XYZ"))


def take(cfg, start, count, host=0, hosts=1, **options):
    return list(itertools.islice(data.load(cfg, 260, **options).train_batches(start, host, hosts), count))


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def alike(left, right):
    """Whether two lists of batches are equal."""
    return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))


def joined(parts):
    """The batches of all hosts, from each host's."""
    return [{key: np.concatenate([b[key] for b in batch]) for key in batch[0]} for batch in zip(*parts, strict=True)]


def targets(batches):
    return np.concatenate([batch["targets"][batch["mask"] == 1] for batch in batches]).tolist()


def test_prepared_text_is_all_read(corpus):
    """Validation and an epoch of training hold each token once, but for an end that fills no row."""
    cfg = small(corpus, batch_size=1)
    loaded = data.load(cfg, 260)
    val, held = targets(loaded.val_batches()), loaded.held()
    ends = val.count(EOS)
    assert collections.Counter(val) == collections.Counter(held) + collections.Counter({EOS: ends})
    assert round(loaded.bytes_per_token * len(val)) == len(held)
    texts = [text for text in documents() if text.encode() in held]
    assert 0.1 < len(held) / sum(map(len, documents())) <= 0.2 and len(texts) >= ends > 1
    total = sum(len(text) + 1 for text in documents()) - len(val)
    train = targets(itertools.islice(loaded.train_batches(), total // cfg.seq_len))
    missing = (
        collections.Counter("".join(documents()).encode()) - collections.Counter(train) - collections.Counter(held)
    )
    assert total - len(train) == total % cfg.seq_len >= missing.total()


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("mixed", [False, True])
def test_the_order_does_not_depend_on_hosts_and_threads(corpus, other, hosts, mixed):
    cfg = small(mixture=(f"2:{corpus}", f"1:{other}")) if mixed else small(corpus)
    whole = take(dataclasses.replace(cfg, threads=0), 0, 30)
    for threads in (1, 3):
        assert alike(whole, take(dataclasses.replace(cfg, threads=threads), 0, 30))
    parts = [take(dataclasses.replace(cfg, threads=host), 7, 23, host, hosts) for host in range(hosts)]
    assert alike(whole[7:], joined(parts))
    loaded = data.load(cfg, 260)
    whole = list(loaded.val_batches())
    assert len(whole) > 2 and all(len(batch["tokens"]) == 4 for batch in whole)
    for count in (0, 2):
        parts = [list(loaded.val_batches(count, host, hosts)) for host in range(hosts)]
        assert alike(whole[: count or None], joined(parts))


def test_hosts_that_do_not_divide_a_batch_are_refused(corpus):
    loaded = data.load(small(corpus), 260)
    for host, hosts in ((0, 3), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="hosts: expected a divisor of data.batch_size 4"):
            loaded.train_batches(0, host, hosts)
        with pytest.raises(ValueError, match="hosts: expected a divisor of data.batch_size 4"):
            loaded.val_batches(0, host, hosts)


def test_batches_are_functions_of_their_index(corpus, other):
    cfg = small(mixture=(f"0.7:{corpus}", f"0.3:{other}"))
    whole = take(cfg, 0, 400)  # several epochs of both
    for start in (1, 133, 399):
        assert alike(whole[start:], take(cfg, start, 400 - start))


@pytest.mark.parametrize("weight", [0.25, 0.5, 0.9])
def test_a_mixture_has_its_weights(corpus, other, weight):
    batches = take(small(mixture=(f"{weight}:{corpus}", f"{1 - weight}:{other}")), 0, 100)
    first = np.concatenate([np.isin(batch["tokens"], list(b"abcdefgh \n")).any(axis=1) for batch in batches])
    assert abs(first.mean() - weight) < 0.01
    for half in np.split(first, 2):  # all along
        assert abs(half.mean() - weight) < 0.02


def test_a_mixture_of_text_and_prepared_text(tmp_path, corpus):
    (tmp_path / "z.txt").write_text("ZZZ ZZ\n" * 100)
    cfg = small(mixture=(f"1:{tmp_path / 'z.txt'}", f"3:{corpus}"))
    loaded = data.load(cfg, 260)
    assert {ord("Z"), ord("a")} <= set(targets(itertools.islice(loaded.train_batches(), 8)))
    assert b"Z" in loaded.held() and b"a" in loaded.held()
    assert {ord("Z"), ord("a")} <= set(targets(loaded.val_batches()))
    assert 0 < loaded.stats()["unigram_entropy"] < 8


def test_documents_have_names(tmp_path, corpus):
    """The name of each document of a batch leads to text that has the batch's tokens."""
    for name in ("y", "z"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name.upper()}{index}" for index in range(300)))
    mixture = (f"1:{tmp_path}", f"1:{corpus}", f"1:{tmp_path / 'z.txt'}")
    loaded = data.load(small(mixture=mixture), 260)
    made = documents()
    named = {f"document {index} of {corpus}": text for index, text in enumerate(made)}
    named |= {f"{path.name}{end}": path.read_text() for path in tmp_path.iterdir() for end in ("", ", start")}
    seen = set()
    for batch in itertools.islice(loaded.train_batches(), 200):
        for row in range(4):
            for number in set(batch["documents"][row][batch["mask"][row] == 1].tolist()):
                here = (batch["documents"][row] == number) & (batch["mask"][row] == 1)
                ids = [id for id in batch["tokens"][row][here].tolist() if id != EOS]
                assert bytes(ids).decode() in named[loaded.names[number]]
                seen.add(loaded.names[number])
    assert {"z.txt", "z.txt, start"} <= seen and len(seen) > 40


def test_windows_are_contiguous_and_one_segment(corpus):
    batches = take(small(corpus), 0, 50, packs=False)
    for batch in batches:
        assert (batch["mask"] == 1).all() and (batch["segment_ids"] == 1).all()
        assert (batch["positions"] == np.arange(16)).all()
        assert (batch["targets"][:, :-1] == batch["tokens"][:, 1:]).all()
    packed = take(small(corpus), 0, 50)
    assert all(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(batches, packed, strict=True))
    assert max(batch["segment_ids"].max() for batch in packed) > 1
    explicit = take(small(corpus, rows="windows"), 0, 50)
    assert alike(batches, explicit)
    with pytest.raises(ValueError, match="data.rows: a mixer of this model cannot pack"):
        data.load(small(corpus, rows="packed"), 260, packs=False)


def test_one_long_document_validates_on_its_end(tmp_path):
    text = "".join(f"line {index}\n" for index in range(3000))
    loaded = data.load(small(prepared(tmp_path / "a", [text])), 260)
    held = loaded.held().decode()
    assert text.endswith(held) and abs(len(held) / len(text) - 0.2) < 0.01
    assert targets(loaded.val_batches()) == [*held.encode(), EOS] or len(targets(loaded.val_batches())) == len(held) + 1


def test_a_trained_tokenizer_is_asked_for(tmp_path):
    pytest.importorskip("tokenizers")
    folder = prepared(tmp_path / "a", documents(), "--train-bpe=280")
    with pytest.raises(ValueError, match=f"another tokenizer than bytes: expected data.tokenizer={folder}/tok"):
        data.load(small(folder), 1000)
    cfg = small(folder, tokenizer=str(folder / "tokenizer.json"))
    loaded = data.load(cfg, 280)
    assert loaded.bytes_per_token > 1 and loaded.held().decode()
    with pytest.raises(ValueError, match="ids beyond the vocabulary: model.vocab is 260"):
        data.load(cfg, 260)


REFUSED = {
    "unfinished": (lambda p: unfinished(p), "its preparation is unfinished; finish it with: python -m experiments.pre"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), "no manifest.json there"),
    "no shard": (lambda p: (p / "shard-00000.array_record").unlink(), "shard-00000.array_record: missing"),
    "no JSON": (lambda p: (p / "manifest.json").write_text("{"), "not a manifest of prepared text"),
}


def unfinished(folder):
    (folder / "manifest.json").unlink()
    (folder / "prepare.json").write_text(json.dumps({"command": "python -m experiments.prepare x --out=y"}))


@pytest.mark.parametrize("name", REFUSED)
def test_broken_folders_are_refused_in_one_line(tmp_path, name):
    folder = prepared(tmp_path / "a", documents())
    change, message = REFUSED[name]
    change(folder)
    with pytest.raises(ValueError, match="^data.path: ") as caught:
        data.load(small(folder), 260)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("entry", ["x", "0:x", "-1:x", "a:x", "1:"])
def test_a_mixture_is_weights_and_paths(entry):
    with pytest.raises(ValueError, match="data.mixture: expected WEIGHT:PATH with a positive weight"):
        small(mixture=(entry, "1:x"))


def test_a_mixture_from_the_command_line(corpus, other):
    from experiments import flags

    given = f"0.5:{corpus},1e-1:{other}"
    cfg, args = flags.parse(["--config=quickstart", f"--data.mixture={given}", "--allow-data-change"])
    assert cfg.data.mixture == (f"0.5:{corpus}", f"1e-1:{other}") and args.allow_data_change
    cfg, args = flags.parse(["--config=quickstart", f"--data.mixture=1:{corpus}"])
    assert cfg.data.mixture == (f"1:{corpus}",) and not args.allow_data_change
    with pytest.raises(ValueError, match="data.path: expected None beside data.mixture"):
        flags.parse(["--config=quickstart", f"--data.mixture={given}", "--data.path=x"])


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_record_is_named(tmp_path, threads):
    texts = ["".join(random.Random(index).choices("abcdef", k=3000)) for index in range(40)]
    folder = prepared(tmp_path / "a", texts)
    victim = folder / "shard-00000.array_record"
    content = bytearray(victim.read_bytes())
    content[20_000] ^= 1
    victim.write_bytes(content)
    with pytest.raises(shards.Damaged, match=rf"{victim}: record \d+ is damaged: "):
        take(small(folder, threads=threads), 0, 2000)
    names = [thread.name for thread in threading.enumerate() if not thread.daemon and "prefetch" not in thread.name]
    assert names == ["MainThread"]


def test_a_folder_with_a_binary_file_says_how_to_go_on(tmp_path):
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / "b.bin").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=f"b.bin is binary .* experiments.prepare {tmp_path} --out=DIR --skip-bad` le"):
        data.load(small(tmp_path), 260)


def test_reading_leaves_no_process(corpus):
    """The threads that read ahead end with the process, though batches are left."""
    code = f"""
import itertools
from experiments import data
from experiments.config import Data
batches = data.load(Data(path={str(corpus)!r}, seq_len=16, batch_size=4, threads=3), 260).train_batches()
print(len(list(itertools.islice(batches, 5))))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout == "5\n", done.stderr
