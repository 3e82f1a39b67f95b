"""The look-up and its gradient, on one device and on meshes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from seqmix.core import sharding
from seqmix.models.embedding import TABLE, lookup
from seqmix.models.loss import chunked_cross_entropy
from tests.quick import QUICK

V, D, B, T = 24, 16, 8, 12


def objective(table, tokens, targets):
    """A loss of a tied table that is looked up and read out."""
    x = lookup(table, tokens, "float32")
    rows = sharding.gathered(table, TABLE, ("vocab", None))
    return chunked_cross_entropy(jnp.sin(x), rows, targets, jnp.ones((B, T)), chunk=4)[0]


@pytest.fixture(scope="module")
def drawn():
    keys = jax.random.split(jax.random.key(0), 3)
    tokens, targets = (jax.random.randint(key, (B, T), 0, V) for key in keys[1:])
    return jax.random.normal(keys[0], (V, D)), tokens.at[0, :2].set(jnp.array([-3, V + 5])), targets


def test_the_rows_and_their_gradient_are_those_of_a_product_with_one_hot_rows(drawn):
    table, tokens, _ = drawn
    hot = jax.nn.one_hot(jnp.clip(tokens, 0, V - 1), V)
    x, back = jax.vjp(lambda table: lookup(table, tokens, "bfloat16"), table)
    assert x.dtype == jnp.bfloat16
    np.testing.assert_array_equal(x, (hot @ table).astype("bfloat16"))
    given = jnp.cos(jnp.arange(x.size).reshape(x.shape)).astype("bfloat16")
    (grad,) = back(given)
    want = jnp.einsum("btv,btd->vd", hot, given.astype("float32"), precision="highest")
    np.testing.assert_allclose(grad, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "model": 2}, {"fsdp": 2, "context": 4}], ids=str)
def test_the_gradient_of_a_tied_table_on_a_mesh(drawn, sizes):
    table, *ids = drawn
    want = jax.jit(jax.grad(objective), compiler_options=QUICK)(table, *ids)
    mesh = sharding.make_mesh(**sizes)
    where = [NamedSharding(mesh, sharding.spec(axes, (V, D), mesh)) for axes in (TABLE, ("batch", "time"))]
    with sharding.use_mesh(mesh):
        run = jax.jit(jax.grad(objective), out_shardings=where[0], compiler_options=QUICK)
        compiled = run.lower(jax.device_put(table, where[0]), *(jax.device_put(x, where[1]) for x in ids)).compile()
        got = compiled(jax.device_put(table, where[0]), *(jax.device_put(x, where[1]) for x in ids))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    if sizes == {"fsdp": 8}:  # the read-out's part is summed once, not chunk by chunk, and the look-up's not at all
        body = re.findall(r" = (.*) all-reduce\(", compiled.as_text())
        assert sum(shapes.count(f"f32[{V},{D}]") for shapes in body) == 1
        assert not any(f"1,{V},{D}]" in shapes for shapes in body)
