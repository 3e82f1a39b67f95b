"""Devices of a mesh give what one gives, forward and gradients: fsdp=2 x model=2 x context=2, or data=2 where a mixer
has no form for time that is cut; and each of these axes beside data alone, one of them here and all by
`make conformance`.
"""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from seqmix.core import param, sharding
from tests.conformance.cases import CASES, close, close_trees, mixed_ids, over
from tests.quick import QUICK

AXES = {"fsdp": dict(data=2, fsdp=2), "model": dict(data=4, model=2), "context": dict(data=4, context=2)}


def cuts_time(case):
    return case.mixer.context_form != "none" and case.time % 2 == 0


def alone():
    """Each case with each axis; those that are not its turn are marked."""
    for index, case in enumerate(CASES):
        axes = [axis for axis in AXES if axis != "context" or cuts_time(case)]
        for axis in axes:
            marks = () if axis == axes[index % len(axes)] else pytest.mark.axes
            yield pytest.param(case, axis, id=f"{case}-{axis}", marks=marks)


def equals_one_device(case, **sizes):
    """Compares y and the gradients on a mesh with those on one device."""
    ids, x, w, inputs = mixed_ids(case), case.x(), case.x(seed=3), case.inputs()
    want = case.pull(case.params(), x, ids, inputs, w)
    count = math.prod(sizes.values())
    mesh = sharding.make_mesh(**sizes, devices=jax.devices()[:count])

    def lay(array):
        axes = ("batch", "time", None)[: array.ndim]
        return jax.device_put(array, NamedSharding(mesh, sharding.spec(axes, array.shape, mesh)))

    with sharding.use_mesh(mesh):
        params = jax.device_put(case.params(), param.shardings(case.mixer.params(), mesh))
        cut = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(params)]
        args = jax.tree.map(lay, (x, ids, inputs, w))
        got = jax.jit(case.pull_of(case.mixer), compiler_options=QUICK)(params, *args)
    close(got[0], want[0])
    close_trees(got[1], want[1])
    close(got[2], want[2])
    assert len(got[0].sharding.device_set) == count and not jnp.isnan(got[0]).any()
    return min(cut)


@over()
def test_eight_devices_equal_one(case, x64):
    context = 2 if cuts_time(case) else 1
    cut = equals_one_device(case, data=2 // context, fsdp=2, context=context, model=2)
    assert cut <= (0.25 if "heads" in str(case.mixer.params()) else 0.5)


@pytest.mark.parametrize("case, axis", list(alone()))
def test_an_axis_beside_data_alone_equals_one(case, axis, x64):
    cut = equals_one_device(case, **AXES[axis])
    if axis != "model" or "heads" in str(case.mixer.params()):
        assert cut == (1 if axis == "context" else 0.5)
