"""The optimiser against a hand-written AdamW, the schedules at their corners, accumulation against a whole
batch.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import optim
from seqmix.core.param import Param

BASE = dict(
    peak_lr=0.1,
    warmup=0,
    schedule="cosine",
    decay_steps_fraction=0.2,
    end_lr_ratio=0.1,
    b1=0.9,
    b2=0.95,
    eps=1e-8,
    weight_decay=0.1,
    clip=0.0,
    accumulate=1,
    kind="adamw",
)
TREE = {
    "kernel": Param((3, 2), ("embed", "mlp")),
    "bias": {"b": Param((2,), ("mlp",), decay=False, lr_scale=0.5)},
    "table": Param((4,), (None,), trainable=False),
}


def settings(**changes):
    return types.SimpleNamespace(**(BASE | changes))


def weights(seed=0):
    draw = np.random.default_rng(seed)
    return {
        "kernel": jnp.asarray(draw.normal(size=(3, 2)), jnp.float32),
        "bias": {"b": jnp.asarray(draw.normal(size=2), jnp.float32)},
        "table": jnp.arange(4.0),
    }


def parts(tree):
    from seqmix.core import param

    return optim.split(tree, param.trainable_mask(TREE))


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_adamw_by_hand(clip):
    cfg = settings(clip=clip)
    transform, lr = optim.optimizer(cfg, 10, TREE), optim.schedule(cfg, 10)
    trainable, frozen = parts(weights())
    state = transform.init(trainable)
    w = np.asarray(trainable["kernel"], np.float64)
    b = np.asarray(trainable["bias"]["b"], np.float64)
    moments = {"w": [0, 0], "b": [0, 0]}
    for step in range(3):
        grads, _ = parts(weights(step + 1))
        updates, state = transform.update(grads, state, trainable)
        trainable = jax.tree.map(jnp.add, trainable, updates)
        gw, gb = np.asarray(grads["kernel"], np.float64), np.asarray(grads["bias"]["b"], np.float64)
        norm = np.sqrt((gw**2).sum() + (gb**2).sum())
        factor = min(1, clip / norm) if clip else 1
        for name, value, grad in (("w", w, gw * factor), ("b", b, gb * factor)):
            m = moments[name]
            m[0], m[1] = 0.9 * m[0] + 0.1 * grad, 0.95 * m[1] + 0.05 * grad**2
            ratio = m[0] / (1 - 0.9 ** (step + 1)) / (np.sqrt(m[1] / (1 - 0.95 ** (step + 1))) + 1e-8)
            if name == "w":
                w = value - float(lr(step)) * (ratio + 0.1 * value)
            else:
                b = value - float(lr(step)) * 0.5 * ratio
    # float32 moments against float64: a few units in the last place of values of order one
    np.testing.assert_allclose(trainable["kernel"], w, atol=2e-6)
    np.testing.assert_allclose(trainable["bias"]["b"], b, atol=2e-6)
    joined = optim.join(trainable, frozen)
    np.testing.assert_array_equal(joined["table"], np.arange(4.0))


def test_schedules():
    cosine = optim.schedule(settings(warmup=10), 110)
    np.testing.assert_allclose(
        [cosine(0), cosine(9), cosine(10), cosine(60), cosine(110)], [0.01, 0.1, 0.1, 0.055, 0.01], rtol=1e-5
    )
    wsd = optim.schedule(settings(schedule="wsd", warmup=10), 100)
    np.testing.assert_allclose([wsd(0), wsd(50), wsd(80), wsd(90), wsd(100)], [0.01, 0.1, 0.1, 0.055, 0.01], rtol=1e-5)
    linear = optim.schedule(settings(schedule="linear", warmup=10), 110)
    np.testing.assert_allclose([linear(9), linear(60), linear(85), linear(110)], [0.1, 0.055, 0.0325, 0.01], rtol=1e-5)
    constant = optim.schedule(settings(schedule="constant", warmup=10), 110)
    np.testing.assert_allclose([constant(0), constant(9), constant(110)], [0.01, 0.1, 0.1], rtol=1e-6)
    with pytest.raises(ValueError, match="schedule"):
        optim.schedule(settings(schedule="step"), 10)


def test_accumulation_is_the_whole_batch():
    draw = np.random.default_rng(0)
    batch = {
        "x": jnp.asarray(draw.normal(size=(8, 5)), jnp.float32),
        "mask": jnp.asarray(draw.random((8, 5)) < 0.6),
    }

    def loss_fn(w, batch, rng):
        tokens = batch["mask"].sum().astype(jnp.float32)
        nll = jnp.sum(jnp.square(batch["x"] * w["a"] - 1) * batch["mask"])
        return nll / tokens, {"nll_sum": nll, "tokens": tokens, "loss": nll / tokens}

    w, key = {"a": jnp.full((5,), 0.3), "none": None}, jax.random.key(0)
    whole = optim.accumulated(loss_fn, w, batch, key, 1)
    for count in (2, 4, 8):
        parts_ = optim.accumulated(loss_fn, w, batch, key, count)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, parts_)


def test_moments_lie_as_weights_do():
    trainable, _ = parts(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), weights()))
    laid, _ = parts({"kernel": "K", "bias": {"b": "B"}, "table": "T"})
    found = optim.state_shardings(optim.optimizer(settings(), 10, TREE), trainable, laid, "R")
    assert sorted(jax.tree.leaves(found)) == ["B", "B", "K", "K", "R", "R"]


def test_config_round_trip():
    import dataclasses

    from experiments import serialize
    from experiments.config import Data, Optim

    data = Data(path="x", seq_len=7)
    held = serialize.to_json(data)
    assert serialize.from_json(held) == data
    assert serialize.difference(held, serialize.to_json(dataclasses.replace(data, seq_len=8))) == (
        "seq_len",
        7,
        8,
    )
    assert serialize.difference(held, held) is None
    assert serialize.difference(held, serialize.to_json(dataclasses.replace(data, path="y")), ignore=("path",)) is None
    assert serialize.from_json(serialize.to_json(Optim(peak_lr=0.25))).peak_lr == 0.25
