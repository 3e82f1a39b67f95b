"""Lists of single tokens through the Hopper kernels: lists, interpreted kernels, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.block_sparse_attention import token_gpu
from seqmix import ops
from seqmix.ops import masks, token_block_kernels
from tests.quick import QUICK

needs_mosaic = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))
BOUND = 5e-3


def jitted(function, index, *static):
    return jax.jit(lambda index: function(index, *static), compiler_options=QUICK)(index)


def chosen(shape, blocks, seed=0):
    """Lists in any order, with entries that are none and blocks listed twice."""
    rng = np.random.default_rng(seed)
    return rng.integers(-2, blocks + 2, shape).astype(np.int32)


def test_unions_hold_what_the_tokens_list(group=32):
    index = chosen((2, 1, 64, 5), 9)
    index[0, 0, :32] = -1
    count, block, bits = (np.asarray(x) for x in jitted(token_block_kernels.unions, index, group, 9))
    for b, o in np.ndindex(2, 64 // group):
        lists = index[b, 0, o * group : (o + 1) * group]
        want = {n: sum(1 << i for i, row in enumerate(lists) if n in row) for n in range(9) if n in lists}
        assert count[b, 0, o] == len(want)
        got = block[b, 0, o, : len(want)], bits[b, 0, o, : len(want)].view(np.uint32)
        assert dict(zip(*(x.tolist() for x in got), strict=True)) == want


@pytest.mark.parametrize("most", [8, 64])
def test_visitors_are_the_lists_transposed(most):
    index = chosen((2, 1, 40, 3), 5)
    index[0, 0, :, 0] = 2  # a list longer than the others, cut or not
    found = jitted(token_block_kernels.visitors, index, 5, most, 4)
    block, begin, count, order, token, counts = (np.asarray(x)[:, 0] for x in found)
    assert np.array_equal(np.sort(order), np.broadcast_to(np.arange(block.shape[1]), block.shape))
    for b in range(2):
        got = {n: [] for n in range(5)}
        for n, first, length in zip(block[b], begin[b], count[b], strict=True):
            assert length <= most and not length % 4
            mine = slice(first, first + length)
            got[n] += token[b, mine][counts[b, mine]].tolist()
        assert got == {n: np.flatnonzero((index[b, 0] == n).any(-1)).tolist() for n in range(5)}


SHAPES = {
    "ragged": (1, 66, 320, 16, 1, 64, 128),
    "shared": (1, 64, 64, 16, 2, 64, 64),
    "causal": (1, 70, 70, 16, 1, 64, 64),
}


@needs_mosaic
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_match_float64(name, monkeypatch):
    """Tokens that list nothing, blocks listed twice, lists of keys cut in two; lists shared by key heads; a mask."""
    shape, mask = SHAPES[name], masks.Causal() if name == "causal" else None
    monkeypatch.setattr(token_block_kernels, "_most", lambda time: 40)
    monkeypatch.setattr(token_gpu, "LONG", 128)  # the first is cut otherwise than the others
    batch, time, keys, heads, key_heads, width, value = shape
    draw = lambda n, *dims: jax.random.normal(jax.random.key(n), dims, jnp.bfloat16)
    q, k = draw(0, batch, time, heads, width), draw(1, batch, keys, key_heads, width)
    v, dy = draw(2, batch, keys, key_heads, value), draw(3, batch, time, heads, value)
    index = chosen((1, 1, time, 2), -(-keys // 64))
    if mask is not None:  # of others later ones and their own are listed too
        index = np.concatenate([index, (np.arange(time) // 64)[:, None] + 0 * index[..., :1]], axis=-1)
        index[:, :, ::7, 2] = -1
    index[:, :, 5] = -1
    dlse = jnp.cos(jnp.arange(batch * heads * time, dtype=jnp.float32)).reshape(batch, heads, time)

    def run(implementation, q, k, v, dy):
        def call(*x):
            options = dict(blocks=jnp.asarray(index), sizes=(1, 64), mask=mask, return_lse=True)
            return ops.block_sparse_attention(*x, **options, implementation=implementation)

        (y, lse), pull = jax.vjp(call, q, k, v)
        return y, jnp.where(lse > -jnp.inf, lse, 0), *pull((dy, dlse.astype(lse.dtype)))

    with compat.interpret():  # not within one jit: its threads and the interpreter's can use up a pool of two
        got = run("gpu", q, k, v, dy)
    with jax.enable_x64(True):
        wants = run("reference", *(jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, dy)))
        wants = [np.asarray(x) for x in wants]
    for one, want in zip(got, wants, strict=True):
        assert np.linalg.norm(np.asarray(one, np.float64) - want) < BOUND * np.linalg.norm(want)
    assert not np.any(np.asarray(got[0], np.float32)[:, 5]) and not np.any(np.asarray(got[2], np.float32)[:, 5])


def test_calls_that_no_kernel_takes_are_refused_with_the_reason():
    """Other kernels may take these, which know of no union."""

    def reason(heads=16, keys=128, dtype=jnp.bfloat16, **given):
        q = jax.ShapeDtypeStruct((1, 64, heads, 64), dtype)
        k = jax.ShapeDtypeStruct((1, keys, 1, 64), dtype)
        given = {"mask": None, "soft_cap": None, "slopes": None, "scale": 1.0} | given
        with compat.interpret():
            return token_block_kernels.reason(None, q, k, k, **given)

    assert "no form for this mask" in reason(mask=masks.Window(3))
    assert "no form for this mask" in reason(mask=masks.Causal())  # of more keys than queries
    assert "no form for a soft cap" in reason(soft_cap=5.0)
    if compat.unavailable() is None:
        assert reason() is None
        assert "needs bfloat16" in reason(dtype=jnp.float32)
        assert "query heads to a key head, got H=4, Hk=1" in reason(heads=4)
        assert "whole blocks of 64 keys, got S=100" in reason(keys=100)
        assert reason(mask=masks.Causal(), keys=64) is None
