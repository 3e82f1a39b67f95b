"""Native sparse attention: its equations block by block, its branches' limits, what is always selected."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.dynamic_sparse import native_sparse_attention
from seqmix.mixers.dynamic_sparse.native_sparse_attention import BRANCHES, NativeSparseAttention
from tests.mixers.equations import agrees_with, compiled, sigmoid, tokens, weights

FIELDS = dict(d_model=8, heads=4, kv_heads=2, head_dim=4, rope=False, block=4)
PAPER = NativeSparseAttention(**FIELDS, size=4, count=4, compress=4, stride=2, window=5)
POOLED = NativeSparseAttention(**FIELDS, size=3, count=2, first=0, local=1, compress=3, stride=3, window=4, pool="mean")
TIME = 23


def attend(q, k, v, seen):
    """Softmax over what is seen [..., T, S]; rows that see nothing are 0. Also the weights."""
    score = jnp.where(seen, jnp.einsum("bthk,bshk->bhts", q, k) / 2, -1e30)
    weight = jnp.where(seen, jax.nn.softmax(score), 0)
    return jnp.einsum("bhts,bshk->bthk", weight, v), weight


def selected(m, weight):
    """Who sees whom in the selected branch [B, Hk, T, T], from the weights of compressed blocks [B, H, T, n]."""
    weight = np.asarray(weight)
    batch, heads, time, n = weight.shape
    weight = weight.reshape(batch, m._kv_heads, -1, time, n).sum(2)
    seen = np.zeros((batch, m._kv_heads, time, time), bool)
    for b, j, t in np.ndindex(seen.shape[:3]):
        own = t // m.size
        always = {s for s in range(own + 1) if s < m.first or s > own - m.local}
        score = {}
        for s in set(range(own)) - always:
            tokens_of = set(range(s * m.size, (s + 1) * m.size))
            overlap = [len(tokens_of & set(range(c * m.stride, c * m.stride + m.compress))) for c in range(n)]
            score[s] = sum(w * o for w, o in zip(weight[b, j, t], overlap, strict=True))
        best = sorted(score, key=score.get, reverse=True)[: m.count - len(always)]
        for s in always | set(best):
            seen[b, j, t, s * m.size : (s + 1) * m.size] = True
    return seen & np.tri(time, dtype=bool)


def equations(m, p, x, seen=None):
    """y, and what the selected branch sees; given that, the choice is taken from there."""
    time = x.shape[1]
    name = lambda branch: branch if m.branch_kv else "shared"
    q = jnp.einsum("btd,dhk->bthk", x, p["q"])
    k, v = ({b: jnp.einsum("btd,djk->btjk", x, p[n][name(b)]) for b in BRANCHES} for n in "kv")
    ends = range(m.compress, time + 1, m.stride)

    def pool(which, y):
        blocks = jnp.stack([y[:, end - m.compress : end] for end in ends], 1)
        if m.pool == "mean":
            return blocks.mean(2)
        w = p["pool"][which]
        h = jnp.einsum("bnljk,lkf->bnjf", blocks + w["position"][None, None, :, None], w["in"])
        return jax.nn.gelu(h) @ w["out"]

    wide = lambda y: jnp.repeat(y, m.heads // y.shape[2], axis=2)
    at = np.arange(time)
    ended = np.array(ends)[None] - 1 <= at[:, None]
    first, weight = attend(q, wide(pool("k", k["compressed"])), wide(pool("v", v["compressed"])), ended)
    if seen is None:
        seen = selected(m, weight)
    second, _ = attend(q, wide(k["selected"]), wide(v["selected"]), jnp.repeat(seen, m.heads // seen.shape[1], axis=1))
    near = (at[:, None] >= at) & (at[:, None] - at < m.window)
    third, _ = attend(q, wide(k["window"]), wide(v["window"]), near)
    gate = sigmoid(jnp.einsum("btd,dhn->bthn", x, p["gate"]))[..., None]
    mixed = gate[:, :, :, 0] * first + gate[:, :, :, 1] * second + gate[:, :, :, 2] * third
    return jnp.einsum("bthk,hkd->btd", mixed, p["out"]), seen


@pytest.mark.parametrize(
    "mixer, scores", [(PAPER, 2**26), (POOLED, 2**26), (dataclasses.replace(PAPER, branch_kv=False), 4 * 10 * 9)]
)
def test_its_equations(mixer, scores, x64, monkeypatch):
    """With all scores of the selection at once, and for 9 tokens at a time."""
    monkeypatch.setattr(native_sparse_attention, "SCORES", scores)
    _, seen = equations(mixer, weights(mixer), tokens(mixer, TIME))
    assert seen[:, :, -1].sum(-1).max() < TIME and (seen[:, 0] != seen[:, 1]).any()  # key heads choose, and not all
    agrees_with(mixer, lambda p, x: equations(mixer, p, x, seen)[0], time=TIME)


def only(mixer, branch):
    """Weights with every gate open to 1/2 and values in one branch alone."""
    p = weights(mixer)
    p["gate"] = jnp.zeros_like(p["gate"])
    p["v"] = {name: y if name == branch else jnp.zeros_like(y) for name, y in p["v"].items()}
    return p


@pytest.mark.parametrize(
    "branch, fields, window",
    [("selected", {"count": 6}, None), ("window", {}, 5), ("window", {"window": TIME}, None)],
)
def test_branches_alone_are_softmax_attention(branch, fields, window, x64):
    """The selected one where it selects all blocks; the window, and one as long as the sequence."""
    mixer = dataclasses.replace(PAPER, rope=True, **fields)
    p, x = only(mixer, branch), tokens(mixer, TIME)
    dense = Attention(**FIELDS | {"rope": True}, window=window)
    own = {name: p[name][branch] for name in "kv"} | {"q": p["q"], "out": p["out"] / 2}
    want = compiled(dense.forward)(own, x)[0]
    assert float(jnp.max(jnp.abs(want))) > 0.1
    pooled = {name: w | {"out": jnp.zeros_like(w["out"])} for name, w in p["pool"].items()}
    np.testing.assert_allclose(compiled(mixer.forward)(p | {"pool": pooled}, x)[0], want, rtol=0, atol=1e-12)


BAD = {
    "count: expected at least first \\+ local = 3, got 2": {"count": 2},
    "size: expected a multiple of stride=16, got 24": {"size": 24},
    "compress: expected a multiple of stride=16, >= 2, got 24": {"compress": 24},
    "compress: expected a multiple of stride=1, >= 2, got 1": {"compress": 1, "stride": 1},
    "pool: expected one of mlp, mean, got 'max'": {"pool": "max"},
    "kv_heads: expected a divisor of heads=64, got 3": {"kv_heads": 3},
    "first: expected an integer >= 0, got -1": {"first": -1},
    "head_dim: expected an even number with rope, got 3": {"head_dim": 3},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_fields_are_refused(message):
    with pytest.raises(ValueError, match=f"NativeSparseAttention.{message}"):
        NativeSparseAttention(**BAD[message])
