"""Muon, averaged weights, skipped spikes, the tracker and the trace: what each promises."""

import dataclasses
import itertools
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoint, clock, config, data, loop, optim, progress, spikes, train
from experiments.wandb_run import WandbRun
from seqmix.core.param import Param
from seqmix.models import LM
from tests import runs
from tests.toys import Leaky

MATRICES = {
    "in": (Param((4, 3, 2), ("embed", "heads", "head_dim")), ((0,), (1, 2))),
    "out": (Param((3, 2, 4), ("heads", "head_dim", "embed"), fan_in=6), ((0, 1), (2,))),
    "stacked": (Param((5, 4, 6), ("layers", "embed", "mlp"), fan_in=4), ((1,), (2,))),
}
OTHERS = {
    "embedding": Param((8, 4), ("vocab", "table")),
    "conv": Param((4, 3, 2), (None, "heads", "head_dim")),
    "bias": Param((3, 2), ("heads", "head_dim"), decay=False),
    "vectors": Param((5, 4), ("layers", "embed")),
}


def setting(path, mesh=None, layers=2, **changes):
    return config.Train(
        name="toy",
        model=LM(vocab=260, d_model=8, n_layers=layers, mixers=(Leaky(),), compute_dtype="float32"),
        data=config.Data(path=str(path), seq_len=16, batch_size=8, val_fraction=0.2),
        optim=config.Optim(peak_lr=0.01, **changes),
        mesh=mesh or config.Mesh(data=1),
        steps=6,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return runs.write_corpus(tmp_path_factory.mktemp("corpus"))


def steps_of(cfg, count, factors=()):
    """The states before and after each of `count` steps, on the host; factors multiply a step's loss."""
    trainer = loop.Trainer(cfg, loop.make_mesh(cfg))
    plain = trainer._loss
    trainer._loss = lambda params, batch, rng=None: _scaled(plain, params, dict(batch), rng)
    batches = data.load(cfg.data, cfg.model.vocab).train_batches()
    state, step, states, logs = trainer.init(), None, [], []
    for index, batch in enumerate(itertools.islice(batches, count)):
        factor = np.full((cfg.data.batch_size, 1), dict(factors).get(index, 1.0), np.float32)
        batch = trainer.put(batch | {"factor": factor})
        step = step or trainer.compile_step(state, batch)
        states.append(jax.device_get(state))
        state, metrics = step(state, batch)
        logs.append(jax.device_get(metrics))
    return [*states, jax.device_get(state)], logs


def _scaled(plain, params, batch, rng):
    factor = batch.pop("factor")
    loss, metrics = plain(params, batch, rng)
    return loss * factor.mean(), metrics


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("name", [*MATRICES, *OTHERS])
def test_a_matrix_is_known_by_what_its_param_says(name):
    if name in OTHERS:
        assert optim.matrix(OTHERS[name]) is None
        return
    declared, (inputs, outputs) = MATRICES[name]
    found = optim.matrix(declared)
    assert (found.reduction_axis, found.output_axis) == (inputs, outputs)


def test_muon_orthogonalises_matrices_and_leaves_the_rest_to_adamw():
    """One step without decay: a matrix moves by lr * 0.2 sqrt(max side) times nearly orthonormal columns."""
    tree = {"w": Param((6, 4), ("embed", "mlp")), "b": Param((4,), ("mlp",), decay=False)}
    grads = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32), "b": jnp.ones(4)}
    params = jax.tree.map(jnp.zeros_like, grads)
    moved = {}
    for kind in ("muon", "adamw"):
        cfg = config.Optim(peak_lr=0.1, kind=kind, schedule="constant", clip=0.0, weight_decay=0.0)
        transform = optim.optimizer(cfg, 10, tree)
        moved[kind], _ = transform.update(grads, transform.init(params), params)
    np.testing.assert_allclose(moved["muon"]["b"], moved["adamw"]["b"], rtol=1e-6)  # two compilations
    singular = np.linalg.svd(moved["muon"]["w"] / (0.1 * 0.2 * np.sqrt(6)), compute_uv=False)
    # five Newton-Schulz iterations with Jordan's coefficients bring singular values into about [0.7, 1.2]
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert np.linalg.svd(moved["adamw"]["w"], compute_uv=False).max() > 0.2


def test_muon_on_eight_devices_does_as_on_one(corpus):
    many = setting(corpus, config.Mesh(data=2, fsdp=2, model=2), layers=1, kind="muon", ema=0.5)
    states, logs = steps_of(many, 3)
    expected_states, expected = steps_of(setting(corpus, layers=1, kind="muon", ema=0.5), 3)
    # float32 sums in another order, through the iterations of three steps
    np.testing.assert_allclose([m["loss"] for m in logs], [m["loss"] for m in expected], rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    jax.tree.map(close, states[-1]["ema"], expected_states[-1]["ema"])


def test_the_average_by_hand(corpus):
    states, _ = steps_of(setting(corpus, ema=0.75), 4)
    mean = states[0]["params"]["embedding"]["table"]
    for state in states[1:]:
        mean = np.float32(0.75) * mean + np.float32(0.25) * state["params"]["embedding"]["table"]
    np.testing.assert_allclose(states[-1]["ema"]["embedding"]["table"], mean, rtol=1e-6, atol=1e-7)
    assert not np.array_equal(mean, states[-1]["params"]["embedding"]["table"])


def test_a_spike_changes_nothing_that_is_learned(corpus):
    at = 4
    cfg = setting(corpus, ema=0.9, spike_sigma=6.0, spike_window=4)
    states, logs = steps_of(cfg, 6, {at: 10.0}.items())
    learned = [{key: state[key] for key in ("params", "opt_state", "ema")} for state in states]
    assert same(learned[at], learned[at + 1])
    assert all(not same(learned[i], learned[i + 1]) for i in range(6) if i != at)
    assert [int(m["skipped"]) for m in logs] == [0, 0, 0, 0, 1, 1]
    assert [int(state["step"]) for state in states] == list(range(7))


def test_a_loss_that_stays_high_is_accepted_in_the_end():
    state = spikes.init(types.SimpleNamespace(spike_window=8))
    judged = []
    for loss in [*np.linspace(1.0, 1.1, 8), *[3.0] * 12]:
        spiked, state = spikes.judge(state, jnp.float32(loss), 3.0)
        judged.append(bool(spiked))
    assert judged[:8] == [False] * 8 and judged[8] and not judged[-1]
    assert int(state["skipped"]) == sum(judged) < 12


def test_no_loss_is_a_spike_before_the_window_is_full():
    state = spikes.init(types.SimpleNamespace(spike_window=4))
    for loss in (1.0, 100.0, 1.0, 1000.0):
        spiked, state = spikes.judge(state, jnp.float32(loss), 1.0)
        assert not spiked


def test_the_tracker_gets_the_records(tmp_path, monkeypatch):
    """With a module in the place of wandb: the same id for the same directory, every number, and an end."""
    made = []

    class Fake:
        def __init__(self, **settings):
            self.settings, self.logged, self.finished = settings, [], False
            made.append(self)

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=Fake))
    for start in (0, 1):
        curves = progress.Curves(tmp_path, start, WandbRun("mixers", "toy", tmp_path, {"steps": 3}))
        curves.write({"kind": "train", "step": start + 1, "loss": 2.5, "note": "text"})
        curves.close()
    first, second = made
    assert first.settings["id"] == second.settings["id"] and first.settings["resume"] == "allow"
    assert first.settings["project"] == "mixers" and first.settings["config"] == {"steps": 3}
    assert first.logged == [(1, {"train/loss": 2.5})] and second.logged == [(2, {"train/loss": 2.5})]
    assert first.finished and second.finished


def test_without_the_package_the_tracker_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(checkpoint.Refused, match="^--wandb: expected the package wandb, not installed"):
        WandbRun("mixers", "toy", tmp_path, {})


@pytest.mark.parametrize("start, expected", [(0, [2, 3]), (2, [3]), (3, [])])
def test_the_trace_covers_its_window(tmp_path, start, expected):
    trace, covered = clock.Trace((2, 3), start, tmp_path / "profile"), []
    for step in range(start + 1, 6):
        trace.before(step)
        covered += [step] if trace.on else []
        trace.after(step, jnp.ones(1))
    assert covered == expected and not trace.on
    assert bool(list(tmp_path.rglob("*.xplane.pb"))) == bool(expected)


def test_when_to_save_and_to_evaluate():
    """(evaluates, saves) by step: best checkpoints are compared by an evaluation at each save."""
    base = setting("x")
    base = dataclasses.replace(base, eval=config.Eval(every=3))

    def due(step, stopping=False, **save):
        cfg = dataclasses.replace(base, checkpoint=config.Checkpoint(every=2, **save))
        return train._due(cfg, step, stopping)

    assert [due(step) for step in range(1, 7)] == [
        (False, False),
        (False, True),
        (True, False),
        (False, True),
        (False, False),
        (False, True),
    ]
    assert due(2, keep_best=1) == due(6, keep_best=1) == (True, True)
    assert due(2, keep_best=1, metric="loss") == (False, True)
    assert due(5, stopping=True, keep_best=1) == (False, True)


def test_starts_are_counted(tmp_path):
    assert clock.note_start(tmp_path, 0, 0) == (1, 0)
    assert clock.note_start(tmp_path, 4, 7) == (2, 3)
    assert clock.note_start(tmp_path, 8, 8) == (3, 3)
    assert [json.loads(line)["step"] for line in (tmp_path / "starts.jsonl").read_text().splitlines()] == [0, 4, 8]
