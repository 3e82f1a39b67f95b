"""The Hopper kernels of the elementwise scan, without a GPU: against float64 in the interpreter, and through ptxas.

Tolerances: bfloat16 results are rounded once (relative errors of 1.7e-3 in the mean), and dlog_a reads an h that was,
which makes 2.4e-3; 5e-3 is fla's bound. Float32 results differ by float32 rounding and the approximate exp2.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.linear_scan import cost, gpu

needs_mosaic = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))
GATES = (0.0, -1e-4, -0.3, -5.0, -20.0, -1e4, -np.inf)


def draw(batch, time, width, dtype, gates):
    rng = np.random.default_rng(time)
    normal = lambda *shape, dtype=dtype: jnp.asarray(rng.normal(size=shape), dtype)
    log_a = jnp.asarray(rng.choice(gates, size=(batch, time, width)), dtype)
    x, dh = normal(batch, time, width), normal(batch, time, width)
    return x, log_a, normal(batch, width, dtype=jnp.float32), dh, normal(batch, width, dtype=jnp.float32)


def masks(batch, time):
    """Padding left, inside and right, and segments that open: one right after padding, one token long."""
    real, opened = np.ones((batch, time), bool), np.zeros((batch, time), bool)
    real[:, :3] = real[:, time // 2 : time // 2 + 3] = real[:, -2:] = False
    opened[:, [time // 4, time // 4 + 1, time // 2 + 3]] = True
    return real, opened


def exact(x, log_a, state, real, opened, dh, dstate):
    """h, its last value and all gradients in float64, token by token."""
    x, log_a, state, dh, carry = (np.asarray(a, np.float64) for a in (x, log_a, state, dh, dstate))
    a = np.where(opened[..., None], 0, np.exp(log_a))
    a, x = np.where(real[..., None], a, 1), np.where(real[..., None], x, 0)
    h, before = state, [state]
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        before.append(h)
    dx, dlog_a = np.zeros_like(x), np.zeros_like(x)
    for t in reversed(range(x.shape[1])):
        dx[:, t] = dh[:, t] + carry
        carry = a[:, t] * dx[:, t]
        dlog_a[:, t] = carry * before[t]
    there = real[..., None]
    return np.stack(before[1:], 1), h, dx * there, dlog_a * there, carry


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@needs_mosaic
@pytest.mark.parametrize(
    ("time", "width", "dtype", "splits", "gates"),
    [
        (45, 256, jnp.bfloat16, 1, (-0.5,)),
        (75, 384, jnp.bfloat16, 3, GATES),
        (40, 512, jnp.float32, 2, GATES),
        (1, 256, jnp.bfloat16, 1, (-0.5,)),
        (16, 512, jnp.bfloat16, 1, (0.0,)),
    ],
    ids=["odd_length", "splits", "float32", "one_token", "no_decay"],
)
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_match_float64(time, width, dtype, splits, gates, packed):
    if packed and time < 40:
        pytest.skip("too short for the segments drawn here")
    batch, bound = 2, 5e-3 if dtype == jnp.bfloat16 else 5e-6
    x, log_a, state, dh, dstate = draw(batch, time, width, dtype, gates)
    real, opened = masks(batch, time) if packed else (np.ones((batch, time), bool), np.zeros((batch, time), bool))
    marks = (jnp.asarray(real), jnp.asarray(opened)) if packed else (None, None)
    x = jnp.where(real[..., None], x, jnp.nan).astype(dtype)  # what stands at padding is not read
    with compat.interpret():
        h, last = gpu.forward(x, log_a, state, *marks, splits=splits)
        gradients = gpu.backward(log_a, h, state, *marks, dh, dstate, splits=splits)
    wants = exact(x, log_a, state, real, opened, np.where(real[..., None], dh, 0), dstate)
    for got, want in zip((h, last, *gradients), wants, strict=True):
        assert error(got, want) < bound


@needs_mosaic
def test_calls_that_cannot_run_are_refused_with_the_reason():
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    x, hopper = shape(2, 64, 256), {"capability": (9, 0)}
    assert gpu.supports(x, x, **hopper) is None
    assert "8.0" in gpu.supports(x, x, capability=(8, 0))
    assert "float16" in gpu.supports(x, shape(2, 64, 256, dtype=jnp.float16), **hopper)
    for width in (96, 128, 320):
        assert f"D={width}" in gpu.supports(shape(2, 64, width), shape(2, 64, width), **hopper)
    assert "one shape" in gpu.supports(x, shape(2, 1, 256), **hopper)
    assert "state" in gpu.supports(x, x, x, **hopper)


def test_a_long_row_is_cut_until_it_fills_the_chip_and_full_batches_are_not():
    x = jax.ShapeDtypeStruct((1, 32768, 4096), jnp.bfloat16)
    plan = gpu.make_plan(x, x)
    assert plan.splits == 16 and plan.splits * plan.steps * plan.rows == 32768
    for batch in (8, 16):
        x = jax.ShapeDtypeStruct((batch, 32768 // batch, 4096), jnp.bfloat16)
        assert gpu.make_plan(x, x).splits == 1


def test_a_thread_block_never_has_all_channels_of_a_row():
    """Else rows are copied as one piece of memory, and the last tile overwrites the next row of the batch."""
    for width in range(256, 4097, 128):
        x = jax.ShapeDtypeStruct((2, 1003, width), jnp.bfloat16)
        assert gpu.make_plan(x, x).channels < width and width % gpu.make_plan(x, x).channels == 0


def test_floor_at_32768_tokens_is_the_bytes_of_its_arrays():
    assert cost.forward_bytes(8, 4096, 4096) == 3 * 2 * 32768 * 4096
    assert cost.backward_bytes(8, 4096, 4096, states=2) == 5 * 2 * 32768 * 4096 + 2 * 4 * 8 * 4096
    assert 0.26 < cost.floor_ms(cost.forward_bytes(8, 4096, 4096)) < 0.28


@pytest.mark.parametrize("shape", [(16, 2048, 4096), (1, 32768, 4096), (3, 1000, 384)], ids=["full", "split", "odd"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_for_an_h100_without_spills(spilled, shape, packed):
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    state = jax.ShapeDtypeStruct((shape[0], shape[2]), jnp.float32)
    mark = jax.ShapeDtypeStruct(shape[:2], bool) if packed else None
    found = spilled(gpu.forward, x, x, state, mark, mark) | spilled(gpu.backward, x, x, state, mark, mark, x, state)
    assert {"linear_scan_forward", "linear_scan_backward"} <= found.keys() and set(found.values()) == {0}
