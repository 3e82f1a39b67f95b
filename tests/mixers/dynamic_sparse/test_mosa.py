"""MoSA: its equations under both rules, dense attention as its limit, who may take part and what that costs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.mixers.dynamic_sparse.mosa import MoSA
from seqmix.models import LM
from seqmix.parts import budget
from seqmix.parts.rotary import rotate
from tests.mixers.equations import agrees_with, compiled, sigmoid, tokens, weights

FIELDS = dict(d_model=8, heads=3, head_dim=4, sparsity=3, block=4)
ALONE, BESIDE = MoSA(**FIELDS, dense_heads=0), MoSA(**FIELDS, dense_heads=2, window=5)
PUBLISHED = MoSA(**FIELDS, dense_heads=0, rule="published")
TIME = 23


def taken(m, p, x):
    """Whether a head takes a token [B, T, H], one after another."""
    logits = np.asarray(x) @ np.asarray(p["router"])
    out = np.zeros(logits.shape, bool)
    for b, h in np.ndindex(logits.shape[0], m.heads):
        if m.rule == "published":
            out[b, np.argsort(-logits[b, :, h])[: max(2, x.shape[1] // m.sparsity)], h] = True
            continue
        for t in range(x.shape[1]):
            out[b, t, h] = logits[b, t, h] > p["threshold"][h] and out[b, :t, h].sum() < (t + 1) // m.sparsity
    return out


def softmax_heads(m, p, x, seen):
    """[B, T, H, K] before the way out, where rows see something."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    q, k = (rotate(y, jnp.arange(x.shape[1])[None], fraction=m.rope_fraction) for y in (q, k))
    score = jnp.where(seen, jnp.einsum("bthk,bshk->bhts", q, k) / 2, -1e30)
    return jnp.einsum("bhts,bshk->bthk", jnp.where(seen, jax.nn.softmax(score), 0), v)


def equations(m, p, x, took):
    at = np.arange(x.shape[1])
    order = at[:, None] >= at
    rows = np.moveaxis(took, 2, 1)
    mixed = softmax_heads(m, p, x, order & rows[..., None] & rows[:, :, None])
    mixed = mixed * sigmoid(x @ p["router"])[..., None]
    y = jnp.einsum("bthk,hkd->btd", mixed, p["out"])
    if m.dense_heads:
        near = order & (at[:, None] - at < (m.window or TIME))
        y += jnp.einsum("bthk,hkd->btd", softmax_heads(m, p["dense"], x, near), p["dense"]["out"])
    return y


@pytest.mark.parametrize("mixer", [ALONE, BESIDE, PUBLISHED], ids=["causal", "dense-heads", "published"])
def test_its_equations(mixer, x64):
    p, x = weights(mixer), tokens(mixer, TIME)
    took = taken(mixer, p, x)
    number = took.sum(1)
    assert number.max() == TIME // 3 and (took[..., 0] != took[..., 1]).any()
    agrees = lambda p, x: equations(mixer, p, x, took)
    if mixer.rule == "published":  # which has no weight without a gradient
        agrees_with(mixer, agrees, time=TIME)
    y, grad = compiled(jax.value_and_grad(lambda p: jnp.sum(mixer.forward(p, x)[0] ** 2)))(p)
    want, want_grad = compiled(jax.value_and_grad(lambda p: jnp.sum(agrees(p, x) ** 2)))(p)
    np.testing.assert_allclose(y, want, rtol=1e-12)
    for name, g in want_grad.items():
        for a, b in zip(jax.tree.leaves(grad[name]), jax.tree.leaves(g), strict=True):
            assert np.any(b != 0) == (name != "threshold")  # the router has one, by the gate
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("rule", ["causal", "published"])
def test_where_every_head_takes_all_it_is_dense_attention_with_gated_outputs(rule, x64):
    mixer = MoSA(**FIELDS | {"sparsity": 1}, dense_heads=0, rule=rule)
    p, x = weights(mixer), tokens(mixer, TIME)
    p |= {"threshold": jnp.full(3, -1e3)} if rule == "causal" else {}
    want = equations(mixer, p, x, np.ones((2, TIME, 3), bool))
    np.testing.assert_allclose(compiled(mixer.forward)(p, x)[0], want, rtol=0, atol=1e-12)  # sums of 23 terms


@pytest.mark.parametrize("mixer", [ALONE, PUBLISHED], ids=["causal", "published"])
def test_only_the_published_rule_lets_a_later_token_change_who_takes_part(mixer, x64):
    p, x = weights(mixer), tokens(mixer, TIME)
    run = compiled(lambda x: mixer.forward(p, x)[0])
    y, other = run(x), run(x.at[:, -6:].set(tokens(mixer, TIME, seed=9)[:, -6:] * 3))
    assert np.any(y[:, :-6] != other[:, :-6]) == (mixer.rule == "published")


def test_tokens_that_no_head_takes_change_nothing_but_themselves(x64):
    p, x = weights(ALONE), tokens(ALONE, TIME)
    idle = ~taken(ALONE, p, x).any(-1)
    idle[:, -1] = False
    # What is added moves no logit: it is orthogonal to the routers.
    null = np.linalg.svd(np.asarray(p["router"]).T)[2][3:]
    other = x + jnp.where(idle[..., None], 5 * null.sum(0), 0)
    run = compiled(lambda x: ALONE.forward(p, x)[0])
    y, changed = run(x), run(other)
    assert idle.sum() > 3 and np.all(y[idle] == 0)
    np.testing.assert_allclose(changed, y, rtol=0, atol=1e-12)


def test_a_language_model_refuses_the_published_rule_and_takes_the_causal_one():
    LM(vocab=8, d_model=8, n_layers=1, mixers=(ALONE,), mlp_hidden=8)
    with pytest.raises(ValueError, match="MoSA"):
        LM(vocab=8, d_model=8, n_layers=1, mixers=(PUBLISHED,), mlp_hidden=8)
    with pytest.raises(ValueError, match="MoSA does not decode by the published rule"):
        PUBLISHED.init_state(None, 1, 4)


def test_thresholds_move_until_a_head_takes_its_share():
    mixer = dataclasses.replace(ALONE, sparsity=4, threshold_rate=0.5)
    p, x = weights(mixer, np.float32), tokens(mixer, 200).astype(np.float32)
    share = lambda p: np.mean(np.asarray(x @ p["router"]) > p["threshold"], axis=(0, 1))
    step = compiled(lambda threshold: mixer.forward(p | {"threshold": threshold}, x)[1]["update/threshold"])
    assert np.abs(share(p) - 1 / 4).max() > 0.1
    for _ in range(60):
        p["threshold"] = step(p["threshold"])
    np.testing.assert_allclose(share(p), 1 / 4, atol=0.01)


def test_many_sparse_heads_cost_what_few_dense_ones_do():
    """At sparsity 8, 16 heads cost less than a third of 16 dense ones, whose scores are most of the cost at 4096."""
    shape = dict(d_model=256, head_dim=16, sparsity=8)
    sparse, dense = MoSA(**shape, heads=16, dense_heads=0), MoSA(**shape, heads=1, dense_heads=16)
    assert 3 * sparse.flops(1, 4096) < dense.flops(1, 4096)
    assert sparse.state_size(4096) == 2 * 16 * 512 * 16 + 17


def test_the_budget_is_that_of_a_loop_in_any_split():
    rng = np.random.default_rng(0)
    runs = np.array([[0, 1, 1, 0, 1, 1, 1, 2, 2, 2, 0, 2, 3, 3, 3, 3], [1] * 16, [0] * 16])
    ready = rng.random((3, 16, 5)) < 0.6
    limit = np.zeros(ready.shape, int)
    want, count = np.zeros(ready.shape, bool), np.tile(np.arange(5) % 3, (3, 1))  # never more than the limit before
    for b in range(3):
        c, last, place = count[b].copy(), 1, 4
        for t in range(16):
            if runs[b, t] > last:
                c, last, place = 0 * c, runs[b, t], 0
            place += runs[b, t] != 0
            limit[b, t] = place // 2
            want[b, t] = ready[b, t] & (c < limit[b, t]) & (runs[b, t] != 0)
            c = c + want[b, t]
    assert want.any((0, 1)).all() and (ready & ~want)[:2].any((0, 1)).all()
    np.testing.assert_array_equal(budget.take(*map(jnp.asarray, (ready, limit, runs, count))), want)


BAD = {
    "sparsity: expected a positive integer": {"sparsity": 0},
    "dense_heads: expected an integer >= 0, got -1": {"dense_heads": -1},
    "rule: expected one of causal, published, got 'top'": {"rule": "top"},
    "threshold_rate: expected a number >= 0": {"threshold_rate": -1.0},
    "rope_fraction: expected one in": {"head_dim": 3, "rope_fraction": 1.0},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_fields_are_refused(message):
    with pytest.raises(ValueError, match=f"MoSA.{message}"):
        MoSA(**BAD[message])
