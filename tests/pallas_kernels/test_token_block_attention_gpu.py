"""The Hopper kernels for lists of single tokens, through ptxas without a GPU; tests/ops compares them with float64."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.block_sparse_attention import best_gpu, token_gpu, token_gpu_backward, weights_gpu

LENGTHS = token_gpu.LONG, 2 * token_gpu.LONG  # one for each cut
KERNELS = {"token_block_attention_forward": 0, "token_block_attention_dq": 0, "token_block_attention_dkv": 0}


def compiled(spilled, time, heads=64, width=128, value=128):
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    q, k, v, dy = (array(1, time, *more) for more in ((heads, width), (4, width), (4, value), (heads, value)))
    integers = lambda *more: array(1, 4, *more, dtype=jnp.int32)
    groups = -(-time // token_gpu.group_tokens(q, k))
    union, own = (integers(groups), integers(groups, 64), integers(groups, 64)), integers(groups)
    lists = *(integers(97),) * 4, integers(65536), array(1, 4, 2, 65536 * heads // 4, dtype=jnp.float32)

    def run(q, k, v, dy, delta, union, own, lists):
        y, lse = token_gpu.forward(q, k, v, union, own, scale=0.1)
        dq = token_gpu_backward.backward_queries(q, k, v, lse, dy, delta, union, scale=0.1)
        return y, dq, token_gpu_backward.backward_keys(q, k, v, dy, lists, scale=0.1)

    return spilled(run, q, k, v, dy, array(1, heads, time, dtype=jnp.float32), union, own, lists)


@pytest.mark.parametrize("time", LENGTHS)
def test_kernels_compile_for_an_h100_without_spills(spilled, time):
    assert compiled(spilled, time) == KERNELS


def test_the_kernels_of_weights_and_of_the_best_compile_for_an_h100_without_spills(spilled):
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    inputs = array(1, 4096, 64, 128), array(1, 256, 4, 128), array(1, 64, 4096, dtype=jnp.float32)

    def run(q, k, lse, tiles, low, high):
        return best_gpu.best(weights_gpu.weights(q, k, lse, tiles, scale=0.1), low, high, count=13)

    inputs += array(1, 32, dtype=jnp.int32), *(array(1, 4096, dtype=jnp.int32),) * 2
    assert spilled(run, *inputs) == {"block_weights": 0, "best_of_ranges": 0}


@pytest.mark.slow
@pytest.mark.parametrize("time", LENGTHS)
@pytest.mark.parametrize("shape", [(32, 64, 128)])
def test_other_heads_and_widths_compile_for_an_h100_without_spills(spilled, shape, time):
    assert compiled(spilled, time, *shape) == KERNELS


CUTS = [
    *((cut.units, cut.fetching, cut.computing) for cut in (token_gpu.MANY, token_gpu.WIDE)),
    (token_gpu_backward.LISTS, token_gpu_backward.LISTS_FETCHING, token_gpu_backward.LISTS_COMPUTING),
    (weights_gpu.UNITS, weights_gpu.FETCHING, weights_gpu.COMPUTING),
]


@pytest.mark.parametrize("units, fetching, computing", CUTS)
def test_warpgroups_ask_for_no_more_registers_than_a_thread_block_has(units, fetching, computing):
    given = 65536 // (128 * (units + 1)) // 8 * 8 * (units + 1)
    assert given >= units * computing + fetching
