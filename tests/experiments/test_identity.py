"""Data that changed is refused when a run resumes, with a diff, unless that is allowed; then it is on record."""

import dataclasses
import json

import pytest

from experiments import config, data, files, identity, synthetic, train
from seqmix.mixers.dense.attention import Attention
from seqmix.models import LM
from seqmix.tasks import MQAR
from tests.corpora import documents, prepared, small


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("corpus") / "a", documents())


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("corpus") / "b", documents(20, seed=1, letters="XYZ"))


def recorded(loaded, workdir):
    workdir.mkdir(exist_ok=True)
    (workdir / "data.json").write_text(json.dumps(loaded.identity.record()))


CHANGES = {
    "seed": ({"seed": 3}, "seed: 0 -> 3"),
    "length": ({"seq_len": 32}, "seq_len: 16 -> 32"),
    "batch": ({"batch_size": 2}, "batch_size: 4 -> 2"),
    "rows": ({"rows": "windows"}, "rows: packed -> windows"),
    "fraction": ({"val_fraction": 0.3}, "val_fraction: 0.2 -> 0.3"),
    "source": ({"path": "{other}"}, "source: {corpus} ("),
    "mixture": ({"path": None, "mixture": ("3:{corpus}", "1:{other}")}, " x 0.75, {other} ("),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_data_is_refused_with_a_diff(tmp_path, corpus, other, name):
    first = data.load(small(corpus), 260)
    recorded(first, tmp_path)
    changes, message = json.loads(
        json.dumps(CHANGES[name]).replace("{corpus}", str(corpus)).replace("{other}", str(other))
    )
    if "mixture" in changes:
        changes["mixture"] = tuple(changes["mixture"])
    second = data.load(dataclasses.replace(small(corpus), **changes), 260)
    with pytest.raises(ValueError, match="was trained on other data: ") as caught:
        second.identity.check(tmp_path)
    assert message in str(caught.value) and "--allow-data-change" in str(caught.value)
    assert str(caught.value).count(" -> ") == 1
    assert len(second.identity.check(tmp_path, allow=True)) == 1
    second.identity.resumed(40, first.fingerprint)
    change = second.identity.record()["changes"]
    assert [c["step"] for c in change] == [40] and message in change[0]["differences"][0]


def test_another_tokenizer_is_refused_with_a_diff(tmp_path):
    """The same text in the tokens of another tokenizer is other data."""
    pytest.importorskip("tokenizers")
    loaded = []
    for vocab in (280, 300):
        folder = prepared(tmp_path / str(vocab), documents(), f"--train-bpe={vocab}")
        loaded.append(data.load(small(folder, tokenizer=str(folder / "tokenizer.json")), 300))
    first, second = loaded
    recorded(first, tmp_path)
    with pytest.raises(ValueError, match="was trained on other data: source: .* -> .*; tokenizer: [0-9a-f]+ -> "):
        second.identity.check(tmp_path)
    assert len(second.identity.check(tmp_path, allow=True)) == 2


def test_a_change_stays_on_record(tmp_path, corpus):
    first, second = (data.load(small(corpus, seed=seed), 260) for seed in (0, 1))
    recorded(first, tmp_path)
    second.identity.check(tmp_path, allow=True)
    second.identity.resumed(10, first.fingerprint)
    recorded(second, tmp_path)
    again = data.load(small(corpus, seed=1), 260)
    assert again.identity.check(tmp_path) == []
    again.identity.resumed(10, first.fingerprint)  # the checkpoint from before the change is this run's
    assert again.identity.record() == second.identity.record()
    with pytest.raises(ValueError, match="checkpoint 10 was made on other data than the run"):
        again.identity.resumed(10, "something else")


def test_a_run_resumes_on_other_data_only_when_told(tmp_path, corpus):
    """Through the trainer's own start, up to its first step."""
    cfg = config.Train(
        name="tiny",
        model=LM(vocab=260, d_model=8, n_layers=1, mixers=(Attention(heads=1, kv_heads=1, head_dim=8),)),
        data=small(corpus, batch_size=8),
        optim=config.Optim(peak_lr=1e-3),
        steps=9,
    )
    _, dataset, saved, start, state, held = train.prepare(cfg, tmp_path)
    assert start == 0
    rest = {key: value for key, value in state.items() if key != "params"}
    saved.save(4, state["params"], rest, {"fingerprint": dataset.fingerprint, "config": held})
    saved.wait()
    files.write_json(tmp_path / "config.json", held)
    recorded(dataset, tmp_path)
    assert train.prepare(cfg, tmp_path)[3] == 4
    other = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, seed=7, seq_len=24))
    with pytest.raises(ValueError, match="other data: seq_len: 16 -> 24; seed: 0 -> 7 "):
        train.prepare(other, tmp_path)
    _, dataset, _, start, *_ = train.prepare(other, tmp_path, allow_data_change=True)
    assert start == 4
    assert [change["step"] for change in dataset.identity.record()["changes"]] == [4]


def test_what_does_not_count(tmp_path, corpus):
    """Where the folder lies and how many threads read it."""
    recorded(data.load(small(corpus), 260), tmp_path)
    moved = tmp_path / "moved"
    moved.symlink_to(corpus)
    assert data.load(small(moved, threads=0), 260).identity.check(tmp_path) == []


def test_a_record_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(ValueError, match="not the record of a run's data"):
        identity.Identity([], {}).check(tmp_path)


def test_a_task_has_an_identity_too(tmp_path):
    task = MQAR(vocab=64, seq_len=32, pairs=(2, 4))
    first, second = (
        synthetic.Dataset(config.Synthetic(task=made, batch_size=4), 64)
        for made in (task, dataclasses.replace(task, pairs=(4,)))
    )
    recorded(first, tmp_path)
    assert first.identity.check(tmp_path) == []
    with pytest.raises(ValueError, match=r"other data: task.pairs: \[2, 4\] -> \[4\] "):
        second.identity.check(tmp_path)
