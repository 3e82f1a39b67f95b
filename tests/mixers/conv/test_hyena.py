"""Hyena against its equations, with every convolution a sum over lags; what filters start as; decoding in splits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.conv.hyena import Hyena
from tests.mixers.equations import agrees_with, compiled, tokens, weights

SMALL = Hyena(d_model=4, order=3, max_len=16, filter_width=5, filter_features=5, shift=0.1)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def past(u, taps, time):
    """sum_j taps[j] u_{t-j}, taps [J, ...]."""
    moved = [jnp.pad(u, ((0, 0), (j, 0), *[(0, 0)] * (u.ndim - 2)))[:, :time] for j in range(min(len(taps), time))]
    return sum(tap * m for tap, m in zip(taps, moved))


def by_the_equations(p, x):
    time, f = x.shape[1], p["filter"]
    u = jnp.einsum("btd,dne->btne", x, p["in"]) + p["in_bias"]
    u = past(u, p["conv"][::-1], time) + p["conv_bias"]
    *gates, v = (u[:, :, n] for n in range(4))
    s = jnp.sin(f["frequency"] * (f["z"][:time] @ f["in"] + f["in_bias"]))
    for i in range(2):
        s = jnp.sin(f["frequency"] * (s @ f["hidden"][i] + f["hidden_bias"][i]))
    delta = np.log(100) * np.linspace(1 / 1.5, 1 / 0.3, 8)
    for n in (2, 1):
        window = np.exp(-np.arange(time)[:, None] / 15 * delta[4 * (n - 1) : 4 * n]) + 0.1
        u = gates[n] * v
        v = past(u, s @ f["out"][:, n - 1] * window, time) + p["bias"][n - 1] * u
    return (gates[0] * v) @ p["out"] + p["out_bias"]


def test_forward_and_its_gradients_are_those_of_the_equations():
    agrees_with(SMALL, by_the_equations, time=16)


def test_a_filter_of_lag_zero_alone_leaves_a_product_of_projections():
    mixer = Hyena(d_model=4, max_len=16, conv_width=1)
    p, x = weights(mixer), tokens(mixer, 9)
    p |= {"filter": p["filter"] | {"out": 0 * p["filter"]["out"]}, "bias": 0 * p["bias"] + 1}
    x0, x1, v = (p["conv"][0, n] * (x @ p["in"][:, n] + p["in_bias"][n]) + p["conv_bias"][n] for n in range(3))
    want = (x0 * x1 * v) @ p["out"] + p["out_bias"]
    np.testing.assert_allclose(compiled(mixer.forward)(p, x)[0], want, atol=1e-12)


def test_decoding_in_splits_and_with_less_room_equals_forward():
    p, x = weights(SMALL), tokens(SMALL, 11)
    prefill = compiled(SMALL.prefill)
    want = compiled(SMALL.forward)(p, x)[0]
    for ends in ((4, 8, 9, 10, 11), (1, 2, 6, 10, 11)):
        state, got, start = SMALL.init_state(p, 2, 11, jnp.float64), [], 0
        for end in ends:
            y, state = prefill(p, x[:, start:end], state)
            got, start = [*got, y], end
        np.testing.assert_allclose(np.concatenate(got, 1), want, atol=1e-12)
        assert state["length"].tolist() == [11, 11]


def test_lags_start_as_time_and_waves_and_windows_fall_to_a_hundredth():
    mixer = Hyena(d_model=4, max_len=151, filter_features=5)
    z = np.asarray(mixer._features(None, None, np.float64))
    place = np.arange(151)
    want = [place / 150, *(f(2 * np.pi * w * place / 151) for f in (np.cos, lambda a: -np.sin(a)) for w in (1e-4, 1))]
    np.testing.assert_allclose(z, np.stack(want, 1), atol=1e-12)
    # A filter whose MLP gives 1 is its window. The last channel's falls to 0.01 after 0.3 of max_len.
    p = weights(mixer)
    f = {name: 0 * w for name, w in p["filter"].items()} | {"frequency": p["filter"]["frequency"] * 0 + 1}
    f["hidden_bias"] = f["hidden_bias"].at[1].set(np.pi / 2)
    f["out"] = f["out"] + 1 / 64
    h = mixer.filters({"filter": f}, 151, jnp.float64)
    assert h.shape == (1, 4, 151)
    np.testing.assert_allclose([h[0, 3, 45], h[0, 0, 150], h[0, 1, 0]], [0.01, 0.01 ** (1 / 1.5), 1], rtol=1e-12)


def test_the_weights_are_declared():
    tree = Hyena(d_model=64, max_len=100).params()
    mlp = 100 * 3 + 64 + 3 * 64 + 64 + 2 * (64 * 64 + 64) + 64 * 64
    assert param.count(tree) == 4 * 64 * 64 + 4 * 64 + 3 * 64 * 4 + 64 + mlp
    assert {name for name, p in param.entries(tree) if p.decay} == {"in", "conv", "out"}
    assert tree["filter"]["z"].lr_scale == 0.01
    assert Hyena(d_model=64).state_size(100) == 64 * (2 * 3 + 100) + 1


def test_what_does_not_fit_is_named_in_one_line():
    p, x = weights(SMALL), tokens(SMALL, 17)
    state = SMALL.init_state(p, 2, 16)
    ids = jnp.ones((2, 4), jnp.int32)
    cases = [
        (lambda: Hyena(order=1), "Hyena.order: expected an integer >= 2, got 1"),
        (lambda: Hyena(max_len=1), "Hyena.max_len: expected at least 2, got 1"),
        (lambda: Hyena(filter_features=4), "Hyena.filter_features: expected an odd integer >= 3, got 4"),
        (lambda: Hyena(frequency=0.0), "Hyena.frequency: expected a positive number"),
        (lambda: Hyena(shift=-1.0), "Hyena.shift: expected a number >= 0"),
        (lambda: SMALL.forward(p, x), "x: expected at most max_len=16 tokens for Hyena, got 17"),
        (lambda: SMALL.init_state(p, 2, 17), "max_len: expected 1 to 16 tokens for Hyena, got 17"),
        (lambda: SMALL.prefill(p, x[:, :4], state, segment_ids=ids), "segment_ids: Hyena does not pack"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
