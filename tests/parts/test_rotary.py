"""Rotary embedding: rotations, relative positions, and each scaling by hand."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.parts.rotary import RotaryScaling, frequencies, rotate

LLAMA = RotaryScaling(kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=64)


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotation_is_by_pairs_of_halves(x64, fraction):
    x, at = draw(0, 2, 5, 3, 8), np.array([[0, 1, 2, 3, 4], [7, 0, 100, 3, 2]])
    y = rotate(x, at, base=50.0, fraction=fraction)
    want, n = x.copy(), int(8 * fraction)
    for b, t, h, i in np.ndindex(2, 5, 3, n // 2):
        a = at[b, t] * 50.0 ** (-2 * i / n)
        one, two = x[b, t, h, i], x[b, t, h, i + n // 2]
        want[b, t, h, i] = one * np.cos(a) - two * np.sin(a)
        want[b, t, h, i + n // 2] = one * np.sin(a) + two * np.cos(a)
    np.testing.assert_allclose(y, want, atol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-13)
    np.testing.assert_array_equal(rotate(x, 0 * at), x)


@pytest.mark.parametrize("scaling", [None, RotaryScaling(kind="ntk", factor=4.0), LLAMA])
def test_scores_depend_on_the_difference_of_positions(x64, scaling):
    q, k = draw(1, 1, 1, 1, 8), draw(2, 1, 1, 1, 8)

    def score(i, j):
        return np.sum(rotate(q, np.array([[i]]), scaling=scaling) * rotate(k, np.array([[j]]), scaling=scaling))

    np.testing.assert_allclose(score(9, 4), score(1005, 1000), rtol=1e-11)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_rows_may_share_positions_and_dtypes_are_kept(x64):
    x = draw(3, 2, 4, 1, 6)
    shared, each = np.arange(4)[None], np.tile(np.arange(4), (2, 1))
    np.testing.assert_array_equal(rotate(x, shared), rotate(x, each))
    for dtype, atol in ((jnp.float32, 1e-6), (jnp.bfloat16, 0.02)):  # 2^-8 of values up to 3
        y = rotate(x.astype(dtype), each)
        assert y.dtype == dtype
        np.testing.assert_allclose(y.astype(np.float64), rotate(x, each), atol=atol)


def test_linear_scaling_is_interpolation_of_positions(x64):
    x, at = draw(4, 1, 6, 2, 8), np.arange(6)[None] * 3
    got = rotate(x, at, scaling=RotaryScaling(kind="linear", factor=2.5))
    np.testing.assert_allclose(got, rotate(x, at / 2.5), atol=1e-13)


def test_ntk_keeps_the_highest_frequency_and_divides_the_lowest():
    plain = frequencies(8, base=100.0)
    np.testing.assert_allclose(plain, [1, 100**-0.25, 0.1, 100**-0.75])
    scaled = frequencies(8, base=100.0, scaling=RotaryScaling(kind="ntk", factor=4.0))
    # base 100 * 4^(8/6); at 2i/n = 6/8 that is 4^-1.
    np.testing.assert_allclose(scaled, plain / 4.0 ** (np.arange(4) / 3))


def test_llama3_scaling_by_wavelength():
    """Waves longer than 64 are stretched 8-fold, those shorter than 16 are kept, between them a blend."""
    plain = frequencies(8, base=1000.0)
    waves = 2 * np.pi / plain
    assert waves[0] < 16 < waves[1] < 64 < waves[2]
    u = (64 / waves[1] - 1) / (4 - 1)
    want = [plain[0], (1 - u) * plain[1] / 8 + u * plain[1], plain[2] / 8, plain[3] / 8]
    np.testing.assert_allclose(frequencies(8, base=1000.0, scaling=LLAMA), want)


REFUSALS = [
    (lambda: RotaryScaling(kind="yarm", factor=2.0), "kind: expected one of linear, ntk, llama3, got 'yarm'"),
    (lambda: RotaryScaling(kind="ntk", factor=0.5), "factor: expected a number >= 1, got 0.5"),
    (lambda: RotaryScaling(kind="llama3", factor=2.0, low_freq_factor=5.0), "low_freq_factor: expected 0 < "),
    (lambda: RotaryScaling(kind="llama3", factor=2.0, original_len=0), "original_len: expected an integer >= 1"),
    (lambda: frequencies(7), "size: expected an even number of rotated dimensions, got 7"),
    (lambda: frequencies(8, base=1.0), "base: expected a number above 1, got 1.0"),
    (lambda: frequencies(2, scaling=RotaryScaling(kind="ntk", factor=2.0)), "scaling: expected at least 4"),
    (lambda: rotate(draw(0, 1, 2, 1, 6), np.zeros((1, 2)), fraction=0.5), "fraction: expected one in (0, 1]"),
    (lambda: rotate(draw(0, 1, 2, 1, 6), np.zeros((1, 2)), fraction=0.0), "fraction: expected one in (0, 1]"),
    (
        lambda: rotate(draw(0, 3, 2, 1, 6), np.zeros((2, 2))),
        "positions: expected shape (B=3, T=2), got (2, 2)",
    ),
    (lambda: rotate(draw(0, 3, 2, 1, 6), np.zeros((3, 1))), "positions: expected shape (P, T=2), got (3, 1)"),
]


@pytest.mark.parametrize("call, message", REFUSALS)
def test_refusals_name_the_argument(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
