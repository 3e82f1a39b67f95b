"""The scan through the kernels for GPUs and TPUs: interpreted on a CPU, refused with a reason without the device."""

import functools
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat, triton_calls
from seqmix.ops.scan import linear_scan

TARGETS = [
    pytest.param("gpu", marks=pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))),
    "tpu",
    pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason=triton_calls.EXTRA)),
]
IDS = jnp.asarray([[0] * 5 + [3] * 40 + [7] * 30 + [0] * 2])


def draw(decay_shape):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1, 77, 3, 20), jnp.bfloat16)
    log_a = -jax.random.uniform(keys[1], decay_shape)
    return x, log_a, jax.random.normal(keys[2], (1, 3, 20))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="not on a CPU")
@pytest.mark.parametrize(("target", "needs"), [("gpu", "a Hopper GPU"), ("tpu", "a TPU"), ("triton", "an NVIDIA GPU")])
def test_without_the_device_a_kernel_is_refused_with_the_reason(target, needs):
    x, log_a, _ = draw((1, 77, 3, 20))
    with pytest.raises(ValueError, match=f"cannot run '{target}': needs {needs}"):
        linear_scan(x, log_a, implementation=target)


@functools.cache
def results_and_gradients(implementation, shape, packed):
    ids = IDS if packed else None
    call = lambda x, log_a, state: linear_scan(x, log_a, state=state, segment_ids=ids, implementation=implementation)
    results, pull = jax.vjp(call, *draw(shape))
    cotangents = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype), results)
    return jax.tree.leaves(jax.block_until_ready((results, pull(cotangents))))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("shape", "packed"), [((1, 77, 3, 20), True), ((3, 1), False)], ids=["packed", "constant"])
def test_kernels_agree_with_the_chunked_form(shape, packed, target):
    """Values and all gradients: both round bfloat16 results, and the kernels' slopes read a rounded h, 2.4e-3."""
    with compat.interpret():
        got = results_and_gradients(target, shape, packed)
    for a, b in zip(got, results_and_gradients("chunked", shape, packed), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 5e-3 * np.linalg.norm(b)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("change", "reason"),
    [({"log_a": 1j}, "complex64"), ({"reverse": True}, "reverse"), ({"tokens": 8}, "64 tokens")],
    ids=["complex", "reverse", "short"],
)
def test_what_the_kernels_cannot_do_is_named(change, reason, target):
    x, log_a, _ = draw((1, 77, 3, 20))
    change = dict(change)
    tokens = change.pop("tokens", 77)
    log_a = log_a * change.pop("log_a", 1)
    with compat.interpret(), pytest.raises(ValueError, match=reason):
        linear_scan(x[:, :tokens], log_a[:, :tokens], implementation=target, **change)
