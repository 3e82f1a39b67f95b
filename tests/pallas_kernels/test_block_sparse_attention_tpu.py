"""The TPU kernels of block-sparse attention, through the op, against float64, in the interpreter on a CPU.

Bounds: bfloat16 operands are rounded (2^-9 relative) once before each product and once at the output, which gives 2 to
3 in a thousand; products of float32 are exact to its own rounding, 6e-8 of each of some hundred terms.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.block_sparse_attention import tpu
from seqmix import ops
from seqmix.core import sharding
from seqmix.ops import block_lists, block_sparse_kernels, block_sparse_sizes, masks
from tests.quick import QUICK

BOUNDS = {jnp.bfloat16: 5e-3, jnp.float32: 1e-5}
CAUSAL = masks.Causal()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Short sequences then take several blocks."""
    monkeypatch.setattr(block_sparse_sizes, "SIZES", (128,))
    block_sparse_sizes.choose.cache_clear()
    yield
    block_sparse_sizes.choose.cache_clear()


def check(shape, mask=None, dtype=jnp.bfloat16, mesh=None, **options):
    """Values, lse and gradients of shape B, T, S, H, Hk, K, V; what sees nothing is 0 and passes none."""
    batch, time, keys, heads, key_heads, key, value = shape
    rng = np.random.default_rng(0)
    draw = lambda *dims: jnp.asarray(rng.normal(size=dims), dtype)
    q, k, v = draw(batch, time, heads, key), draw(batch, keys, key_heads, key), draw(batch, keys, key_heads, value)
    cotangents = draw(batch, time, heads, value), jnp.asarray(rng.normal(size=(batch, heads, time)), jnp.float32)

    def run(name, given, cotangents):
        def both(blocks, data, q, k, v, dy, dlse):
            more = options | {"blocks": blocks, "data": data}
            call = lambda q, k, v: ops.block_sparse_attention(
                q, k, v, mask=mask, return_lse=True, implementation=name, **more
            )
            (y, lse), pull = jax.vjp(call, q, k, v)
            return y, lse, *pull((dy, jnp.where(lse > -jnp.inf, dlse, 0)))

        blocks, data = (options.get(name) for name in ("blocks", "data"))
        return jax.jit(both, compiler_options=QUICK)(blocks, data, *given, *cotangents)

    with compat.interpret():
        if mesh is None:
            got = run("tpu", (q, k, v), cotangents)
        else:
            with sharding.use_mesh(mesh):
                got = run("tpu", (q, k, v), cotangents)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v, *cotangents)]
        wants = run("reference", wide[:3], wide[3:])
    for one, want, like in zip(got, wants, (v, None, q, k, v), strict=True):
        assert like is None or one.dtype == like.dtype
        one, want = np.asarray(one, np.float64), np.asarray(want)
        seen = np.isfinite(want)
        assert np.array_equal(np.isfinite(one), seen)
        assert np.linalg.norm(one[seen] - want[seen]) < BOUNDS[dtype] * np.linalg.norm(want[seen])
    blind = ~np.isfinite(np.swapaxes(np.asarray(wants[1]), 1, 2))
    assert not np.any(np.asarray(got[0])[blind]) and not np.any(np.asarray(got[2])[blind])
    return blind.any()


def segments(length):
    """Padding left, inside and right of two segments."""
    ids = np.full((1, length), 1, np.int32)
    ids[:, length // 3 :] = 2
    ids[:, :9] = ids[:, -9:] = ids[:, length // 2 : length // 2 + 3] = 0
    return jnp.asarray(ids)


def test_packed_rows_of_an_odd_length_with_grouped_heads_and_a_soft_cap_match_float64():
    assert check((1, 200, 200, 4, 2, 64, 128), CAUSAL, segment_ids=segments(200), soft_cap=3.0)


def test_lists_that_the_data_chose_match_float64_row_by_row_and_with_heads_in_turns(monkeypatch):
    """Blocks of queries without keys, and of keys that nobody lists; lists that do not fit scalar memory together."""
    monkeypatch.setattr(tpu, "SCALAR_BYTES", 60)
    monkeypatch.setattr(tpu, "ROW_BYTES", 512)
    blocks = jnp.asarray([[[[-1, -1], [2, 0]], [[0, 9], [0, -1]]], [[[2, -1], [-1, -1]], [[0, 2], [2, 0]]]])
    assert check((2, 256, 300, 4, 2, 64, 64), blocks=blocks, dtype=jnp.float32)


def test_a_neighbourhood_in_boxes_matches_float64_with_heads_side_by_side():
    mask = masks.Boxed(masks.Neighbourhood((16, 31), (5, 7)), (8, 16))
    assert check((1, 512, 512, 2, 2, 128, 128), mask)


def test_blocks_at_random_match_float64_though_no_kernel_evaluates_their_table():
    table = np.array([[1, 0, 0], [0, 1, 1], [1, 0, 1]])
    assert not check((1, 384, 384, 2, 1, 64, 64), masks.BlockTable(table, 128), dtype=jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (CAUSAL & (masks.Window(70) | masks.Sinks(4) | masks.Strided(16, 4, 12)), {"slopes": jnp.asarray([0.1, 0.5])}),
        (masks.Neighbourhood((200,), (51,), (7,), (2,)) | masks.Coarse(masks.Powers(), 50), {}),
        (masks.Intervals() & masks.Positions(~masks.Window(20)), {"soft_cap": 2.0}),
    ],
    ids=["window", "neighbourhood", "data"],
)
def test_masks_of_every_kind_match_float64(mask, options):
    at = np.arange(200, dtype=np.int32)[None]
    data = {"starts": at // 2, "ends": at + 70, "q_positions": at, "kv_positions": at // 2}
    value = 256 if mask.inputs else 64
    check((1, 200, 200, 2, 1, 64, value), mask, data={name: data[name] for name in mask.inputs}, **options)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")
def test_shares_of_a_mesh_match_float64():
    mesh = sharding.make_mesh(data=2, model=2, devices=jax.devices()[:4])
    check((2, 200, 200, 4, 2, 64, 64), CAUSAL, segment_ids=jnp.repeat(segments(200), 2, 0), mesh=mesh)


def test_steps_go_through_every_list_once_and_stay_where_the_last_one_ends():
    index = np.array([[[[2, 0], [-1, -1], [1, -1]], [[0, -1], [1, 2], [-1, -1]]]])
    lists = block_lists.Lists(index, index == 2)
    turned = [[[[0], [2], [0], []], [[0], [1], [1], []]]]
    assert block_sparse_sizes.steps(index, 4) == (4, 4)
    for walk, owned, place in ((block_lists.forward(lists), index, 1), (block_lists.transposed(lists, 4), turned, 0)):
        most = walk.other.shape[-1] + walk.begin.shape[-1]
        words = tpu.laid(walk, most)
        traced = np.asarray(jax.jit(lambda *walk, most=most: tpu.laid(walk, most))(*walk))
        assert traced.shape[-1] == most and words.shape[-1] < most
        for head in range(2):
            steps = []
            for owner, others in enumerate(owned[0][head]):
                others = [x for x in others if x >= 0]
                for n, other in enumerate(others or [None]):
                    steps.append((owner, other, n == 0, n == max(1, len(others)) - 1, other is not None))
            for found in (words[0, head], traced[0, head]):
                fields = [
                    (
                        int(w >> tpu.OWNER_AT),
                        int(w >> tpu.OTHER_AT & (tpu.MOST_BLOCKS - 1)),
                        bool(w & tpu.FIRST),
                        bool(w & tpu.LAST),
                        bool(w & tpu.LIVE),
                    )
                    for w in found
                ]
                for field, step in zip(fields, steps):
                    assert field == (step[0], field[1] if step[1] is None else step[1], *step[2:])
                for word, step in zip(found, steps):
                    assert bool(word & tpu.FULL) == (step[1] is not None and (step[0], step[1])[place] == 2)
                after = set(fields[len(steps) :])
                assert all(field[:2] == fields[len(steps) - 1][:2] and not any(field[2:]) for field in after)


def test_calls_that_cannot_run_are_refused_with_the_reason():
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    q = shape(2, 256, 2, 128)
    assert tpu.supports(q, q, q, (128, 256), visible=CAUSAL.visible) is None
    assert "float32" in tpu.supports(q, q, shape(2, 256, 2, 128, dtype=jnp.float32), (128, 128))
    assert "K=96" in tpu.supports(*[shape(2, 256, 2, 96)] * 2, q, (128, 128))
    assert "sizes=(64, 128)" in tpu.supports(q, q, q, (64, 128))
    assert "scale" in tpu.supports(q, q, q, (128, 128), scale=0.0)
    assert "entries" in tpu.supports(q, q, q, (128, 128), entries=1 << 20)
    assert "a mask that uses" in tpu.supports(q, q, q, (128, 128), visible=masks.BlockTable(np.eye(2), 64).visible)
    inputs = [jnp.ones((1, 128, 1, 64), jnp.bfloat16)] * 3
    call = {"mask": CAUSAL, "data": {}, "sizes": (128, 128), "scale": 1.0}
    with compat.interpret():
        assert "only if named" in block_sparse_kernels.reasons(None, None, *inputs, **call)[0]["tpu"]
        assert block_sparse_kernels.reasons("tpu", None, *inputs, **call)[0]["tpu"] is None
        with pytest.raises(ValueError, match="cannot run 'tpu': needs blocks of a multiple of 128"):
            ops.block_sparse_attention(*inputs, blocks=np.zeros((2, 1), int), sizes=(64, 64), implementation="tpu")
        with pytest.raises(ValueError, match="cannot run 'tpu': has no form for bias"):
            ops.attention(*inputs, bias=jnp.zeros((1, 1, 1, 1)), implementation="tpu")


@pytest.mark.skipif(jax.default_backend() == "tpu", reason="not on a TPU")
@pytest.mark.parametrize("op", [ops.attention, ops.block_sparse_attention])
def test_without_a_tpu_kernels_are_refused_with_the_reason(op):
    inputs = [jnp.ones((1, 128, 1, 64), jnp.bfloat16)] * 3
    with pytest.raises(ValueError, match="cannot run 'tpu': needs a TPU"):
        op(*inputs, implementation="tpu", **({} if op is ops.attention else {"mask": CAUSAL}))
