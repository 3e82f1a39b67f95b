"""Gradients of travelling keys that cuDNN makes: of which halves of which stretches it is asked, and with what."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import cudnn
from seqmix.core import sharding
from seqmix.ops import softmax_context
from seqmix.ops.parcels import packed, unpacked
from seqmix.ops.softmax import attention
from seqmix.ops.softmax_ring import Travel
from tests.quick import QUICK


def dense(q, k, v, lse, dy, y, *, scale, causal=False):
    """What `cudnn.gradients` is documented to compute."""
    group = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    scores = scale * jnp.einsum("bhik,bhjk->bhij", q, k)
    p = jnp.exp(scores - lse[..., None]) * (jnp.tri(*scores.shape[2:]) if causal else 1)
    ds = p * (jnp.einsum("bhiv,bhjv->bhij", dy, v) - jnp.sum(dy * y, axis=-1, keepdims=True))
    dq, dk = scale * jnp.einsum("bhij,bhjk->bhik", ds, k), scale * jnp.einsum("bhij,bhik->bhjk", ds, q)
    dv = jnp.einsum("bhij,bhiv->bhjv", p, dy)
    summed = lambda x: x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(2)
    return dq, summed(dk), summed(dv)


def whole(scale, soft_cap, q, k, v):
    """What `block_sparse_kernels.whole` is documented to compute."""
    k, v = (jnp.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = scale * jnp.einsum("bhik,bhjk->bhij", q, k)
    return jax.nn.softmax(scores) @ v, jax.nn.logsumexp(scores, axis=-1)


def pull(inputs, weights, **options):
    """(y, gradients of the inputs)."""

    def loss(q, k, v, *sink):
        y = attention(q, k, v, sink_logits=sink[0] if sink else None, **options)
        return jnp.sum(weights * y), y

    run = jax.jit(jax.grad(loss, tuple(range(len(inputs))), has_aux=True), compiler_options=QUICK)
    return jax.tree.leaves(run(*inputs))


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize(("form", "causal"), [("zigzag", True), ("ring", False)])
def test_calls_of_whole_chunks_give_what_one_device_gives(monkeypatch, x64, form, causal, sink):
    rng, calls = np.random.default_rng(0), []
    shapes = [(2, 16, heads, 4) for heads in (4, 2, 2)] + [(4,)] * sink
    inputs, weights = [rng.normal(size=shape) for shape in shapes], rng.normal(size=(2, 16, 4, 4))

    def counted(q, k, *rest, causal=False, **options):
        calls.append((q.shape[2], k.shape[2], causal))
        return dense(q, k, *rest, causal=causal, **options)

    want = pull(inputs, weights, causal=causal, implementation="reference")
    monkeypatch.setattr(cudnn, "gradients", counted)
    monkeypatch.setattr(softmax_context, "Travel", lambda *a: Travel(*a[:5], cudnn=True))
    with sharding.use_mesh(sharding.make_mesh(data=2, context=4)):
        got = pull(inputs, weights, causal=causal, context=form)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
    asked = {(4, 4, True), (2, 2, False)} if causal else {(4, 4, False)}
    assert set(calls) == asked


def test_what_travels_in_one_piece_arrives_to_the_bit():
    rng = np.random.default_rng(1)
    odd = jnp.asarray(rng.normal(size=(3, 5)), jnp.bfloat16)
    arrays = [odd, jnp.arange(-3, 4, dtype=jnp.int32), jnp.asarray([[np.nan, -0.0, np.inf]], jnp.float32)]
    piece = packed(arrays)
    assert piece.ndim == 1 and piece.nbytes == 8 * 4 + 7 * 4 + 3 * 4
    for x, back in zip(arrays, unpacked(piece, arrays), strict=True):
        assert back.dtype == x.dtype and np.asarray(back).tobytes() == np.asarray(x).tobytes()


ROWS = jax.ShapeDtypeStruct((1, 4, 8, 16), jnp.bfloat16)
KEYS = jax.ShapeDtypeStruct((1, 2, 6, 16), jnp.bfloat16)
SUMS = jax.ShapeDtypeStruct((1, 4, 8), jnp.float32)
GIVEN = {"q": ROWS, "k": KEYS, "v": KEYS, "lse": SUMS, "dy": ROWS, "y": ROWS}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (1, 4, 8, 12), r"^q, k: expected \[B, H, T, K\] and .* K a multiple of 8"),
        ("k", (1, 3, 6, 16), r"^q, k: expected .* H of Hk"),
        ("v", (1, 2, 5, 16), r"^v: expected \(1, 2, 6, 16\), got \(1, 2, 5, 16\)"),
        ("lse", (1, 4, 7), r"^lse: expected \(1, 4, 8\), got \(1, 4, 7\)"),
    ],
)
def test_cudnn_is_asked_for_nothing_that_does_not_fit(name, shape, message):
    given = GIVEN | {name: jax.ShapeDtypeStruct(shape, GIVEN[name].dtype)}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda given: cudnn.gradients(**given, scale=1.0), given)


def test_cudnn_is_asked_for_16_bits_alone():
    wide = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), GIVEN)
    with pytest.raises(ValueError, match="^q: expected all of bfloat16 or all of float16, got float32"):
        jax.eval_shape(lambda given: cudnn.gradients(**given, scale=1.0), wide)
