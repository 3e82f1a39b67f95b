"""Linear attention: the paper's recurrence, other maps, both directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.linear.linear_attention import LinearAttention

quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # halves compile time
SMALL = LinearAttention(d_model=6, heads=2, key_dim=3, value_dim=4, chunk=4)


def weights(mixer, seed=0):
    rng = np.random.default_rng(seed)
    return param.map_params(lambda p: jnp.asarray(0.5 * rng.standard_normal(p.shape)), mixer.params())


def tokens(batch, time, width=6, seed=7):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, time, width)))


def by_the_paper(p, x, eps):
    """Equations 18 to 20, token by token and head by head, with the feature map of equation 7."""
    phi = lambda u: jax.nn.elu(u) + 1
    heads, ys = range(p["q"].shape[1]), []
    s = [jnp.zeros((len(x), 3, 4)) for _ in heads]
    z = [jnp.zeros((len(x), 3)) for _ in heads]
    for t in range(x.shape[1]):
        y = 0
        for h in heads:
            q, k, v = (x[:, t] @ p[name][:, h] for name in "qkv")
            s[h] = s[h] + phi(k)[:, :, None] * v[:, None, :]
            z[h] = z[h] + phi(k)
            below = jnp.sum(phi(q) * z[h], -1, keepdims=True) + eps
            y = y + (jnp.einsum("bk,bkv->bv", phi(q), s[h]) / below) @ p["out"][h]
        ys.append(y)
    return jnp.stack(ys, axis=1)


def test_forward_and_its_gradients_are_those_of_the_recurrence(x64):
    p, x, cotangent = weights(SMALL), tokens(2, 7), tokens(2, 7, seed=8)

    def run(f):
        return quick(jax.value_and_grad(lambda p, x: (jnp.sum(f(p, x) * cotangent), f(p, x)), (0, 1), has_aux=True))

    (_, got), got_grads = run(lambda p, x: SMALL.forward(p, x)[0])(p, x)
    (_, want), grads = run(lambda p, x: by_the_paper(p, x, SMALL.eps))(p, x)
    assert float(jnp.max(jnp.abs(want))) > 0.3
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)
    for a, b in zip(jax.tree.leaves(got_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


def test_decoding_equals_forward_with_a_state_that_does_not_grow(x64):
    p, x = weights(SMALL), tokens(2, 9)
    want = quick(SMALL.forward)(p, x)[0]
    y, state = quick(SMALL.prefill)(p, x[:, :5], SMALL.init_state(p, 2, 9, jnp.float64))
    got, step = [y], quick(SMALL.step)
    for t in range(5, 9):
        y, state = step(p, x[:, t : t + 1], state)
        got.append(y)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, rtol=0, atol=1e-12)
    assert SMALL.state_size(10) == SMALL.state_size(10**6) == 2 * (3 * 4 + 3)


def test_the_first_token_is_its_own_value(x64):
    """Its weight is w / (w + eps), here exactly 1."""
    mixer = LinearAttention(d_model=6, heads=2, key_dim=3, value_dim=4, chunk=4, eps=0.0)
    p, x = weights(mixer), tokens(2, 5)
    v = jnp.einsum("bd,dhv->bhv", x[:, 0], p["v"])
    np.testing.assert_allclose(quick(mixer.forward)(p, x)[0][:, 0], jnp.einsum("bhv,hvd->bd", v, p["out"]), atol=1e-12)


def test_without_causality_each_token_reads_its_whole_segment(x64):
    mixer = LinearAttention(d_model=6, heads=2, key_dim=3, value_dim=4, chunk=4, causal=False)
    p, x = weights(mixer), tokens(2, 7)
    run = quick(mixer.forward)
    y, flipped = run(p, x)[0], run(p, x[:, ::-1])[0]
    np.testing.assert_allclose(flipped[:, ::-1], y, rtol=0, atol=1e-12)  # it has no order
    np.testing.assert_allclose(y[:, -1], quick(SMALL.forward)(p, x)[0][:, -1], rtol=0, atol=1e-12)
    assert not mixer.decodes
    with pytest.raises(ValueError, match="LinearAttention does not decode without causality"):
        mixer.init_state(p, 2, 7)


def test_many_random_features_are_softmax_attention(x64):
    """FAVOR+ is unbiased: rows within 0.04 of the softmax's with 10000 features, and not within it with 8."""
    soft = Attention(d_model=6, heads=2, head_dim=4, rope=False)
    p, x = weights(soft), tokens(2, 8)
    p |= {"q": 0.5 * p["q"], "k": 0.5 * p["k"]}  # the variance grows as the exponential of |q + k|^2
    want = quick(soft.mixing_matrix)(p, x)
    errors = []
    for features in (8, 10000):
        mixer = LinearAttention(d_model=6, heads=2, key_dim=4, value_dim=4, feature_map="random", features=features)
        drawn = quick(functools.partial(param.materialise, mixer.params()))(jax.random.key(0))["features"]
        got = quick(mixer.mixing_matrix)(p | {"features": drawn}, x)
        errors.append(float(jnp.max(jnp.abs(got - want))))
    assert errors[1] < 0.04 < errors[0]


def test_fields_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="LinearAttention.feature_map: expected one of .*did you mean 'elu'"):
        LinearAttention(feature_map="elu1")
    with pytest.raises(ValueError, match="LinearAttention.features: expected None"):
        LinearAttention(features=3)
    with pytest.raises(ValueError, match="LinearAttention.eps: expected a number >= 0"):
        LinearAttention(eps=-1.0)
    with pytest.raises(ValueError, match="LinearAttention.key_dim: expected a value"):
        LinearAttention(d_model=10, heads=4)
