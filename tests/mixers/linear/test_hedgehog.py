"""Hedgehog: its equation, weights shared with attention, and how well it learns a softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from seqmix.core import param
from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.linear.hedgehog import Hedgehog
from seqmix.mixers.linear.linear_attention import LinearAttention

SMALL = Hedgehog(d_model=6, heads=2, key_dim=4, value_dim=3, rope=False, chunk=4)


def tokens(batch, time, width=6, seed=7):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, time, width)))


def test_forward_is_the_equation(x64):
    rng = np.random.default_rng(0)
    p = param.map_params(lambda w: jnp.asarray(0.6 * rng.standard_normal(w.shape)), SMALL.params())
    x = tokens(2, 7)

    def phi(side, h, u):
        w = u @ p["features"][side]["weight"][h] + p["features"][side]["bias"][h]
        return jnp.concatenate([jax.nn.softmax(w), jax.nn.softmax(-w)], -1)

    want = 0
    for h in range(2):
        q, k, v = (x @ p[name][:, h] for name in "qkv")
        w = jnp.tril(phi("q", h, q) @ jnp.swapaxes(phi("k", h, k), -1, -2))
        want = want + (w / (jnp.sum(w, -1, keepdims=True) + 1e-12)) @ v @ p["out"][h]
    np.testing.assert_allclose(SMALL.forward(p, x)[0], want, rtol=0, atol=1e-12)
    assert float(jnp.max(jnp.abs(want))) > 0.2


def test_it_takes_the_weights_of_an_attention_layer():
    hedgehog, soft = Hedgehog(d_model=8, heads=2), Attention(d_model=8, heads=2)
    mine = hedgehog.params()
    assert {name: mine[name] for name in soft.params()} == soft.params()
    assert set(mine) - set(soft.params()) == {"features"}


def test_rotary_positions_make_it_relative(x64):
    """Hedgehog maps rotated queries, so its weights see positions; a shift of all of them by a whole turn is none."""
    mixer = Hedgehog(d_model=6, heads=2, key_dim=2, chunk=4)  # one frequency, of 1 radian a token
    p = param.materialise(mixer.params(), jax.random.key(0))
    x = tokens(1, 6)
    place = jnp.arange(6.0)[None]
    run = lambda place: mixer.mixing_matrix(p, x, positions=place)
    np.testing.assert_allclose(run(place + 2 * np.pi), run(place), atol=1e-6)  # weights are drawn in float32
    assert float(jnp.max(jnp.abs(run(2 * place) - run(place)))) > 1e-2


def test_it_learns_a_softmax_three_times_closer_than_fixed_maps():
    """KL(softmax rows || rows) on fresh tokens after fitting the map alone, against the other maps' (paper, table 4)."""
    width, size = 16, 8
    soft = Attention(d_model=width, heads=2, head_dim=size, rope=False)
    rng = np.random.default_rng(1)
    p = param.map_params(lambda w: jnp.asarray(rng.standard_normal(w.shape) * w.shape[0] ** -0.5), soft.params())
    p |= {"q": 1.5 * p["q"], "k": 1.5 * p["k"]}  # scores with a standard deviation of some 2: rows with peaks
    fields = {"d_model": width, "heads": 2, "key_dim": size}
    hedgehog = Hedgehog(rope=False, **fields)
    draw = lambda seed: tokens(8, 24, width, seed).astype(jnp.float32)

    def divergence(mixer, p, x):
        teacher, student = soft.mixing_matrix(p, x), mixer.mixing_matrix(p, x)
        seen = jnp.tril(jnp.ones(teacher.shape[-2:], bool))
        ratio = jnp.where(seen, teacher / jnp.where(seen, student + 1e-12, 1), 1)
        return jnp.mean(jnp.sum(teacher * jnp.log(jnp.maximum(ratio, 1e-30)), -1))

    @jax.jit
    def fit(features, batches):
        optimiser = optax.adam(0.03)

        def step(carry, x):
            features, state = carry
            grads = jax.grad(lambda f: divergence(hedgehog, p | {"features": f}, x))(features)
            updates, state = optimiser.update(grads, state)
            return (optax.apply_updates(features, updates), state), None

        return jax.lax.scan(step, (features, optimiser.init(features)), batches)[0][0]

    test = draw(100)
    start = param.materialise(hedgehog.params(), jax.random.key(0))["features"]
    fitted = fit(start, jnp.stack([draw(seed) for seed in range(300)]))
    learned = float(divergence(hedgehog, p | {"features": fitted}, test))
    for name in ("elu", "relu", "random"):
        mixer = LinearAttention(feature_map=name, **fields)
        fixed = param.materialise(mixer.params(), jax.random.key(0)).get("features", {})
        assert learned < float(divergence(mixer, p | {"features": fixed}, test)) / 3, name
    assert learned < float(divergence(hedgehog, p | {"features": start}, test)) / 3


def test_fields_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="Hedgehog.form: expected one of halves, whole, exp"):
        Hedgehog(form="softmax")
    with pytest.raises(ValueError, match="Hedgehog.key_dim, rope_base: size: expected an even"):
        Hedgehog(d_model=6, heads=2)
    with pytest.raises(ValueError, match="Hedgehog.eps"):
        Hedgehog(eps=-1.0)
