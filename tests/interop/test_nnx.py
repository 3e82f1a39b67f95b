"""Mixers in a Flax NNX host."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seqmix.core import param, sharding
from seqmix.interop import nnx as smx
from tests.toys import Cross, Leaky

X = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)


def leaky(**kwargs):
    return smx.MixerModule(Leaky(d_model=8), rngs=rngs(), **kwargs)


def rngs():
    return nnx.Rngs(jax.random.key(0, impl="unsafe_rbg"))  # compiles quickly


@nnx.jit
def call(module, x):
    return module(x)


class Block(nnx.Module):
    def __init__(self, width, *, rngs):
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = smx.Attention(width, heads=2, rngs=rngs)
        self.leaky = smx.MixerModule(Leaky(d_model=width), rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        y, aux = self.leaky.forward(x)
        return x + y, aux


@nnx.jit
def train_step(model, optimizer, x, target):
    def objective(model):
        y, aux = model(x)
        return jnp.mean((y - target) ** 2) + aux["loss/size"], aux

    (loss, aux), grads = nnx.value_and_grad(objective, has_aux=True)(model)
    optimizer.update(model, grads)
    model.leaky.write(aux)
    return loss


def test_training_lowers_the_loss_and_leaves_buffers_to_write():
    model = Block(8, rngs=rngs())
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2, weight_decay=0.5), wrt=nnx.Param)
    kinds = {type(v) for v in jax.tree.leaves(nnx.state(model), is_leaf=lambda v: isinstance(v, nnx.Variable))}
    assert smx.Buffer in kinds and not issubclass(smx.Buffer, nnx.Param)
    target = np.roll(X, 1, axis=1)
    losses = [float(train_step(model, optimizer, X, target)) for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]
    mean = model.leaky.weights["mean"][...]
    assert np.any(mean != 0) and np.all(np.abs(mean) < 1)  # of inputs of mean zero, where a gradient grew it not
    held = jax.tree.leaves(nnx.state(optimizer, nnx.OptState))
    assert sum(leaf.shape == (8,) for leaf in held) == 2  # the norm's two moments, none of the mean's


def test_it_computes_what_the_function_does():
    module = leaky()
    y, aux = nnx.jit(lambda m, x: m.forward(x))(module, X)
    want, want_aux = jax.jit(module.mixer.forward)(module.params(), X)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(call(module, X), want)
    module.write(aux)
    np.testing.assert_array_equal(module.params()["mean"], want_aux["update/mean"])
    assert jax.eval_shape(module, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    names = [name for name, _ in param.entries(module.mixer.params())]
    assert names == ["in/rate", "in/value", "mean", "out"]
    assert jax.tree.structure(module.params()) == jax.tree.structure(param.abstract(module.mixer.params()))


def test_it_decodes():
    module = leaky()
    ids = np.array([[0, 1, 1, 1]] * 4, np.int32)
    y, state = module.prefill(X[:, :4], module.init_state(4, 6), segment_ids=ids)
    token, state = module.step(X[:, 4:5], state)
    want = module(X[:, 1:5])
    np.testing.assert_allclose(np.concatenate([y[:, 1:], token], axis=1), want, rtol=1e-5, atol=1e-6)


def test_inputs_and_ids_reach_the_mixer():
    module = smx.MixerModule(Cross(d_model=8), rngs=rngs())
    ids = np.zeros(X.shape[:2], np.int32)
    assert np.any(module(X, memory=X[:, :3]) != 0)
    assert not np.any(module(X, memory=X[:, :3], segment_ids=ids))
    assert module.init_state(4, 6, memory=X[:, :3])["k"].shape == (4, 3, 8)
    with pytest.raises(ValueError, match="memory"):
        module(X)


def test_layers_stack_and_scan():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return smx.MixerModule(Leaky(d_model=8), rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    @nnx.remat
    def run(x, layer):
        return x + layer(x)

    layers = stack(rngs())
    weights, want, forward = layers.params(), X, jax.jit(Leaky(d_model=8).forward)
    assert weights["out"].shape == (3, 2, 4, 8)
    for i in range(3):
        want = want + forward(jax.tree.map(lambda w, i=i: w[i], weights), want)[0]
    got = nnx.jit(run)(X, layers)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_on_a_hosts_own_mesh():
    want = call(leaky(), X)
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("dp")))
    with jax.set_mesh(mesh):  # knows nothing of our names
        np.testing.assert_allclose(call(leaky(), x), want, atol=1e-6)
    rules = {"batch": "dp", "heads": "tp"}
    with sharding.use_mesh(mesh, rules):
        module = leaky()
        laid = param.shardings(module.mixer.params(), mesh, rules)
        nnx.update(module, {"weights": jax.device_put(module.params(), laid)})
        assert module.weights["out"][...].sharding.spec[0] == "tp"
        y = call(module, x)
    np.testing.assert_allclose(y, want, atol=1e-6)
    assert len(y.sharding.device_set) == 8


def test_on_an_explicit_mesh_through_auto_axes():
    want = call(leaky(), X)
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        graph, state = nnx.split(leaky())
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("dp")))
        run = lambda state, x: nnx.merge(graph, state)(x)
        y = jax.jit(jax.sharding.auto_axes(run, out_sharding=PartitionSpec("dp")))(state, x)
    np.testing.assert_allclose(y, want, atol=1e-6)


def test_annotations_are_for_hosts_whose_rules_know_the_names():
    assert "out_sharding" not in leaky().weights["out"].get_metadata()
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
    rules = (("embed", "dp"), ("heads", "tp"), ("head_dim", None))
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
        module = nnx.jit(lambda: leaky(annotate=True))()
        assert module.weights["out"].get_metadata()["out_sharding"] == ("heads", "head_dim", "embed")
        assert module.weights["out"][...].sharding.spec == PartitionSpec("tp", None, "dp")
        y = call(module, X)
    np.testing.assert_allclose(y, call(leaky(), X), atol=1e-6)


def test_unknown_mixers_are_told_the_nearest():
    with pytest.raises(AttributeError, match="did you mean 'Attention'"):
        smx.Atention  # noqa: B018
    with pytest.raises(ValueError, match="d_model"):
        smx.Attention(0, heads=2, head_dim=4, rngs=rngs())
    assert "Mamba2" in dir(smx) and not hasattr(smx, "_private")
