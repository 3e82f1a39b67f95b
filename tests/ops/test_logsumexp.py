"""The running softmax average against a masked softmax, its states, packing, and huge scores."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.ops.logsumexp import empty_logsumexp_state, logsumexp_scan

B, H, V = 2, 2, 3


def draw(time, seed=0):
    rng = np.random.default_rng(seed)
    return 5 * rng.normal(size=(B, time, H)), rng.normal(size=(B, time, H, V))


def packed(time, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(1, 4, size=(B, time)), axis=1)
    return np.where(rng.random((B, time)) < 0.2, 0, ids).astype(np.int32)


def softmax(scores, values, ids=None):
    """The definition as a dense matrix of weights, [B, H, T, T]."""
    time = scores.shape[1]
    ids = np.ones((B, time), np.int32) if ids is None else ids
    sees = np.tril((ids[:, :, None] == ids[:, None]) & (ids[:, :, None] != 0))[:, None]
    logits = jnp.where(sees, jnp.moveaxis(scores, 1, 2)[:, :, None], -1e30)
    weights = jnp.where(sees, jax.nn.softmax(logits, -1), 0)
    return jnp.einsum("bhts,bshv->bthv", weights, values)


def gradients_and_value(f, *arrays):
    weights = np.random.default_rng(9).normal(size=(B, arrays[0].shape[1], H, V))

    def total(*a):
        y = f(*a)
        return jnp.sum(weights * y), y

    return jax.jit(jax.grad(total, (0, 1), has_aux=True))(*arrays)


def close(got, want):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-10, atol=1e-11), got, want)


@pytest.mark.parametrize(("time", "has_segments"), [(1, False), (65, False), (65, True)])
def test_it_is_the_causal_softmax_with_gradients(x64, time, has_segments):
    arrays, ids = draw(time), packed(time) if has_segments else None
    scan = lambda *a: logsumexp_scan(*a, segment_ids=ids, chunk=8)[0]
    close(gradients_and_value(scan, *arrays), gradients_and_value(lambda *a: softmax(*a, ids), *arrays))


def test_state_passing_equals_one_pass(x64):
    scores, values = draw(20, seed=1)
    ids = packed(20, seed=1)
    ids[:, 9:15] = 2  # the split falls inside a segment,
    ids[0, 13] = 0  # and what follows begins with padding

    def split(scores, values):
        state, ys = empty_logsumexp_state(B, H, V, scores.dtype), []
        for now in (slice(0, 13), slice(13, 20)):
            y, state = logsumexp_scan(scores[:, now], values[:, now], state=state, segment_ids=ids[:, now], chunk=4)
            ys.append(y)
        return jnp.concatenate(ys, 1) + jnp.sum(jnp.log(state[2]) + state[0])

    def whole(scores, values):
        y, (m, _, den) = logsumexp_scan(scores, values, segment_ids=ids, chunk=4)
        return y + jnp.sum(jnp.log(den) + m)

    close(gradients_and_value(split, scores, values), gradients_and_value(whole, scores, values))


def test_the_outgoing_state_is_the_sums_of_the_last_segment(x64):
    scores, values = draw(30, seed=2)
    ids = packed(30, seed=2)
    ids[1] = 0
    state = tuple(np.random.default_rng(3).uniform(1, 2, size=s) for s in ((B, H), (B, H, V), (B, H)))
    m, num, den = jax.jit(logsumexp_scan)(scores, values, state=state, segment_ids=ids)[1]
    last = ids[0] == ids[0].max()
    weight = np.exp(scores[0, last])
    close(num[0] * np.exp(m[0])[:, None], np.einsum("th,thv->hv", weight, values[0, last]))
    close(den[0] * np.exp(m[0]), weight.sum(0))
    close((m[1], num[1], den[1]), tuple(a[1] for a in state))


def test_scores_of_any_size_are_stable_in_float32():
    scores = np.float32([-1e4, 1e4, 0, 1e4 - 1, -1e30, 2e4, -3e4])[None, :, None].repeat(B, 0).repeat(H, 2)
    values = draw(7)[1].astype(np.float32)
    grads, y = gradients_and_value(lambda *a: logsumexp_scan(*a, chunk=2)[0], scores, values)
    np.testing.assert_allclose(y, softmax(scores, values), rtol=1e-6, atol=1e-6)
    assert all(np.all(np.isfinite(a)) for a in grads)


def test_bfloat16_values_keep_a_float32_state():
    scores, values = draw(50, seed=4)
    low = jnp.asarray(values, jnp.bfloat16)
    y, state = jax.jit(logsumexp_scan)(jnp.asarray(scores, jnp.float32), low)
    assert y.dtype == jnp.bfloat16 and {a.dtype for a in state} == {jnp.dtype("float32")}
    error = np.asarray(y, np.float32) - softmax(scores, np.asarray(low, np.float32))
    assert np.sqrt(np.mean(error**2) / np.mean(values**2)) < 0.005


def test_bad_input_is_named():
    scores, values = (jnp.asarray(a, jnp.float32) for a in draw(5))
    for message, call in {
        r"values: expected shape \(B=2, T=5, H=2, V\)": lambda: logsumexp_scan(scores, values[:, 1:]),
        r"num: expected shape \(B=2, H=2, V=3\)": lambda: logsumexp_scan(
            scores, values, state=empty_logsumexp_state(2, 2, 4)
        ),
        "segment_ids: expected integers": lambda: logsumexp_scan(scores, values, segment_ids=scores[..., 0]),
        "scores: expected at least one of every dimension": lambda: logsumexp_scan(scores[:, :0], values[:, :0]),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
