"""DeltaNet: its equations, a memory that stores and overwrites exactly, negative eigenvalues."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.mixers.recurrent.delta_net import DeltaNet
from tests.mixers.equations import agrees_with, compiled, tokens, weights
from tests.mixers.recurrent.delta_loops import heads, normed, recurrence

SMALL = DeltaNet(d_model=6, heads=2, key_dim=4, value_dim=3, conv_width=3, beta_max=2.0, chunk=4)


def by_the_equations(p, x):
    mixed = recurrence(*heads(p, x, beta_max=2.0), jnp.ones((*x.shape[:2], 2, 1)))
    return jnp.einsum("bthv,hvd->btd", normed(p, mixed), p["out"])


def test_forward_and_its_gradients_are_those_of_the_equations(x64):
    agrees_with(SMALL, by_the_equations)


def memory(size=4):
    """A mixer of one head whose tokens are [one-hot key, value, 1 to write or -1 to read], and its weights.

    silu keeps 0, so that keys stay one-hot; beta is 1 or 0 to the last bit.
    """
    width = 2 * size + 1
    mixer = DeltaNet(d_model=width, heads=1, key_dim=size, value_dim=size, conv_width=0, chunk=4)
    key, value, beta = np.zeros((width, 1, size)), np.zeros((width, 1, size)), np.zeros((width, 1))
    key[:size, 0] = 30 * np.eye(size)
    value[size : 2 * size, 0] = np.eye(size)
    beta[-1] = 80
    made = {"q": key, "k": key, "v": value, "beta": beta}
    return mixer, weights(mixer) | {name: jnp.asarray(w) for name, w in made.items()}


def token(key, value=None, size=4):
    """One that writes a value under a key, or without one reads it."""
    written = np.zeros(size) if value is None else value
    return np.concatenate([np.eye(size)[key], written, [-1.0 if value is None else 1.0]])


def read(mixer, p, rows):
    """What the memory answers at each token, times K^1/2, and the values as they were written."""
    x = jnp.asarray(np.stack(rows))[None]
    matrix = compiled(mixer.mixing_matrix)(p, x)
    values, _ = compiled(mixer.project)(p, x)
    return np.asarray(jnp.einsum("bhts,bshv->btv", matrix, values))[0] * 2, np.asarray(values)[0, :, 0]


def test_orthonormal_keys_are_stored_and_retrieved_exactly(x64):
    """As many pairs as channels, read back in another order; l2norm's 1e-6 under the root is the error."""
    mixer, p = memory()
    stored = np.random.default_rng(7).standard_normal((4, 4))
    answers, values = read(mixer, p, [token(i, stored[i]) for i in range(4)] + [token(i) for i in (2, 0, 3, 1)])
    assert np.max(np.abs(values[:4])) > 0.1
    np.testing.assert_allclose(answers[4:], values[[2, 0, 3, 1]], rtol=0, atol=1e-6)


def test_a_second_value_replaces_the_first_and_leaves_the_others(x64):
    mixer, p = memory()
    stored = np.random.default_rng(7).standard_normal((3, 4))
    rows = [token(0, stored[0]), token(1, stored[1]), token(0, stored[2]), token(0), token(1)]
    answers, values = read(mixer, p, rows)
    np.testing.assert_allclose(answers[3], values[2], rtol=0, atol=1e-6)
    np.testing.assert_allclose(answers[4], values[1], rtol=0, atol=1e-6)
    assert np.max(np.abs(values[0])) > 0.1  # linear attention would still add it


def test_beta_two_reflects_what_is_stored(x64):
    """The transition I - 2 k k^T has the eigenvalue -1: a write of nothing turns the sign (arXiv 2411.12537)."""
    mixer, p = memory()
    stored = np.random.default_rng(7).standard_normal(4)
    rows = [token(0, stored), token(0, np.zeros(4)), token(0)]
    mixer = dataclasses.replace(mixer, beta_max=2.0)
    answers, values = read(mixer, p, rows)
    np.testing.assert_allclose(answers[0], 2 * values[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(answers[2], -2 * values[0], rtol=0, atol=1e-5)


def test_decoding_equals_forward_with_a_state_that_does_not_grow(x64):
    p, x = weights(SMALL), tokens(SMALL, 9)
    want = compiled(SMALL.forward)(p, x)[0]
    y, state = compiled(SMALL.prefill)(p, x[:, :6], SMALL.init_state(p, 2, 9, jnp.float64))
    got, step = [y], compiled(SMALL.step)
    for t in range(6, 9):
        y, state = step(p, x[:, t : t + 1], state)
        got.append(y)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, rtol=0, atol=1e-11)
    assert SMALL.state_size(9) == SMALL.state_size(9000) == 2 * 4 * 3 + 2 * 2 * (4 + 4 + 3)


def test_fields_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"DeltaNet.beta_max: expected a number in \(0, 2\], got 3"):
        DeltaNet(beta_max=3)
    with pytest.raises(ValueError, match="DeltaNet.conv_width: expected an integer >= 0"):
        DeltaNet(conv_width=-1)
    with pytest.raises(ValueError, match="DeltaNet.chunk: expected a power of two"):
        DeltaNet(chunk=3)
    with pytest.raises(ValueError, match="DeltaNet.key_dim: expected a value"):
        DeltaNet(d_model=10)
