"""Batches: every byte once an epoch, segments that never span documents, order by index alone, refusals."""

import collections
import dataclasses
import gzip
import itertools
import math
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import data
from experiments.config import Data

EOS = 258


def write(folder, documents):
    folder.mkdir(exist_ok=True)
    for index, text in enumerate(documents):
        (folder / f"{index:03d}.txt").write_bytes(text)
    return folder


def texts(count=40, length=90, seed=0):
    draw = random.Random(seed)
    return [bytes(draw.choices(b"abcdefgh \n", k=draw.randrange(1, length))) for _ in range(count)]


@pytest.fixture
def corpus(tmp_path):
    return write(tmp_path / "corpus", texts())


def small(path, **changes):
    base = {"seq_len": 16, "batch_size": 4, "val_fraction": 0.2}
    return Data(path=str(path), **base | changes)


def take(cfg, start, count, vocab=260):
    return list(itertools.islice(data.load(cfg, vocab).train_batches(start), count))


def same(left, right):
    return all(np.array_equal(left[key], right[key]) for key in left)


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=8),
    seq_len=st.sampled_from([2, 3, 8, 64]),
    seed=st.sampled_from([None, 0, 1]),
    align=st.sampled_from([1, 1, 2, 8]),
)
def test_rows_are_the_documents(documents, seq_len, seed, align):
    seq_len = -(-seq_len // align) * align
    stream = data.Stream.of(data.tokenizers.Bytes(), documents, align)
    count = -(-stream.tokens.size // seq_len)
    for epoch in (0, 3):
        rows = data.Rows(stream, seq_len, count, seed)
        rows = [rows[epoch * count + index] for index in range(count)]
        whole = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
        real = whole["mask"] == 1
        assert real.sum() == sum(map(len, documents)) + len(documents)
        predicted = whole["targets"][real]
        closed = np.split(predicted, np.flatnonzero(predicted == EOS) + 1)
        assert closed.pop().size == 0  # each document is closed
        made = [bytes(part[:-1].tolist()) for part in closed]
        assert sorted(made) == sorted(documents)  # and each byte of it is a target once
        for row in rows:
            check_row(row, align)


def check_row(row, align):
    real = row["mask"] == 1
    opened = np.flatnonzero(real & (row["tokens"] == EOS))
    assert (opened % align == 0).all()
    tokens, ids, places = row["tokens"][real], row["segment_ids"][real], row["positions"][real]
    assert not any(row[key][~real].any() for key in row)
    assert ids[0] == 1 and (np.diff(ids) == (tokens[1:] == EOS)).all()  # a segment opens where a document does
    assert (places == np.arange(ids.size) - np.searchsorted(ids, ids)).all()
    assert (row["targets"][real][:-1] == tokens[1:]).all()


def test_batches_are_functions_of_their_index(corpus):
    cfg = small(corpus)
    whole = take(cfg, 0, 60)  # several epochs
    tokens = data.load(cfg, 260)._train[0]["tokens"].size
    epoch = sum(len(text) + 1 for text in texts()) // tokens
    assert 2 * epoch < 60
    for start in (1, epoch - 1, 41):
        again = take(cfg, start, 60 - start)
        assert all(same(a, b) for a, b in zip(whole[start:], again, strict=True))


def test_batches_have_the_declared_form(corpus):
    batch = take(small(corpus), 0, 1)[0]
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        key: ((4, 16), "float32" if key == "mask" else "int32")
        for key in ("tokens", "targets", "mask", "segment_ids", "positions", "documents")
    }


def test_order_depends_on_seed_and_epoch(corpus):
    rows = lambda seed, start: np.concatenate([b["tokens"] for b in take(small(corpus, seed=seed), start, 8)])
    first = rows(0, 0)
    assert np.array_equal(first, rows(0, 0))
    assert not np.array_equal(first, rows(1, 0))
    assert not np.array_equal(first, rows(0, 100))


def test_fingerprint_changes_with_what_the_batches_depend_on(corpus, tmp_path):
    cfg = small(corpus)
    base = data.load(cfg, 260).fingerprint
    changes = ({"seq_len": 17}, {"batch_size": 3}, {"val_fraction": 0.3}, {"seed": 1})
    others = [data.load(dataclasses.replace(cfg, **change), 260).fingerprint for change in changes]
    moved = write(tmp_path / "elsewhere", texts())
    assert data.load(small(moved), 260).fingerprint == base
    (moved / "000.txt").rename(moved / "900.txt")
    others.append(data.load(small(moved), 260).fingerprint)
    (moved / "001.txt").write_bytes(texts()[1].swapcase())
    others.append(data.load(small(moved), 260).fingerprint)
    assert len({base, *others}) == 7


def test_validation_is_whole_documents_apart_from_training(corpus):
    loaded = data.load(small(corpus), 260)
    held = loaded._held
    assert 0 < len(held) <= 0.2 * sum(map(len, texts()))
    targets = np.concatenate([b["targets"][b["mask"] == 1] for b in loaded.val_batches()])
    assert targets.size == round(len(held) / loaded.bytes_per_token)
    assert collections.Counter(targets[targets != EOS].tolist()) == collections.Counter(held)
    validates = [text for text in texts() if text in held]
    assert sum(map(len, validates)) >= len(held)
    assert data.load(small(corpus, seed=5), 260)._held == held


def test_short_evaluations_see_the_same_rows(corpus):
    loaded = data.load(small(corpus, batch_size=1), 260)
    everything = list(loaded.val_batches())
    assert len(everything) > 3
    assert all(same(a, b) for a, b in zip(loaded.val_batches(3), everything[:3], strict=True))
    assert len(list(loaded.val_batches(10**6))) == len(everything)


def test_gzip_is_read(tmp_path):
    plain, packed = write(tmp_path / "plain", texts()), tmp_path / "packed"
    packed.mkdir()
    for path in plain.iterdir():
        (packed / path.name).write_bytes(path.read_bytes())
    (packed / "003.txt").unlink()
    (packed / "003.txt.gz").write_bytes(gzip.compress(texts()[3]))
    (packed / ".hidden").write_bytes(b"\0")
    total = lambda folder: data.load(small(folder), 260).summary.split(",")[0]
    assert total(plain) == total(packed) == "40 documents"


def test_a_single_file_validates_on_its_end(tmp_path):
    text = "".join(f"line {index} of a b\u00e9b\u00e9\n" for index in range(200))
    path = tmp_path / "one.txt"
    path.write_text(text)
    held = data.load(small(path), 260)._held.decode()
    assert text.endswith(held) and held.startswith("line ") and abs(len(held) / len(text) - 0.2) < 0.01


def test_the_entropy_is_that_of_the_bytes(tmp_path):
    folder = write(tmp_path / "c", [b"abcd" * 50, b"abcd" * 50, b"dcba" * 50])
    stats = data.load(small(folder), 260).stats()
    assert math.isclose(stats["unigram_entropy"], 2.0)
    assert 0 < stats["gzip_bits"] < 2 and 0 < stats["xz_bits"] < 8


REFUSED = {
    "missing": (lambda p: p / "none", "no such file or directory"),
    "empty file": (lambda p: touch(p / "x.txt", b""), "found none"),
    "empty folder": (lambda p: write(p / "d", []), "found none"),
    "binary": (lambda p: write(p / "d", [b"text" * 99, b"te\0xt"]), "001.txt is binary"),
    "not UTF-8": (lambda p: write(p / "d", [b"text" * 99, b"caf\xe9 au lait"]), "001.txt is not at byte 3"),
    "broken gzip": (lambda p: touch(p / "x.gz", b"\x1f\x8bnothing"), "x.gz"),
    "cut gzip": (lambda p: touch(p / "x.gz", gzip.compress(b"text" * 999)[:-9]), "x.gz"),
    "short": (lambda p: write(p / "d", [b"ten bytes."] * 6), "too short for one batch"),
    "one letter": (lambda p: touch(p / "x.txt", b"x"), "too short"),
}


def touch(path, content):
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_take_one_line(tmp_path, name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match="^data.path: ") as caught:
        data.load(small(make(tmp_path)), 260)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_ids_beyond_the_vocabulary_are_refused(corpus):
    with pytest.raises(ValueError, match="ids beyond the vocabulary: model.vocab is 258, bytes gives .* 258"):
        data.load(small(corpus), 258)
    data.load(small(corpus), 259)


def test_the_standard_library_is_the_default():
    start = time.monotonic()
    loaded = data.load(Data(), 260)
    assert time.monotonic() - start < 20  # half a second where nothing else runs
    stats = loaded.stats()
    assert 4 < stats["unigram_entropy"] < 5.5 and stats["xz_bits"] < stats["gzip_bits"] < 3
    assert not any("/test/" in name or "site-packages" in name for name, _ in data._standard_library())
