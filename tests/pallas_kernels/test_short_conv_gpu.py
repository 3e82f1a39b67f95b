"""The Hopper kernels of the short convolution, without a GPU: against float64 in the interpreter, and through ptxas.

Tolerances: y and dx are bfloat16, rounded once (1.7e-3 in the mean); the weights' gradients are float32 sums.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.short_conv import gpu

needs_mosaic = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))
WIDTH = 128


def draw(time, taps, seed=0):
    rng = np.random.default_rng(seed)
    normal = lambda *shape, dtype=jnp.bfloat16: jnp.asarray(rng.normal(size=shape), dtype)
    x, dy, more = (normal(2, time, WIDTH) for _ in range(3))
    return x, normal(taps, WIDTH, dtype=jnp.float32), normal(WIDTH, dtype=jnp.float32), dy, more


def segments(time):
    """Padding left, inside segments and right, next to the ends of stretches too; a segment of one token."""
    ids = np.ones((2, time), np.int32)
    ids[0, 60:] = 2
    ids[0, 130:] = 3
    ids[1, 10:12], ids[1, 12:] = 2, 3
    ids[0, [0, 1, 5, 63, 64, 126, 127, 128, time - 1]] = 0
    ids[1, [62, 63, 127, 129]] = 0
    return ids


def exact(x, weight, bias, ids, dy, silu):
    """y, dx, dweight and dbias in float64: every token looks for the W - 1 before it."""
    x, weight, bias, dy = (np.asarray(a, np.float64) for a in (x, weight, bias, dy))
    taps, y = len(weight), np.zeros_like(x)
    dx, dweight, dbias = np.zeros_like(x), np.zeros_like(weight), np.zeros_like(bias)
    for b, t in zip(*np.nonzero(ids)):
        seen = [s for s in range(t, -1, -1) if ids[b, s] == ids[b, t]][:taps]
        c = bias + sum(weight[taps - 1 - j] * x[b, s] for j, s in enumerate(seen))
        sigmoid = 1 / (1 + np.exp(-c))
        y[b, t] = c * sigmoid if silu else c
        dc = dy[b, t] * (sigmoid * (1 + c * (1 - sigmoid)) if silu else 1)
        dbias += dc
        for j, s in enumerate(seen):
            dx[b, s] += weight[taps - 1 - j] * dc
            dweight[taps - 1 - j] += x[b, s] * dc
    return y, dx, dweight, dbias


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@needs_mosaic
@pytest.mark.parametrize(
    ("time", "taps", "silu", "packed"),
    [(150, 4, True, True), (128, 3, True, False), (67, 2, False, False)],
    ids=["packed", "whole_stretches", "linear"],
)
def test_values_and_gradients_match_float64(time, taps, silu, packed):
    x, weight, bias, dy, more = draw(time, taps)
    ids = segments(time) if packed else np.ones((2, time), np.int32)
    given = jnp.asarray(ids) if packed else None
    y, *want = exact(x, weight, bias, ids, np.asarray(dy, np.float64) + np.asarray(more, np.float64), silu)
    there = jnp.asarray(ids)[..., None] != 0
    x, dy = (jnp.where(there, a, jnp.nan).astype(a.dtype) for a in (x, dy))  # what stands at padding is not read
    with compat.interpret():
        got = gpu.forward(x, weight, bias, given, silu=silu)
        dx, dweight, dbias = gpu.backward(x, weight, bias, given, dy, more, silu=silu)
    assert not np.any(np.asarray(got)[ids == 0]) and not np.any(np.asarray(dx)[ids == 0])
    assert error(got, y) < 2.5e-3 and error(dx, want[0]) < 2.5e-3
    assert error(dweight, want[1]) < 1e-5 and error(dbias, want[2]) < 1e-5


@needs_mosaic
def test_no_register_is_spilled(spilled):
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    x, ids = shape(2, 256, 512), shape(2, 256, dtype=jnp.int32)
    weights = shape(4, 512, dtype=jnp.float32), shape(512, dtype=jnp.float32)
    assert spilled(gpu.forward, x, *weights, ids) == {"short_conv_forward": 0}
    assert spilled(gpu.backward, x, *weights, ids, x, x) == {"short_conv_backward": 0}


@needs_mosaic
def test_what_the_kernels_cannot_do_is_said():
    x, weight, bias, *_ = draw(8, 4)
    supports = functools.partial(gpu.supports, capability=(9, 0))
    assert supports(x, weight, bias) is None
    assert "bfloat16" in supports(x.astype(jnp.float32), weight, bias)
    assert "multiple of 128" in supports(x[..., :64], weight[:, :64], bias[:64])
    assert "taps" in supports(x, weight[:1], bias)
    assert "9.x" in gpu.supports(x, weight, bias, capability=(8, 0))
