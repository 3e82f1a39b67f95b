"""`attention` by masks, biases, slopes and normalisers: values and gradients by the whole matrix, parts, memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix import ops
from seqmix.ops import masks
from tests.quick import QUICK

B, T, S, H, HK, K, V = 2, 11, 13, 4, 2, 3, 5
IDS = np.array([[1, 1, 1, 0, 2, 2, 2, 2, 3, 3, 3], [1] * 7 + [0] * 4], np.int32)


def arrays(keys=S, time=T, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"q": (B, time, H, K), "k": (B, keys, HK, K), "v": (B, keys, HK, V)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def matrix(q, k, v, seen, *, soft_cap=None, bias=0.0, slopes=None, normalizer="softmax", sink_logits=None):
    """y and lse by the definition; seen [B or 1, T, S]."""
    k, v = (jnp.repeat(x, H // HK, axis=2) for x in (k, v))
    s = jnp.einsum("bthk,bshk->bhts", q, k) / K**0.5
    s = s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)
    s = s + bias
    if slopes is not None:
        far = np.abs(np.arange(s.shape[2])[:, None] - np.arange(s.shape[3]))
        s = s - slopes[:, None, None] * far
    seen = jnp.asarray(seen)[:, None]
    if normalizer == "sigmoid":
        return jnp.einsum("bhts,bshv->bthv", jnp.where(seen, 1 / (1 + jnp.exp(-s)), 0), v), None
    size = jnp.abs(s) if normalizer == "signed" else s
    weight = jnp.where(seen, jnp.exp(size), 0)
    total = weight.sum(-1) + (0 if sink_logits is None else jnp.exp(sink_logits)[:, None])
    weight = weight * jnp.sign(s) if normalizer == "signed" else weight
    y = jnp.einsum("bhts,bshv->bthv", weight / jnp.where(total > 0, total, 1)[..., None], v)
    return y, jnp.log(total)


def check(seen, options, tensors, given):
    """Both forms, by values and every gradient: of the tensors, and of what is given as an array."""
    tensors = tensors | given
    w = np.random.default_rng(5).normal(size=(B, tensors["q"].shape[1], H, V))
    lse = options.get("normalizer") != "sigmoid"
    rows = np.broadcast_to(np.asarray(seen).any(-1)[:, None], (B, H, seen.shape[1]))

    def objective(run):
        def f(tensors):
            y, z = run(tensors)
            z = jnp.sum(jnp.where(rows, z, 0) * w[..., 0].swapaxes(1, 2)) if lse else 0.0
            return jnp.sum(w * y) + z, (y, z)

        return jax.jit(jax.value_and_grad(f, has_aux=True), compiler_options=QUICK)(tensors)

    plain = {name: x for name, x in options.items() if name in ("soft_cap", "normalizer")}
    (_, want), grads = objective(lambda t: matrix(seen=seen, **t, **plain))
    for name, block in (("chunked", 4), ("reference", 4)):

        def run(t, name=name, block=block):
            out = ops.attention(**t, **options, return_lse=lse, block=block, implementation=name)
            return out if lse else (out, None)

        (_, got), got_grads = objective(run)
        # Sums of some ten terms of order one in float64.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-12), got, want)
        for key, g in grads.items():
            assert np.any(g != 0)
            np.testing.assert_allclose(got_grads[key], g, rtol=1e-10, atol=1e-11, err_msg=f"{name} {key}")


GIVEN = {
    "nothing": {},
    "bias": {"bias": (B, H, T, S)},
    "bias of keys, slopes": {"bias": (B, 1, 1, S), "slopes": (H,)},
    "sinks": {"sink_logits": (H,)},
}
MASK = masks.Causal(2) & (masks.Window(6) | masks.Sinks(1)) | masks.Strided(5)


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("normalizer", ["softmax", "signed", "sigmoid"])
def test_rows_and_gradients_are_those_of_the_matrix(normalizer, given, x64):
    rng = np.random.default_rng(3)
    made = {name: rng.normal(size=shape) for name, shape in GIVEN[given].items()}
    if normalizer == "sigmoid" and "sink_logits" in made:
        made = {"bias": np.full((1, 1, 1, 1), -np.log(S))}
    options = {"mask": MASK, "normalizer": normalizer, "soft_cap": 1.5}
    check(MASK.dense(T, S)[None], options, arrays(), made)


@pytest.mark.parametrize("normalizer", ["softmax", "signed"])
def test_rules_and_segments_hold_beside_a_normaliser_and_a_mask(normalizer, x64):
    ids = IDS
    at = np.arange(T)
    order = at[:, None] >= at
    one = (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, None]
    bias = {"bias": np.random.default_rng(1).normal(size=(1, H, 1, T))}
    near = order & (at[:, None] - at < 3)
    check(one & near, {"window": 3, "segment_ids": IDS, "normalizer": normalizer}, arrays(T), bias)
    place = np.array([[0, 1, 2, 9, 0, 1, 2, 3, 0, 1, 2], list(range(T))])
    apart = place[:, :, None] - place[:, None]
    two = {"mask": masks.Causal() & masks.Dilated(2), "segment_ids": IDS, "normalizer": normalizer}
    check(one & (apart >= 0) & (apart % 2 == 0), two, arrays(T), {})


def test_given_positions_and_data_reach_the_mask(x64):
    rng = np.random.default_rng(2)
    q_at, k_at = (
        rng.permuted(np.tile(np.arange(T), (B, 1)), axis=1),
        rng.permuted(np.tile(np.arange(S), (B, 1)), axis=1),
    )
    tensors = arrays()
    seen = k_at[:, None] <= q_at[:, :, None]
    y = ops.attention(**tensors, q_positions=q_at, kv_positions=k_at, normalizer="signed")
    np.testing.assert_allclose(y, matrix(**tensors, seen=seen, normalizer="signed")[0], rtol=1e-11)
    data = {"starts": rng.integers(0, 4, (B, S)), "ends": rng.integers(5, 12, (B, S))}
    at = np.arange(T)[:, None]
    seen = (data["starts"][:, None] <= at) & (at < data["ends"][:, None])
    for bias in (None, np.zeros((1, 1, 1, 1))):
        y = ops.attention(**tensors, mask=masks.Intervals(), data=data, bias=bias, block=4)
        np.testing.assert_allclose(y, matrix(**tensors, seen=seen)[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("normalizer", ["softmax", "signed"])
def test_parts_of_the_keys_merge(normalizer, x64):
    t = arrays()
    bias = np.random.default_rng(1).normal(size=(1, H, T, S))
    part = lambda keys: ops.attention(
        *(t["q"], t["k"][:, keys], t["v"][:, keys]),
        **dict(causal=False, bias=bias[..., keys], normalizer=normalizer, return_lse=True),
    )
    got = ops.merge([part(slice(5)), part(slice(5, None))])
    want = part(slice(None))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11)


def test_signed_rows_have_size_one_and_are_softmax_where_no_score_is_negative(x64):
    t = arrays()
    signed = matrix(**t, seen=MASK.dense(T, S)[None], normalizer="signed")[0]
    assert np.abs(signed - matrix(**t, seen=MASK.dense(T, S)[None])[0]).max() > 0.1
    ones = t | {"v": np.ones((B, S, HK, 1))}
    sums = ops.attention(**ones, mask=MASK, normalizer="signed")
    assert np.abs(sums).max() <= 1 + 1e-12 and np.asarray(sums).min() < 0
    positive = {name: np.abs(x) for name, x in t.items()}
    got = ops.attention(**positive, mask=MASK, normalizer="signed")
    np.testing.assert_allclose(got, ops.attention(**positive, mask=MASK), rtol=1e-11)
    # A token can be taken away from another in one head: scores c and -c give half of v_a - v_b.
    q, k = np.ones((1, 1, 1, 1)), np.array([2.0, -2.0]).reshape(1, 2, 1, 1)
    y = ops.attention(q, k, np.array([7.0, 4.0]).reshape(1, 2, 1, 1), causal=False, normalizer="signed")
    np.testing.assert_allclose(y, np.full((1, 1, 1, 1), 1.5), rtol=1e-12)


def test_memory_grows_linearly_with_time_forward_and_backward():
    def temporary(time):
        x = jax.ShapeDtypeStruct((1, time, 1, 16), jnp.float32)
        bias = jax.ShapeDtypeStruct((1, 1, 1, time), jnp.float32)
        loss = lambda q, k, v, bias: jnp.sum(ops.attention(q, k, v, bias=bias, normalizer="signed", block=64))
        compiled = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(x, x, x, bias).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(1024), temporary(4096)
    assert large < 4.5 * small and large < 4096**2  # a fourth of one matrix of scores


X = np.ones((1, 4, 2, 2), np.float32)
BAD = {
    "normalizer: expected one of softmax, sigmoid, signed, got 'max'": {"normalizer": "max"},
    "mask: expected a mask of ops.masks, got str": {"mask": "causal"},
    "mask: expected causal, window and sinks left alone": {"mask": masks.Causal(), "window": 3},
    "data: expected a mask that takes it": {"data": {}},
    "data: expected 'starts', of the keys": {"mask": masks.Intervals()},
    "data: expected starts, ends, which the mask takes, got 'begins'": {
        "mask": masks.Intervals(),
        "data": dict.fromkeys(("begins", "starts", "ends"), np.ones((1, 4), int)),
    },
    "data: expected nothing, which the mask takes, got 'starts'": {
        "mask": masks.Causal(),
        "data": {"starts": np.ones((1, 4), int)},
    },
    "return_lse: expected softmax or signed": {"normalizer": "sigmoid", "return_lse": True},
    "sink_logits: expected softmax or signed": {"normalizer": "sigmoid", "sink_logits": X[0, 0, :, 0]},
    r"bias: expected shape \(B=1 or 1, H=2 or 1, T=4 or 1, S=4 or 1\), got \(4, 4\)": {"bias": np.ones((4, 4))},
    "bias: expected a floating dtype": {"bias": np.ones((1, 1, 4, 4), int)},
    r"slopes: expected shape \(H=2,\), got \(3,\)": {"slopes": np.ones(3)},
    "slopes: expected no given positions": {
        "slopes": np.ones(2, np.float32),
        **dict.fromkeys(("q_positions", "kv_positions"), np.zeros((1, 4), int)),
    },
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_refused(message):
    with pytest.raises(ValueError, match=message):
        ops.attention(X, X, X, **BAD[message])
