"""The Hopper kernels of the gated norm, without a GPU: against float64 in the interpreter, and through ptxas.

Tolerances: bfloat16 results are rounded once (1.7e-3 in the mean); the weights' gradients are float32 sums.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.gated_norm import gpu

needs_mosaic = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))
ROWS, WIDTH, EPS = 35, 256, 1e-2


def draw():
    rng = np.random.default_rng(0)
    x, skip, gate, dy = (jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.bfloat16) for _ in range(4))
    scale, weight = (jnp.asarray(rng.normal(size=WIDTH), jnp.float32) for _ in range(2))
    return x, skip, gate, scale, weight, dy


def exact(x, skip, gate, scale, weight):
    s = (x + weight * skip) * jax.nn.silu(gate)
    return s * jax.lax.rsqrt(jnp.mean(s * s, -1, keepdims=True) + EPS) * scale


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@needs_mosaic
def test_values_and_gradients_match_float64():
    *call, dy = draw()
    with compat.interpret():
        y = gpu.forward(*call, eps=EPS)
        again, *gradients = gpu.backward(*call, dy, eps=EPS)
    with jax.enable_x64(True):
        want, pull = jax.vjp(exact, *(jnp.asarray(np.asarray(a).astype(float)) for a in call))
        want, *slopes = map(np.asarray, (want, *pull(jnp.asarray(np.asarray(dy).astype(float)))))
    assert np.array_equal(y, again) and error(y, want) < 2.5e-3
    for index, (got, slope) in enumerate(zip(gradients, slopes, strict=True)):
        assert error(got, slope) < (2.5e-3 if index < 3 else 1e-5)


@needs_mosaic
def test_no_register_is_spilled(spilled):
    rows, row = jax.ShapeDtypeStruct((64, 4096), jnp.bfloat16), jax.ShapeDtypeStruct((4096,), jnp.float32)
    call = (rows, rows, rows, row, row)
    assert spilled(functools.partial(gpu.forward, eps=EPS), *call) == {"gated_norm_forward": 0}
    assert spilled(functools.partial(gpu.backward, eps=EPS), *call, rows) == {"gated_norm_backward": 0}


@needs_mosaic
def test_what_the_kernels_cannot_do_is_said():
    x, skip, gate, scale, weight, _ = draw()
    supports = functools.partial(gpu.supports, capability=(9, 0))
    assert supports(x, skip, gate, scale, weight) is None
    assert "bfloat16" in supports(x, skip, gate.astype(jnp.float32), scale, weight)
    assert "at most" in supports(*(jnp.zeros((2, 8192), jnp.bfloat16),) * 3, scale, weight)
    assert "float32 scale" in supports(x, skip, gate, scale[:128], weight)
    assert "9.x" in gpu.supports(x, skip, gate, scale, weight, capability=(8, 0))
