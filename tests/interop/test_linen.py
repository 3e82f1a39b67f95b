"""Mixers in a Flax Linen host."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seqmix.core import param, sharding
from seqmix.interop import linen as smx
from tests.toys import Cross, Leaky

X = np.random.default_rng(0).normal(size=(4, 6, 8)).astype(np.float32)
KEY = jax.random.key(0, impl="unsafe_rbg")  # compiles quickly
LeakyModule = smx.wrap(Leaky)
init, apply = jax.jit(LeakyModule().init), jax.jit(LeakyModule().apply, static_argnames=("method", "mutable"))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + smx.Attention(heads=2)(nn.RMSNorm()(x))
        return x + LeakyModule(heads=2)(x), None


def functional(variables):
    """The weights as the mixer's methods take them."""
    return {**nn.unbox(variables["params"]), **nn.unbox(variables["buffers"])}


def test_params_are_the_functional_params():
    variables = init(KEY, X)
    shapes = jax.tree.map(lambda w: (w.shape, w.dtype), functional(variables))
    declared = param.abstract(Leaky(d_model=8).params())
    assert shapes == jax.tree.map(lambda w: (w.shape, w.dtype), declared)
    assert list(variables["buffers"]) == ["mean"]
    want, aux = jax.jit(Leaky(d_model=8).forward)(functional(variables), X)
    np.testing.assert_array_equal(apply(variables, X), want)
    y, seen = apply(variables, X, method="forward")
    np.testing.assert_array_equal(seen["loss/size"], aux["loss/size"])
    _, changed = apply(variables, X, mutable="buffers")
    np.testing.assert_array_equal(changed["buffers"]["mean"], aux["update/mean"])
    assert jax.eval_shape(apply, variables, X.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_training_lowers_the_loss_and_leaves_buffers_alone():
    model, target = Block(), np.roll(X, 1, axis=1)
    variables = jax.jit(model.init)(KEY, X)
    optimizer = optax.adamw(1e-2, weight_decay=0.5)
    assert set(variables["params"]) == {"Attention_0", "Leaky_0", "RMSNorm_0"}

    @jax.jit
    def train_step(params, buffers, moments):
        def objective(params):
            variables = {"params": params, "buffers": buffers}
            (y, _), changed = model.apply(variables, X, mutable=["buffers"])
            return jnp.mean((y - target) ** 2), changed["buffers"]

        (loss, buffers), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), buffers, moments, loss

    params, buffers = variables["params"], variables["buffers"]
    moments, losses = optimizer.init(params), []
    for _ in range(10):
        params, buffers, moments, loss = train_step(params, buffers, moments)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert np.any(buffers["Leaky_0"]["mean"] != 0)


def test_it_decodes():
    module = LeakyModule(d_model=8)
    variables = init(KEY, X)
    run = lambda name, *args, **kwargs: module.apply(variables, *args, method=name, **kwargs)
    ids = np.array([[0, 1, 1, 1]] * 4, np.int32)
    y, state = run("prefill", X[:, :4], run("init_state", 4, 6), segment_ids=ids)
    token, state = run("step", X[:, 4:5], state)
    want = run("__call__", X[:, 1:5])
    np.testing.assert_allclose(np.concatenate([y[:, 1:], token], axis=1), want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="d_model"):
        apply(variables, 4, 6, method="init_state")
    with pytest.raises(ValueError, match="width 4, the field d_model, got 8"):
        LeakyModule(d_model=4).init(KEY, X)


def test_another_width_than_that_of_the_weights_is_laid_to_x():
    for module in (smx.Attention(heads=2), smx.Attention(heads=2, head_dim=4), smx.Mamba2(head_dim=16), LeakyModule()):
        variables = jax.eval_shape(module.init, KEY, X)
        for width in (16, 10, 9):  # which the fields allow, and which some do not
            with pytest.raises(ValueError, match=f"^x: expected the width .* made for, got {width} "):
                module.apply(variables, np.zeros((1, 2, width), np.float32))
    with pytest.raises(ValueError, match="^x: expected an array, got list"):
        module.apply(variables, X.tolist())


def test_inputs_reach_the_mixer():
    module = smx.wrap(Cross)()
    variables = jax.jit(module.init)(KEY, X, memory=X[:, :3])
    assert np.any(jax.jit(module.apply)(variables, X, memory=X[:, :3]) != 0)
    with pytest.raises(ValueError, match="memory"):
        module.apply(variables, X)


def test_layers_scan_with_remat():
    axes = {"params": 0, "buffers": 0}
    Stack = nn.scan(nn.remat(Block), variable_axes=axes, split_rngs={"params": True}, length=3)
    variables = jax.jit(Stack().init)(KEY, X, None)
    assert variables["params"]["Leaky_0"]["out"].shape == (3, 2, 4, 8)
    want, layer = X, jax.jit(Block().apply)
    for i in range(3):
        want, _ = layer(jax.tree.map(lambda w, i=i: w[i], variables), want)
    got, _ = jax.jit(Stack().apply)(variables, X, None)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_on_a_hosts_own_mesh():
    variables = init(KEY, X)
    want = apply(variables, X)
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
    x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("dp")))
    with jax.set_mesh(mesh):  # knows nothing of our names
        fresh = init(KEY, x)
        np.testing.assert_allclose(apply(fresh, x), want, atol=1e-6)
    rules = {"batch": "dp", "heads": "tp"}
    with sharding.use_mesh(mesh, rules):
        declared = Leaky(d_model=8).params()
        laid = jax.device_put(functional(variables), param.shardings(declared, mesh, rules))
        split = {"params": {k: laid[k] for k in ("in", "out")}, "buffers": {"mean": laid["mean"]}}
        y = apply(split, x)
    np.testing.assert_allclose(y, want, atol=1e-6)
    assert len(y.sharding.device_set) == 8


def test_on_an_explicit_mesh_through_auto_axes():
    variables = init(KEY, X)
    want = apply(variables, X)
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, PartitionSpec("dp")))
        run = jax.sharding.auto_axes(LeakyModule().apply, out_sharding=PartitionSpec("dp"))
        y = jax.jit(run)(jax.device_put(variables, NamedSharding(mesh, PartitionSpec())), x)
    np.testing.assert_allclose(y, want, atol=1e-6)


def test_annotations_are_for_hosts_whose_rules_know_the_names():
    module = LeakyModule(annotate=True)
    variables = jax.jit(module.init)(KEY, X)
    specs = nn.get_partition_spec(variables)
    assert specs["params"]["in"]["value"] == PartitionSpec("embed", "heads", "head_dim")
    assert specs["buffers"]["mean"] == PartitionSpec("embed")
    plain = init(KEY, X)
    assert jax.tree.all(jax.tree.map(np.array_equal, functional(variables), functional(plain)))
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
    rules = (("embed", "dp"), ("heads", "tp"), ("head_dim", None))
    laid = nn.logical_to_mesh_sharding(specs, mesh, rules)
    assert laid["params"]["out"].spec == PartitionSpec("tp", None, "dp")
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        made = jax.jit(module.init, out_shardings=laid)(KEY, X)
        y, changed = jax.jit(lambda v: module.apply(v, X, mutable=["buffers"]))(made)
    np.testing.assert_allclose(y, apply(plain, X), atol=1e-6)
    assert isinstance(changed["buffers"]["mean"], nn.LogicallyPartitioned)


def test_classes_are_made_once_and_unknown_ones_are_told_the_nearest():
    assert smx.Attention is smx.Attention and smx.Attention.__name__ == "Attention"
    with pytest.raises(AttributeError, match="did you mean 'Attention'"):
        smx.Atention  # noqa: B018
    with pytest.raises(TypeError, match="hedas"):
        smx.Attention(hedas=2)
    assert "Mamba2" in dir(smx) and not hasattr(smx, "_private")
