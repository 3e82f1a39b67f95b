"""The Hopper kernels for lists of single tokens, through ptxas without a GPU; tests/ops compares them with float64."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.block_sparse_attention import token_gpu


def compiled(spilled, heads=64, width=128, value=128):
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    q, k, v = array(1, 4096, heads, width), array(1, 4096, 4, width), array(1, 4096, 4, value)
    groups = 4096 // token_gpu.group_tokens(q, k)
    lists = [array(1, 4, groups, *more, dtype=jnp.int32) for more in ((), (64,), (64,))]
    return spilled(lambda *x: token_gpu.forward(*x[:3], x[3:], scale=0.1), q, k, v, *lists)


def test_kernels_compile_for_an_h100_without_spills(spilled):
    assert compiled(spilled) == {"token_block_attention_forward": 0}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(32, 128, 128), (128, 128, 128), (64, 64, 128), (64, 128, 64), (64, 64, 64)])
def test_other_heads_and_widths_compile_for_an_h100_without_spills(spilled, shape):
    assert compiled(spilled, *shape) == {"token_block_attention_forward": 0}


def test_warpgroups_ask_for_no_more_registers_than_a_thread_block_has():
    threads = 128 * (token_gpu.UNITS + 1)
    given = 65536 // threads // 8 * 8 * (token_gpu.UNITS + 1)
    assert given >= token_gpu.UNITS * token_gpu.COMPUTING + token_gpu.FETCHING
