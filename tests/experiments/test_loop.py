"""The jitted steps: the same on eight devices as on one, and nothing learned from a loss that is not finite."""

import itertools

import jax
import numpy as np
import pytest

from experiments import config, data, loop
from seqmix.models import LM
from tests.toys import Leaky


def setting(path, mixer=None, **mesh):
    return config.Train(
        name="toy",
        model=LM(vocab=260, d_model=8, n_layers=2, mixers=(mixer or Leaky(),), compute_dtype="float32"),
        data=config.Data(path=str(path), seq_len=16, batch_size=8, val_fraction=0.2),
        optim=config.Optim(peak_lr=0.01, accumulate=2),
        mesh=config.Mesh(**mesh),
        steps=4,
    )


@pytest.fixture
def corpus(tmp_path):
    for index in range(30):
        (tmp_path / f"{index}.txt").write_text(f"the state of mixer {index} is what it has read\n" * 3)
    return tmp_path


def run(cfg):
    """(losses of the steps, validation loss, last state, trainer)."""
    trainer = loop.Trainer(cfg, loop.make_mesh(cfg))
    dataset = data.load(cfg.data, cfg.model.vocab)
    state, losses = trainer.init(), []
    batches = [trainer.put(batch) for batch in itertools.islice(dataset.train_batches(), cfg.steps)]
    step = trainer.compile_step(state, batches[0])
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, trainer.evaluate(state["params"], dataset, 0)["loss"], state, trainer


def test_eight_devices_do_as_one(corpus):
    cfg = setting(corpus, data=2, fsdp=2, context=1, model=2)
    alone = setting(corpus, data=1)
    losses, val, state, trainer = run(cfg)
    expected, expected_val, expected_state, _ = run(alone)
    # float32 sums in another order, over four steps
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(val, expected_val, rtol=1e-5)
    out = state["params"]["layers"]["0"]["mixer"]["out"]
    assert len({str(shard.index) for shard in out.addressable_shards}) == 4  # fsdp x model
    mean = expected_state["params"]["layers"]["0"]["mixer"]["mean"]  # written, not trained
    assert np.abs(mean).max() > 0
    np.testing.assert_allclose(state["params"]["layers"]["0"]["mixer"]["mean"], mean, rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_changes_nothing(corpus):
    cfg = setting(corpus, data=1)
    trainer = loop.Trainer(cfg, loop.make_mesh(cfg))
    batch = trainer.put(next(data.load(cfg.data, 260).train_batches()))
    state = trainer.init()
    state["params"]["final_norm"]["scale"] = state["params"]["final_norm"]["scale"].at[0].set(np.nan)
    before = jax.device_get(state)
    step = trainer.compile_step(state, batch)
    after, metrics = step(state, batch)
    assert not np.isfinite(metrics["loss"])
    for key in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, before[key], jax.device_get(after[key]))


def test_an_axis_of_minus_one_takes_the_rest():
    sizes = lambda devices, **mesh: tuple(loop.mesh_sizes(setting("x", **mesh), devices).values())
    assert sizes(1) == (1, 1, 1, 1) and sizes(4) == (4, 1, 1, 1)
    assert sizes(8, data=2, fsdp=-1, model=2) == (2, 2, 1, 2)
    for mesh, message in (
        ({"model": 3}, "8 devices cannot be divided"),
        ({"data": 4, "model": 4}, "at most 8 devices"),
    ):
        with pytest.raises(ValueError, match=message):
            sizes(8, **mesh)


@pytest.mark.parametrize(
    "mesh, message",
    [({"data": 8}, "data.batch_size: expected a multiple"), ({"context": 3, "data": 2}, "data.seq_len: expected a")],
)
def test_batches_that_cannot_be_divided_are_refused(tmp_path, mesh, message):
    with pytest.raises(ValueError, match=message):
        loop.make_mesh(setting(tmp_path, **mesh))


def test_a_mixer_without_a_form_for_cut_time_is_refused_on_a_context_axis():
    with pytest.raises(ValueError, match="mesh.context: expected 1, as Leaky has no form for time that is cut, got 2"):
        loop.mesh_sizes(setting("x", context=2), 8)
