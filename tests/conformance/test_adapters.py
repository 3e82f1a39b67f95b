"""NNX and Linen modules compute what the functional call does, from the same weights."""

import dataclasses

import jax
import numpy as np
from flax import nnx

from seqmix.interop import linen as in_linen
from seqmix.interop import nnx as in_nnx
from tests.conformance.cases import CASES, fast_key, over

FIRST = {type(c.mixer): c.mixer for c in reversed(CASES)}.values()  # one of a row: adapters do not see fields


@over(lambda m: m in FIRST)
def test_adapters_give_the_same_y(case):
    params, x, inputs = case.params(np.float32), case.x(np.float32), case.inputs(np.float32)
    want = case.forward(params, x, None, inputs)

    module = in_nnx.MixerModule(case.mixer, rngs=nnx.Rngs(params=fast_key()))
    assert jax.tree.structure(module.params()) == jax.tree.structure(params)
    nnx.update(module, {"weights": params})
    got = nnx.jit(lambda m, x, inputs: m(x, **inputs, **case.static))(module, x, inputs)
    np.testing.assert_array_equal(got, want)

    fields = {f.name: getattr(case.mixer, f.name) for f in dataclasses.fields(case.mixer)}
    linen = in_linen.wrap(type(case.mixer))(**fields | {"d_model": 0})
    fixed = [name for name, p in case.mixer.params().items() if getattr(p, "trainable", True) is False]
    variables = {"params": {k: v for k, v in params.items() if k not in fixed}}
    variables["buffers"] = {k: params[k] for k in fixed}
    got = jax.jit(lambda v, x, inputs: linen.apply(v, x, **inputs, **case.static))(variables, x, inputs)
    np.testing.assert_array_equal(got, want)
