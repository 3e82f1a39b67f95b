"""The op through the kernels for GPUs and TPUs: interpreted on a CPU, refused with a reason without the device."""

import functools
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, triton_calls
from seqmix.ops import linear_kernels
from seqmix.ops.linear import linear_attention

TARGETS = [
    pytest.param("gpu", marks=pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))),
    "tpu",
    pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason=triton_calls.EXTRA)),
]
IDS = jnp.asarray([[0] * 5 + [3] * 40 + [7] * 30 + [0] * 2])


def _inputs(dtype=jnp.bfloat16):
    keys = jax.random.split(jax.random.key(0), 5)
    q, k = (jax.random.normal(key, (1, 77, 1, 64), dtype) / 8 for key in keys[:2])
    v = jax.random.normal(keys[2], (1, 77, 2, 64), dtype)
    log_decay = -0.1 * jax.random.uniform(keys[3], (1, 77, 2))
    return q, k, v, log_decay, jax.random.normal(keys[4], (1, 2, 64, 64))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="not on a CPU")
@pytest.mark.parametrize(("target", "needs"), [("gpu", "a Hopper GPU"), ("tpu", "a TPU"), ("triton", "an NVIDIA GPU")])
def test_without_the_device_a_kernel_is_refused_with_the_reason(target, needs):
    q, k, v, log_decay, _ = _inputs()
    with pytest.raises(ValueError, match=f"cannot run '{target}': needs {needs}"):
        linear_attention(q, k, v, log_decay, implementation=target)


@functools.cache
def _results_and_gradients(implementation):
    write = jax.random.uniform(jax.random.key(1), (1, 77, 2)).at[:, ::7].set(0)  # 0 has a gradient too

    def call(q, k, v, log_decay, state, write):
        options = {"state": state, "write": write, "segment_ids": IDS, "implementation": implementation}
        return linear_attention(q, k, v, log_decay, scale=0.5, **options)

    results, pull = jax.vjp(call, *_inputs(), write)
    cotangents = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype), results)
    return jax.tree.leaves(jax.block_until_ready((results, pull(cotangents))))


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_agree_with_the_chunked_form(target):
    """Values and all gradients of one packed call: 5e-3 is what bfloat16 operands leave of either form."""
    with compat.interpret():
        got = _results_and_gradients(target)
    for a, b in zip(got, _results_and_gradients("chunked"), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 0.01 * np.linalg.norm(b)


@pytest.mark.parametrize("constant", [True, False])
def test_the_backward_kernels_are_asked_for_no_more_than_the_gradient_needs(monkeypatch, constant):
    """Constant decays have no gradient to compute, a state that nobody reads hands none back."""
    asked = []

    class Kernels:
        def forward(q, k, v, log_decay, state, runs, log_write, *, scale, need_last):
            return 2 * v, jnp.zeros((1, 2, 64, 64))

        def backward(q, k, v, log_decay, state, runs, log_write, dy, dstate, *, scale, need_decay):
            asked.append((need_decay, dstate is not None))
            return q, k, 2 * dy, log_decay if need_decay else None, jnp.zeros((1, 2, 64, 64)), None

    monkeypatch.setattr(linear_kernels, "_modules", lambda target, log_decay: (Kernels, Kernels))
    q, k, v, log_decay, _ = _inputs()
    call = lambda v, log_decay: linear_kernels.run("gpu", q, k, v, log_decay, None, None, None, 1.0)
    values = lambda v, log_decay: jnp.sum(call(v, log_decay)[0])
    gradient = jax.jit(jax.grad(values, argnums=0 if constant else (0, 1)))(v, log_decay)
    assert asked == [(not constant, False)]
    assert np.all(np.asarray(jax.tree.leaves(gradient)[0]) == 2)
    jax.grad(lambda v, log_decay: jnp.sum(call(v, log_decay)[1]))(v, log_decay)
    assert asked[1:] == [(False, True)]
