"""The Hopper gradients of block-sparse attention, without a GPU: against float64 in the interpreter, and through ptxas.

Bound: p, ds and the results are rounded to bfloat16 (2^-9 relative) once each, which alone gives 2 to 3 in a thousand.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.block_sparse_attention import deal, gpu_backward, plan

BOUND = 5e-3
needs_mosaic = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))


def causal(i, j, values):
    return j <= i


def packed(i, j, values):
    return (j <= i) & (values["segment"] == values["kv_segment"]) & (values["segment"] != 0)


def walk(live, full):
    """Owners, the rows of `live` [n, m], laid end to end."""
    count = live.sum(1, dtype=np.int32)
    begin = np.cumsum(count, dtype=np.int32) - count
    return tuple(x[None, None] for x in (begin, count, np.nonzero(live)[1].astype(np.int32), full[live]))


def marks(seen):
    """What lists say of tiles of 128 x 128 of seen [T, S], [n, m], and of these transposed."""
    tiles = seen.reshape(seen.shape[0] // 128, 2, 64, seen.shape[1] // 128, 2, 64)
    some, full = tiles.any((2, 5)), tiles.all((2, 4, 5))  # [n, 2, m, 2] and [n, 2, m]
    found = sum(full[:, half] * (1 << half) for half in range(2))
    turned = sum(tiles.all((1, 2, 5))[:, :, half].T * (1 << half) for half in range(2))
    for mine, other in np.ndindex(2, 2):
        found += ~some[:, mine, :, other] * (4 << 2 * other + mine)
        turned += ~some[:, other, :, mine].T * (4 << 2 * other + mine)
    return found.astype(np.int32), turned.astype(np.int32)


def attention(q, k, v, seen, scale, soft_cap):
    """(y, lse) of the whole matrix, with seen [B, T, S]."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    score = scale * jnp.einsum("bthk,bshk->bhts", q, k)
    if soft_cap is not None:
        score = soft_cap * jnp.tanh(score / soft_cap)
    weight = jnp.where(seen[:, None], jnp.exp(score), 0)
    total = jnp.sum(weight, axis=-1)
    some = jnp.where(total > 0, total, 1)
    y = jnp.einsum("bhts,bshv->bthv", weight / some[..., None], v)
    return y, jnp.where(total > 0, jnp.log(some), -jnp.inf)


def check(shape, sizes, visible=None, segments=None, drop=(), soft_cap=None, with_lse=False, makes=False, marked=False):
    """Compares the gradients with float64 ones.

    shape: B, T, S, H, Hk, K, V; drop: tiles that are not listed; makes: whether the kernel makes what it needs of rows;
    marked: whether lists say what halves of blocks of 128 see.
    """
    batch, time, keys, heads, key_heads, key, value = shape
    rng = np.random.default_rng(0)
    draw = lambda *dims: jnp.asarray(rng.normal(size=dims), jnp.bfloat16)
    q, k = draw(batch, time, heads, key), draw(batch, keys, key_heads, key)
    v, dy = draw(batch, keys, key_heads, value), draw(batch, time, heads, value)
    names = {}
    if segments is not None:
        names = {"segment": segments[0][:, :, None], "kv_segment": segments[1][:, None]}
    seen = np.ones((batch, time, keys), bool)
    if visible is not None:
        seen &= np.asarray(visible(np.arange(time)[:, None], np.arange(keys), names))
    tiles = seen.reshape(batch, time // sizes[0], sizes[0], keys // sizes[1], sizes[1])
    live, full = tiles.any(axis=(0, 2, 4)), tiles.all(axis=(0, 2, 4))
    for tile in drop:
        live[tile] = False
    seen &= np.repeat(np.repeat(live, sizes[0], 0), sizes[1], 1)
    scale = key**-0.5
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (q, k, v)]
        dlse = jnp.asarray(rng.normal(size=(batch, heads, time))) * with_lse
        wide_dy = jnp.asarray(np.asarray(dy, np.float64))
        (y, lse), pull = jax.vjp(lambda *x: attention(*x, jnp.asarray(seen), scale, soft_cap), *wide)
        dlse = jnp.where(lse > -jnp.inf, dlse, 0)
        wants = [np.asarray(x) for x in pull((wide_dy, dlse))]
        delta = np.asarray(jnp.einsum("bthv,bthv->bht", wide_dy, y) - dlse, np.float32)
        lse = np.asarray(lse, np.float32)
    given = {}
    if segments is not None:
        given = {"q_data": {"segment": segments[0]}, "k_data": {"kv_segment": segments[1]}}
    rows = plan.rows(jnp.asarray(lse), jnp.asarray(delta))
    if makes:
        rows = jnp.asarray(np.asarray(y), jnp.bfloat16), jnp.asarray(lse), jnp.asarray(dlse, jnp.float32)
    walks = [walk(live, full), walk(live.T, full.T)]
    if marked:
        walks = [walk(live, known) for live, known in zip((live, live.T), marks(seen[0]))]
    with compat.interpret():
        got = gpu_backward.backward(
            *(q, k, v, rows, dy, *walks),
            **given,
            sizes=sizes,
            visible=visible,
            scale=scale,
            soft_cap=soft_cap,
        )
    for one, want, of in zip(got, wants, (q, k, v), strict=True):
        assert one.shape == of.shape and one.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(one, np.float64) - want) < BOUND * np.linalg.norm(want)
    return got


@needs_mosaic
def test_gradients_of_grouped_heads_under_a_causal_mask_match_float64():
    check((1, 128, 128, 2, 1, 64, 128), (128, 64), causal, with_lse=True, makes=True)


@needs_mosaic
def test_sums_of_shares_of_heads_and_of_lists_match_float64(monkeypatch):
    monkeypatch.setattr(plan, "LEAST_STEPS", 1)
    assert plan.pieces(1, 1, 2, 2) == (2, 2)  # blocks of 64 keys, two in a thread block
    check((1, 128, 128, 2, 1, 64, 64), (64, 64), causal, with_lse=True)


def deals(monkeypatch, processors):
    """A list of what is dealt out from here on, to so many multiprocessors."""
    made = []
    monkeypatch.setattr(plan, "SMS", processors)
    monkeypatch.setattr(deal, "UNEVEN", 10)
    monkeypatch.setattr(gpu_backward, "dealt", lambda *a: made.append(deal.dealt(*a)) or made[-1])
    return made


@needs_mosaic
@pytest.mark.parametrize("blocks", [128, 64])
def test_thread_blocks_that_go_through_several_lists_make_the_same_gradients(monkeypatch, capfd, blocks):
    made = deals(monkeypatch, 2)
    if blocks == 128:  # lists of which one is empty, and halves of a ring
        check(
            (1, 384, 384, 2, 1, 64, 64),
            (128, 128),
            causal,
            drop=[(1, 0), (1, 1)],
            with_lse=True,
            makes=True,
            marked=True,
        )
    else:  # pairs of blocks, of which one is missing
        monkeypatch.setattr(deal, "LISTED", 0)
        segments = np.repeat(np.array([[1, 2, 0]], np.int32), (80, 90, 22), axis=1)
        check((1, 192, 192, 2, 2, 64, 64), (64, 64), packed, (segments, segments), makes=True)
    assert [x.items for x in made] == ([6, 3] if blocks == 128 else [4, 4])
    assert "RACE" not in "".join(capfd.readouterr())


def test_items_are_dealt_once_each_and_long_lists_evenly():
    items = deal.Deal(owners=33, heads=16, rows=8, together=4)
    owner, head, row = items.place(np.arange(items.items))
    assert len({*zip(owner.tolist(), head.tolist(), row.tolist())}) == items.items == 33 * 16 * 8
    assert owner.max() == 32 and head.max() == 15 and row.max() == 7
    loads = np.bincount(np.arange(items.items) % plan.SMS, owner + 1)
    assert loads.max() < 1.1 * loads.mean()


def test_items_are_listed_once_each_and_shared_out_evenly_where_lengths_are_known():
    work = deal.Deal(owners=32, heads=16, rows=8, together=8).place(np.arange(4096))[0] * 128 + 192
    order = deal.shared_out(work, 256, plan.SMS)
    assert sorted(order[order >= 0].tolist()) == list(range(4096))
    assert not (order[:, -1] >= 0).any() and not ((order[:, :-1] < 0) & (order[:, 1:] >= 0)).any()
    loads = np.where(order >= 0, work[order], 0).sum(1)
    assert loads.max() < 1.01 * loads.mean()


def test_cards_tell_every_item_its_list():
    rng = np.random.default_rng(0)
    begin, count = rng.integers(0, 99, (2, 3, 2, 5))  # rows, key heads, owners
    items = deal.Deal(owners=5, heads=4, rows=3, together=2)
    order = deal.shared_out(np.ones(items.items, np.int32), 10, 7)
    found = deal.cards(dataclasses.replace(items, order=order), begin, count)
    owner, head, first, steps = found[found[..., 0] >= 0].T
    head, row = head % (1 << deal.ROW), head >> deal.ROW
    assert len({*zip(owner, head, row)}) == owner.size == items.items
    assert (first == begin[row, head // 2, owner]).all() and (steps == count[row, head // 2, owner]).all()
    assert (found[:, -1, 0] == -1).all() and found.shape[1] % 8 == 0


def test_walks_are_cut_where_their_thread_blocks_are_few_and_long():
    cut = lambda blocks, *rest: plan.pieces(blocks, blocks, *rest)
    assert cut(4, 16, 128) == (16, 2)  # compressed blocks of keys of 8,192 tokens
    assert cut(16, 16, 512) == (8, 1)
    assert cut(33, 16, 512) == (4, 1)
    assert cut(1, 1, 64) == (1, 4)
    assert cut(89, 16, 512) == cut(4, 1, 31) == (1, 1)


def test_thread_blocks_that_wait_for_the_longest_walk_count_as_few():
    causal_lists = np.arange(64, 0, -1).reshape(1, 1, 64)
    assert plan.walks(causal_lists, 1, 2) == (128, 65)
    assert plan.pieces(128, 65, 8, 64) == (2, 1)
    assert plan.pieces(1024, 6, 16, 64) == (1, 1)  # tokens that all see: the sums of all would be stored for their sake
    assert plan.walks(np.full((1, 2, 8), 3), 1, 4) == (32, 32)
    assert plan.walks(np.array([[[3, 0, 0]]]), 2, 1) == (2, 1)  # a pair ends with its longer list
    assert plan.walks(np.zeros((1, 1, 3), int), 2, 1) == (2, 2)
    assert plan.walks(jnp.full((1, 1, 3), 3), 2, 5) == (10, 10)


@needs_mosaic
def test_gradients_are_exact_with_segments_and_zero_where_nothing_is_seen():
    segments = np.repeat(np.array([[1, 2, 0], [3, 3, 3]], np.int32), (40, 50, 38), axis=1)
    keys = np.where(np.arange(128) < 30, 1, segments)
    keys[1, 100:] = 5
    dq, dk, dv = check((2, 128, 128, 1, 1, 64, 64), (64, 64), packed, (segments, keys), drop=[(1, 0)])
    assert not np.any(np.asarray(dq, np.float32)[0, 90:])
    for one in (dk, dv):
        assert not np.any(np.asarray(one, np.float32)[0, 90:]) and not np.any(np.asarray(one, np.float32)[1, 100:])


@needs_mosaic
@pytest.mark.slow
def test_gradients_of_blocks_of_128_and_of_a_soft_cap_match_float64():
    check((1, 256, 256, 1, 1, 64, 64), (128, 128), lambda i, j, values: (j <= i) & (i < j + 140), marked=True)
    check((1, 128, 256, 1, 1, 128, 64), (64, 128), drop=[(0, 0), (1, 1)])
    check((1, 128, 128, 1, 1, 64, 64), (128, 128), causal, soft_cap=1.5)


@needs_mosaic
def test_a_call_that_cannot_run_is_refused_with_one_line():
    array = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    q, rows = array(1, 128, 1, 64), array(1, 1, 2, 128)
    call = lambda **rest: gpu_backward.backward(q, q, q, rows, q, (), (), scale=1.0, **rest)
    with pytest.raises(ValueError, match=r"^sizes: expected 64 or 128 each"):
        call(sizes=(32, 128))
    with pytest.raises(ValueError, match=r"^slopes: expected None"):
        call(sizes=(128, 128), slopes=jnp.ones(1))


# Ahead of time for an H100, through ptxas, on a machine without a GPU.


def compiled(spilled, visible, data=(), soft_cap=None, sizes=(128, 128), marks=False, makes=True):
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    integers = lambda length: array(1, 1, length, dtype=jnp.int32)
    time, tiles = 1024, 1024 // sizes[0]
    lists = (
        integers(tiles),
        integers(tiles),
        integers(tiles**2),
        array(1, 1, tiles**2, dtype=jnp.int32 if marks else jnp.bool_),
    )
    q, row = array(2, time, 4, 128), array(2, 4, time, dtype=jnp.float32)
    rows = (q, row, row) if makes else array(2, 4, 2, time, dtype=jnp.float32)
    k = array(2, time, 2, 128)
    data = [{name: array(2, time, dtype=jnp.int32)} for name in data] or [{}, {}]

    def run(q, k, v, rows, dy, walk, turned, q_data, k_data):
        sides = {"q_data": q_data, "k_data": k_data, "visible": visible, "soft_cap": soft_cap}
        sides["turned_queries"] = 64 if marks else None
        return gpu_backward.backward(q, k, v, rows, dy, walk, turned, sizes=sizes, scale=1.0, **sides)

    return spilled(run, q, k, k, rows, q, lists, lists, *data)


def test_kernels_with_a_data_mask_compile_for_an_h100_without_spills(spilled):
    found = compiled(spilled, packed, ("segment", "kv_segment"))
    assert found == {"block_sparse_attention_dkv": 0, "block_sparse_attention_dq": 0}


def test_kernels_that_go_through_several_lists_compile_for_an_h100_and_spill_next_to_nothing(spilled, monkeypatch):
    made = deals(monkeypatch, 16)
    found = compiled(spilled, causal, marks=True)
    assert [x.items for x in made] == [64, 32]
    # Registers of the loop over lists, none of them in the loop over tiles, when written.
    assert found["block_sparse_attention_dkv"] <= 16 and found["block_sparse_attention_dq"] <= 32


def test_kernels_whose_halves_pass_over_tiles_compile_for_an_h100_without_spills(spilled):
    found = compiled(spilled, causal, marks=True)
    assert found == {"block_sparse_attention_dkv": 0, "block_sparse_attention_dq": 0}


@pytest.mark.slow
def test_kernels_of_blocks_of_64_compile_for_an_h100_without_spills(spilled):
    found = compiled(spilled, causal, sizes=(64, 64))
    assert found == {"block_sparse_attention_dkv": 0, "block_sparse_attention_dq": 0}


@pytest.mark.slow
def test_kernels_with_a_soft_cap_compile_for_an_h100_without_spills(spilled):
    found = compiled(spilled, causal, soft_cap=30.0)
    assert found == {"block_sparse_attention_dkv": 0, "block_sparse_attention_dq": 0}


def test_warpgroups_ask_for_no_more_registers_than_a_thread_block_has():
    threads = 128 * (gpu_backward.WARPGROUPS + 1)
    given = 65536 // threads // 8 * 8 * (gpu_backward.WARPGROUPS + 1)
    assert given >= gpu_backward.WARPGROUPS * gpu_backward.COMPUTING + gpu_backward.FETCHING
