"""Block-sparse attention with time cut over a mesh gives what one device gives, and gathers keys alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import sharding
from seqmix.ops import block_sparse_attention, masks
from seqmix.ops.block_sparse_context import row_size
from seqmix.ops.mesh import layout
from tests.collectives import sent
from tests.quick import QUICK

B, T, H, HK, K, V = 2, 32, 4, 2, 3, 5
PACKED = np.repeat([[1, 1, 0, 2, 2, 2, 0, 0], [0, 0, 5, 5, 5, 5, 7, 7]], 4, axis=1)
PLACES = np.random.default_rng(0).permuted(np.tile(np.arange(T), (B, 1)), axis=1)
LISTS = np.argsort(np.random.default_rng(1).random((B, HK, 8, 16)), axis=-1)[..., :5].astype(np.int32)
FIXED = masks.Causal() & (masks.Window(5) | masks.Strided(4))
CASES = {
    "a fixed pattern": dict(mask=FIXED, sizes=(512, 2), soft_cap=1.5, return_lse=True),
    "packed": dict(mask=FIXED, segment_ids=PACKED, sizes=(3, 2)),
    "positions": dict(
        mask=masks.Positions(FIXED), data=dict(q_positions=PLACES, kv_positions=PLACES[:1]), sizes=(4, 4)
    ),
    "lists": dict(blocks=LISTS, mask=masks.Causal(), sizes=(4, 2)),
    "lists of one row": dict(blocks=jnp.asarray(LISTS[:1, :1]), sizes=(4, 2)),
    "lists that do not fit": dict(blocks=LISTS[:, :, :3], sizes=(12, 2)),
}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def pull(name):
    """(results, gradients of q, k, v and the slopes), compiled under the rules in force."""
    args = draw(0, B, T, H, K), draw(1, B, T, HK, K), draw(2, B, T, HK, V), draw(3, H) ** 2

    def f(q, k, v, slopes):
        out = block_sparse_attention(q, k, v, slopes=slopes, **CASES[name])
        leaves = [jnp.where(jnp.isfinite(x), x, 0) for x in jax.tree.leaves(out)]
        return sum(jnp.sum(x * draw(9 + i, *x.shape)) for i, x in enumerate(leaves)), out

    (_, out), grads = jax.jit(jax.value_and_grad(f, (0, 1, 2, 3), has_aux=True), compiler_options=QUICK)(*args)
    return jax.tree.map(np.asarray, (out, grads))


@pytest.mark.parametrize("name", CASES)
def test_four_stretches_of_time_give_what_one_gives(name, x64):
    want = pull(name)
    with sharding.use_mesh(sharding.make_mesh(context=4, model=2)):
        got = pull(name)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.any(b)
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)  # sums in another order, in float64


def test_keys_and_values_are_all_that_crosses_devices():
    mesh = sharding.make_mesh(context=8)
    cut = jax.NamedSharding(mesh, jax.P(None, "context"))
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32, sharding=cut)
    with sharding.use_mesh(mesh):
        op = jax.jit(lambda q, k, v: block_sparse_attention(q, k, v, mask=FIXED, sizes=(16, 16)))
        text = op.lower(shape(1, 512, H, K), shape(1, 512, HK, K), shape(1, 512, HK, V)).compile(QUICK).as_text()
    assert sent(text) == {"all-gather": 7 * 64 * HK * (K + V) * 4}


def test_a_stretch_is_a_whole_number_of_blocks():
    with sharding.use_mesh(sharding.make_mesh(context=8)):
        lay = layout(1, 8000)
        assert [row_size(lay, 8000, size) for size in (512, 128, 1000, 4096)] == [500, 125, 1000, 1000]
