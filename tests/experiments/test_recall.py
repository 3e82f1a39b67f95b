"""The recall experiment: through the runner as any config, and as a table of lanes."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.mqar import mqar
from experiments import clock, config, flags, lanes, optim, recall, recall_table, synthetic, train
from seqmix import catalog
from seqmix.core import param
from seqmix.tasks import MQAR

TINY = ["--model.d-model=32", "--model.vocab=64", "--data.task.vocab=64", "--data.task.seq-len=16"]
TINY += ["--data.task.pairs=1,4", "--data.batch-size=4", "--steps=4", "--optim.warmup=0", "--mesh.data=1"]


def tiny(mixer="base_conv"):
    return flags.parse(["--config=mqar", f"--mixer={mixer}", *TINY])[0]


def test_every_mixer_of_the_table_has_a_config_with_equal_matrix_states():
    names = [row.name for row in catalog.ROWS if recall.suits(row)]
    assert len(names) >= 18
    matrix = (
        "mamba2 mamba retnet lightning gla hgrn2 gateloop linear_attention hedgehog deltanet gated_deltanet kda rwkv7"
    )
    for name in names:
        for width in (64, 128):
            mixer = mqar(name, width).model.period[-1]
            if name in matrix.split():
                # Tails of short convolutions (3 tokens of at most 3 width channels), normalisers, token shifts on top.
                assert 0 <= mixer.state_size(128) - 32 * width <= 9 * width + 128, name


def test_training_reports_the_share_of_right_answers(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(synthetic, "VAL_BATCHES", 2)
    cfg, args = flags.parse(["--config=mqar", "--mixer=base_conv", *TINY, "--eval.every=2", "--eval.batches=1"])
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, final_batches=0))
    stop = type("Never", (), {"asked": False, "waits": False})()
    assert train.train(cfg, tmp_path, train.prepare(cfg, tmp_path), stop, clock.Clock()) == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    final = records[-1]
    assert final["kind"] == "final" and final["tokens"] == 2 * 2 * (1 + 4)
    assert 0 <= final["accuracy/4"] <= 1 and "bits_per_byte" not in final
    assert capfd.readouterr().out.splitlines()[-1] == f"accuracy={final['accuracy/4']:.3f}"


def test_the_evaluation_counts_what_the_model_answers_right():
    from experiments import loop

    cfg = tiny()
    trainer = loop.Trainer(cfg, loop.make_mesh(cfg))
    dataset = synthetic.Dataset(cfg.data, cfg.model.vocab)
    params = trainer.init()["params"]
    result = trainer.evaluate(params, dataset, 3)
    right, asked = np.zeros(2), np.zeros(2)
    for batch in dataset.val_batches(3):
        hidden, _ = cfg.model.forward(params, batch["tokens"])
        said = np.argmax(cfg.model.logits(params, hidden), -1)
        for row in range(4):
            right[row % 2] += ((said == batch["targets"]) * batch["mask"])[row].sum()
            asked[row % 2] += batch["mask"][row].sum()
    assert result["accuracy/1"] == right[0] / asked[0] and result["accuracy/4"] == right[1] / asked[1]
    assert result["tokens"] == asked.sum()


def test_a_batch_depends_on_seed_and_index_alone():
    first, again = (synthetic.Dataset(tiny().data, 64) for _ in range(2))
    batches = [batch["tokens"] for _, batch in zip(range(3), first.train_batches())]
    np.testing.assert_array_equal(next(iter(again.train_batches(2)))["tokens"], batches[2])
    assert not np.array_equal(batches[0], batches[1])
    other = synthetic.Dataset(dataclasses.replace(tiny().data, seed=1), 64)
    assert not np.array_equal(next(iter(other.train_batches()))["tokens"], batches[0])
    assert other.fingerprint != first.fingerprint == again.fingerprint
    own = [next(iter(first.train_batches(2, host, 2)))["tokens"] for host in range(2)]
    np.testing.assert_array_equal(np.concatenate(own), batches[2])
    own = [next(iter(first.val_batches(1, host, 2)))["tokens"] for host in range(2)]
    np.testing.assert_array_equal(np.concatenate(own), next(iter(first.val_batches(1)))["tokens"])


def test_a_lane_is_the_run_of_its_learning_rate_and_seed():
    cfg, rates, seeds = dataclasses.replace(tiny(), steps=6), (1e-3, 1e-2), (0, 3)
    result = lanes.Lanes(cfg, rates, seeds, every=2).run()
    assert result["loss"].shape == (3, 4)
    alone = dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, peak_lr=1e-2))
    tree = alone.model.params()
    transform = optim.optimizer(alone.optim, alone.steps, tree)
    params = param.materialise(tree, jax.random.key(3))
    moments, losses = transform.init(params), []

    @jax.jit
    def loss_and_grad(params, batch):
        loss = lambda p: alone.model.loss(p, batch["tokens"], batch["targets"], batch["mask"])[0]
        return jax.value_and_grad(loss)(params)

    for step in range(6):
        batch = alone.data.task.batch(synthetic.key(jnp.uint32(3), step), alone.data.batch_size)
        loss, grads = loss_and_grad(params, batch)
        updates, moments = transform.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    # float32 in another order of operations, through six AdamW steps at 1e-2.
    np.testing.assert_allclose(result["loss"][:, 3], np.reshape(losses, (3, 2)).mean(1), rtol=1e-3)
    assert abs(result["loss"][2, 1] - result["loss"][2, 3]) > 1e-3
    assert set(result["test"]) == {"1", "4"} and len(result["test"]["4"]) == 4


def row(mixer, width, val, test):
    return dict(
        mixer=mixer, width=width, rates=[0.1, 0.2], seeds=[0, 1], val={"4": val}, test={"4": test}, state=8, seconds=1
    )


def test_the_learning_rate_is_chosen_on_validation_and_reported_on_test():
    cell = row("a", 64, val=[0.2, 0.4, 0.3, 0.5], test=[0.9, 0.9, 0.5, 0.7])
    rate, scores = recall_table.best(cell)
    assert rate == 0.2
    np.testing.assert_allclose(scores["4"][:2], (0.6, np.std([0.5, 0.7], ddof=1)))
    better = row("b", 64, val=[0.9] * 4, test=[0.8] * 4)
    lines = recall_table.markdown([cell, better]).splitlines()
    assert lines[2] == "| b | 8 | 0.1 | 80.0 ± 0.0 |" and lines[3] == "| a | 8 | 0.2 | 60.0 ± 14.1 |"


def test_a_cell_is_kept_and_not_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(recall, "config", lambda args, mixer, width: dataclasses.replace(tiny(mixer), steps=100))
    argv = ["--mixers=base_conv", "--widths=64", "--seeds=0", "--rates=0.01", f"--out={tmp_path}", "--cell"]
    assert recall.main(argv) == 0
    stored = json.loads((tmp_path / "base_conv_64.json").read_text())
    assert len(stored["loss"]) == 1 and stored["steps"] == 100 and stored["state"] > 0
    monkeypatch.setattr(recall, "one", lambda *_: pytest.fail("computed again"))
    assert recall.main(argv) == 0
    args = recall.parse(["--seeds=1" if word.startswith("--seeds") else word for word in argv])
    assert recall.read(tmp_path, args, "base_conv", 64) is None
    assert not (tmp_path / "recall.json").exists()  # a cell's process leaves the table to the one that started it


def test_the_table_keeps_the_cells_that_a_command_does_not_ask_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recall, "config", lambda args, mixer, width: dataclasses.replace(tiny(mixer), steps=100))
    argv = lambda mixer, seed=0: [f"--mixers={mixer}", "--widths=64", f"--seeds={seed}", f"--out={tmp_path}"]

    def spawn(out, args, mixer, width, gpus, slots):
        cell = dict(row(mixer, width, [0.1] * 3, [0.2] * 3), rates=args.rates, seeds=args.seeds)
        cell |= dict(loss=[[0.0] * 3], steps=100, digest=recall.digest(args, mixer, width))
        (out / f"{mixer}_{width}.json").write_text(json.dumps(cell))

    monkeypatch.setattr(recall, "spawn", spawn)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert recall.main(argv("base_conv")) == 0
    assert "no NVIDIA GPU: 1 cells of 3 runs each; " in capsys.readouterr().err
    (tmp_path / "base_conv_64.json").unlink()  # recall.json alone is kept in a repository
    assert recall.main(argv("retnet")) == 0
    assert [cell["mixer"] for cell in recall.tabled(tmp_path)] == ["base_conv", "retnet"]
    assert recall.main(argv("retnet", seed=1)) == 2
    assert "holds a table of other settings (base_conv at width 64)" in capsys.readouterr().err
    assert len(recall.tabled(tmp_path)) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mixers=deltane"], "--mixers: no mixer is called 'deltane'; did you mean 'deltanet'?"),
        (["--widths=65"], "--widths: expected a multiple of 64, got 65"),
        (["--seeds="], "--seeds: invalid list of int value: ''"),
        (["--rates=1,abc"], "--rates: invalid list of float value: '1,abc'"),
        (["--rates=-1"], "--rates: expected positive numbers, got -1.0"),
        (["--seeds=-1"], "--seeds: expected integers in [0, 2**31), got -1"),
        (["--steps=100", "--steps=200"], "--steps: given twice"),
        (["--jobs=0"], "--jobs: expected at least 1, got 0"),
        (["--mixer=gla"], "--mixer: unknown flag, did you mean --mixers?"),
        (["--batch-size=3"], "--batch-size: expected a multiple of 2 (pairs), got 3"),
        (["--steps=150"], "--steps: expected a multiple of 100, got 150"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        recall.parse(argv)
    assert exit_.value.code == 2 and capsys.readouterr().err == f"error: {message}\n"


def test_arguments_of_a_config_are_flags():
    cfg, _ = flags.parse(["--config=mqar", "--mixer", "gla", "--width=128"])
    assert cfg.name == "mqar_gla_128" and cfg.model.d_model == 128 and isinstance(cfg.data.task, MQAR)
    for flag, message in (
        ("--mixer=gated_delta", "--mixer: no mixer is called 'gated_delta'; did you mean 'gated_deltanet'?"),
        ("--width=1", "--width: expected a multiple of 64, got 1"),
        ("--width=x", "--width: expected an integer, got 'x'"),
    ):
        with pytest.raises(ValueError) as error:
            flags.parse(["--config=mqar", flag])
        assert str(error.value) == message
    with pytest.raises(ValueError, match="--mixer: unknown field"):
        flags.parse(["--config=quickstart", "--mixer=gla"])
    with pytest.raises(ValueError, match=r"data.batch_size: expected a multiple of 2 \(pairs\), got 3"):
        config.Synthetic(task=MQAR(), batch_size=3)
