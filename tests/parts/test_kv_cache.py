"""The ring buffer against a list per row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmix.core import packing
from seqmix.parts import kv_cache

B, T = 3, 7


class Rows:
    """What a cache should hold: {position: number of the token} and the length of each row."""

    def __init__(self, slots, sinks):
        self.slots, self.sinks = slots, sinks
        self.held, self.length = [{} for _ in range(B)], [0] * B

    def append(self, tokens, ids):
        for b, (row, names) in enumerate(zip(tokens, ids)):
            last = 0
            for token, name in zip(row, names):
                if name == 0:
                    continue
                if last not in (0, name):
                    self.held[b], self.length[b] = {}, 0
                last = name
                self.held[b][self.length[b]] = token
                self.length[b] += 1
            ring = self.slots - self.sinks
            self.held[b] = {
                p: x for p, x in self.held[b].items() if p < self.sinks or p >= max(self.sinks, self.length[b] - ring)
            }


def contents(cache, sinks):
    """{position: token} of each row, and where the positions lie."""
    at = np.asarray(POSITIONS(cache["length"], cache["k"].shape[1], sinks))
    return [{int(p): cache["k"][b, s, 0, 0].item() for s, p in enumerate(at[b]) if p >= 0} for b in range(B)], at


POSITIONS = jax.jit(kv_cache.positions, static_argnums=(1, 2))


def compiled(window, sinks):
    return jax.jit(lambda cache, k, v, ids: kv_cache.append(cache, k, v, packing.runs(ids), sinks=sinks))


SHAPES = [(20, None, 0), (20, 4, 0), (20, 3, 2), (5, 9, 2), (1, None, 0), (6, 1, 1)]
APPENDS = {(window, sinks): compiled(window, sinks) for _, window, sinks in SHAPES}


@settings(max_examples=40)
@given(shape=st.sampled_from(SHAPES), data=st.data())
def test_a_ring_holds_what_a_list_holds(shape, data):
    max_len, window, sinks = shape
    cache = kv_cache.init(B, max_len, 1, 2, 3, jnp.float32, window, sinks)
    slots = cache["k"].shape[1]
    assert slots == (max_len if window is None else min(max_len, window + sinks))
    rows, count = Rows(slots, sinks), 0
    row = st.lists(st.sampled_from([0, 1, 1, 1, 2]), min_size=T, max_size=T)
    for _ in range(data.draw(st.integers(1, 3))):
        ids = np.array([data.draw(row) for _ in range(B)], np.int32)
        tokens = np.arange(1, B * T + 1, dtype=np.float32).reshape(B, T) + count
        count += B * T
        k = np.broadcast_to(tokens[..., None, None], (B, T, 1, 2))
        v = np.broadcast_to(-tokens[..., None, None], (B, T, 1, 3))
        cache = jax.tree.map(np.asarray, APPENDS[window, sinks](cache, k, v, ids))
        rows.append(tokens.tolist(), ids.tolist())
        held, at = contents(cache, sinks)
        assert held == rows.held
        assert cache["length"].tolist() == rows.length
        filled, k_held = (at >= 0)[..., None], cache["k"][:, :, 0]
        np.testing.assert_array_equal(
            np.where(filled, cache["v"][:, :, 0], 0), np.where(filled, -k_held[..., [0, 0, 0]], 0)
        )
    for s in range(slots):
        for p in at[:, s]:
            assert p == -1 or s == (p if p < sinks else sinks + (p - sinks) % (slots - sinks))


def test_padding_alone_changes_nothing():
    cache = kv_cache.init(B, 4, 1, 2, 2, jnp.float32)
    x = np.random.default_rng(0).normal(size=(B, T, 1, 2)).astype(np.float32)
    cache = kv_cache.append(cache, x, x, np.ones((B, T), np.int32))
    same = kv_cache.append(cache, x + 1, x + 1, np.zeros((B, T), np.int32))
    jax.tree.map(np.testing.assert_array_equal, same, cache)


def test_gradients_go_to_the_tokens_that_stay_and_the_slots_that_are_kept():
    """7 tokens into a row of 2 with 2 sinks and a ring of 3: the last 3 stay, and both sinks."""
    old = kv_cache.init(B, 10, 1, 2, 2, jnp.float32, window=3, sinks=2) | {"length": jnp.full(B, 2, jnp.int32)}
    x = np.ones((B, T, 1, 2), np.float32)

    def total(cached, k):
        return jnp.sum(jnp.square(kv_cache.append(old | {"k": cached}, k, x, np.ones((B, T), int), sinks=2)["k"]))

    cached, k = jax.grad(total, (0, 1))(old["k"] + 1, x)
    np.testing.assert_array_equal(k[0, :, 0, 0], [0, 0, 0, 0, 2, 2, 2])
    np.testing.assert_array_equal(cached[0, :, 0, 0], [2, 2, 0, 0, 0])


def test_sinks_may_fill_all_slots():
    cache = kv_cache.init(B, 3, 1, 2, 2, jnp.float32, window=4, sinks=5)
    x = np.arange(B * T * 2, dtype=np.float32).reshape(B, T, 1, 2)
    cache = kv_cache.append(cache, x, x, np.ones((B, T), np.int32), sinks=5)
    np.testing.assert_array_equal(cache["k"], x[:, :3])
    np.testing.assert_array_equal(kv_cache.positions(cache["length"], 3, 5), [[0, 1, 2]] * B)


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match="max_len: expected a positive integer, got 0"):
        kv_cache.init(1, 0, 1, 2, 2, jnp.float32)
    with pytest.raises(ValueError, match="window: expected a positive integer, got 0"):
        kv_cache.init(1, 4, 1, 2, 2, jnp.float32, window=0)
    with pytest.raises(ValueError, match="sinks: expected an integer >= 0, got -1"):
        kv_cache.init(1, 4, 1, 2, 2, jnp.float32, window=2, sinks=-1)
    cache = kv_cache.init(1, 4, 1, 2, 2, jnp.float32)
    with pytest.raises(ValueError, match="k: expected shape"):
        kv_cache.append(cache, np.ones((1, 3, 2, 2)), np.ones((1, 3, 1, 2)), np.ones((1, 3), int))
