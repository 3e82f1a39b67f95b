"""The Hopper kernel of block-sparse attention, without a GPU: against float64 in the interpreter, and through ptxas.

Tolerances: operands are rounded to bfloat16 (2^-9 relative) once before each product and once at the output, so
relative errors of 2 in a thousand are what exact arithmetic on these operands gives; the sums of lse are float32.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.block_sparse_attention import cost, gpu, plan
from seqmix.ops import block_lists, masks
from seqmix.ops.block_sparse_chunked import Config
from seqmix.ops.block_sparse_reference import reference

BOUND = 5e-3
needs_mosaic = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))


def draw(time, heads, key_heads, key, value):
    keys = jax.random.split(jax.random.key(time), 3)
    shapes = (1, time, heads, key), (1, time, key_heads, key), (1, time, key_heads, value)
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes))


def listed(mask, sizes, time, data):
    """The lists of a mask, and the options that go with it."""
    lists = block_lists.lists(mask, block_lists.of_mask(mask, sizes, time, time), sizes, time, time, data)
    sides = [{name: x for name, x in data.items() if mask.inputs[name] == side} for side in ("queries", "keys")]
    return block_lists.forward(lists), dict(sizes=sizes, visible=mask.visible, q_data=sides[0], k_data=sides[1])


def ids(time):
    """Padding left, inside and right of two segments."""
    ids = np.full((1, time), 1, np.int32)
    ids[:, time // 3 :] = 2
    ids[:, :9] = ids[:, -9:] = ids[:, time // 2 : time // 2 + 3] = 0
    return dict.fromkeys(("segment_ids", "kv_segment_ids"), jnp.asarray(ids))


def check(inputs, mask, sizes, data, *, soft_cap=None, slopes=None, **more):
    time = inputs[0].shape[1]
    walk, options = listed(mask, sizes, time, data)
    with compat.interpret():
        call = dict(scale=0.1, soft_cap=soft_cap, slopes=slopes, **more)
        y, lse = gpu.forward(*inputs, walk, **options, **call)
    with jax.enable_x64(True):
        wide = [None if x is None else jnp.asarray(np.asarray(x, np.float64)) for x in (*inputs, slopes)]
        config = Config(0.1, soft_cap, mask, time, time)
        wants = [np.asarray(x) for x in reference(config, *wide, data, None, sizes)]
    for got, want in zip((y, lse), wants, strict=True):
        got, seen = np.asarray(got, np.float64), np.isfinite(want)
        assert np.array_equal(np.isfinite(got), seen)
        assert np.linalg.norm(got[seen] - want[seen]) < BOUND * np.linalg.norm(want[seen])
    blind = ~np.isfinite(np.swapaxes(wants[1], 1, 2))
    assert not np.any(np.asarray(y)[blind])


@needs_mosaic
def test_grouped_heads_and_a_list_without_blocks_match_float64():
    """Two heads in a thread block of 64 queries; the first block sees no key. Two thread blocks take listed items."""
    check(draw(192, 2, 1, 64, 128), masks.Causal(-64), (64, 64), {}, workers=2)


@needs_mosaic
def test_packed_rows_dealt_to_fewer_thread_blocks_match_float64():
    check(draw(256, 2, 2, 64, 64), masks.Causal() & masks.Segments(), (128, 64), ids(256), workers=3)


@needs_mosaic
def test_soft_cap_and_slopes_with_halves_that_pass_over_tiles_match_float64():
    """Of the first three boxes of 64 tokens, the first half of the first block sees two, the second half three."""
    mask = masks.Boxed(masks.Neighbourhood((8, 32), (5, 5)), (8, 8))
    walk, _ = listed(mask, (128, 64), 256, {})
    np.testing.assert_array_equal(walk.other[0, 0], [0, 1, 2, 1, 2, 3])
    own = plan.own_lists(walk, np.array([[[0, 0, 4, 8, 0, 0]]]))
    np.testing.assert_array_equal(own["count"], [[[[2, 3], [3, 2]]]])
    inputs = draw(256, 1, 1, 128, 64)
    check(inputs, mask, (128, 64), {}, soft_cap=2.0, slopes=jnp.asarray([0.05]), own=own)


@needs_mosaic
def test_calls_that_cannot_run_are_refused_with_the_reason():
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    q, hopper = shape(2, 64, 2, 128), {"capability": (9, 0)}
    assert plan.supports(q, q, q, (128, 64), visible=masks.Causal().visible, **hopper) is None
    assert "8.0" in plan.supports(q, q, q, (64, 64), capability=(8, 0))
    assert "float32" in plan.supports(q, q, shape(2, 64, 2, 64, dtype=jnp.float32), (64, 64), **hopper)
    assert "K=96" in plan.supports(*[shape(2, 64, 2, 96)] * 2, q, (64, 64), **hopper)
    assert "sizes=(32, 64)" in plan.supports(q, q, q, (32, 64), **hopper)
    assert "scale" in plan.supports(q, q, q, (64, 64), scale=0.0, **hopper)
    assert "default device" in plan.supports(q, q, q, (64, 64))
    sine = lambda i, j, values: jnp.sin(i) > j
    assert "a mask that uses" in plan.supports(q, q, q, (64, 64), visible=sine, **hopper)
    table = masks.BlockTable(np.eye(2, dtype=int), 32)
    assert "a mask that uses" in plan.supports(q, q, q, (64, 64), visible=table.visible, **hopper)


def test_what_a_mask_makes_of_one_side_alone_is_made_before_the_kernel():
    mask = masks.Boxed(masks.Neighbourhood((16, 8), (5, 3)), (8, 4)) & masks.Segments("a", "b")
    data = {name: np.arange(128, dtype=np.int32)[None] // 32 for name in "ab"}
    seen = plan.Visibility(mask.visible, ("a",), ("b",))
    prepared, q_data, k_data = seen.prepared({"a": data["a"]}, {"b": data["b"]}, 128, 128)
    assert "b" in k_data and len(k_data) == 3  # and the coordinates of a key; that it lies in the grid is always so
    values = plan.Values({name: x[0][:, None] for name, x in q_data.items()} | k_data)
    values.leaves |= {"i": np.arange(128)[:, None], "j": np.arange(128)[None]}
    np.testing.assert_array_equal(values.of(prepared.root), mask.dense(128, data=data)[0])


def test_floor_of_dense_attention_is_its_products():
    least = cost.forward(1, 8192, 8192, 16, 16, 128, 128, pairs=8192**2)
    assert least.flops == 4 * 128 * 16 * 8192**2
    assert 0.6 < least.floor_ms() < 0.8


# Ahead of time for an H100, through ptxas, on a machine without a GPU.


@pytest.mark.parametrize(
    ("mask", "sizes", "key_heads", "value"),
    [
        (masks.Causal() & masks.Segments(), (128, 128), 4, 128),
        (masks.Boxed(masks.Neighbourhood((32, 32), (13, 13)), (8, 8)), (128, 64), 4, 128),
    ],
    ids=["packed", "neighbourhood"],
)
def test_it_compiles_for_an_h100_without_spills(spilled, mask, sizes, key_heads, value):
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    data = {name: array(2, 1024, dtype=jnp.int32) for name in mask.inputs}

    def run(q, k, v, data):
        walk, options = listed(mask, sizes, 1024, data)
        return gpu.forward(q, k, v, walk, **options, scale=0.1)

    inputs = array(2, 1024, 4, 128), array(2, 1024, key_heads, 128), array(2, 1024, key_heads, value)
    assert spilled(run, *inputs, data) == {"block_sparse_attention_forward": 0}
