"""Based: the quadratic form, the state of mapped keys, the stack with a window."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.linear.based import Based
from seqmix.models import LM
from seqmix.parts.feature_maps import Taylor2
from tests.mixers.equations import agrees_with, compiled, tokens, weights

SMALL = Based(d_model=6, heads=2, key_dim=3, value_dim=4, chunk=4)


def quadratic(p, x):
    """Weights 1 + u + u^2 / 2 of all pairs, without features."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    u = jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5
    w = jnp.where(jnp.tril(jnp.ones(u.shape[-2:], bool)), 1 + u + u * u / 2, 0)
    return jnp.einsum("bhts,bshv,hvd->btd", w / (jnp.sum(w, -1, keepdims=True) + SMALL.eps), v, p["out"])


def test_forward_and_its_gradients_are_those_of_the_quadratic_form(x64):
    agrees_with(SMALL, quadratic, time=11)


def test_prefill_leaves_the_state_of_mapped_keys_and_steps_go_on_from_it(x64):
    """The released code's fused prefill keeps a state of keys as they are, which its decoding cannot read."""
    p, x = weights(SMALL), tokens(SMALL, 8)
    y, state = compiled(SMALL.prefill)(p, x[:, :6], SMALL.init_state(p, 2, 8, jnp.float64))
    k, v = (jnp.einsum("btd,dhk->bthk", x[:, :6], p[name]) for name in "kv")
    _, phi = Taylor2().apply({}, k, k)
    np.testing.assert_allclose(state["kv"], jnp.einsum("bthf,bthv->bhfv", phi, v), atol=1e-11)
    np.testing.assert_allclose(state["k"], jnp.sum(phi, 1), atol=1e-11)
    got = [y]
    for t in (6, 7):
        y, state = compiled(SMALL.step)(p, x[:, t : t + 1], state)
        got.append(y)
    np.testing.assert_allclose(jnp.concatenate(got, 1), quadratic(p, x), rtol=0, atol=1e-11)


def test_weights_are_a_mean_even_where_scores_are_very_negative(x64):
    """1 + u + u^2 / 2 is at least 1/2, so that no denominator vanishes."""
    p = weights(SMALL)
    matrix = SMALL.mixing_matrix(p | {"q": -p["k"]}, tokens(SMALL, 11))  # u_tt = -|k|^2 / sqrt(K)
    np.testing.assert_allclose(jnp.sum(matrix, -1), 1, atol=1e-11)
    assert jnp.min(matrix) >= 0


def test_the_published_sizes():
    mixer = Based(d_model=1024)
    assert mixer.state_size(2048) == 16 * 153 * (64 + 1)  # 273 there, with both halves of the products
    assert param.count(mixer.params()) == 2 * 1024 * 256 + 2 * 1024 * 1024


def test_a_stack_alternates_it_with_a_narrow_exact_window(x64):
    """The paper's plan in one period: global Taylor attention, then exact attention to the last few tokens."""
    window = Attention(heads=2, window=3, block=4)
    mixers = (Based(heads=2, key_dim=2, chunk=4), window)
    model = LM(vocab=11, d_model=8, n_layers=2, mixers=mixers, compute_dtype="float64")
    p = compiled(functools.partial(param.materialise, model.params()))(jax.random.key(0))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 11, (2, 9)))
    run = compiled(model.forward)
    want = run(p, ids)[0]
    y, state = compiled(model.prefill)(p, ids[:, :7], model.init_state(p, 2, 9))
    got, step = [y], compiled(model.step)
    for t in (7, 8):
        y, state = step(p, ids[:, t : t + 1], state)
        got.append(y)
    np.testing.assert_allclose(jnp.concatenate(got, 1), want, rtol=0, atol=1e-10)
    assert [s["k"].shape[2] for s in state["layers"][:1]] == [2]  # heads; no tokens are kept
    # What the first token holds reaches the last through the global layers alone: the window has 3 tokens.
    far = run(p, ids.at[:, 0].set((ids[:, 0] + 1) % 11))[0]
    assert float(jnp.max(jnp.abs(far[:, -1] - want[:, -1]))) > 1e-6


def test_fields_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="Based.key_dim: expected an integer, got None"):
        Based(key_dim=None)
    with pytest.raises(ValueError, match="Based.eps"):
        Based(eps=-1e-3)
    with pytest.raises(ValueError, match="Based.value_dim: expected a value"):
        Based(d_model=40)
