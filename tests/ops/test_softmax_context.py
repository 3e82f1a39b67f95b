"""Attention with time cut over a mesh: every form gives what one device gives, and moves only what it must."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import sharding
from seqmix.ops.softmax import attention
from seqmix.ops.softmax_context import FORMS
from tests.quick import QUICK

B, T, H, K, V = 2, 16, 8, 3, 5
# A segment over two stretches of four, one that fills three, padding over a border, an id that comes back, a stretch
# of padding alone.
PACKED = np.array([[1, 1, 1, 0, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 0, 5, 5, 5, 5, 5, 5, 5, 0, 0, 5, 5]])
PLACES = np.random.default_rng(0).permuted(np.tile(np.arange(T), (B, 1)), axis=1)
# name: (keys, key heads, sink logits, options)
CASES = {
    "causal": (T, 2, True, {}),
    "window and sinks": (T, 8, True, {"window": 3, "sinks": 1, "soft_cap": 1.5, "return_lse": True}),
    "window": (T, 4, False, {"window": 3}),
    "both sides": (T, 1, False, {"window": 3, "causal": False}),
    "packed": (T, 8, True, {"segment_ids": PACKED, "window": 5, "return_lse": True}),
    "all of a segment": (T, 1, False, {"segment_ids": PACKED, "causal": False}),
    "positions": (T, 2, False, {"q_positions": PLACES, "kv_positions": PLACES[:, ::-1]}),
    "other keys": (8, 2, False, {"causal": False, "segment_ids": PACKED, "kv_segment_ids": PACKED[:, 4:12]}),
}


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def pull(name, **options):
    """(results, gradients of q, k, v and the sink), compiled under the rules in force."""
    keys, key_heads, sink, more = CASES[name]
    shapes = (B, T, H, K), (B, keys, key_heads, K), (B, keys, key_heads, V), (H,)
    args = [draw(i, *shape) for i, shape in enumerate(shapes)]

    def f(q, k, v, logits):
        out = attention(q, k, v, sink_logits=logits if sink else None, block=2, **more, **options)
        weights = [draw(9 + i, *x.shape) for i, x in enumerate(jax.tree.leaves(out))]
        finite = [jnp.where(jnp.isfinite(x), x, 0) for x in jax.tree.leaves(out)]
        return sum(jnp.sum(x * w) for x, w in zip(finite, weights, strict=True)), out

    run = jax.jit(jax.value_and_grad(f, tuple(range(4)), has_aux=True), compiler_options=QUICK)
    (_, out), grads = run(*args)
    return jax.tree.map(np.asarray, (out, grads))


@functools.cache
def wanted(name):
    return pull(name, implementation="reference")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_what_one_device_gives(name, form, x64):
    """Heads over two devices and time over four, or heads whole where all-to-all needs them."""
    if form == "zigzag" and name == "other keys":
        pytest.skip("queries and keys are not cut alike")
    want = wanted(name)
    model = 1 if form == "heads" else 2
    with sharding.use_mesh(sharding.make_mesh(data=2 // model, context=4, model=model)):
        got = pull(name, context=form)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.any(b) or b.shape == (H,)
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)  # sums in another order, in float64
