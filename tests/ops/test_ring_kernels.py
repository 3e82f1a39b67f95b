"""Visits of ring attention by the Hopper kernels equal those by chunks: the parts of a ring, on one device.

The interpreter cannot run kernels on several devices; the whole ring ran on GPUs (docs/benchmarks).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from seqmix.ops import softmax_ring
from seqmix.ops.softmax_reference import Rules

pytestmark = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))
B, J, R, T, S, K = 1, 1, 2, 64, 128, 64


def relative(a, b):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2))


def test_a_visit_by_the_kernels_is_one_by_chunks():
    first = 100  # of the queries' positions, beside keys from 64 on
    keys = jax.random.split(jax.random.key(first), 5)
    draw = lambda key, *shape: jax.random.normal(key, shape, jnp.bfloat16)
    q, dy = (draw(key, B, J, R, T, K) for key in keys[:2])
    k, v = (draw(key, B, J, S, K) for key in keys[2:4])
    sink = jnp.array([[0.3, -0.2]])
    places = lambda ids, at: jnp.stack([ids, at])[:, None].astype(jnp.int32)
    own = places(jnp.where(jnp.arange(T) < 50, 1, 2), first + jnp.arange(T))
    block = k, v, places(jnp.where(jnp.arange(S) < 120, 1, 0), 64 + jnp.arange(S))
    rules = Rules(K**-0.5, True, 90, 0, None)
    found = []
    for kernel in (False, True):
        travel = softmax_ring.Travel(rules, "context", ((1, 1),), 64, kernel)
        with compat.interpret():
            y, lse = softmax_ring._visit(travel, q, own, block, sink)
            total = lse + 0.5  # as if other keys were elsewhere
            grads = softmax_ring._visit_back(travel, q, own, block, (total, dy, jnp.ones_like(lse)))
        found.append((y, jnp.exp(lse), *grads))
    assert [x.dtype for x in found[0]] == [x.dtype for x in found[1]]
    for chunked, kernel in zip(*found, strict=True):
        assert relative(kernel, chunked) < 5e-3
