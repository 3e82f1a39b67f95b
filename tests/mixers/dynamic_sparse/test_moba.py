"""MoBA: its equations, full and block-diagonal attention as its limits, what a step reads."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.dynamic_sparse.moba import MoBA
from tests.mixers.equations import agrees_with, compiled, tokens, weights


def chosen(q, k, size, count):
    """Who sees whom [B, H, T, T], token by token: the own block, and the best of the whole ones before it."""
    q, k = np.asarray(q), np.asarray(k)
    batch, time, heads, _ = q.shape
    k = np.repeat(k, heads // k.shape[2], axis=2)
    seen = np.zeros((batch, heads, time, time), bool)
    for b, h, t in np.ndindex(batch, heads, time):
        own = t // size
        means = [k[b, n * size : (n + 1) * size, h].mean(0) for n in range(own)]
        best = np.argsort([-q[b, t, h] @ mean for mean in means], kind="stable")[: count - 1]
        for n in (*best, own):
            seen[b, h, t, n * size : (n + 1) * size] = True
    return seen & np.tri(time, dtype=bool)


@pytest.mark.parametrize("count", [2, 3])
def test_it_is_one_softmax_over_the_union_of_the_chosen_blocks(count, x64):
    mixer = MoBA(d_model=8, heads=4, kv_heads=2, head_dim=4, size=4, count=count, block=4)
    p, x = weights(mixer), tokens(mixer, 23)
    q, k, _ = mixer._inputs(p, x, jnp.arange(23)[None])
    seen = chosen(q, k, 4, count)
    rows = seen.sum(-1)
    assert rows.max() == 4 * count and (rows[:, :, -1] == 3 + 4 * (count - 1)).all()
    assert (seen[:, 0] != seen[:, 1]).any() and (seen[:, :, 21] != seen[:, :, 22]).any()  # each head and token chooses

    def equations(p, x):
        q, k, v = mixer._inputs(p, x, jnp.arange(x.shape[1])[None])
        k, v = (jnp.repeat(y, 2, axis=2) for y in (k, v))
        score = jnp.where(seen, jnp.einsum("bthk,bshk->bhts", q, k) / 2, -jnp.inf)
        return jnp.einsum("bhts,bshk,hkd->btd", jax.nn.softmax(score), v, p["out"])

    agrees_with(mixer, equations, time=23)


@pytest.mark.parametrize("count, time", [(6, 23), (100, 24)])
def test_with_all_blocks_chosen_it_is_causal_softmax_attention(count, time, x64):
    mixer = MoBA(d_model=8, heads=2, size=4, count=count, block=4)
    agrees_with(mixer, lambda p, x: Attention(d_model=8, heads=2).forward(p, x)[0], time=time)


def test_with_its_own_block_alone_it_is_attention_within_blocks(x64):
    mixer = MoBA(d_model=8, heads=2, size=4, count=1, block=4)
    p, x = weights(mixer), tokens(mixer, 23)
    ids = jnp.broadcast_to(1 + jnp.arange(23) // 4, x.shape[:2])
    place = jnp.broadcast_to(jnp.arange(23), x.shape[:2])
    want = compiled(Attention(d_model=8, heads=2).forward)(p, x, segment_ids=ids, positions=place)[0]
    np.testing.assert_allclose(compiled(mixer.forward)(p, x)[0], want, rtol=0, atol=1e-12)  # sums of 4 terms


def test_a_step_reads_no_more_when_there_is_more_to_read():
    """A compiled step computes as much over a hundred blocks as over four, beside their means."""
    mixer = MoBA(d_model=64, heads=2, size=64, count=2)
    params = jax.eval_shape(lambda: weights(mixer, np.float32))

    def flops(blocks):
        state = jax.eval_shape(lambda: mixer.init_state(None, 1, blocks * 64))
        x = jax.ShapeDtypeStruct((1, 1, 64), jnp.float32)
        return jax.jit(mixer.step).lower(params, x, state).compile().cost_analysis()["flops"]

    assert flops(100) - flops(4) < 96 * 2 * 64 * 8  # not 96 blocks of 64 keys: 96 means, some operations an entry


BAD = {
    "size: expected a positive integer": {"size": 0},
    "count: expected a positive integer": {"count": 0},
    "kv_heads: expected a divisor of heads=8, got 3": {"kv_heads": 3},
    "rope_base: expected a number above 1": {"rope_base": 1.0},
    "head_dim: expected an even number with rope, got 3": {"head_dim": 3},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_fields_are_refused(message):
    with pytest.raises(ValueError, match=f"MoBA.{message}"):
        MoBA(**BAD[message])
