"""Logical names on meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from seqmix.core import sharding


@pytest.fixture
def mesh():
    return sharding.make_mesh(data=2, fsdp=2, model=2)


def test_axes_are_auto(mesh):
    assert mesh.axis_names == sharding.MESH_AXES and set(mesh.axis_types) == {AxisType.Auto}
    with pytest.raises(ValueError, match=r"product of 8 devices, got data=3"):
        sharding.make_mesh(data=3)


def test_rules_hold_on_a_mesh_alone():
    message = "^mesh: expected a jax.sharding.Mesh, as make_mesh makes it, got None"
    with pytest.raises(ValueError, match=message), sharding.use_mesh(None):
        pass


def test_a_spec_follows_the_rules(mesh):
    assert tuple(sharding.spec(("batch", "time", None), (4, 9, 3), mesh)) == (("data", "fsdp"), None, None)
    assert tuple(sharding.spec(("embed", "heads", "unheard_of"), (4, 4, 4), mesh)) == ("fsdp", "model", None)
    one = sharding.make_mesh(devices=jax.devices()[:1])
    assert tuple(sharding.spec(("embed", "heads"), (3, 5), one)) == (None, None)


def test_what_cannot_be_divided(mesh):
    with pytest.raises(ValueError, match=r"heads: expected a multiple of 2 \(mesh model=2\), got 3"):
        sharding.spec(("heads",), (3,), mesh)
    assert tuple(sharding.spec(("heads",), (3,), mesh, strict=False)) == (None,)
    assert tuple(sharding.spec(("kv_heads", "vocab"), (1, 257), mesh)) == (None, None)
    with pytest.raises(ValueError, match="two of them lie on mesh axis model"):
        sharding.spec(("heads", "mlp"), (4, 4), mesh)


def test_constrain_places_activations_where_rules_are_in_force(mesh):
    x = jnp.arange(4 * 6 * 4.0).reshape(4, 6, 4)
    place = lambda x: sharding.constrain(2 * x, "batch", "time", "heads")
    assert sharding.active() is None and len(jax.jit(place)(x).sharding.device_set) == 1
    with sharding.use_mesh(mesh):
        y = jax.jit(lambda x: place(x))(x)
        assert tuple(y.sharding.spec) == (("data", "fsdp"), None, "model")
        with pytest.raises(ValueError, match="axes: expected 3 names"):
            sharding.constrain(x, "batch")
    np.testing.assert_array_equal(y, 2 * x)
    assert sharding.active() is None


def test_a_host_brings_its_own_axes():
    mesh = jax.make_mesh((4, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
    with sharding.use_mesh(mesh, {"batch": "dp", "heads": "tp"}):
        y = jax.jit(lambda x: sharding.constrain(x, "batch", "time", "heads"))(jnp.ones((4, 3, 2)))
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec("dp", None, "tp")), 3)


def test_rules_end_with_their_block_even_by_an_error(mesh):
    with pytest.raises(RuntimeError), sharding.use_mesh(mesh):
        raise RuntimeError
    assert sharding.active() is None
