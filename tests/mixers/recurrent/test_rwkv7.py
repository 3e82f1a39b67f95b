"""RWKV-7: its equations, its limits, values that travel along the stack."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.recurrent.rwkv7 import RWKV7
from seqmix.models import LM
from seqmix.ops.delta_matrix import delta_mixing_matrix
from seqmix.ops.linear_reference import linear_mixing_matrix
from tests.mixers.equations import agrees_with, compiled, scan, sigmoid, tokens, weights
from tests.mixers.recurrent.delta_loops import before

SMALL = RWKV7(d_model=6, head_dim=3, decay_rank=2, rate_rank=2, gate_rank=3, value_rank=2, chunk=4)
RESIDUAL = dataclasses.replace(SMALL, value_residual=True)


def by_the_equations(p, x, v_first=None):
    """The released time mixing, with the paper's state [V, K]: y and the values."""
    split = lambda u: u.reshape(*u.shape[:-1], 2, 3)
    flat = lambda w: w.reshape(*w.shape[:-2], 6)
    low = lambda name, inner: flat(p[name]["bias"]) + inner @ p[name]["down"] @ flat(p[name]["up"])
    s = {name: x + (before(x, 1) - x) * mu for name, mu in p["mix"].items()}
    r, k, v = (s[name] @ flat(p[name]) for name in "rkv")
    w = flat(p["w"]["bias"]) + jnp.tanh(s["w"] @ p["w"]["down"]) @ flat(p["w"]["up"])
    w, a = jnp.exp(-jnp.exp(-0.5) * sigmoid(w)), sigmoid(low("a", s["a"]))
    g = sigmoid(s["g"] @ p["g"]["down"]) @ flat(p["g"]["up"])
    if v_first is not None:
        v = v + (v_first - v) * sigmoid(low("v_gate", s["v"]))
    kappa = split(k * flat(p["k_k"]))
    kappa = kappa / jnp.sqrt(jnp.sum(kappa**2, -1, keepdims=True) + 1e-12)
    r, k, a, w, values = (split(u) for u in (r, k * (1 + (a - 1) * flat(p["k_a"])), a, w, v))

    def step(state, r, k, v, w, a, kappa):
        removed = jnp.einsum("bhvk,bhk->bhv", state, kappa)
        state = state * w[:, :, None] - removed[..., None] * (kappa * a)[:, :, None] + v[..., None] * k[:, :, None]
        return state, jnp.einsum("bhvk,bhk->bhv", state, r)

    y = scan(step, jnp.zeros((len(x), 2, 3, 3)), r, k, values, w, a, kappa)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + 3e-5) * p["norm"]["scale"] + p["norm"]["bias"]
    y = y + jnp.sum(r * k * p["r_k"], -1, keepdims=True) * values
    return (flat(y) * g) @ p["out"].reshape(6, 6), v


def test_forward_and_its_gradients_are_those_of_the_equations(x64):
    equations = lambda p, x: by_the_equations(p, x)[0]
    agrees_with(SMALL, equations)


def test_values_move_towards_those_of_the_first_layer(x64):
    """Two layers in training and in decoding; the first, which is given nothing, is a layer without the residual."""
    first, second, x = weights(RESIDUAL), weights(RESIDUAL, scale=0.4), tokens(SMALL, 6)
    equations = compiled(by_the_equations)
    want, v_first = equations(first, x)
    want_second, _ = equations(second, x + want, v_first)
    forward = compiled(RESIDUAL.forward)
    y, aux = forward(first, x)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-11)
    np.testing.assert_allclose(aux["shared"]["v_first"].reshape(2, 6, 6), v_first, rtol=0, atol=1e-11)
    y, aux = forward(second, x + y, shared=aux["shared"])
    np.testing.assert_allclose(y, want_second, rtol=0, atol=1e-11)
    np.testing.assert_allclose(aux["shared"]["v_first"].reshape(2, 6, 6), v_first, rtol=0, atol=1e-11)

    @compiled
    def decode(x, states):
        shared, new = {}, []
        for p, state in zip((first, second), states):
            y, state = RESIDUAL.prefill(p, x, state, shared=shared)
            x, shared = x + y, shared | state.pop("shared")
            new.append(state)
        return x, new

    got, states = [], [RESIDUAL.init_state(p, 2, 6, jnp.float64) for p in (first, second)]
    for part in (x[:, :4], x[:, 4:5], x[:, 5:]):
        out, states = decode(part, states)
        got.append(out)
    np.testing.assert_allclose(jnp.concatenate(got, 1), x + want + want_second, rtol=0, atol=1e-11)


def test_a_scanned_stack_shares_the_values_of_its_very_first_layer(x64):
    """In a period of one all layers are the same code; which of them is the first is known only as it runs."""
    mixer = dataclasses.replace(RESIDUAL, d_model=0)
    model = LM(vocab=11, d_model=6, n_layers=3, mixers=(mixer,), compute_dtype="float64")
    p = param.map_params(lambda w: 0.5 * jnp.asarray(np.random.default_rng(0).normal(size=w.shape)), model.params())
    ids = jnp.arange(7)[None] % 5
    got, aux = compiled(model.forward)(p, ids)
    norm = lambda scale, x: x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * scale
    x, v_first, equations = p["embedding"]["table"][ids], None, compiled(by_the_equations)
    for i in range(3):
        layer = jax.tree.map(lambda w, i=i: w[i], p["layers"]["0"])
        y, v = equations(layer["mixer"], norm(layer["mixer_norm"]["scale"], x), v_first)
        x, v_first = x + y, v if v_first is None else v_first
    np.testing.assert_allclose(got, norm(p["final_norm"]["scale"], x), rtol=0, atol=1e-10)
    assert not aux


def test_without_erasure_it_is_gated_linear_attention(x64):
    """a = 0 and k_a = 0: S_t = diag(w) S_{t-1} + k v^T."""
    p, x = weights(SMALL), tokens(SMALL, 7)
    p |= {"a": p["a"] | {"bias": jnp.full((2, 3), -800.0)}, "k_a": 0 * p["k_a"]}
    t, _, _ = compiled(lambda p, x: SMALL._inputs(p, x, None, None, None))(p, x)
    want = linear_mixing_matrix(t["r"], t["k"], t["log_w"])
    np.testing.assert_allclose(compiled(SMALL.mixing_matrix)(p, x), want, rtol=0, atol=1e-12)


def test_with_rates_of_one_it_corrects_as_the_delta_rule_does(x64):
    """a = 1 and w = 1: I - kappa kappa^T, the delta rule's transition with beta = 1; with k_k = 1 on the keys.

    What is written is the key as it is, not beta times the unit one: its length multiplies the value.
    """
    p, x = weights(SMALL), tokens(SMALL, 7)
    p |= {"a": p["a"] | {"bias": jnp.full((2, 3), 800.0)}, "w": p["w"] | {"bias": jnp.full((2, 3), -800.0)}}
    p |= {"k_k": jnp.ones((2, 3))}
    t, _, _ = compiled(lambda p, x: SMALL._inputs(p, x, None, None, None))(p, x)
    length = jnp.linalg.norm(t["k"], axis=-1)
    unit = delta_mixing_matrix(t["r"], t["right"], jnp.ones_like(length))
    want = unit * jnp.moveaxis(length, 1, 2)[:, :, None]
    np.testing.assert_allclose(compiled(SMALL.mixing_matrix)(p, x), want, rtol=0, atol=1e-9)  # l2norm adds 1e-12


def test_the_value_residual_decodes_in_a_stack():
    """The first layer's values travel along the stack in prefill and step as they do in forward."""
    model = LM(
        vocab=9, d_model=6, n_layers=3, mixers=(RWKV7(head_dim=3, value_residual=True),), compute_dtype="float32"
    )
    params = compiled(functools.partial(param.materialise, model.params()))(jax.random.key(0))
    params = jax.tree.map(lambda w: w + 0.1 * jnp.sin(jnp.arange(w.size)).reshape(w.shape), params)
    ids = jax.random.randint(jax.random.key(1), (2, 7), 0, 9)
    y, state = compiled(model.prefill)(params, ids[:, :4], model.init_state(params, 2, 7))
    got, step = [y], compiled(model.step)
    for t in range(4, 7):
        y, state = step(params, ids[:, t : t + 1], state)
        got.append(y)
    want, _ = compiled(model.forward)(params, ids)
    np.testing.assert_allclose(np.concatenate(got, axis=1), want, rtol=1e-4, atol=1e-5)  # float32, other sums


def test_decays_are_bounded_and_start_spread_out():
    mixer = RWKV7(d_model=128)
    p = compiled(functools.partial(param.materialise, mixer.params()))(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (1, 4, 128))
    t, _, _ = compiled(lambda p, x: mixer._inputs(p, x, None, None, None))(p, x)
    assert -0.6066 < float(jnp.min(t["log_w"])) < -0.5 and -0.02 < float(jnp.max(t["log_w"])) < 0
    assert mixer._rank("w") == 32 and RWKV7(d_model=4096)._rank("g") == 320
    scales = {name: declared.lr_scale for name, declared in param.entries(mixer.params())}
    assert scales["w/bias"] == 2.0 and sum(s != 1.0 for s in scales.values()) == 1


def test_fields_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="RWKV7.head_dim: expected a divisor of d_model, got 64 and d_model 96"):
        RWKV7(d_model=96)
    with pytest.raises(ValueError, match=r"RWKV7.depth: expected a number in \[0, 1\]"):
        RWKV7(depth=2.0)
    with pytest.raises(ValueError, match="RWKV7.decay_rank: expected a positive integer"):
        RWKV7(decay_rank=0)
    with pytest.raises(ValueError, match="shared: RWKV7 does not take this input"):
        SMALL.forward(param.materialise(SMALL.params(), jax.random.key(0)), jnp.zeros((1, 2, 6)), shared={})
