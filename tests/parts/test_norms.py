"""rms_norm against its formula: per head, over groups of heads, gated before and after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.parts.norms import l2_norm, norm_params, rms_norm

rng = np.random.default_rng(0)
X, GATE, SCALE = (
    rng.standard_normal((2, 5, 4, 3)),
    rng.standard_normal((2, 5, 4, 3)),
    rng.standard_normal((4, 3)),
)


def silu(x):
    return x / (1 + np.exp(-x))


def test_each_form_is_its_formula():
    def over(x, heads):
        """Normalised over so many consecutive heads at a time."""
        parts = x.reshape(2, 5, 4 // heads, heads * 3)
        return (parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 0.1)).reshape(x.shape)

    with jax.enable_x64(True):
        x, gate, scale = jnp.asarray(X), jnp.asarray(GATE), jnp.asarray(SCALE)
        cases = [
            (rms_norm(x, eps=0.1), over(X, 1)),
            (rms_norm(x, scale[0], eps=0.1), over(X, 1) * SCALE[0]),
            (rms_norm(x, scale, eps=0.1, groups=1), over(X, 4) * SCALE),
            (rms_norm(x, scale, eps=0.1, groups=2, gate=gate), over(X, 2) * SCALE * silu(GATE)),
            (
                rms_norm(x, scale, eps=0.1, groups=2, gate=gate, gate_first=True),
                over(X * silu(GATE), 2) * SCALE,
            ),
            (
                rms_norm(x, scale, skip=(scale[:, 0], gate), eps=0.1, groups=1),
                over(X + SCALE[:, :1] * GATE, 4) * SCALE,
            ),
            (rms_norm(x, eps=0.1, gate=gate, activation=jax.nn.sigmoid), over(X, 1) / (1 + np.exp(-GATE))),
        ]
        for got, expected in cases:
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14)


def test_low_precision_is_normalised_in_float32():
    x = jnp.asarray(100 * X, jnp.bfloat16)
    y = rms_norm(x, eps=0.0)
    assert y.dtype == jnp.bfloat16
    exact = rms_norm(x.astype(jnp.float32), eps=0.0)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=2**-8)  # one rounding to 8 significant bits


def test_the_scale_starts_at_one_and_does_not_decay():
    scale = norm_params((4, 3), ("heads", "head_dim"))["scale"]
    assert not scale.decay and np.all(scale.initializer(jax.random.key(0), scale.shape, scale.dtype) == 1)


def test_l2_norm_makes_vectors_of_length_one_and_is_differentiable_at_zero():
    with jax.enable_x64(True):
        got = l2_norm(jnp.asarray(X), eps=0.0)
        np.testing.assert_allclose(got, X / np.linalg.norm(X, axis=-1, keepdims=True), rtol=0, atol=1e-14)
        np.testing.assert_allclose(l2_norm(jnp.asarray(X)), got, rtol=0, atol=1e-6 / np.min(np.sum(X**2, -1)))
        zero = jnp.zeros((2, 3))
        np.testing.assert_array_equal(l2_norm(zero), zero)
        np.testing.assert_allclose(jax.grad(lambda x: jnp.sum(l2_norm(x)))(zero), 1e3 * np.ones((2, 3)), rtol=1e-12)
    y = l2_norm(jnp.asarray(1e4 * X, jnp.bfloat16))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), got, rtol=2**-7)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(gate=GATE[:1]), "gate: expected shape"),
        (dict(scale=SCALE[:, :2]), "scale: expected the trailing shape"),
        (dict(groups=3), "groups: expected a divisor"),
    ],
)
def test_shapes_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(X, **options)
