"""RetNet against the recurrence it is published as, and against its parallel form with all normalisations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.recurrent.retnet import RetNet
from seqmix.parts.rotary import frequencies
from tests.mixers.equations import agrees_with, compiled, scan, silu, tokens, weights

SMALL = RetNet(d_model=6, heads=3, key_dim=4, value_dim=5, chunk=4)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def heads(x, weight):
    return jnp.einsum("btd,dhk->bthk", x, weight)


def group_norm(x, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps)


def as_a_complex_recurrence(p, x):
    """s_t = gamma e^{i theta} s_{t-1} + conj(k_t) v_t: retention before rotations are moved into q and k (eq. 1-3)."""
    q, k, v, gate = (heads(x, p[name]) for name in ("q", "k", "v", "gate"))
    q, k = (z[..., :2] + 1j * z[..., 2:] for z in (q, k))
    gamma = 1 - 2.0 ** (-5 - np.arange(3))
    a = gamma[:, None] * np.exp(1j * frequencies(4))

    def step(s, q, k, v):
        s = a[..., None] * s + jnp.conj(k)[..., None] * v[..., None, :]
        return s, jnp.sum(q[..., None] * s, axis=-2).real / 2

    mixed = scan(step, jnp.zeros((len(x), 3, 2, 5), complex), q, k, v)
    return jnp.einsum("bthv,hvd->btd", group_norm(mixed, 1e-5) * silu(gate), p["out"])


def test_forward_and_its_gradients_are_those_of_the_complex_recurrence():
    agrees_with(SMALL, as_a_complex_recurrence)


def test_the_published_normalisations_of_scores_cancel_in_the_norm():
    """Equation 5 with the paper's three normalisations, each row scaled by a number of its own."""
    mixer = dataclasses.replace(SMALL, norm_eps=1e-30)
    p, x = weights(mixer), tokens(mixer, 9)
    t = np.arange(9)
    gamma = 1 - 2.0 ** (-5 - np.arange(3))
    decay = np.tril(gamma[:, None, None] ** np.maximum(t[:, None] - t, 0))

    @compiled
    def run(p, x):
        scores = mixer.mixing_matrix(p, x) / np.where(decay == 0, 1, decay)  # q k^T / sqrt(K)
        r = scores * decay / np.sqrt(decay.sum(-1, keepdims=True))
        total = jnp.abs(r.sum(-1, keepdims=True))
        values, context = mixer.project(p, x)
        mixed = jnp.einsum("bhts,bshv->bthv", r / jnp.maximum(total, 1), values)
        return total, mixer.merge(p, context, mixed), mixer.forward(p, x)[0]

    total, normalised, y = run(p, x)
    assert np.any(total > 1) and np.any(total < 1)
    np.testing.assert_allclose(normalised, y, atol=1e-11)


def test_only_the_group_norm_subtracts_the_mean():
    p, x = weights(SMALL), tokens(SMALL, 5)

    @compiled
    def run(p, x):
        values, context = SMALL.project(p, x)
        mixers = SMALL, dataclasses.replace(SMALL, norm="rms")
        return [m.merge(p, context, values + 3.0) - m.merge(p, context, values) for m in mixers]

    group, rms = run(p, x)
    np.testing.assert_allclose(group, 0, atol=1e-11)
    assert np.max(np.abs(rms)) > 0.1


def test_positions_given_only_rotate():
    p, x = weights(SMALL), tokens(SMALL, 6)
    run = compiled(lambda place: SMALL.forward(p, x, positions=place)[0])
    place = np.tile(np.arange(6), (2, 1))
    y, later, other = run(place), run(place + 1000), run(2 * place)
    np.testing.assert_allclose(later, y, atol=1e-10)
    assert np.max(np.abs(other - y)) > 1e-3


def test_the_weights_are_the_published_ones_in_number():
    mixer = RetNet(d_model=2048)
    assert mixer.sizes == (256, 512) and param.count(mixer.params()) == 8 * 2048**2
    decays = np.asarray(mixer._log_decay(jnp.float64))
    np.testing.assert_allclose(np.exp(decays[[0, 7]]), [31 / 32, 4095 / 4096], rtol=1e-15)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(d_model=6, heads=4), "RetNet.key_dim: expected a value, or a number of heads that divides d_model"),
        (dict(d_model=6, heads=2), "RetNet.key_dim, rope_base: size: expected an even number"),
        (dict(norm="layer"), "RetNet.norm: expected one of group, rms"),
        (dict(chunk=48), "RetNet.chunk: expected a power of two"),
        (dict(heads=0), "RetNet.heads: expected a positive integer"),
    ],
)
def test_bad_fields_are_named_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        RetNet(**fields)
    assert "\n" not in str(error.value)
