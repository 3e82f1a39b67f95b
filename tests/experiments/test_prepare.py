"""Prepared text: every document once and in order from every format, one line for what is no text."""

import gzip
import json
import sys

import numpy as np
import pytest

from experiments import inputs, shards, textfiles
from tests.corpora import made, refused, texts, write_jsonl, write_texts


def zstd(content):
    half = len(content) // 2
    pack = pytest.importorskip("zstandard").ZstdCompressor().compress
    return pack(content[:half]) + pack(content[half:])  # frames may follow each other


def parquet(path, documents):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table({"id": range(len(documents)), "text": documents})
    parquet.write_table(table, path, row_group_size=7)
    return path


FORMATS = {
    "folder": lambda p, t: write_texts(p / "d", t),
    "jsonl": lambda p, t: write_jsonl(p / "x.jsonl", t),
    "jsonl.gz": lambda p, t: write_jsonl(p / "x.jsonl.gz", t, gzip.compress),
    "jsonl.zst": lambda p, t: write_jsonl(p / "x.jsonl.zst", t, zstd),
    "parquet": lambda p, t: parquet(p / "x.parquet", t),
}


@pytest.mark.parametrize("form", FORMATS)
def test_every_document_once_and_in_order(tmp_path, monkeypatch, form):
    monkeypatch.setattr(textfiles, "TASK_BYTES", 300)  # many shards
    documents = texts()
    source = FORMATS[form](tmp_path, documents)
    assert made(tmp_path / "out", source) == documents
    count = len(inputs.plan([str(source)]))
    assert count == 1 if form in ("jsonl.gz", "jsonl.zst") else count > 2
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    whole = "".join(documents).encode()
    assert manifest["documents"] == 40 and manifest["tokens"] == manifest["bytes"] == len(whole)
    assert manifest["byte_counts"] == np.bincount(np.frombuffer(whole, np.uint8), minlength=256).tolist()


@pytest.mark.parametrize("cut", [1, 7, 64, 100, 10_000])
def test_json_lines_fall_into_one_task_each(tmp_path, monkeypatch, cut):
    path = write_jsonl(tmp_path / "x.jsonl", texts(12))
    monkeypatch.setattr(textfiles, "TASK_BYTES", cut)
    found = [document.decode() for task in inputs.plan([str(path)]) for document, _ in inputs.documents(task)]
    assert found == texts(12)


def test_mixed_inputs_keep_their_order(tmp_path):
    folder = write_texts(tmp_path / "d", ["one", "two"])
    write_jsonl(folder / "0000.z.jsonl", ["between"])
    (folder / "0002.txt.gz").write_bytes(gzip.compress(b"three"))
    (folder / ".hidden").write_bytes(b"\0")
    assert made(tmp_path / "out", folder, write_jsonl(tmp_path / "x.jsonl", ["four"])) == [
        "one",
        "between",
        "two",
        "three",
        "four",
    ]


def test_a_long_document_takes_several_records(tmp_path):
    long = "".join(f"{index} " for index in range(3 * shards.BLOCK))
    folder = write_texts(tmp_path / "d", ["short", long, "end"])
    assert made(tmp_path / "out", folder) == ["short", long, "end"]
    assert len(shards.Prepared(tmp_path / "out")._source) > 3


def test_a_data_set_of_the_datasets_library(tmp_path, monkeypatch):
    """From a local folder; the hub itself is not reached."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(textfiles, "TASK_BYTES", 1000)
    (tmp_path / "set").mkdir()
    parquet(tmp_path / "set" / "train.parquet", texts(30))
    assert made(tmp_path / "out", f"hf:{tmp_path / 'set'}") == texts(30)


def test_a_data_set_that_fails_is_one_line(tmp_path, monkeypatch, capsys):
    class Hub:
        disable_progress_bars = staticmethod(lambda: None)

        @staticmethod
        def load_dataset(name, config, split):
            assert (name, config, split) == ("owner/name", "part", "test")
            raise ConnectionError("no hub\nat all")

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    line = refused(capsys, 2, "hf:owner/name:part", "--split=test", f"--out={tmp_path / 'out'}")
    assert line == "error: hf:owner/name: ConnectionError: no hub"


def test_a_trained_tokenizer(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    source = write_jsonl(tmp_path / "x.jsonl", texts(200))
    out = tmp_path / "out"
    assert made(out, source, flags=["--train-bpe=300"]) == texts(200)
    held = shards.Prepared(out).manifest
    assert held["tokens"] < held["bytes"] / 2 and held["tokenizer"]["vocab"] == 300
    assert f"--data.tokenizer={out}/tokenizer.json" in capsys.readouterr().out
    assert made(tmp_path / "few", write_jsonl(tmp_path / "y.jsonl", ["ab ab"]), flags=["--train-bpe=300"]) == ["ab ab"]
    vocab = shards.manifest(tmp_path / "few")["tokenizer"]["vocab"]
    assert vocab < 300 and f"the tokenizer has {vocab} tokens, not the 300 asked for" in capsys.readouterr().out
    again = tmp_path / "again"
    assert made(again, source, flags=[f"--tokenizer={out / 'tokenizer.json'}"]) == texts(200)
    assert shards.Prepared(again).manifest["digest"] == held["digest"]


def test_the_shards_do_not_depend_on_the_workers(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", texts(300))
    found = []
    for index, workers in enumerate((1, 2)):
        copies = [source, *(write_jsonl(tmp_path / f"{name}.jsonl", texts(9, name)) for name in range(3))]
        made(tmp_path / f"out{index}", *copies, workers=workers)
        found.append(shards.manifest(tmp_path / f"out{index}"))
    assert found[0]["shards"] == found[1]["shards"] and found[0]["digest"] == found[1]["digest"]


def test_progress_is_shown_to_the_end(tmp_path, capsys):
    source = write_jsonl(tmp_path / "x.jsonl", texts(300))
    made(tmp_path / "out", source)
    last = capsys.readouterr().err.splitlines()[-1]
    size = source.stat().st_size / 1000
    assert last.startswith(f"prepare 100%  {size:.1f}k of {size:.1f}k B  ") and "B/s" in last and "tokens" in last


def test_the_digest_is_of_the_content(tmp_path):
    first = ["a b", "c"]
    variants = (first, ["a b", "d"], ["a ", "bc"], ["c", "a b"], first)
    digests = []
    for index, documents in enumerate(variants):
        made(tmp_path / f"out{index}", write_jsonl(tmp_path / f"{index}.jsonl", documents))
        digests.append(shards.manifest(tmp_path / f"out{index}")["digest"])
    assert len(set(digests)) == 4 and digests[0] == digests[-1]


def test_empty_documents_are_counted(tmp_path, capsys):
    folder = write_texts(tmp_path / "d", ["one", "", "two"])
    (folder / "x.jsonl").write_text('{"text": ""}\n\n{"text": null}\n{"text": "three"}\n')
    (folder / "y.jsonl").write_text("")
    assert made(tmp_path / "out", folder) == ["one", "two", "three"]
    assert "left out: 3 empty, 0 bad documents" in capsys.readouterr().out


BAD = {
    "binary": ("x.txt", b"te\0xt", "expected text, {} is binary (a NUL at byte 2)"),
    "not UTF-8": ("x.txt", b"caf\xe9 au lait", "expected UTF-8 text, {} is not at byte 3"),
    "cut gzip": ("x.gz", gzip.compress(b"text" * 999)[:-9], "{}: Compressed file ended"),
    "no JSON": ("x.jsonl", b'{"text": "a"}\n\n{"text": oops}\n', "{}:3: not JSON: Expecting value at column 10"),
    "no object": ("x.jsonl", b"[1]\n", "{}:1: expected an object, got list"),
    "no field": ("x.jsonl", b'{"content": "a"}\n', "{}:1: no field 'text', only content (--field=NAME chooses)"),
    "a number": ("x.jsonl", b'{"text": 5}\n', "{}:1: expected text in 'text', got int"),
    "half a character": ("x.jsonl", b'{"text": "\\ud800"}\n', "{}:1: 'utf-8' codec can't encode"),
    "cut lines": ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 999)[:-9], "{}: Compressed file ended"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_documents_are_named_or_left_out(tmp_path, capsys, name):
    file, content, message = BAD[name]
    folder = write_texts(tmp_path / "d", ["good"])
    (folder / file).write_bytes(content)
    line = refused(capsys, 2, folder, f"--out={tmp_path / 'out'}", "--workers=1")
    assert message.format(folder / file) in line and line.endswith("; --skip-bad leaves such out")
    with pytest.raises(ValueError, match="unfinished; finish it with: python -m experiments.prepare"):
        shards.Prepared(tmp_path / "out")
    assert made(tmp_path / "out", folder, flags=["--skip-bad"])[0] == "good"
    shown = capsys.readouterr().out
    assert "1 bad documents" in shown and message.format(folder / file) in shown


def test_a_zstd_file_that_was_cut_is_noticed(tmp_path, capsys):
    path = write_jsonl(tmp_path / "x.jsonl.zst", texts(500), zstd)
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: zstd: the file ends inside a frame" in refused(capsys, 2, path, f"--out={tmp_path / 'out'}")


def test_a_line_far_into_a_file_has_its_number(tmp_path, monkeypatch, capsys):
    lines = [json.dumps({"text": text}) for text in texts(100)]
    lines[77] = "{"
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(textfiles, "TASK_BYTES", 500)
    assert "x.jsonl:78: not JSON" in refused(
        capsys, 2, tmp_path / "x.jsonl", f"--out={tmp_path / 'out'}", "--workers=1"
    )


REFUSED = {
    "missing": (["{}/none"], "none: no such file or directory"),
    "hub": (["owner/name"], "is written hf:owner/name"),
    "no text": (["{}/void"], "no text there (1 empty"),
    "typo": (["{}/d", "--tokeniser=bytes"], "--tokeniser: unknown flag, did you mean --tokenizer?"),
    "no tokenizer": (["{}/d", "--tokenizer={}/none.json"], "--tokenizer: {}/none.json: No such file"),
    "two tokenizers": (["{}/d", "--tokenizer=x.json", "--train-bpe=300"], "--train-bpe: expected no --tokenizer"),
    "small vocabulary": (["{}/d", "--train-bpe=9"], "--train-bpe: expected 257 to"),
    "no column": (["{}/x.parquet", "--field=body"], "x.parquet: no column 'body', only id, text"),
    "no parquet": (["{}/broken.parquet"], "broken.parquet: "),
    "other files": (["{}/d", "--out={}/void"], "--out: expected a new or empty folder, {}/void holds other files"),
    "a file": (["{}/d", "--out={}/x.parquet"], "--out: expected a folder, got the file"),
    "in a file": (["{}/d", "--out={}/x.parquet/out"], "Not a directory: "),
    "inside": (["{}"], "--out: expected a folder outside of the input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_take_one_line(tmp_path, capsys, name):
    write_texts(tmp_path / "d", ["text"])
    write_texts(tmp_path / "void", [""])
    parquet(tmp_path / "x.parquet", ["text"])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no PAR1")
    args, message = REFUSED[name]
    args = [arg.format(tmp_path) for arg in args]
    out = [] if any(arg.startswith("--out") for arg in args) else [f"--out={tmp_path / 'out'}"]
    line = refused(capsys, 2, *out, "--workers=1", *args)
    assert message.format(tmp_path) in line
    assert not (tmp_path / "out" / "manifest.json").exists()
