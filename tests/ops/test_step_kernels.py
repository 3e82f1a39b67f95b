"""One token of an op through the Hopper kernel, interpreted on a CPU; in programs for H100s, see test_on_a_mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from seqmix import ops
from seqmix.ops import step_kernels

needs_mosaic = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))
B, HK, H, K, V = 2, 2, 4, 64, 64
OPS = {
    "write": lambda q, k, v, gate, more, state, **kind: ops.linear_attention(
        q, k, v, gate[..., 0], write=more[..., 0] ** 2, state=state, **kind
    ),
    "channel": lambda q, k, v, gate, more, state, **kind: ops.linear_attention(q, k, v, gate, state=state, **kind),
    "delta": lambda q, k, v, gate, more, state, **kind: ops.delta_rule(
        q, k, v, more[..., 0], gate, state=state, **kind
    ),
    "erase": lambda q, k, v, gate, more, state, **kind: ops.delta_rule(
        q, k, v, more[..., 0], gate[0, 0, :, 0], erase=more, state=state, **kind
    ),
    "rank one": lambda q, k, v, gate, more, state, **kind: ops.diagonal_plus_rank_one(
        q, k, v, more, k, gate, state=state, **kind
    ),
}


def draw(batch=B, time=1, heads=H):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=(batch, time, *shape))
    arrays = normal(HK, K), normal(HK, K) / 8, normal(heads, V), -np.exp(normal(heads, K)), normal(heads, K) / 8
    dtypes = (jnp.bfloat16,) * 3 + (jnp.float32, jnp.bfloat16)
    tokens = (jnp.asarray(x, dtype) for x, dtype in zip(arrays, dtypes))
    return *tokens, jnp.asarray(rng.normal(size=(batch, heads, K, V)), jnp.float32)


def results(op, implementation):
    def both(*call):
        outputs, pull = jax.vjp(functools.partial(OPS[op], scale=0.5, implementation=implementation), *call)
        cotangents = [jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype) for x in outputs]
        return outputs, pull(tuple(cotangents))

    run = both if implementation == "gpu" else jax.jit(both)  # the interpreter's threads need those of a jitted call
    return jax.block_until_ready(run(*draw()))


@needs_mosaic
@pytest.mark.parametrize("op", OPS)
def test_values_and_gradients_are_those_of_the_other_form(op):
    """That of `write` rounds the weighted values to bfloat16: 5e-3 is for both."""
    with compat.interpret():
        got = jax.tree.leaves(results(op, "gpu"))
    for a, b in zip(got, jax.tree.leaves(results(op, "chunked")), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 5e-3 * np.linalg.norm(b)


@needs_mosaic
def test_it_is_taken_from_enough_heads_on():
    def reason(batch):
        q, k, v, gate, more, state = draw(batch)
        return step_kernels.reason(None, (state, q, k, v, gate, None, more, more), None, scale=1.0)

    with compat.interpret():
        assert reason(64) is None and "too few heads" in reason(B)


@needs_mosaic
@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"segment_ids": np.ones((B, 1), np.int32)}, "segment_ids"),
        ({"scale": jnp.ones(())}, "number for scale"),
        ({"time": 2}, "one token"),
    ],
)
@pytest.mark.parametrize("op", ["delta", "rank one"])
def test_what_has_no_kernel_is_refused_with_the_reason(op, more, said):
    options = {name: value for name, value in more.items() if name != "time"}
    with compat.interpret(), pytest.raises(ValueError, match=said):
        OPS[op](*draw(time=more.get("time", 1)), implementation="gpu", **options)
