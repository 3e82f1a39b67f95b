"""The loop waits for a device only where it fetches the metrics: between those steps the host runs ahead."""

import dataclasses
import types

import jax
import jax._src.array
import pytest

from experiments import clock, config, data, loop, progress, train
from seqmix.models import LM
from tests.toys import Leaky

EVERY, STEPS = 5, 12


class Still:
    """A watchdog and a store of checkpoints that do nothing."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.fixture
def made(tmp_path):
    """A `train.Run` of a toy on eight devices, and what happens in it: "step", "fetch" or "wait"."""
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text(f"the state of mixer {index} is what it has read\n" * 3)
    cfg = config.Train(
        name="toy",
        model=LM(vocab=260, d_model=8, n_layers=2, mixers=(Leaky(),), compute_dtype="float32"),
        data=config.Data(path=str(tmp_path), seq_len=16, batch_size=8, val_fraction=0.2),
        optim=config.Optim(peak_lr=0.01, spike_sigma=6.0, ema=0.9),
        mesh=config.Mesh(fsdp=4),
        eval=config.Eval(every=0),
        steps=STEPS,
        log_every=EVERY,
    )
    trainer = loop.Trainer(cfg, loop.make_mesh(cfg))
    stop = types.SimpleNamespace(asked=False, waits=False)
    parts = (cfg, tmp_path, trainer, data.load(cfg.data, 260), Still(), progress.NoCurves(), clock.Clock())
    return train.Run(*parts, Still(), stop, {})


def watch(monkeypatch, run):
    """The list to which every step, fetch of an array and wait for one is written from now on."""
    seen, array = [], jax._src.array.ArrayImpl
    value, ready, compiled = array._value, array.block_until_ready, run.trainer.compile_step
    monkeypatch.setattr(array, "_value", property(lambda x: seen.append("fetch") or value.fget(x)))
    monkeypatch.setattr(array, "block_until_ready", lambda x: seen.append("wait") or ready(x))

    def compile_step(state, batch):
        step = compiled(state, batch)
        return lambda *given: seen.append("step") or step(*given)

    run.trainer.compile_step = compile_step
    return seen


def test_a_step_fetches_nothing_and_a_log_line_fetches_its_metrics_once(made, monkeypatch):
    state = made.trainer.init()
    seen = watch(monkeypatch, made)
    train._loop(made, state, 0)
    assert seen.count("step") == STEPS
    after, step = {}, 0
    for event in seen:
        step += event == "step"
        after[step] = after.get(step, []) + [event] * (event != "step")
    assert {step for step, events in after.items() if events} == {5, 10, 12}
    values = len(after[10]) // EVERY  # scalars of a step; after the last one the state is waited for and saved too
    assert values >= 5 and after[5] == after[10] == ["fetch"] * EVERY * values
    assert after[12].count("fetch") == 2 * values


def test_the_count_sees_a_sync(made, monkeypatch):
    stopping = train._stopping
    monkeypatch.setattr(
        train, "_stopping", lambda stop, before: (before and float(before["loss"])) and stopping(stop, None)
    )
    state = made.trainer.init()
    seen = watch(monkeypatch, dataclasses.replace(made))
    train._loop(made, state, 0)
    assert seen[seen.index("step") + 1 :].count("fetch") > STEPS + EVERY
