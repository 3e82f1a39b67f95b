"""Neighbourhood attention: on images and video against a gather, its limits, its simulator."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.static_sparse.neighbourhood import Neighbourhood
from seqmix.ops import block_sparse_attention, masks
from tests.mixers.equations import compiled, tokens, weights

SMALL = {"d_model": 8, "heads": 2}


def by_gathering(p, x, grid, window):
    """Each token's window cut out of the image, clamped at the borders: undilated, stride 1, odd windows."""
    q, k, v = (np.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    k, v = (y.reshape(len(x), *grid, *y.shape[2:]) for y in (k, v))
    out = np.zeros(q.shape)
    for t, at in enumerate(np.ndindex(*grid)):
        first = [min(max(c - w // 2, 0), n - w) for c, w, n in zip(at, window, grid, strict=True)]
        near = (slice(None), *(slice(a, a + w) for a, w in zip(first, window, strict=True)))
        keys, values = (y[near].reshape(len(x), -1, *y.shape[-2:]) for y in (k, v))
        score = np.einsum("bhk,bshk->bhs", q[:, t], keys) / q.shape[-1] ** 0.5
        weight = np.exp(score)
        out[:, t] = np.einsum("bhs,bshk->bhk", weight / weight.sum(-1, keepdims=True), values)
    return np.einsum("bthk,hkd->btd", out, p["out"])


@pytest.mark.parametrize("grid, window, box", [((5, 7), (3, 5), (2, 4)), ((3, 4, 5), (3, 1, 3), (2, 2, 2))], ids=str)
def test_images_and_video_are_what_gathering_windows_gives(x64, grid, window, box):
    mixer = Neighbourhood(**SMALL, window=window, box=box)
    p, x = weights(mixer), tokens(mixer, int(np.prod(grid)))
    got = compiled(lambda p, x: mixer.forward(p, x, grid=grid))(p, x)[0]
    want = by_gathering({name: np.asarray(w) for name, w in p.items()}, np.asarray(x), grid, window)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)  # sums of 15 terms in float64


def test_a_window_as_long_as_the_grid_is_dense_and_a_stride_as_long_as_the_window_is_blocked(x64):
    dense = Attention(**SMALL, causal=False, rope=False)
    p, x = weights(dense), tokens(dense, 12)
    whole = Neighbourhood(**SMALL, window=(3, 4), box=(2, 2))
    want = compiled(dense.forward)(p, x)[0]
    got = compiled(lambda p, x: whole.forward(p, x, grid=(3, 4)))(p, x)[0]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    blocked = Neighbourhood(**SMALL, window=(4,), stride=(4,), box=(4,))
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    mixed = block_sparse_attention(q, k, v, mask=masks.Blocks(4), implementation="reference")
    want = jnp.einsum("bthk,hkd->btd", mixed, p["out"])
    np.testing.assert_allclose(compiled(blocked.forward)(p, x)[0], want, rtol=0, atol=1e-12)


def test_the_simulator_counts_the_tiles_that_are_visited():
    mixer = Neighbourhood(window=(13, 13))
    boxed = mixer.boxed((64, 64))
    assert boxed.box == (8, 8)
    visited = boxed.dense(4096).reshape(64, 64, 64, 64).any((1, 3))
    assert mixer.speed_up((64, 64)) == visited.size / visited.sum()
    aligned = Neighbourhood(window=(16, 32), stride=(16, 32))
    assert aligned.speed_up((64, 64)) == 4096 / (16 * 32)  # no tile is partial: the pattern's whole gain


BAD = {
    "window: expected a tuple of 1 to 3 lengths": {"window": (1, 1, 1, 1)},
    "box: expected a value for each axis": {"box": (4,)},
    "stride: expected at most the window": {"stride": (14, 1)},
    "dilation: expected one integer >= 1": {"dilation": (0, 1)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_fields_are_refused(message):
    with pytest.raises(ValueError, match=f"Neighbourhood.{message}"):
        Neighbourhood(**BAD[message])


def test_a_grid_that_does_not_fit_is_refused():
    mixer = Neighbourhood(**SMALL, window=(2, 2))
    params, x = param.materialise(mixer.params(), jax.random.key(0)), jnp.zeros((1, 12, 8))
    for grid, message in (
        ((3, 5), "product is T=12"),
        (None, "needs this input"),
        ((1, 12), "window . dilation within"),
        (8, "grid: expected 2 lengths, as many as of window, got 8"),
        ("34", "grid: expected 2 lengths, as many as of window, got '34'"),
    ):
        with pytest.raises(ValueError, match=message):
            mixer.forward(params, x, grid=grid)
    with pytest.raises(ValueError, match="grid: expected 2 lengths"):
        mixer.speed_up((12,))
