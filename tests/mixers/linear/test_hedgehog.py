"""Hedgehog: its equation, weights shared with attention, and how well it learns a softmax."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqmix.core import param
from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.linear.hedgehog import Hedgehog
from seqmix.parts import feature_maps
from seqmix.parts.feature_attention import attention_weights
from tests.mixers.equations import agrees_with, compiled, tokens

SMALL = Hedgehog(d_model=6, heads=2, key_dim=4, value_dim=3, rope=False, chunk=4)


def by_the_equation(p, x):
    def phi(side, h, u):
        w = u @ p["features"][side]["weight"][h] + p["features"][side]["bias"][h]
        return jnp.concatenate([jax.nn.softmax(w), jax.nn.softmax(-w)], -1)

    y = 0
    for h in range(2):
        q, k, v = (x @ p[name][:, h] for name in "qkv")
        w = jnp.tril(phi("q", h, q) @ jnp.swapaxes(phi("k", h, k), -1, -2))
        y = y + (w / (jnp.sum(w, -1, keepdims=True) + 1e-12)) @ v @ p["out"][h]
    return y


def test_forward_and_its_gradients_are_those_of_the_equation(x64):
    agrees_with(SMALL, by_the_equation)


def test_it_takes_the_weights_of_an_attention_layer():
    hedgehog, soft = Hedgehog(d_model=8, heads=2), Attention(d_model=8, heads=2)
    mine = hedgehog.params()
    assert {name: mine[name].shape for name in soft.params()} == {name: w.shape for name, w in soft.params().items()}
    assert set(mine) - set(soft.params()) == {"features"}


def test_rotary_positions_make_it_relative(x64):
    """Hedgehog maps rotated queries, so its weights see positions; a shift of all of them by a whole turn is none."""
    mixer = Hedgehog(d_model=6, heads=2, key_dim=2, chunk=4)  # one frequency, of 1 radian a token
    p = compiled(functools.partial(param.materialise, mixer.params()))(jax.random.key(0))
    x = tokens(mixer, 6, batch=1)
    place = jnp.arange(6.0)[None]
    run = compiled(lambda place: mixer.mixing_matrix(p, x, positions=place))
    np.testing.assert_allclose(run(place + 2 * np.pi), run(place), atol=1e-6)  # weights are drawn in float32
    assert float(jnp.max(jnp.abs(run(2 * place) - run(place)))) > 1e-2


def test_it_learns_the_softmax_of_a_few_keys_three_times_closer_than_fixed_maps():
    """KL(softmax rows || rows) on fresh tokens, after fitting the maps alone (the paper's distillation).

    Queries and keys are drawn from eight vectors, as where tokens come back: rows have peaks. Of independent Gaussian
    vectors, which have no such structure, the maps learn only some half of what elu + 1 misses.
    """
    rng, size, length = np.random.default_rng(0), 8, 24
    table = rng.standard_normal((8, size))
    table = jnp.asarray(2 * size**0.5 * table / np.linalg.norm(table, axis=-1, keepdims=True), jnp.float32)
    seen = jnp.tril(jnp.ones((length, length), bool))

    def divergence(phi, params, key):
        q, k = (table[ids][:, :, None] for ids in jax.random.randint(key, (2, 8, length), 0, len(table)))
        scores = jnp.where(seen, jnp.einsum("bthk,bshk->bhts", q, k) / size**0.5, -1e30)
        teacher, log_teacher = jax.nn.softmax(scores), jax.nn.log_softmax(scores)
        student = attention_weights(*phi.apply(params, q, k), eps=1e-12)
        gap = jnp.where(seen, log_teacher - jnp.log(jnp.where(seen, student, 1) + 1e-12), 0)
        return jnp.mean(jnp.sum(teacher * gap, -1))

    @compiled
    def fit(params, keys):
        optimiser = optax.adam(0.03)

        def step(carry, key):
            params, state = carry
            grads = jax.grad(lambda p: divergence(feature_maps.Hedgehog(), p, key))(params)
            updates, state = optimiser.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimiser.init(params)), keys)[0][0]

    @compiled
    def measure(learned):
        fixed = {name: feature_maps.named(name) for name in ("elu", "relu", "random", "hedgehog")}
        params = {name: param.materialise(phi.params(1, size), jax.random.key(0)) for name, phi in fixed.items()}
        of = lambda phi, p: divergence(phi, p, jax.random.key(5))
        return of(fixed["hedgehog"], learned), {name: of(phi, params[name]) for name, phi in fixed.items()}

    start = param.materialise(feature_maps.Hedgehog().params(1, size), jax.random.key(0))
    learned, others = measure(fit(start, jax.random.split(jax.random.key(1), 250)))
    for name, fixed in others.items():
        assert learned < fixed / 3, name


def test_fields_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="Hedgehog.form: expected one of halves, whole, exp"):
        Hedgehog(form="softmax")
    with pytest.raises(ValueError, match="Hedgehog.key_dim, rope_base: size: expected an even"):
        Hedgehog(d_model=6, heads=2)
    with pytest.raises(ValueError, match="Hedgehog.eps"):
        Hedgehog(eps=-1.0)
