"""Linear attention: the paper's recurrence, other maps, both directions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.linear.linear_attention import LinearAttention
from tests.mixers.equations import agrees_with, compiled, scan, tokens, weights

SMALL = LinearAttention(d_model=6, heads=2, key_dim=3, value_dim=4, chunk=4)


def by_the_paper(p, x):
    """Equations 18 to 20 with the feature map of equation 7."""
    phi = lambda u: jax.nn.elu(u) + 1
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")

    def step(state, q, k, v):
        s, z = state
        s, z = s + phi(k)[..., None] * v[..., None, :], z + phi(k)
        below = jnp.sum(phi(q) * z, -1, keepdims=True) + SMALL.eps
        return (s, z), jnp.einsum("bhk,bhkv->bhv", phi(q), s) / below

    state = jnp.zeros((len(x), 2, 3, 4)), jnp.zeros((len(x), 2, 3))
    return jnp.einsum("bthv,hvd->btd", scan(step, state, q, k, v), p["out"])


def test_forward_and_its_gradients_are_those_of_the_recurrence(x64):
    agrees_with(SMALL, by_the_paper)


def test_decoding_equals_forward_with_a_state_that_does_not_grow(x64):
    p, x = weights(SMALL), tokens(SMALL, 9)
    want = compiled(SMALL.forward)(p, x)[0]
    y, state = compiled(SMALL.prefill)(p, x[:, :5], SMALL.init_state(p, 2, 9, jnp.float64))
    got, step = [y], compiled(SMALL.step)
    for t in range(5, 9):
        y, state = step(p, x[:, t : t + 1], state)
        got.append(y)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, rtol=0, atol=1e-12)
    assert SMALL.state_size(10) == SMALL.state_size(10**6) == 2 * (3 * 4 + 3)


def test_the_first_token_is_its_own_value(x64):
    """Its weight is w / (w + eps), here exactly 1."""
    mixer = LinearAttention(d_model=6, heads=2, key_dim=3, value_dim=4, chunk=4, eps=0.0)
    p, x = weights(mixer), tokens(SMALL, 5)
    v = jnp.einsum("bd,dhv->bhv", x[:, 0], p["v"])
    np.testing.assert_allclose(
        compiled(mixer.forward)(p, x)[0][:, 0], jnp.einsum("bhv,hvd->bd", v, p["out"]), atol=1e-12
    )


def test_without_causality_each_token_reads_its_whole_segment(x64):
    mixer = LinearAttention(d_model=6, heads=2, key_dim=3, value_dim=4, chunk=4, causal=False)
    p, x = weights(mixer), tokens(SMALL, 7)
    run = compiled(mixer.forward)
    y, flipped = run(p, x)[0], run(p, x[:, ::-1])[0]
    np.testing.assert_allclose(flipped[:, ::-1], y, rtol=0, atol=1e-12)  # it has no order
    np.testing.assert_allclose(y[:, -1], compiled(SMALL.forward)(p, x)[0][:, -1], rtol=0, atol=1e-12)
    assert not mixer.decodes
    with pytest.raises(ValueError, match="LinearAttention does not decode without causality"):
        mixer.init_state(p, 2, 7)


def test_many_random_features_are_softmax_attention(x64):
    """FAVOR+ is unbiased: rows within 0.04 of the softmax's with 10000 features, and not within it with 8."""
    soft = Attention(d_model=6, heads=2, head_dim=4, rope=False)
    p, x = weights(soft), tokens(SMALL, 8)
    p |= {"q": 0.5 * p["q"], "k": 0.5 * p["k"]}  # the variance grows as the exponential of |q + k|^2
    want = compiled(soft.mixing_matrix)(p, x)
    errors = []
    for features in (8, 10000):
        mixer = LinearAttention(d_model=6, heads=2, key_dim=4, value_dim=4, feature_map="random", features=features)
        drawn = compiled(functools.partial(param.materialise, mixer.params()))(jax.random.key(0))["features"]
        got = compiled(mixer.mixing_matrix)(p | {"features": drawn}, x)
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
