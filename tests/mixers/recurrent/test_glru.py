"""GLRU against its equations; tied gates keep the state a moving average."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.recurrent.glru import GLRU
from tests.mixers.equations import agrees_with, compiled, scan, sigmoid, tokens, weights

SMALL = GLRU(d_model=4, width=6, chunk=4)
UNTIED = GLRU(d_model=4, width=6, chunk=4, tied=False)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def by_the_equations(p, x):
    logits = {name: jnp.einsum("btd,dhk->bth", x, p[name]) + bias[:, 0] for name, bias in p["bias"].items()}
    i = sigmoid(logits["i"])
    f = sigmoid(logits["f"]) if "f" in logits else 1 - i
    step = lambda h, f, w: (f * h + w,) * 2
    h = scan(step, jnp.zeros((len(x), 6)), f, i * jnp.tanh(logits["z"]))
    return jnp.einsum("bth,hkd->btd", jnp.tanh(h) * sigmoid(logits["o"]), p["out"])


@pytest.mark.parametrize("mixer", [SMALL, UNTIED], ids=["tied", "untied"])
def test_forward_and_its_gradients_are_those_of_the_equations(mixer):
    agrees_with(mixer, by_the_equations)


def test_rows_of_the_tied_matrix_sum_to_one_less_what_is_kept_of_the_start():
    p, x = weights(SMALL, scale=2), tokens(SMALL, 9)
    run = compiled(lambda p, x: (SMALL.mixing_matrix(p, x), jnp.cumsum(SMALL._gates(p, x)[2], axis=1)))
    matrix, log_kept = run(p, x)
    want = 1 - np.exp(np.moveaxis(np.asarray(log_kept)[..., 0], 1, 2))
    np.testing.assert_allclose(np.sum(matrix, -1), want, atol=1e-12)


def test_the_weights_are_declared():
    assert param.count(GLRU(d_model=64).params()) == 4 * 64**2 + 3 * 64
    assert param.count(UNTIED.params()) == 5 * 4 * 6 + 4 * 6
    with pytest.raises(ValueError, match="GLRU.width: expected a positive integer, got 0"):
        GLRU(width=0)
