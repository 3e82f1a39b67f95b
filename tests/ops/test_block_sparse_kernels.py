"""Attention through the Hopper kernels: interpreted on a CPU, refused with a reason where they cannot run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from seqmix import ops
from seqmix.ops import block_halves, block_lists, block_sparse_kernels, masks, scored
from tests.quick import QUICK

needs_mosaic = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))
IDS = jnp.asarray([[0] * 5 + [3] * 40 + [7] * 50 + [0] * 5])


def _inputs(time=100, heads=2, key_heads=1):
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (1, time, heads, 64), jnp.bfloat16)
    return q, *(jax.random.normal(key, (1, time, key_heads, 64), jnp.bfloat16) for key in keys[1:])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="not on a CPU")
def test_without_a_hopper_gpu_kernels_are_refused_with_the_reason():
    masked = {"mask": masks.Causal()}
    for op, options in ((ops.attention, {}), (ops.attention, masked), (ops.block_sparse_attention, masked)):
        with pytest.raises(ValueError, match=f"^implementation: {op.__name__} cannot run 'gpu': needs a Hopper GPU"):
            op(*_inputs(), implementation="gpu", **options)
    with pytest.raises(ValueError, match="cannot run 'gpu': has no form for bias"):
        ops.attention(*_inputs(), bias=jnp.zeros((1, 1, 1, 1)), implementation="gpu")


@needs_mosaic
def test_calls_that_no_kernel_takes_are_refused_with_the_reason():
    call = lambda **options: ops.block_sparse_attention(*_inputs(), implementation="gpu", **options)
    table = masks.BlockTable(np.eye(4, dtype=int), 32)
    with compat.interpret():
        with pytest.raises(ValueError, match="has no form for a mask that uses"):
            call(mask=table)
        with pytest.raises(ValueError, match="blocks of 64 or 128"):
            call(blocks=np.zeros((4, 1), int), sizes=(32, 64))
        with pytest.raises(ValueError, match="a scale that is a Python number above 0"):
            call(mask=masks.Causal(), scale=-1.0)
        with pytest.raises(ValueError, match="needs bfloat16"):
            ops.attention(*(x.astype(jnp.float32) for x in _inputs()), implementation="gpu")


def _with_gradients(call, *inputs):
    def run(*inputs):
        results, pull = jax.vjp(call, *inputs)
        turned = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype), results)
        return results, pull(turned)

    out = jax.jit(run, compiler_options=QUICK)(*inputs)
    return [np.asarray(x, np.float64) for x in jax.tree.leaves(out)]


@needs_mosaic
@pytest.mark.parametrize(
    ("op", "options"),
    [
        (
            ops.attention,
            {"segment_ids": IDS, "slopes": jnp.asarray([0.1, 0.5]), "sink_logits": jnp.asarray([0.5, -1.0])},
        ),
        (ops.block_sparse_attention, {"blocks": np.array([[1, -1], [1, 0]]), "sizes": (64, 64)}),
        (ops.block_sparse_attention, {"mask": masks.Causal() & masks.Window(30), "time": 200}),
    ],
    ids=["packed", "lists", "halves"],
)
def test_kernels_agree_with_the_chunked_form(op, options):
    """Values, lse and all gradients: 5e-3 is what bfloat16 operands leave of either form."""
    options, time = {n: x for n, x in options.items() if n != "time"}, options.get("time", 100)
    run = lambda name: _with_gradients(
        lambda q, k, v: op(q, k, v, return_lse=True, implementation=name, **options), *_inputs(time)
    )
    with compat.interpret():
        got = run("gpu")
    for a, b in zip(got, run("chunked"), strict=True):
        seen = np.isfinite(b)
        assert np.array_equal(np.isfinite(a), seen)
        assert np.linalg.norm(a[seen] - b[seen]) <= 0.01 * np.linalg.norm(b[seen])


@needs_mosaic
def test_a_visit_of_keys_from_another_stretch_agrees_with_the_reference():
    q, k, v = _inputs()
    k, v = k[:, :90], v[:, :90]
    places = {"q_positions": jnp.arange(100)[None] + 50, "kv_positions": jnp.arange(90)[None] + 70}
    data = dict(zip(scored.PLACES, (jnp.ones((1, 100), int), jnp.ones((1, 90), int), *places.values())))
    mask = masks.Positions(masks.Causal(), *scored.PLACES[2:]) & masks.Segments(*scored.PLACES[:2])
    with compat.interpret():
        y, lse = block_sparse_kernels.visit(64**-0.5, None, mask, data, *(jnp.swapaxes(x, 1, 2) for x in (q, k, v)))
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    want, want_lse = ops.attention(*wide, **places, return_lse=True, implementation="reference")
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
    assert np.linalg.norm(jnp.swapaxes(y, 1, 2) - want) <= 5e-3 * np.linalg.norm(want)


def test_a_half_passes_over_no_tile_that_it_sees():
    time, sizes = 300, (128, 64)  # the last blocks are ragged
    mask = masks.Boxed(masks.Neighbourhood((8, 40), (5, 5)), (8, 8))
    lists = block_lists.lists(mask, block_lists.of_mask(mask, sizes, time, time), sizes, time, time, {})
    walk = block_lists.forward(lists)
    own = block_halves.halves(mask, lists, walk, sizes, time, time).own
    dense = np.pad(mask.dense(time), ((0, 84), (0, 20))).reshape(3, 2, 64, 5, 64)
    passed = 0
    for owner, half in np.ndindex(3, 2):
        begin, count = walk.begin[0, 0, owner], own["count"][0, 0, half, owner]
        places, entries = (own[name][0, 0, half, begin : begin + count] for name in ("place", "entry"))
        listed = walk.other[0, 0, begin : begin + walk.count[0, 0, owner]]
        np.testing.assert_array_equal(listed[places], entries // 2)
        tiles = dense[owner, half]
        assert set(np.flatnonzero(tiles.any((0, 2)))) <= set(entries // 2)
        assert all(tiles[:, block].all() for block in entries[entries % 2 == 1] // 2)
        assert np.all(np.diff(places) <= 2)
        passed += len(listed) - count
    assert passed


@pytest.mark.parametrize("sizes", [(128, 64), (128, 128), (64, 128), (64, 64)])
def test_keys_walk_along_all_queries_that_see_them_and_half_a_block_passes_over_none(sizes):
    time, keys = 300, 270
    mask = masks.Causal() & masks.Window(90)
    lists = block_lists.lists(mask, block_lists.of_mask(mask, sizes, time, keys), sizes, time, keys, {})
    found = block_halves.halves(mask, lists, block_lists.forward(lists), sizes, time, keys)
    halves = sizes[1] // 64
    assert (found.turned.full.dtype != bool) == (halves == 2)
    dense = np.pad(mask.dense(time, keys), ((0, 84), (0, 114)))
    exist = np.arange(384) < keys
    for owner in range(-(-keys // sizes[1])):
        begin, count = (x[0, 0, owner] for x in found.turned[:2])
        listed, marks = (x[0, 0, begin : begin + count] for x in found.turned[2:])
        for half in range(halves):
            columns = slice(owner * sizes[1] + half * 64, owner * sizes[1] + (half + 1) * 64)
            tiles = dense[:, columns].reshape(6, 64, 64)
            passed = listed[marks >> 2 + half & 1 == 1] if halves == 2 else []
            assert set(np.flatnonzero(tiles.any((1, 2)))) == set(listed) - set(passed)
            full = listed[marks & (1 << half) != 0]
            assert set(full) == {n for n in listed if tiles[n].all() and exist[columns].all()}
    if sizes[0] == 128 and found.marks is not None:
        _check_marks(found.marks, block_lists.forward(lists), dense, sizes[1])
    assert (found.marks is None) == (sizes[0] == 64)


def _check_marks(marks, walk, dense, width):
    """Compares what marks say of listed tiles of 128 queries and `width` keys, of 300 tokens, with the whole mask."""
    for owner, half, part in np.ndindex(3, 2, width // 64):
        begin = walk.begin[0, 0, owner]
        rows = dense[owner * 128 + half * 64 :][:64]
        for n in range(begin, begin + int(walk.count[0, 0, owner])):
            start = int(walk.other[0, 0, n]) * width
            nothing = not rows[:, start + part * 64 :][:, :64].any()
            said = bool(marks[0, 0, n] >> 2 + 2 * part + half & 1)
            real = owner * 128 + half * 64 < 300 and start + part * 64 < 300
            assert said == nothing if real else said <= nothing
            assert bool(marks[0, 0, n] >> half & 1) <= bool(rows[:, start : start + width].all())
