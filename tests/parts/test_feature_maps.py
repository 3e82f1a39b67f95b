"""Feature maps: what the products of features are."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.parts.feature_maps import NAMED, Elu, Hedgehog, RandomFeatures, Relu, Taylor2, named

quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # halves compile time


def pair(size, heads=2, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(scale * rng.normal(size=(2, 3, heads, size))) for _ in "qk")


def make(phi, heads, size, seed=0):
    return quick(lambda key: param.materialise(phi.params(heads, size), key))(jax.random.key(seed))


def products(phi, params, q, k):
    """phi(q_t) . phi(k_s) as [B, H, T, T]; the features have the width that the map says."""
    features = phi.apply(params, q, k)
    assert all(f.shape == (*q.shape[:3], phi.dim(q.shape[3])) and f.dtype == q.dtype for f in features)
    return jnp.einsum("bthf,bshf->bhts", *features)


def scores(q, k):
    return jnp.einsum("bthk,bshk->bhts", q, k)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
def test_taylor_products_are_the_series_of_the_exponential(size, x64):
    q, k = pair(size, scale=2.0)
    s = scores(q, k) / size**0.5
    got = products(Taylor2(), {}, q, k)
    np.testing.assert_allclose(got, 1 + s + s * s / 2, rtol=0, atol=1e-13 * float(jnp.max(s * s) + 1))
    assert jnp.min(got) >= 0.5 - 1e-12


def test_taylor_features_are_packed():
    assert Taylor2().dim(16) == 153  # 273 with both halves of x x^T


def test_elu_and_relu_are_what_they_are_called(x64):
    x = jnp.linspace(-3.0, 3.0, 13).reshape(1, 1, 1, -1)
    np.testing.assert_allclose(Elu().apply({}, x, x)[0], jax.nn.elu(x) + 1, rtol=1e-14)
    np.testing.assert_array_equal(Relu().apply({}, x, x)[1], np.maximum(x, 0))
    assert jnp.all(Elu().apply({}, -20 + x, x)[0] > 0)


def test_hedgehog_starts_as_plain_softmaxes_of_its_input(x64):
    q, k = pair(4)
    params = make(Hedgehog(), 2, 4)
    got, _ = Hedgehog().apply(params, q, k)
    np.testing.assert_allclose(got, jnp.concatenate([jax.nn.softmax(q), jax.nn.softmax(-q)], -1), rtol=1e-13)
    _, got = Hedgehog("whole").apply(params, q, k)
    e = jnp.exp(jnp.concatenate([2 * k, -2 * k], -1))
    np.testing.assert_allclose(got, e / jnp.sum(e, -1, keepdims=True), rtol=1e-13)
    # sum over i of e^(q_i + k_i) + e^(-q_i - k_i), times a number of the query.
    weights = products(Hedgehog("exp"), params, q, k)
    want = jnp.sum(2 * jnp.cosh(q[:, :, None] + k[:, None]), -1).transpose(0, 3, 1, 2)
    ratio = weights / want
    np.testing.assert_allclose(ratio, jnp.broadcast_to(ratio[..., :1], ratio.shape), rtol=1e-12)


def test_hedgehog_weights_belong_to_a_head_and_a_side(x64):
    q, k = pair(4)
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape)), make(Hedgehog(), 2, 4))
    got = Hedgehog().apply(params, q, k)
    for side, x, phi in zip("qk", (q, k), got):
        p = params[side]
        u = np.stack([x[:, :, h] @ p["weight"][h] + p["bias"][h] for h in range(2)], axis=2)
        want = np.concatenate([jax.nn.softmax(u), jax.nn.softmax(-u)], -1)
        np.testing.assert_allclose(phi, want, rtol=1e-12)


def test_random_features_average_to_the_exponential(x64):
    """The relative error of an average of F features is some e^(|q + k|^2 / 2) / sqrt(F) at most, here 2 %."""
    q, k = pair(4, heads=1, scale=0.7)
    phi = RandomFeatures(40000)
    params = make(phi, 1, 4)
    # Queries come scaled: compare within a row.
    got, want = products(phi, params, q, k), jnp.exp(scores(q, k) / 2)
    got, want = (w / jnp.sum(w, -1, keepdims=True) for w in (got, want))
    np.testing.assert_allclose(got, want, rtol=0.05)
    keys = phi.apply(params, jnp.zeros_like(q), k)  # of a query of zeros all features are equal
    np.testing.assert_allclose(jnp.sum(keys[1], -1) * 40000**-0.5, 1, rtol=0.05)


def test_random_rows_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones(x64):
    rows = make(RandomFeatures(4 * 64), 3, 64)["rows"]
    lengths = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    blocks = (rows / lengths).reshape(3, 4, 64, 64)
    gram = blocks @ jnp.swapaxes(blocks, -1, -2)
    np.testing.assert_allclose(gram, jnp.broadcast_to(jnp.eye(64), gram.shape), atol=1e-5)  # drawn in float32
    assert abs(float(jnp.mean(lengths**2)) / 64 - 1) < 0.03 and float(jnp.std(lengths)) > 0.3
    assert jnp.all(jnp.abs(rows[0, :64] - rows[1, :64]).max(-1) > 0)  # heads draw their own
    declared = RandomFeatures().params(1, 8)["rows"]
    assert not declared.trainable and declared.shape == (1, 32, 8)


@pytest.mark.parametrize("name", NAMED)
def test_features_are_positive_finite_and_differentiable(name):
    """In float32 with inputs from tiny to large; bfloat16 differs by its rounding."""
    phi = named(name)
    params = make(phi, 2, 4)

    @quick
    def run(q, k):
        f = lambda q, k: jnp.sum(products(phi, params, q, k))
        return phi.apply(params, q, k), jax.grad(f, (0, 1))(q, k)

    for scale in (0.0, 1e-3, 1.0, 8.0) + (() if name == "hedgehog_exp" else (1000.0,)):
        q, k = (x.astype(jnp.float32) for x in pair(4, scale=scale))
        features, grads = run(q, k)
        assert all(jnp.all(jnp.isfinite(x)) for x in (*features, *grads))
        if name != "taylor2":  # whose products are positive
            assert all(jnp.all(x >= 0) for x in features)
    q, k = pair(4)
    want = phi.apply(params, q, k)
    got = phi.apply(params, *(x.astype(jnp.bfloat16) for x in (q, k)))
    for a, b in zip(got, want):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0.1, atol=0.02)


def test_unknown_maps_and_numbers_are_refused():
    with pytest.raises(ValueError, match="feature_map: expected one of elu, relu.*did you mean 'hedgehog'"):
        named("hedgehoge")
    with pytest.raises(ValueError, match="features: expected None with feature_map 'elu'"):
        named("elu", 8)
    with pytest.raises(ValueError, match="features: expected a positive integer, got 0"):
        named("random", 0)
    with pytest.raises(ValueError, match="form: expected one of halves"):
        Hedgehog("half")
    assert named("random", 6).dim(100) == 6
