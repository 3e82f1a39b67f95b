"""NNX and Linen modules compute what the functional call does, from the same weights."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from seqmix.core import param
from seqmix.interop import linen as in_linen
from seqmix.interop import nnx as in_nnx
from tests.conformance.cases import CASES, over
from tests.quick import QUICK

FIRST = {type(c.mixer): c.mixer for c in reversed(CASES)}.values()  # one of a row: adapters do not see fields


@over(lambda m: m in FIRST)
def test_adapters_give_the_same_y(case, x64):
    params, x, inputs = case.params(), case.x(), case.inputs()
    want = case.forward(params, x, None, inputs)

    module = nnx.eval_shape(lambda: in_nnx.MixerModule(case.mixer, rngs=nnx.Rngs(0)))
    assert jax.tree.structure(module.params()) == jax.tree.structure(params)
    nnx.update(module, {"weights": params})
    graph, state = nnx.split(module)
    call = lambda state, x, inputs: nnx.merge(graph, state)(x, **inputs, **case.static)
    got = jax.jit(call, compiler_options=QUICK)(state, x, inputs)
    np.testing.assert_array_equal(got, want)

    fields = {f.name: getattr(case.mixer, f.name) for f in dataclasses.fields(case.mixer)}
    linen = in_linen.wrap(type(case.mixer))(**fields | {"d_model": 0})
    variables = jax.eval_shape(lambda: linen.init(jax.random.key(0), x, **inputs, **case.static))
    named = {path[1:]: path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(variables)}
    kinds = {True: "params", False: "buffers"}
    trainable = jax.tree_util.tree_leaves_with_path(param.trainable_mask(case.mixer.params()))
    assert named == {path: kinds[mask] for path, mask in trainable}
    values = dict(jax.tree_util.tree_leaves_with_path(params))
    filled = jax.tree_util.tree_map_with_path(lambda path, _: values[path[1:]], variables)
    call = lambda variables, x, inputs: linen.apply(variables, x, **inputs, **case.static)
    got = jax.jit(call, compiler_options=QUICK)(filled, x, inputs)
    np.testing.assert_array_equal(got, want)
