"""What gradients read of each row of queries: against float64 in the interpreter, and compiled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.block_sparse_attention import rows_gpu
from seqmix import ops
from seqmix.core import sharding
from seqmix.ops import block_sparse_kernels, masks

needs_mosaic = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))


@needs_mosaic
@pytest.mark.parametrize(("shape", "by_head"), [((1, 100, 3, 64), False), ((2, 64, 2, 128), True)])
def test_row_sums_match_float64_and_rows_that_see_nothing_have_none(shape, by_head):
    batch, time, heads, _ = shape
    draw = np.random.default_rng(0).normal
    y, dy = (jnp.asarray(draw(size=shape), jnp.bfloat16) for _ in range(2))
    lse, dlse = (draw(size=(batch, heads, time)).astype(np.float32) for _ in range(2))
    lse[0, 1, :5], lse[0, 0, 7] = -np.inf, np.inf
    given = (jnp.swapaxes(x, 1, 2) if by_head else x for x in (y, dy))
    with compat.interpret():
        got = block_sparse_kernels.row_sums("gpu", *given, jnp.asarray(lse), jnp.asarray(dlse), by_head=by_head)
    want = np.einsum("bthv,bthv->bht", np.asarray(y, np.float64), np.asarray(dy, np.float64)) - dlse
    some = np.isfinite(lse)
    np.testing.assert_allclose(got[:, :, 0, :time], np.where(some, lse * np.log2(np.e), np.inf), rtol=1e-6)
    np.testing.assert_allclose(got[:, :, 1, :time], np.where(some, want, 0), rtol=1e-5, atol=1e-5)
    assert np.all(got[:, :, 0, time:] == np.inf) and not np.any(got[:, :, 1, time:])


@pytest.mark.parametrize("value", [64, 128])
def test_the_kernel_compiles_for_an_h100_without_spills(spilled, value):
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    y, row = array(2, 1024, 4, value), array(2, 4, 1024, dtype=jnp.float32)
    assert spilled(rows_gpu.rows, y, y, row, row) == {"block_sparse_attention_rows": 0}


def test_xla_makes_nothing_of_queries_outputs_or_their_cotangents(h100s):
    shape, mesh = (2, 512, 4, 128), sharding.make_mesh(devices=h100s(1))
    array = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P()))

    def gradients(q, k, v, dy):
        call = lambda *inputs: ops.block_sparse_attention(*inputs, mask=masks.Causal(), implementation="gpu")
        return jax.vjp(call, q, k, v)[1](dy)

    with sharding.use_mesh(mesh):
        text = jax.jit(gradients).lower(*[array] * 4).compile().as_text()
    fused, program = text[text.index("\n") : text.index("\nENTRY")], text[text.index("\nENTRY") :]
    name = f"bf16[{','.join(map(str, shape))}]"
    assert name in program and name not in fused
