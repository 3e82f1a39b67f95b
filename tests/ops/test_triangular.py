"""The inverse of unit lower triangular matrices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.ops.triangular import unit_lower_inverse, unit_lower_inverse_flops

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_it_is_the_inverse_and_reads_below_the_diagonal_alone(size, x64):
    a = np.random.default_rng(size).normal(size=(2, 3, size, size)) / 4
    expected = np.linalg.inv(np.eye(size) + np.tril(a, -1))
    got = jit(unit_lower_inverse)(jnp.asarray(a))
    np.testing.assert_allclose(got, expected, atol=1e-12 * np.abs(expected).max())
    np.testing.assert_array_equal(np.triu(got), np.broadcast_to(np.eye(size), a.shape))


def test_equal_keys_at_the_largest_beta_keep_their_digits():
    # The system of a reflection by one and the same key at each step. Powers of `a`, of which a Neumann series
    # is the sum, reach 1e18 here; the inverse itself alternates between 2 and -2.
    size = 64
    a = np.tril(np.full((1, size, size), 2.0, np.float32), -1)
    expected = np.linalg.inv(np.eye(size) + a.astype(np.float64))
    assert np.abs(np.linalg.matrix_power(a[0].astype(np.float64), 16)).max() > 1e15
    np.testing.assert_allclose(jit(unit_lower_inverse)(jnp.asarray(a)), expected, atol=1e-5)


def test_derivatives_both_ways_are_those_of_the_inverse(x64):
    rng = np.random.default_rng(0)
    a, da, weight = (jnp.asarray(rng.normal(size=(2, 16, 16)) / 4) for _ in range(3))

    def direct(a):
        return jnp.linalg.inv(jnp.eye(16) + jnp.tril(a, -1))

    tangent = jit(lambda f, *x: jax.jvp(f, *x)[1], static_argnums=0)
    got, expected = (tangent(f, (a,), (da,)) for f in (unit_lower_inverse, direct))
    np.testing.assert_allclose(got, expected, atol=1e-10)
    loss = lambda f: jit(jax.grad(lambda a: jnp.sum(f(a) * weight)))
    np.testing.assert_allclose(loss(unit_lower_inverse)(a), loss(direct)(a), atol=1e-10)


def test_flops_are_those_that_xla_counts():
    counted = jit(unit_lower_inverse).lower(jnp.zeros((1, 64, 64))).compile().cost_analysis()["flops"]
    assert abs(unit_lower_inverse_flops(64) / counted - 1) < 0.05
