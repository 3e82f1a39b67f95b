"""Tokens sorted by the blocks that they choose: the sorting, and attention by it against the dense matrix."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from seqmix.core import sharding
from seqmix.ops import block_groups, block_sort, block_sparse_attention, masks, topk_block_attention
from tests.quick import QUICK

needs_mosaic = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))
CLOSE = {"rtol": 0, "atol": 1e-12}  # sums of some 60 terms in float64
BOUND = 5e-3  # of bfloat16, as in the tests of the kernels


def chosen(seed, shape, blocks):
    """Lists in any order, with entries that are none and blocks listed twice."""
    return np.random.default_rng(seed).integers(-2, blocks + 2, shape).astype(np.int32)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@hypothesis.settings(max_examples=12)
@hypothesis.given(st.integers(1, 150), st.integers(1, 4), st.integers(1, 9), st.sampled_from([1, 4, 16]), st.integers())
def test_each_block_gets_the_tokens_that_list_it(time, slots, blocks, tile, seed):
    index = chosen(abs(seed), (2, 1, time, slots), blocks)
    sort = jax.jit(block_sort.grouped, static_argnums=(1, 2), compiler_options=QUICK)
    groups = [np.asarray(x) for x in sort(index, blocks, tile)]
    for row, token, real, block, listed in zip(*(x[:, 0] for x in groups), index[:, 0], strict=True):
        tiles = token.reshape(len(block), tile)
        for n in range(blocks):
            mine = np.flatnonzero((listed == n).any(-1))
            assert token[real & np.repeat(block == n, tile)].tolist() == mine.tolist()
            assert (block == n).sum() == -(-len(mine) // tile)  # whole tiles, and none without a token
        assert np.array_equal(token[row[row >= 0]], np.nonzero(row >= 0)[0])
        assert (row >= 0).sum() == real.sum() and not real[np.repeat(block < 0, tile)].any()
        for one, there in zip(tiles[block >= 0], real.reshape(tiles.shape)[block >= 0], strict=True):
            assert there[0] and (one[~there] == one[0]).all()


# B, T, S, H, Hk, heads of the lists, blocks listed, tokens of a block, other options
SHAPES = {
    "grouped heads": (2, 70, 50, 6, 2, 2, 3, 8, {"soft_cap": 1.5, "scale": 0.7}),
    "one list for all heads": (1, 130, 130, 2, 2, 1, 2, 16, {}),
    "segments": (2, 64, 64, 2, 1, 1, 4, 8, {"mask": masks.Causal()}),
}


@functools.cache
def pulled(name, implementation):
    """(index, ids, cotangents) -> y, lse and the gradients of q, k and v, compiled."""
    batch, time, keys, heads, key_heads, *_, size, options = SHAPES[name]
    inputs = draw(0, batch, time, heads, 4), draw(1, batch, keys, key_heads, 4), draw(2, batch, keys, key_heads, 3)

    def run(index, ids, dy, dlse):
        def call(*qkv):
            given = {"blocks": index, "sizes": (1, size), "segment_ids": ids} | options
            y, lse = block_sparse_attention(*qkv, **given, return_lse=True, implementation=implementation)
            return y, jnp.where(lse > -jnp.inf, lse, 0)

        out, pull = jax.vjp(call, *map(jnp.asarray, inputs))
        return *out, *pull((dy, dlse))

    return jax.jit(run, compiler_options=QUICK)


@pytest.mark.parametrize("name", SHAPES)
@hypothesis.settings(max_examples=5, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@hypothesis.given(seed=st.integers(0, 2**31), cuts=st.lists(st.integers(0, 63), max_size=3))
def test_it_is_the_dense_result_with_its_gradients(x64, name, seed, cuts):
    batch, time, keys, heads, _, lists, count, size, options = SHAPES[name]
    index = chosen(seed, (batch, lists, time, count), -(-keys // size))
    ids = None
    if "mask" in options:  # segments that begin anywhere, some of padding
        ids = np.broadcast_to(np.isin(np.arange(time), cuts).cumsum() % 3, (batch, time)).astype(np.int32)
    given = index, ids, draw(seed, batch, time, heads, 3), draw(seed + 1, batch, heads, time)
    for got, want in zip(pulled(name, "chunked")(*given), pulled(name, "reference")(*given), strict=True):
        np.testing.assert_allclose(got, want, **CLOSE)


def test_the_own_block_and_the_others_are_one_softmax(x64):
    """Segments of whole blocks, a choice for each query head, and a last block that is not whole."""
    q, k, v = draw(0, 1, 150, 4, 4), draw(1, 1, 150, 2, 4), draw(2, 1, 150, 2, 3)
    ids = np.repeat([[3, 3, 0, 4, 4]], 30, axis=1)
    for size, options in ((64, {}), (10, {"segment_ids": ids, "scores": draw(3, 1, 4, 150, 15)})):

        def run(name, size=size, options=options):
            call = lambda *x: topk_block_attention(*x, count=2, sizes=(1, size), implementation=name, **options)
            y, pull = jax.vjp(call, q, k, v)
            return y, *pull(jnp.cos(y))

        run = jax.jit(run, static_argnums=0, compiler_options=QUICK)
        for got, want in zip(run("chunked"), run("reference"), strict=True):
            np.testing.assert_allclose(got, want, **CLOSE)


def test_each_device_sorts_its_rows_and_heads(x64):
    q, k, v = draw(0, 2, 64, 4, 3), draw(1, 2, 64, 2, 3), draw(2, 2, 64, 2, 3)
    index = jnp.asarray(chosen(0, (2, 2, 64, 2), 4))
    run = lambda: jax.jit(lambda *x: block_sparse_attention(*x, blocks=index, sizes=(1, 16)), compiler_options=QUICK)(
        q, k, v
    )
    want = run()
    with sharding.use_mesh(sharding.make_mesh(data=2, model=4)):
        got = run()
    np.testing.assert_allclose(got, want, **CLOSE)


def test_what_the_kernels_do_not_take_is_refused_with_the_reason():
    q = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    call = lambda size, **options: block_sparse_attention(
        q, q, q, blocks=jnp.zeros((64, 1), jnp.int32), sizes=(1, size), implementation="gpu", **options
    )
    with compat.interpret():
        with pytest.raises(ValueError, match="a multiple of 64 keys"):
            call(96)
        with pytest.raises(ValueError, match="no form for slopes"):
            call(128, slopes=jnp.ones(2))


@needs_mosaic
def test_kernels_take_a_call_whose_tokens_choose_blocks_of_128():
    q = jnp.zeros((1, 64, 2, 64), jnp.bfloat16)
    given = {"mask": None, "data": {}, "size": 128, "scale": 1.0, "slopes": None}
    with compat.interpret():
        assert block_groups.reason(None, q, q, q, **given) is None


@needs_mosaic
@pytest.mark.parametrize(
    ("heads", "size", "options"),
    [(1, 256, {}), (2, 64, {"mask": masks.Causal(), "soft_cap": 3.0})],
    ids=["plain", "masked"],
)
def test_kernels_match_float64(heads, size, options):
    """Ragged T, lists that are not full, and keys that fill up the last block."""
    time, width = 100, 64
    shapes = (1, time, heads, width), (1, 300, 1, width), (1, 300, 1, width), (1, time, heads, width)
    inputs = [jnp.asarray(draw(n, *shape), jnp.bfloat16) for n, shape in enumerate(shapes)]
    index, dlse = jnp.asarray(chosen(0, (1, 1, time, 2), -(-300 // size))), draw(9, 1, heads, time)

    def run(name, q, k, v, dy):
        def call(*x):
            given = {"blocks": index, "sizes": (1, size)} | options
            y, lse = block_sparse_attention(*x, **given, return_lse=True, implementation=name)
            return y, jnp.where(lse > -jnp.inf, lse, 0)

        out, pull = jax.vjp(call, q, k, v)
        return *out, *pull((dy, jnp.asarray(dlse, out[1].dtype)))

    with compat.interpret():
        got = jax.jit(run, static_argnums=0)("gpu", *inputs)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in inputs]
        wants = [np.asarray(x) for x in jax.jit(run, static_argnums=0)("reference", *wide)]
    for one, want in zip(got, wants, strict=True):
        assert np.linalg.norm(np.asarray(one, np.float64) - want) < BOUND * np.linalg.norm(want)
