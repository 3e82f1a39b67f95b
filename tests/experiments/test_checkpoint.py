"""Checkpoints as a library: what is kept, what is noticed, what a save that fails leaves."""

import contextlib
import math
import os
import resource
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import checkpoint, loop, manifest, process
from experiments.config import Checkpoint, Data, Mesh, Optim, Train
from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.recurrent.mamba2 import Mamba2
from seqmix.models import LM
from tests import runs

SMALL = {"w": np.arange(4.0)}
REST = {"step": np.int32(1)}


@contextlib.contextmanager
def files_of_at_most(size):
    """Within it, writing beyond so many bytes into a file fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def abstract(tree):
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.canonicalize_dtype(x.dtype), sharding=where), tree
    )


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(keep=2), [7, 8]),
        (dict(keep=1, keep_every=3), [3, 6, 8]),
        (dict(keep=1, keep_best=2), [2, 4, 8]),
        (dict(keep=1, keep_every=5, keep_best=1), [4, 5, 8]),
    ],
)
def test_what_is_kept(tmp_path, settings, expected):
    metrics = [None, 0.2, 0.5, 0.1, 0.3, math.nan, -math.inf, 0.9]  # of steps 1 to 8
    saved = checkpoint.Checkpoints(tmp_path, Checkpoint(**settings))
    for step, metric in enumerate(metrics, 1):
        saved.save(step, SMALL, REST, {}, metric)
    saved.wait()
    assert saved.steps() == expected


def test_values_that_are_not_finite_are_never_saved(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, Checkpoint(keep=1))
    saved.save(1, SMALL, REST, {})
    for params, rest, name in (
        ({"w": np.array([1.0, np.nan])}, REST, "params/w"),
        (SMALL, {"step": np.int32(2), "moment": jnp.array([jnp.inf])}, "rest/moment"),
    ):
        with pytest.raises(FloatingPointError, match=f"^{name} is not finite after step 2"):
            saved.save(2, params, rest, {})
    assert os.listdir(saved.root) == ["00000001"]


@pytest.mark.parametrize("background", [False, True])
def test_a_checkpoint_that_does_not_fit_leaves_those_before_it(tmp_path, background):
    saved = checkpoint.Checkpoints(tmp_path, Checkpoint(keep=1, background=background))
    saved.save(1, SMALL, REST, {})
    saved.wait()
    large = {"w": np.random.default_rng(0).random(100_000)}
    message = r"^checkpoint of step 2 \(800004 bytes\) could not be written to .*; \d+ bytes are free$"
    with files_of_at_most(50_000), pytest.raises(checkpoint.NotSaved, match=message):
        saved.save(2, large, {"step": np.int32(2)}, {})
        saved.wait()
    assert os.listdir(saved.root) == ["00000001"]
    manifest.verify(saved.root / "00000001")
    saved.save(3, SMALL, REST, {})  # and the next one is written
    saved.wait()
    assert saved.steps() == [3]


def test_a_save_in_the_background_holds_the_values_of_its_step(tmp_path):
    """The train step donates its state, so what is saved must have been copied when `save` returns."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    saved = checkpoint.Checkpoints(tmp_path, Checkpoint(keep=9))
    state = {"w": jnp.zeros((256, 256))}
    for index in range(1, 6):
        state = step(state)
        saved.save(index, state, {"step": jnp.int32(index)}, {})
        for _ in range(3):
            state = step(state)
    saved.wait()
    for index in range(1, 6):
        found = saved.restore(abstract({"w": state["w"]}), step=index)
        np.testing.assert_array_equal(found[1]["w"], 4 * index - 3)


def test_the_average_is_a_tree_of_its_own(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, Checkpoint(background=False))
    saved.save(1, {"w": np.ones(3)}, {"step": np.int32(1), "ema": {"w": np.full(3, 2.0)}}, {})
    like = abstract({"w": np.ones(3)})
    assert saved.restore(like)[1]["w"].tolist() == [1, 1, 1]
    assert saved.restore(like, weights="ema")[1]["w"].tolist() == [2, 2, 2]
    _, params, rest, _ = saved.restore(like, abstract({"step": np.int32(0), "ema": {"w": np.ones(3)}}))
    assert params["w"].tolist() == [1, 1, 1] and rest["ema"]["w"].tolist() == [2, 2, 2] and int(rest["step"]) == 1


MESHES = {
    "one": dict(data=1),
    "fsdp": dict(data=1, fsdp=8),
    "mixed": dict(data=1, fsdp=2, context=2, model=2),
}


@pytest.fixture(scope="module")
def trainers():
    """A trainer on each of MESHES, of one config but for its mesh."""
    made, mixers = {}, (Attention(heads=4, kv_heads=2, head_dim=8), Mamba2(d_state=4, head_dim=8))
    for name, mesh in MESHES.items():
        cfg = Train(
            name="tiny",
            model=LM(vocab=64, d_model=16, n_layers=2, mixers=mixers),
            data=Data(path="none", seq_len=16, batch_size=8),
            optim=Optim(peak_lr=0.01, ema=0.9, spike_sigma=3.0),
            mesh=Mesh(**mesh),
            steps=4,
        )
        made[name] = loop.Trainer(cfg, loop.make_mesh(cfg))
    return made


@pytest.mark.parametrize("source", MESHES)
def test_a_restore_on_another_mesh_has_every_bit(tmp_path, trainers, source):
    """Weights, moments, average, spikes, step and randomness, each leaf laid as the new mesh wants it."""
    saves, rng = trainers[source], np.random.default_rng(3)
    draw = lambda leaf: np.frombuffer(rng.bytes(leaf.size * leaf.dtype.itemsize), leaf.dtype).reshape(leaf.shape)
    finite = lambda x: np.where(np.isfinite(x), x, 1) if x.dtype.kind == "f" else x
    state = {"params": saves.params, **saves.rest}
    values = jax.tree.map(lambda leaf: finite(draw(leaf)), state)
    laid = jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding), values, state)
    kept = checkpoint.Checkpoints(tmp_path, Checkpoint(background=False))
    kept.save(1, laid.pop("params"), laid, {})
    for name, takes in trainers.items():
        _, params, rest, _ = kept.restore(takes.params, takes.rest)
        found, expected = {"params": params, **rest}, {"params": takes.params, **takes.rest}
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), found, values)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(*map(jax.tree.leaves, (jax.device_get(found), values))))
        for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim)
        moments = [leaf for leaf in jax.tree.leaves(rest["opt_state"]) if leaf.ndim > 1]
        ways = max(leaf.size // leaf.addressable_shards[0].data.size for leaf in moments)
        assert ways == {"one": 1, "fsdp": 8, "mixed": 4}[name]


def test_a_step_that_is_not_there_is_refused(tmp_path):
    saved = checkpoint.Checkpoints(tmp_path, Checkpoint(background=False))
    saved.save(4, SMALL, REST, {})
    with pytest.raises(checkpoint.Refused, match=r"no checkpoint of step 5 in .*: it holds \[4\]"):
        saved.restore(abstract(SMALL), step=5)


def test_the_lock(tmp_path):
    held, new = tmp_path / "held", tmp_path / "some" / "new"
    held.mkdir()
    with process.lock(held), pytest.raises(checkpoint.Refused, match="in use"), process.lock(held):
        pass
    with process.lock(new):
        assert new.is_dir()
    assert os.listdir(tmp_path) == ["held"]  # nothing was written, so nothing stays
    with process.lock(new):
        (new / "config.json").write_text("{}")
    assert sorted(os.listdir(new)) == ["config.json", "lock"]


def test_a_directory_that_cannot_be_written_is_refused_in_one_line(tmp_path):
    if os.geteuid():
        tmp_path.chmod(0o500)
    elif subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path], capture_output=True).returncode:
        pytest.skip("root may write anywhere, and mounting is not allowed")
    try:
        reason = r"^workdir .*: (Read-only file system|Permission denied)$"
        with pytest.raises(checkpoint.Refused, match=reason), process.lock(tmp_path / "run"):
            pass
    finally:
        if os.geteuid():
            tmp_path.chmod(0o700)
        else:
            subprocess.run(["umount", tmp_path], check=True)


def test_damage_is_named_and_never_a_fresh_start(tmp_path):
    said = []
    saved = checkpoint.Checkpoints(tmp_path, Checkpoint(keep=3, background=False), warn=said.append)
    for step in (1, 2, 3):
        saved.save(step, {"w": np.full(3, step, np.float32)}, REST, {})
    like = abstract({"w": np.ones(3, np.float32)})
    for step, left in ((3, 2), (2, 1), (1, None)):
        victim = max(runs.data_files(saved.root / f"{step:08d}"), key=lambda path: path.stat().st_size)
        runs.flip(victim)
        said.clear()
        if left is None:
            with pytest.raises(checkpoint.Refused, match=r"^no checkpoint in .* verifies .*; not starting afresh$"):
                saved.restore(like)
        else:
            assert saved.restore(like)[1]["w"].tolist() == [left] * 3
        assert f"{step:08d} is damaged (sha256 of {victim.relative_to(saved.root / f'{step:08d}')} does not" in said[-1]
    (saved.root / "00000003").rename(saved.root / "x")  # a stray name counts for nothing
    assert saved.steps() == [1, 2]
