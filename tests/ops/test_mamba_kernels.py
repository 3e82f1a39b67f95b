"""The short convolution and the gated norm through their kernels, interpreted on a CPU, against the XLA forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from seqmix.ops.conv import short_conv
from seqmix.ops.norm_kernels import gated_norm_product
from seqmix.parts.norms import rms_norm

needs_mosaic = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))
IDS = jnp.asarray([[0] * 3 + [4] * 30 + [0] * 2 + [4] * 10 + [9] * 20 + [0] * 5])


def agree(got, want):
    """Within 1%: either form rounds to bfloat16 at other places."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape and np.linalg.norm(a - b) <= 0.01 * np.linalg.norm(b)


def both(function, *arrays):
    """(results, gradients) of a function of the arrays, plain and through the kernels."""

    def run():
        results, pull = jax.vjp(lambda *a: function(*a), *arrays)
        cotangents = [jnp.cos(jnp.arange(a.size) + n).reshape(a.shape) for n, a in enumerate(jax.tree.leaves(results))]
        cotangents = [c.astype(a.dtype) for c, a in zip(cotangents, jax.tree.leaves(results), strict=True)]
        return results, pull(jax.tree.unflatten(jax.tree.structure(results), cotangents))

    with compat.interpret():
        got = run()
    return got, run()


@needs_mosaic
def test_the_convolution_used_twice():
    keys = jax.random.split(jax.random.key(0), 3)
    x, weight, bias = (
        jax.random.normal(key, (*lead, 2, 64)) for key, lead in zip(keys, ((1, 70), (4,), ()), strict=True)
    )

    def call(x, weight, bias):
        options = dict(segment_ids=IDS, activation=jax.nn.silu, twice=True)
        return short_conv({"x": x}, {"x": weight}, {"x": bias}, **options)[0]

    agree(*both(call, x.astype(jnp.bfloat16), weight, bias))


@needs_mosaic
def test_the_gated_norm_and_its_product():
    keys = jax.random.split(jax.random.key(0), 6)
    x, skip, gate = (jax.random.normal(key, (1, 70, 4, 64), jnp.bfloat16) for key in keys[:3])
    scale, weight = jax.random.normal(keys[3], (4, 64)), jax.random.normal(keys[4], (4,))
    out = jax.random.normal(keys[5], (4, 64, 32), jnp.bfloat16) / 16

    def call(x, skip, gate, scale, weight, out):
        y = gated_norm_product(x, (weight, skip), gate, scale, out, eps=1e-5)
        if compat.interpreting():
            return y
        assert y is None  # no kernel runs on a CPU
        h = rms_norm(x, scale, skip=(weight, skip), gate=gate, gate_first=True, groups=1, eps=1e-5)
        return jnp.einsum("bthp,hpd->btd", h, out)

    agree(*both(call, x, skip, gate, scale, weight, out))
