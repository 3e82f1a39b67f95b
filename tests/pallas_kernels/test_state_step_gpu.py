"""The Hopper kernel for one token, without a GPU: against float64 in the interpreter, and through ptxas.

Tolerances: bfloat16 outputs are rounded once (1.7e-3 in the mean); the state is float32, after a few sums.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.state_step import gpu

needs_mosaic = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))
B, HK, H = 2, 2, 4
FORMS = {  # what a call has beside q, k and v, and its log decays' shape, K, V and dtype of the vectors
    "added to": ((), None, 64, 64, jnp.bfloat16),
    "added to with weights, a constant decay": (("write",), "h", 128, 64, jnp.float32),
    "delta rule": (("write", "read"), None, 64, 128, jnp.bfloat16),
    "delta rule, a decay a head": (("write", "read"), "bh", 64, 64, jnp.bfloat16),
    "delta rule, a decay a channel": (("write", "read"), "bhk", 128, 64, jnp.bfloat16),
    "rank one": (("read", "left"), "bhk", 64, 64, jnp.bfloat16),
}


def draw(form, batch=B, heads=H):
    rng = np.random.default_rng(0)
    more, decay, key, value, dtype = FORMS[form]
    normal = lambda *shape, dtype=dtype: jnp.asarray(rng.normal(size=shape), dtype)
    call = dict(state=normal(batch, heads, key, value, dtype=jnp.float32), q=normal(batch, HK, key))
    call |= dict(k=normal(batch, HK, key) / 8, v=normal(batch, heads, value))
    if decay is not None:
        sizes = [dict(b=batch, h=heads, k=key)[letter] for letter in decay]
        gates = rng.choice([0.0, -1e-4, -0.1, -1.0, -5.0, -100.0], sizes)
        call["log_decay"] = jnp.asarray(gates, jnp.float32)
    if "write" in more:
        call["write"] = jnp.asarray(rng.uniform(size=(batch, heads)), jnp.float32)
    if "read" in more:
        call["read"] = normal(batch, heads, key) / 8
    if "left" in more:
        call["left"] = normal(batch, HK, key) / 8
    return call


def exact(state, q, k, v, log_decay=None, write=None, read=None, left=None):
    """y and the state after it, in float64 of the same numbers, head by head, with the transition as a matrix."""
    y, last = np.zeros(v.shape), np.zeros(state.shape)
    wide = lambda x, b, h: np.asarray(x, np.float64)[b, h * x.shape[1] // H]
    for b, h in np.ndindex(*state.shape[:2]):
        key, size = wide(k, b, h), state.shape[2]
        decay = np.zeros(size)
        if log_decay is not None:
            gate = np.asarray(log_decay, np.float64)
            decay = np.broadcast_to(gate[h] if gate.ndim == 1 else gate[b, h], size)
        weight = 1.0 if write is None else np.asarray(write, np.float64)[b, h]
        transition = np.diag(np.exp(decay))
        if left is not None:
            transition = transition + np.outer(wide(left, b, h), wide(read, b, h))
        elif read is not None:
            transition = (np.eye(size) - weight * np.outer(key, wide(read, b, h))) @ transition
        last[b, h] = transition @ np.asarray(state, np.float64)[b, h] + weight * np.outer(key, wide(v, b, h))
        y[b, h] = 0.5 * last[b, h].T @ wide(q, b, h)
    return y, last


def error(got, want):
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@needs_mosaic
@pytest.mark.parametrize("form", FORMS)
def test_values_match_float64_and_have_the_same_bits_again(form):
    call = draw(form)
    with compat.interpret():
        (y, state), again = (gpu.step(**call, scale=0.5) for _ in range(2))
    want, last = exact(**call)
    assert y.dtype == call["v"].dtype and error(y, want) < (2.5e-3 if y.dtype == jnp.bfloat16 else 1e-5)
    assert state.dtype == jnp.float32 and error(state, last) < 1e-6
    assert np.array_equal(y, again[0]) and np.array_equal(state, again[1])


def test_it_is_taken_for_as_many_heads_as_it_was_faster_for():
    state = lambda batch, heads: jax.ShapeDtypeStruct((batch, heads, 128, 128), jnp.float32)
    read = jax.ShapeDtypeStruct((16, 16, 128), jnp.bfloat16)
    assert gpu.worthwhile(state(16, 16), read) and not gpu.worthwhile(state(15, 16), read)
    assert gpu.worthwhile(state(64, 16)) and not gpu.worthwhile(state(16, 16))


@needs_mosaic
def test_under_vmap_it_runs_once_for_each():
    arrays = [x[:, None] for x in draw("added to").values()]
    with compat.interpret():
        together = jax.vmap(gpu.step)(*arrays)
        apart = [gpu.step(*(x[b] for x in arrays)) for b in range(B)]
    for x, *ones in zip(together, *apart, strict=True):
        assert np.array_equal(x, jnp.stack(ones))


@needs_mosaic
@pytest.mark.parametrize("form", ["delta rule, a decay a channel", "rank one"])
def test_no_register_is_spilled(spilled, form):
    call = jax.eval_shape(functools.partial(draw, form, 16, 16))
    names = list(call)
    assert spilled(lambda *arrays: gpu.step(**dict(zip(names, arrays))), *call.values()) == {"state_step": 0}


@needs_mosaic
def test_what_the_kernel_cannot_do_is_said():
    call = draw("rank one")
    supports = functools.partial(gpu.supports, capability=(9, 0))
    assert supports(**call) is None
    assert "float32 state" in supports(**call | dict(state=call["state"].astype(jnp.bfloat16)))
    assert "K of 64 or 128" in supports(**call | dict(state=jnp.zeros((B, H, 32, 64))))
    assert "V a multiple of 64" in supports(**call | dict(state=jnp.zeros((B, H, 64, 96))))
    assert "read of float16" in supports(**call | dict(read=call["read"].astype(jnp.float16)))
    assert "number for scale" in supports(**call, scale=jnp.ones(()))
    assert "9.x" in gpu.supports(**call, capability=(8, 0))
