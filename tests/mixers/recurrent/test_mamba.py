"""Mamba: its equations, what small and large time steps do, its size."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.recurrent.mamba import Mamba
from tests.mixers.equations import agrees_with, compiled, scan, silu, tokens, weights
from tests.mixers.recurrent.delta_loops import before

SMALL = Mamba(d_model=6, d_state=3, dt_rank=2, conv_width=3, chunk=4)


def by_the_equations(p, x):
    u = x @ p["u"]
    u = silu(sum(w * before(u, 2 - i) for i, w in enumerate(p["conv"])) + p["conv_bias"])
    dt = jnp.log1p(jnp.exp(u @ p["dt"]["down"] @ p["dt"]["up"] + p["dt"]["bias"]))

    def step(h, u, dt, B, C):
        dt = dt[..., None]
        h = jnp.exp(-dt * jnp.exp(p["A_log"])) * h + dt * u[..., None] * B[:, None]
        return h, jnp.einsum("ben,bn->be", h, C) + p["D"] * u

    y = scan(step, jnp.zeros((len(x), 12, 3)), u, dt, u @ p["B"], u @ p["C"])
    return (y * silu(x @ p["z"])) @ p["out"]


def test_forward_and_its_gradients_are_those_of_the_equations(x64):
    agrees_with(SMALL, by_the_equations)


def states(mixer, p, x):
    """The state after each token."""
    step, state, seen = compiled(mixer.step), mixer.init_state(p, len(x), x.shape[1], jnp.float64), []
    for t in range(x.shape[1]):
        _, state = step(p, x[:, t : t + 1], state)
        seen.append(state["ssm"])
    return seen


def test_small_time_steps_copy_the_state_and_large_ones_forget(x64):
    """softplus(-700) is 1e-304: nothing decays or is written. After softplus(700) only the token itself is left."""
    mixer = dataclasses.replace(SMALL, conv_width=1)
    p, x = weights(mixer), tokens(SMALL, 4)
    p |= {"dt": p["dt"] | {"down": 0 * p["dt"]["down"]}, "A_log": jnp.abs(p["A_log"])}
    at = lambda bias: p | {"dt": p["dt"] | {"bias": jnp.full(12, bias)}}
    before = states(mixer, at(0.5), x)[-1]
    start = mixer.init_state(p, 2, 4, jnp.float64) | {"ssm": before}
    step = compiled(mixer.step)
    _, copied = step(at(-700.0), x[:, :1], start)
    np.testing.assert_allclose(copied["ssm"], before, rtol=1e-15)
    assert float(jnp.min(jnp.abs(before))) > 1e-6
    _, after = step(at(700.0), x[:, :1], start)
    _, alone = step(at(700.0), x[:, :1], start | {"ssm": 0 * before})
    np.testing.assert_array_equal(after["ssm"], alone["ssm"])
    assert float(jnp.max(jnp.abs(alone["ssm"]))) > 1
    # As matrices: only the skip is left, and only the diagonal.
    run, eye = compiled(mixer.mixing_matrix), jnp.eye(4)
    skip = jnp.broadcast_to(p["D"][:, None, None] * eye, (2, 12, 4, 4))
    np.testing.assert_allclose(run(at(-700.0), x), skip, atol=1e-290)
    assert float(jnp.max(jnp.abs(run(at(700.0), x) * (1 - eye)))) < 1e-290


def test_only_with_selection_does_the_response_depend_on_the_tokens_between(x64):
    """With constant dt, B and C it is a convolution: M[t, s] depends on t - s alone (paper, table 1)."""
    mixer = dataclasses.replace(SMALL, conv_width=1)
    p, x = weights(mixer), tokens(SMALL, 6, batch=1)
    matrix = compiled(mixer.mixing_matrix)(p, x)
    assert float(jnp.max(jnp.abs(matrix[..., 1:, 1:] - matrix[..., :-1, :-1]))) > 0.1
    # One channel that is always the same carries B and C, and no channel moves dt.
    steady = x.at[..., 0].set(2.0)
    only = jnp.zeros((12, 3)).at[0].set(1.0)
    u = p["u"].at[1:, 0].set(0.0).at[0, 0].set(1.0)
    fixed = p | {"u": u, "B": only, "C": only, "dt": p["dt"] | {"down": 0 * p["dt"]["down"]}}
    matrix = compiled(mixer.mixing_matrix)(fixed, steady)
    np.testing.assert_allclose(matrix[..., 1:, 1:], matrix[..., :-1, :-1], atol=1e-12)
    assert float(jnp.max(jnp.abs(matrix[:, :, 5, 0]))) > 1e-6


def test_decoding_equals_forward_with_a_state_that_does_not_grow(x64):
    p, x = weights(SMALL), tokens(SMALL, 9)
    y, state = compiled(SMALL.prefill)(p, x[:, :6], SMALL.init_state(p, 2, 9, jnp.float64))
    got, step = [y], compiled(SMALL.step)
    for t in range(6, 9):
        y, state = step(p, x[:, t : t + 1], state)
        got.append(y)
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), compiled(SMALL.forward)(p, x)[0], rtol=0, atol=1e-11)
    assert SMALL.state_size(9) == SMALL.state_size(9000) == 12 * (2 + 3)


def test_initial_values_and_sizes_are_the_published_ones():
    mixer = Mamba(d_model=32)
    p = compiled(functools.partial(param.materialise, mixer.params()))(jax.random.key(0))
    np.testing.assert_allclose(p["A_log"], np.log(np.tile(np.arange(1.0, 17), (64, 1))), rtol=1e-6)
    dt = jax.nn.softplus(p["dt"]["bias"])
    assert jnp.all((dt > 0.99e-3) & (dt < 0.101)) and jnp.all(p["D"] == 1)
    assert p["dt"]["down"].shape == (64, 2)
    # in_proj, conv1d, x_proj, dt_proj, A_log, D, out_proj of the released module
    parts = 32 * 128, 64 * 4 + 64, 64 * (2 + 32), 2 * 64 + 64, 64 * 16, 64, 64 * 32
    assert param.count(mixer.params()) == sum(parts)


def test_fields_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="Mamba.d_state: expected a positive integer, got 0"):
        Mamba(d_state=0)
    with pytest.raises(ValueError, match="Mamba.dt_rank: expected a positive integer"):
        Mamba(dt_rank=0)
    with pytest.raises(ValueError, match="Mamba.dt_min: expected 0 < dt_min <= dt_max"):
        Mamba(dt_min=1.0)
