"""RAT against its equations, token by token; its two ends, softmax attention and a gated recurrence; its cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.composite.rat import RAT
from seqmix.ops.softmax import attention
from seqmix.parts.rotary import rotate
from tests.mixers.equations import agrees_with, compiled, scan, sigmoid, tokens, weights

SMALL = RAT(d_model=8, heads=4, groups=2, chunk=3)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def projected(p, x):
    q, k = (jnp.einsum("btd,dgk->btgk", x, p[name])[:, :, [0, 1, 0, 1]] for name in "qk")
    v, z, a = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in ("v", "z", "gate"))
    return q, k, v, sigmoid(z), sigmoid(a + p["gate_bias"])


def by_the_equations(p, x):
    """One query at a time, over a list of what it sees."""
    q, k, v, z, g = projected(p, x)
    kt, vt, turned, out = k[:, 0] * 0, v[:, 0] * 0, [], []
    for t in range(x.shape[1]):
        if t % 3 == 0:
            kt, vt = 0 * kt, 0 * vt
        kt, vt = (g[:, t] * h + (1 - g[:, t]) * new[:, t] for h, new in ((kt, k), (vt, v)))
        place = jnp.full((1, 1), t // 3)
        turned.append((rotate(kt[:, None], place)[:, 0], vt))
        seen = [turned[s] for s in range(t) if s % 3 == 2 and s // 3 < t // 3] + [turned[t]]
        query = rotate(q[:, t : t + 1], place)[:, 0]
        score = jnp.stack([jnp.sum(query * key, -1) for key, _ in seen], -1) / 2**0.5
        weight = jnp.exp(score) / jnp.sum(jnp.exp(score), -1, keepdims=True)
        mixed = sum(weight[..., i, None] * value for i, (_, value) in enumerate(seen))
        out.append(jnp.einsum("bhk,hkd->bd", z[:, t] * mixed, p["out"]))
    return jnp.stack(out, 1)


def test_forward_and_its_gradients_are_those_of_the_equations():
    agrees_with(SMALL, by_the_equations, time=11)


def test_a_chunk_of_one_without_memory_is_softmax_attention():
    mixer = RAT(d_model=8, heads=4, chunk=1)
    p, x = weights(mixer), tokens(mixer, 9)
    p["gate_bias"] = p["gate_bias"] * 0 - 1e4
    q, k, v, z, _ = projected(p, x)
    place = jnp.arange(9)[None]
    mixed = attention(rotate(q, place), rotate(k, place), v, implementation="reference")
    want = jnp.einsum("bthk,hkd->btd", z * mixed, p["out"])
    run = compiled(jax.value_and_grad(lambda p: (lambda y: (jnp.sum(y**2), y))(mixer.forward(p, x)[0]), has_aux=True))
    (_, got), grads = run(p)
    np.testing.assert_allclose(got, want, atol=1e-12)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(grads))


def test_a_chunk_as_long_as_the_sequence_is_a_gated_recurrence():
    mixer = RAT(d_model=8, heads=4, chunk=9)
    p, x = weights(mixer), tokens(mixer, 9)
    _, _, v, z, g = projected(p, x)
    mixed = scan(lambda h, g, v: (g * h + (1 - g) * v,) * 2, v[:, 0] * 0, g, v)
    want = jnp.einsum("bthk,hkd->btd", z * mixed, p["out"])
    np.testing.assert_allclose(compiled(mixer.forward)(p, x)[0], want, atol=1e-12)


def test_the_cache_holds_a_key_for_each_whole_chunk():
    p, x = weights(SMALL), tokens(SMALL, 11)
    state = SMALL.init_state(p, 2, 11, jnp.float64)
    assert state["k"].shape == (2, 3, 4, 2) and SMALL.state_size(11) == 2 * 3 * 8 + 2 * 8 + 1
    prefill, step = compiled(SMALL.prefill), compiled(SMALL.step)
    _, state = prefill(p, x[:, :8], state)
    assert np.all(state["k"][:, :2] != 0) and np.all(state["k"][:, 2] == 0) and np.all(state["chunk"] != 0)
    _, state = step(p, x[:, 8:9], state)
    assert np.all(state["k"][:, 2] != 0) and np.all(state["chunk"] == 0)
    score_flops = lambda chunk: RAT(d_model=8, heads=4, chunk=chunk).flops(1, 1024) - SMALL.flops(1, 3) / 3 * 1024
    assert score_flops(4) > 1.9 * score_flops(8) > 0


def test_gates_start_as_the_logarithm_of_a_uniform_number():
    mixer = RAT(d_model=4096, heads=32)
    declared = {"gate_bias": mixer.params()["gate_bias"]}
    at = np.exp(param.materialise(declared, jax.random.key(0))["gate_bias"].astype(jnp.float64))
    assert 1 <= at.min() < 1.05 and 14.95 < at.max() < 15.001
    assert abs(at.mean() - 8) < 0.26  # 4 standard errors
    tree = RAT(d_model=64, heads=4).params()
    assert param.count(tree) == 4 * 64 * 64 + 2 * 64 * 2 * 16 + 64
    assert {name for name, p in param.entries(tree) if not p.decay} == {"gate_bias"}


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(d_model=12, heads=4), "RAT.heads: expected heads with an even share of d_model=12, got 4"),
        (dict(heads=4, groups=3), "RAT.groups: expected a divisor of heads=4, got 3"),
        (dict(chunk=0), "RAT.chunk: expected a positive integer"),
        (dict(rope_base=1.0), "RAT.rope_base: expected a number above 1"),
    ],
)
def test_bad_fields_are_named_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        RAT(**fields)
    assert "\n" not in str(error.value)
