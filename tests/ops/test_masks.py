"""The mask language against definitions spelled out pair by pair, and its tables against those matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmix.ops import masks
from seqmix.ops.mask_grid import from_boxes, speed_up, to_boxes
from seqmix.ops.masks import EMPTY, FULL, PARTIAL

TABLE = ((1, 0, 1), (0, 0, 1), (1, 1, 1))

# Each static constructor with its definition, written anew as a rule for one pair.
STATIC = {
    "causal": (masks.Causal(), lambda i, j: j <= i),
    "causal, aligned at the end": (masks.Causal(offset=-3), lambda i, j: j <= i - 3),
    "window": (masks.Window(4), lambda i, j: j <= i < j + 4),
    "window of one": (masks.Window(1), lambda i, j: i == j),
    "two-sided window": (masks.Window(3, causal=False), lambda i, j: i - 3 < j < i + 3),
    "dilated": (masks.Dilated(3), lambda i, j: i % 3 == j % 3),
    "dilated by one": (masks.Dilated(1), lambda i, j: True),
    "strided": (masks.Strided(5, width=2, offset=3), lambda i, j: j % 5 in (3, 4)),
    "strided, every key": (masks.Strided(2, width=2), lambda i, j: True),
    "sinks": (masks.Sinks(3), lambda i, j: j < 3),
    "no sinks": (masks.Sinks(0), lambda i, j: False),
    "everything": (~masks.Sinks(0), lambda i, j: True),
    "prefix": (masks.Prefix(5), lambda i, j: max(i, 4) >= j),
    "blocks": (masks.Blocks(4), lambda i, j: i // 4 == j // 4),
    "blocks of two sizes": (masks.Blocks(4, 3), lambda i, j: i // 4 == j // 3),
    "block table": (masks.BlockTable(TABLE, 4, 3), lambda i, j: i < 12 and j < 9 and TABLE[i // 4][j // 3] == 1),
    "powers": (masks.Powers(), lambda i, j: i - j in (0, 1, 2, 4, 8, 16)),
    "coarse": (masks.Coarse(masks.Powers(), 3), lambda i, j: i // 3 - j // 3 in (0, 1, 2, 4)),
    "coarse window": (masks.Coarse(masks.Window(2), 4), lambda i, j: i // 4 - j // 4 in (0, 1)),
    "transposed": (masks.Transpose(masks.Sinks(2)), lambda i, j: i < 2),
}
SHAPES = [(1, 1), (13, 13), (22, 22), (9, 17), (17, 9)]
TILES = [(1, 1), (4, 4), (5, 3), (2, 16), (32, 7)]


def brute(rule, time, keys):
    return np.array([[bool(rule(i, j)) for j in range(keys)] for i in range(time)])


def table_of(seen, bq, bk):
    """Grades by looking at every pair."""
    rows = [seen[i : i + bq] for i in range(0, seen.shape[0], bq)]
    tiles = [[row[:, j : j + bk] for j in range(0, seen.shape[1], bk)] for row in rows]
    return np.array([[FULL if t.all() else PARTIAL if t.any() else EMPTY for t in row] for row in tiles], np.int8)


def agrees(mask, seen):
    """Every view of a static mask agrees with its matrix; the unrefined table may only be vague."""
    time, keys = seen.shape
    assert np.array_equal(mask.dense(time, keys), seen)
    assert np.array_equal(mask.keys_per_row(time, keys), seen.sum(1))
    assert mask.pairs(time, keys) == seen.sum()
    for bq, bk in TILES:
        want, got = table_of(seen, bq, bk), mask.tiles(bq, bk, time, keys)
        assert got.dtype == np.int8 and np.array_equal(got[got != PARTIAL], want[got != PARTIAL])
        assert np.array_equal(mask.tiles(bq, bk, time, keys, refine=True), want)


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_static_mask_is_its_definition_and_its_tiles_are_exact_without_a_look_at_the_pairs(name, shape):
    mask, rule = STATIC[name]
    seen = brute(rule, *shape)
    agrees(mask, seen)
    for bq, bk in TILES:
        assert np.array_equal(mask.tiles(bq, bk, *shape), table_of(seen, bq, bk))


@pytest.mark.parametrize("name", STATIC)
def test_jax_indices_give_what_numpy_indices_give(name):
    mask = STATIC[name][0]
    seen = mask.visible(jnp.arange(9)[:, None], jnp.arange(14)[None])
    assert isinstance(seen, jax.Array)
    assert np.array_equal(np.broadcast_to(seen, (9, 14)), mask.dense(9, 14))


def neighbours(mask, i, j):
    """The rule of arXiv 2504.16922 for one pair, with start as the released reference writes it."""
    a, b = np.unravel_index(i, mask.grid), np.unravel_index(j, mask.grid)
    for x, y, length, w, s, r, causal in zip(a, b, mask.grid, mask.window, mask.stride, mask.dilation, mask.causal):
        if x % r != y % r:
            return False
        length = length // r + (1 if x % r < length % r else 0)
        x, y, left, right = x // r, y // r, w // 2, w // 2 - (1 if w % 2 == 0 else 0)
        if causal:
            leader = min(x // s * s + s - 1, length - 1)
            start, end = max(leader - left - right, 0), min(x + 1, length)
        else:
            leader = min(x // s * s + s // 2, length - 1)
            start = max(leader - left, 0) + (length - right - leader - 1 if leader + right >= length else 0)
            end = start + w
        if not start <= y < end:
            return False
    return True


@st.composite
def neighbourhoods(draw):
    grid = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3).filter(lambda g: np.prod(g) <= 36))
    if len(grid) == 1:
        grid = [draw(st.integers(1, 24))]
    dilation = [draw(st.integers(1, min(3, n))) for n in grid]
    window = [draw(st.integers(1, n // r)) for n, r in zip(grid, dilation)]
    stride = [draw(st.integers(1, w)) for w in window]
    causal = [draw(st.booleans()) for _ in grid]
    return masks.Neighbourhood(tuple(grid), tuple(window), tuple(stride), tuple(dilation), tuple(causal))


@settings(max_examples=40)
@given(mask=neighbourhoods(), beyond=st.integers(0, 5), bq=st.integers(1, 9), bk=st.integers(1, 9))
def test_neighbourhoods_are_the_published_rule_and_their_tiles_exact(mask, beyond, bq, bk):
    size = int(np.prod(mask.grid))
    seen = brute(lambda i, j: max(i, j) < size and neighbours(mask, i, j), size + beyond, size + beyond)
    agrees(mask, seen)
    assert np.array_equal(mask.tiles(bq, bk, size + beyond), table_of(seen, bq, bk))
    inside = seen[:size, :size]
    assert inside.diagonal().all()
    if not any(mask.causal):
        assert (inside.sum(1) == np.prod(mask.window)).all()


@settings(max_examples=40)
@given(data=st.data(), mask=neighbourhoods(), boxes=st.integers(1, 2))
def test_the_order_of_boxes_moves_tokens_and_makes_tiles_boxes(data, mask, boxes):
    box = tuple(data.draw(st.integers(1, 4)) for _ in mask.grid)
    boxed, size = masks.Boxed(mask, box), int(np.prod(mask.grid))
    index = 1 + np.arange(size)[None]
    order = np.asarray(to_boxes(index, mask.grid, box))
    assert np.array_equal(from_boxes(order, mask.grid, box), index)
    order = order[0] - 1  # -1 for what is added
    seen = mask.dense(size)[np.ix_(order, order)] & (order >= 0) & (order >= 0)[:, None]
    assert boxed.length == order.size
    agrees(boxed, seen)
    tile = int(np.prod(box))
    table, want = boxed.tiles(tile, tile, order.size), table_of(seen, tile, tile)
    # A box that sticks out of the grid is never full: what is added to it sees nothing.
    assert np.array_equal(table, want)
    several = boxed.tiles(boxes * tile, tile, order.size)
    assert np.array_equal(several[several != PARTIAL], table_of(seen, boxes * tile, tile)[several != PARTIAL])


def test_the_simulator_counts_tiles_and_boxes_beat_rows():
    mask = masks.Neighbourhood((16, 128), 13)
    boxed = masks.Boxed(mask, (8, 16))
    rows, boxes = (speed_up(m, (128, 128), 2048) for m in (mask, boxed))
    seen = boxed.dense(2048).reshape(16, 128, 16, 128).any((1, 3))
    assert boxes == seen.size / seen.sum() > 2 * rows
    assert speed_up(masks.Blocks(128), (128, 128), 4096) == 32  # windows that align with tiles waste nothing


def test_strides_and_windows_reach_from_neighbourhoods_to_blocks_and_to_everything():
    assert np.array_equal(masks.Neighbourhood(12, 4, 4).dense(12), masks.Blocks(4).dense(12))
    assert masks.Neighbourhood((3, 4), (3, 4)).dense(12).all()
    assert np.array_equal(masks.Neighbourhood(9, 4, causal=True).dense(9), masks.Window(4).dense(9))
    text = masks.Neighbourhood((2, 3), (1, 3)) | ~masks.Sinks(6)
    assert text.dense(6, 8)[:, 6:].all() and not text.dense(6, 8)[0, 3:6].any()


LEAVES = st.one_of(
    st.sampled_from([mask for mask, _ in STATIC.values()]),
    st.builds(masks.Window, st.integers(1, 9), st.booleans()),
    st.builds(masks.Causal, st.integers(-4, 4)),
    st.builds(masks.Strided, st.integers(3, 7), st.integers(1, 3), st.integers(0, 5)),
    neighbourhoods(),
)
COMPOSED = st.recursive(
    LEAVES,
    lambda m: st.one_of(
        st.builds(masks.And, m, m), st.builds(masks.Or, m, m), st.builds(masks.Not, m), st.builds(masks.Transpose, m)
    ),
    max_leaves=5,
)


def composed(mask, time, keys):
    """The matrix of a composition, from those of its leaves."""
    if isinstance(mask, masks.Not):
        return ~composed(mask.a, time, keys)
    if isinstance(mask, masks.Transpose):
        return composed(mask.mask, keys, time).T
    if isinstance(mask, masks.And | masks.Or):
        a, b = composed(mask.a, time, keys), composed(mask.b, time, keys)
        return a & b if isinstance(mask, masks.And) else a | b
    return mask.dense(time, keys)


@settings(max_examples=40)
@given(mask=COMPOSED, shape=st.sampled_from(SHAPES))
def test_compositions_are_the_logic_of_their_parts(mask, shape):
    agrees(mask, composed(mask, *shape))


def test_a_long_mask_is_counted_without_its_matrix():
    mask = masks.Causal() & (masks.Window(512) | masks.Sinks(4))
    time = 1 << 16
    assert mask.pairs(time) == sum(min(i + 1, 512) + min(4, max(0, i - 511)) for i in range(time))
    assert mask.flops(time, key_dim=64, value_dim=128) == 2 * 192 * mask.pairs(time)


def test_masks_are_static_arguments():
    def make():
        return masks.Causal() & ~masks.BlockTable(np.eye(3, dtype=bool), 2) | masks.Neighbourhood([2, 3], 1)

    assert make() == make() and hash(make()) == hash(make()) and make() != masks.Causal()
    dense = jax.jit(lambda mask: jnp.asarray(mask.dense(6)), static_argnums=0)
    dense(make())
    dense(make())
    assert dense._cache_size() == 1


BAD = {
    "size: expected an integer >= 1, got 0": lambda: masks.Window(0),
    "rate: expected an integer >= 1, got 1.5": lambda: masks.Dilated(1.5),
    "width: expected at most stride=2, got 3": lambda: masks.Strided(2, 3),
    "offset: expected an integer >= -2147483647, got None": lambda: masks.Causal(None),
    "offset: expected an integer <= 2147483647, got 2147483648": lambda: masks.Causal(2**31),
    "count: expected an integer <= 2147483647, got 1000000000000": lambda: masks.Sinks(10**12),
    "table: expected 0 and 1, got 2": lambda: masks.BlockTable([[1, 2]], 4),
    "table: expected .nq, nk. of 0 and 1, got .*1, 0": lambda: masks.BlockTable([[1, 0], [1]], 4),
    "table: expected .nq, nk. of 0 and 1, got shape .2,.": lambda: masks.BlockTable([1, 0], 4),
    "window: expected window . dilation within": lambda: masks.Neighbourhood(8, 5, dilation=2),
    "stride: expected at most the window": lambda: masks.Neighbourhood((8, 8), 3, 4),
    "grid: expected 1 to 3 lengths": lambda: masks.Neighbourhood((2, 2, 2, 2), 1),
    "mask: expected a Neighbourhood": lambda: masks.Boxed(masks.Causal(), (2, 2)),
    "box: expected one integer >= 1 or one for each of 1 axes": lambda: masks.Boxed(masks.Neighbourhood(8, 3), (2, 2)),
    "causal: expected one bool for each axis": lambda: masks.Neighbourhood((2, 2), 1, causal=(True,)),
    "mask: expected a static mask, got one that needs segment_ids": lambda: masks.Positions(masks.Segments()),
    "mask: expected a static mask, got one that needs starts": lambda: masks.Coarse(masks.Intervals(), 2),
    "mask: expected a mask, got 3": lambda: masks.Coarse(3, 2),
    "mask: expected a mask, got 4": lambda: masks.Positions(4),
    "mask: expected a mask, got 5": lambda: masks.Transpose(5),
    "queries: expected the name of an array of data, got 1": lambda: masks.Segments(1),
    "starts, ends: expected different names, got .'a', 'a'.": lambda: masks.Intervals("a", "a"),
    "key_dim: expected an integer >= 1, got -1": lambda: masks.Causal().flops(4, key_dim=-1, value_dim=2),
    "refine: expected True or False, got 1": lambda: masks.Causal().tiles(2, 2, 4, refine=1),
    "bq: expected an integer >= 1": lambda: masks.Causal().tiles(0, 4, 8),
    "refine: expected a static mask": lambda: masks.Segments().tiles(4, 4, 8, refine=True),
    "data: expected 'segment_ids', of the queries": lambda: masks.Segments().dense(8),
    "data.'starts'.: expected shape ": lambda: masks.Intervals().dense(
        8, data={"starts": np.zeros(7), "ends": np.zeros(8)}
    ),
    "data.'kv_segment_ids'.: expected integers, got float64": lambda: masks.Segments().dense(
        8, data={"segment_ids": np.zeros(8, int), "kv_segment_ids": np.zeros(8)}
    ),
    "data: expected 'starts', of the keys": lambda: masks.Intervals().pairs(8),
    "a: expected the input of queries or of keys": lambda: masks.Segments("a", "b") & masks.Segments("b", "a"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_parameters_are_refused_in_one_line(message):
    with pytest.raises(ValueError, match=message) as error:
        BAD[message]()
    assert "\n" not in str(error.value)


def test_masks_are_not_joined_by_and():
    with pytest.raises(TypeError, match="join masks by & and"):
        masks.Causal() and masks.Window(3)
