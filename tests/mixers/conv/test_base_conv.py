"""BaseConv's claims: the equation, and that a token sees its last taps and no more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.conv.base_conv import BaseConv

MIXER = BaseConv(d_model=6)


def weights(seed=0):
    tree = param.materialise(MIXER.params(), jax.random.key(seed))
    return {name: w + 0.1 * jax.random.normal(jax.random.key(i), w.shape) for i, (name, w) in enumerate(tree.items())}


def test_it_is_the_equation_token_by_token():
    with jax.enable_x64(True):
        p = {name: np.asarray(w, np.float64) for name, w in weights().items()}
        x = np.asarray(jax.random.normal(jax.random.key(9), (2, 7, 6)), np.float64)
        y, aux = MIXER.forward(p, jnp.asarray(x))
        for t in range(7):
            window = [x[:, t - j] if t >= j else 0 * x[:, 0] for j in range(3)]
            u = p["conv_bias"] + sum(p["conv"][2 - j] * window[j] for j in range(3))
            np.testing.assert_allclose(y[:, t], (x[:, t] @ p["gate"] + p["gate_bias"]) * u, rtol=1e-12, atol=1e-14)
        assert aux == {}


def test_a_token_reaches_the_next_two_and_no_further():
    x = jax.random.normal(jax.random.key(1), (1, 8, 6))
    moved = MIXER.forward(weights(), x.at[0, 3].add(1.0))[0] - MIXER.forward(weights(), x)[0]
    assert np.abs(moved[0]).max(-1).astype(bool).tolist() == [False] * 3 + [True] * 3 + [False] * 2


def test_a_width_that_is_no_width_is_refused():
    with pytest.raises(ValueError, match=r"BaseConv.conv_width: expected a positive integer, got 0"):
        BaseConv(conv_width=0)
