"""Evaluation: the loss of training's own evaluation, token by token, at any length a mixer takes."""

import dataclasses
import json
import random
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoint, config, data, evaluate, files, loop, prepare, scoring, serialize
from seqmix.core import param
from seqmix.mixers.conv.hyena import Hyena
from seqmix.mixers.dense.attention import Attention
from seqmix.models import LM

EOS = 258


def texts(count=30, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices("abcdefgh \n", k=draw.randrange(1, 120))) for _ in range(count)]


def tiny(path, *mixers, seq_len=32):
    model = LM(
        vocab=260,
        d_model=16,
        n_layers=len(mixers),
        mixers=mixers,
        compute_dtype="float32",
        loss_chunk=24,
    )
    source = config.Data(path=str(path), seq_len=seq_len, batch_size=4, val_fraction=0.3, threads=0)
    optim = config.Optim(peak_lr=1e-3)
    return config.Train(name="tiny", model=model, data=source, optim=optim, mesh=config.Mesh(data=1), steps=10)


def saved(workdir, cfg, steps=(10,)):
    """A working directory with checkpoints of random weights, other ones at each step."""
    workdir.mkdir()
    files.write_json(workdir / "config.json", serialize.to_json(cfg))
    for step in steps:
        params = param.materialise(cfg.model.params(), jax.random.key(step))
        params = jax.tree.map(lambda x: 3 * x, params)  # far from uniform predictions
        keeper = checkpoint.Checkpoints(workdir, config.Checkpoint(keep=9, background=False))
        keeper.save(step, params, {"step": jnp.int32(step)}, {"fingerprint": "x"})
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "text").mkdir()
    for index, text in enumerate(texts()):
        (folder / "text" / f"{index:03d}.txt").write_text(text)
    cfg = tiny(folder / "text", Attention(heads=2, kv_heads=2, head_dim=8))
    return saved(folder / "run", cfg, steps=(5, 10)), cfg


@pytest.fixture(scope="module")
def report(run):
    """Of all validation text."""
    return scored(run[0], "--lengths=32,50")


def scored(workdir, *flags):
    """The report that a command writes."""
    path = workdir.parent / f"report{len(list(workdir.parent.glob('report*.json')))}.json"
    assert evaluate.main([f"--workdir={workdir}", f"--out={path}", *flags]) == 0
    return json.loads(path.read_text())


def refused(capsys, workdir, *flags):
    assert evaluate.main([f"--workdir={workdir}", *flags]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_every_token_has_its_loss(run):
    """Against the full softmax, with a length that the chunks of the read-out do not divide."""
    _, cfg = run
    model = cfg.model
    params = param.materialise(model.params(), jax.random.key(0))
    draw = np.random.default_rng(0)
    tokens, targets = draw.integers(0, 260, (2, 3, 41))
    ids = np.sort(draw.integers(1, 4, (3, 41)), axis=1).astype(np.int32)
    places = (np.arange(41) - np.array([np.searchsorted(row, row) for row in ids])).astype(np.int32)
    batch = {"tokens": tokens, "targets": targets, "segment_ids": ids, "positions": places}
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}
    found = scoring.token_nll(model, params, batch, packs=True)
    hidden, _ = model.forward(params, batch["tokens"], segment_ids=ids, positions=places)
    probs = jax.nn.softmax(model.logits(params, hidden).astype(jnp.float32), axis=-1)
    expected = -jnp.log(jnp.take_along_axis(probs, batch["targets"][..., None], axis=-1))[..., 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # float32 in both
    alone = scoring.token_nll(model, params, batch, packs=False)
    assert not np.allclose(found, alone, atol=1e-2)


def test_the_loss_is_that_of_training(run, report):
    workdir, cfg = run
    trainer = loop.Trainer(cfg, loop.make_mesh(cfg))
    _, params, _, _ = checkpoint.Checkpoints(workdir).restore(trainer.params)
    expected = trainer.evaluate(params, data.load(cfg.data, 260), 0)
    result = report["results"][0]
    assert result["length"] == cfg.data.seq_len and report["step"] == 10
    assert result["tokens"] == expected["tokens"]
    for name in ("loss", "bits_per_byte"):  # sums of some thousand float32 in another order
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-5)


@pytest.mark.parametrize("table", ["by_context", "table"])
def test_the_contexts_make_up_the_whole(report, table):
    for result in report["results"]:
        entries = result[table]
        assert [entry["context"][0] for entry in entries] == [1] + [entry["context"][1] + 1 for entry in entries[:-1]]
        assert entries[-1]["context"][1] == result["length"]
        assert sum(entry["tokens"] for entry in entries) == result["tokens"]
        mean = sum(entry["loss"] * entry["tokens"] for entry in entries) / result["tokens"]
        np.testing.assert_allclose(mean, result["loss"], rtol=1e-9)


def test_a_context_is_what_came_before():
    sums, counts = np.arange(1.0, 13) * 2, np.full(12, 2.0)
    found = scoring.by_context(sums, counts)
    assert [entry["context"] for entry in found] == [[1, 1], [2, 2], [3, 4], [5, 8], [9, 12]]
    assert [entry["loss"] for entry in found] == [1, 2, 3.5, 6.5, 10.5]
    counts[2:4] = 0
    assert [entry["context"] for entry in scoring.by_context(sums, counts)] == [[1, 1], [2, 2], [5, 8], [9, 12]]


def test_longer_rows_than_in_training(run, tmp_path, capsys):
    """Rows of all lengths score the same tokens; in longer ones more context stands before them."""
    workdir, _ = run
    (tmp_path / "x.txt").write_text("ab cd " * 60)
    report = scored(workdir, f"--data={tmp_path / 'x.txt'}", "--lengths=128,16")
    assert [result["length"] for result in report["results"]] == [16, 128]
    assert {result["tokens"] for result in report["results"]} == {361}
    assert [result["by_context"][-1]["context"][1] for result in report["results"]] == [16, 128]
    shown = capsys.readouterr()
    assert "rows of 128" in shown.out and "65 to 128" in shown.out and "rows of 128 100%" in shown.err
    assert shown.out.splitlines()[-1] == f"bits_per_byte={report['results'][0]['bits_per_byte']:.4f}"


def test_a_prepared_set_is_scored_in_whole(run, tmp_path, capsys):
    workdir, _ = run
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts(20, 5))
    (tmp_path / "x.jsonl").write_text(lines)
    assert prepare.main([str(tmp_path / "x.jsonl"), f"--out={tmp_path / 'out'}", "--workers=1"]) == 0
    report = scored(workdir, f"--data={tmp_path / 'out'}")
    (result,) = report["results"]
    size = sum(map(len, texts(20, 5)))
    assert result["tokens"] == size + 20
    bits = result["loss"] / np.log(2) * (size + 20) / size
    np.testing.assert_allclose(result["bits_per_byte"], bits, rtol=1e-9)
    assert result["digest"] == json.loads((tmp_path / "out" / "manifest.json").read_text())["digest"]
    (tmp_path / "text").mkdir()
    for index, text in enumerate(texts(20, 5)):
        (tmp_path / "text" / f"{index:02d}.txt").write_text(text)
    (same,) = scored(workdir, f"--data={tmp_path / 'text'}")["results"]
    assert same["loss"] == result["loss"]  # the same rows, not through shards


def test_a_checkpoint_is_chosen_and_batches_are_a_sample(run, report, capsys):
    workdir, cfg = run
    flags = ("--batches=2", "--batch-size=3")
    older = scored(workdir, "--step=5", *flags)
    assert older["step"] == 5 and 0 < older["results"][0]["tokens"] <= 2 * 3 * 32 < report["results"][0]["tokens"]
    folder = workdir / "checkpoints" / "00000005"
    assert evaluate._checkpoint(evaluate._arguments([f"--workdir={folder}"])) == (workdir, 5)
    assert older["results"] != scored(workdir, *flags)["results"]
    assert "has no checkpoint 7, only 5, 10" in refused(capsys, workdir, "--step=7")


def test_mixers_that_do_not_pack_score_windows_up_to_their_length(run, tmp_path, capsys):
    _, cfg = run
    cfg = tiny(cfg.data.path, Hyena(max_len=64))
    workdir = saved(tmp_path / "run", cfg)
    report = scored(workdir, "--lengths=64", "--batches=1")
    assert report["rows"] == "windows" and report["results"][0]["length"] == 64
    line = refused(capsys, workdir, "--lengths=64,65")
    assert line.startswith("error: --lengths: rows of 65 tokens: ") and "max_len=64" in line
    assert "--rows: a mixer of this model cannot pack" in refused(capsys, workdir, "--rows=packed")


def test_a_mixture_is_scored_source_by_source(run, tmp_path):
    _, cfg = run
    (tmp_path / "z.txt").write_text("z z\n" * 300)
    mixture = (f"1:{cfg.data.path}", f"1:{tmp_path / 'z.txt'}")
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, path=None, mixture=mixture))
    results = scored(saved(tmp_path / "run", cfg))["results"]
    assert [result["source"] for result in results] == [cfg.data.mixture[0][2:], str(tmp_path / "z.txt")]
    assert results[0]["loss"] != results[1]["loss"]


def test_the_figure_is_written(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    workdir, _ = run
    assert evaluate.main([f"--workdir={workdir}", "--lengths=16,32", "--batches=1"]) == 0
    made = workdir / "evaluate" / "00000010-validation"
    assert made.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in made.with_suffix(".svg").read_text()
    assert str(made.with_suffix(".svg")) in capsys.readouterr().out


def test_without_matplotlib_the_numbers_stay(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert evaluate.main([f"--workdir={run[0]}", "--batches=1", f"--out={tmp_path / 'x.json'}"]) == 0
    assert "pip install '.[report]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_changed_data_is_said(run, tmp_path, capsys):
    _, cfg = run
    loaded = data.load(cfg.data, 260)
    record, parts = loaded.identity.record(), data.load_sources(cfg.data, data.tokenizers.load("bytes"))[0]
    files.write_json(tmp_path / "data.json", record)
    evaluate._warn_changed(tmp_path, parts)
    assert capsys.readouterr().err == ""
    record["sources"][0][1] = "0" * 64
    files.write_json(tmp_path / "data.json", record)
    evaluate._warn_changed(tmp_path, parts)
    assert "warning: the data is not what the run was trained on" in capsys.readouterr().err


REFUSED = {
    "typo": ("--lenghts=8", "--lenghts: unknown flag, did you mean --lengths?"),
    "no number": ("--lengths=8,x", "--lengths: expected integers from 2 to"),
    "short": ("--lengths=1", "--lengths: expected integers from 2 to"),
    "no data": ("--data=none", "--data: no such file or directory: none"),
    "negative": ("--batches=-1", "--batches: expected at least 0, got -1"),
    "rows": ("--rows=x", "--rows: invalid choice: 'x'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_take_one_line(run, capsys, name):
    flag, message = REFUSED[name]
    assert message in refused(capsys, run[0], flag)


def test_a_directory_of_no_run_is_refused(tmp_path, capsys):
    assert "found no config.json" in refused(capsys, tmp_path)


def test_the_tokens_of_a_context_are_those_of_the_longest_rows_that_have_it(capsys):
    entry = lambda first, last, tokens: {"context": (first, last), "loss": 1.0, "tokens": tokens}
    short = {"length": 4, "table": [entry(0, 0, 900), entry(1, 3, 2700)]}
    long = {"length": 8, "table": [entry(0, 0, 5), entry(1, 3, 15), entry(4, 7, 20)]}
    for results in ([short, long], [long, short]):
        evaluate._show_contexts("text", results)
        shown = [line.split()[-2] for line in capsys.readouterr().out.splitlines() if " 1.0000 " in line]
        assert shown == ["5", "15", "20"]
