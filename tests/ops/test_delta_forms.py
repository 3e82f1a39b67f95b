"""What the delta rule reduces to, the diagonal plus rank one, mixing matrices, costs, and calls that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.ops import delta
from seqmix.ops.delta import delta_rule, diagonal_plus_rank_one
from seqmix.ops.delta_matrix import delta_mixing_matrix, rank_one_mixing_matrix
from seqmix.ops.linear import linear_attention
from tests.ops.delta_cases import (
    BOUNDS,
    HK,
    SMALL,
    B,
    H,
    K,
    V,
    against_float64,
    assert_close,
    cotangents,
    draw,
    forward,
    in_bfloat16,
    jit,
    pullback,
)

IDS = np.repeat([[0, 1, 2, 2], [1, 0, 1, 3]], [3, 5, 4, 7], axis=1)  # [B, 19]


# What it reduces to


def test_without_erasure_it_is_linear_attention(x64):
    arrays = draw("channel", 19)
    got = forward(chunk=8)(arrays | dict(erase=np.zeros_like(arrays["k"])), jnp.asarray(IDS))
    arrays["v"] = arrays.pop("beta")[..., None] * arrays["v"]
    expected = jit(lambda arrays: linear_attention(**arrays, segment_ids=jnp.asarray(IDS), chunk=8))(arrays)
    assert_close(got, expected, 1e-13)


def test_kinds_of_decay_agree_where_they_mean_the_same(x64):
    arrays = draw("constant", 19)
    run = forward(chunk=8)
    per_head = np.broadcast_to(arrays["log_decay"], (B, 19, H))
    per_channel = np.broadcast_to(per_head[..., None], (B, 19, H, K))
    expected = run(arrays)
    assert_close(run(arrays | dict(log_decay=per_head)), expected, 1e-13)
    assert_close(run(arrays | dict(log_decay=per_channel)), expected, 1e-13)
    plain = {name: x for name, x in arrays.items() if name != "log_decay"}
    assert_close(run(arrays | dict(log_decay=np.zeros(H))), run(plain), 1e-13)


def test_it_runs_under_vmap():
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in draw("channel", 9).items()}
    pair = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), arrays)
    y, state = jit(jax.vmap(lambda arrays: delta_rule(**arrays, chunk=4)))(pair)
    for i, one in enumerate((arrays, jax.tree.map(lambda x: 0.5 * x, arrays))):
        assert_close((y[i], state[i]), forward(chunk=4)(one), 1e-6)


# The diagonal plus rank one


def rank_one(kind, time, vectors, **options):
    """Arguments as RWKV-7 makes them: kappa of length one, a in (0, 1)."""
    arrays = draw(kind, time, erase=vectors, **options)
    a = np.random.default_rng(2).uniform(size=arrays["erase"].shape)
    arrays |= dict(right=arrays["erase"], left=-a * arrays["erase"])
    return {name: x for name, x in arrays.items() if name not in ("beta", "erase")}


def rwkv7(q, k, v, left, right, log_decay, state, ids):
    """y and the state as the paper writes them: rows of the state are values, S (diag(w) - kappa^T (a kappa))."""
    y, last = np.zeros(v.shape), state.copy()
    for b, h in np.ndindex(B, H):
        current, s, g = 0, state[b, h].T, h * HK // H
        for t in np.flatnonzero(ids[b]):
            s = np.zeros_like(s) if current not in (0, ids[b, t]) else s
            current = ids[b, t]
            kappa, a_kappa = right[b, t, h], -left[b, t, h]
            s = s @ (np.diag(np.exp(log_decay[b, t, h])) - np.outer(kappa, a_kappa)) + np.outer(v[b, t, h], k[b, t, g])
            y[b, t, h] = s @ q[b, t, g]
        last[b, h] = s.T
    return y, last


def test_the_transition_of_rwkv7_equals_its_loop_in_values_and_all_gradients(x64):
    arrays = rank_one("channel", 19, H)
    weights = cotangents(arrays)
    got = pullback(diagonal_plus_rank_one, chunk=4)(arrays, weights, jnp.asarray(IDS))
    assert_close(got[0], rwkv7(**arrays, ids=IDS), 1e-13)
    assert_close(
        got, pullback(diagonal_plus_rank_one, implementation="reference")(arrays, weights, jnp.asarray(IDS)), 1e-12
    )


def test_the_delta_rule_is_a_case_of_the_diagonal_plus_rank_one(x64):
    arrays = draw("head", 19, size=(B, H, H, K, V))
    expected = forward(chunk=8)(arrays)
    beta, k = arrays.pop("beta")[..., None], arrays.pop("k")
    arrays |= dict(k=beta * k, left=-beta * k, right=np.exp(arrays["log_decay"])[..., None] * k)
    assert_close(jit(lambda arrays: diagonal_plus_rank_one(**arrays, chunk=8))(arrays), expected, 1e-13)


def test_its_parts_join_by_states_and_one_token_is_a_step(x64):
    arrays = rank_one("head", 19, HK)
    run = jit(lambda arrays: diagonal_plus_rank_one(**arrays, chunk=4))
    y, state = run(arrays)
    first, last = ({name: x[:, part] for name, x in arrays.items()} for part in (slice(18), slice(18, 19)))
    y0, middle = run(first | dict(state=arrays["state"]))
    y1, end = run(last | dict(state=middle))
    assert_close((np.concatenate([y0, y1], 1), end), (y, state), 1e-13)


def test_it_keeps_the_bounds_in_bfloat16():
    arrays, weights = in_bfloat16(rank_one("channel", 150, 2, size=SMALL))
    run, loop = (pullback(diagonal_plus_rank_one, implementation=name) for name in ("chunked", "reference"))
    errors = against_float64(run, loop, arrays, weights)
    assert all(error <= BOUNDS.get(name, 0.008) for name, error in errors.items()), errors


# Mixing matrices


@pytest.mark.parametrize("kind, steps, erase", [("none", (), HK), ("head", (3,), HK), ("channel", (), H)])
def test_the_mixing_matrix_times_the_values_is_the_output(kind, steps, erase, x64):
    arrays = draw(kind, 19, steps=steps, erase=erase)
    del arrays["state"]
    ids, scale = jnp.asarray(IDS), 0.7
    given = {name: x for name, x in arrays.items() if name != "v"}
    matrix = jit(lambda given: delta_mixing_matrix(**given, scale=scale, segment_ids=ids))(given)
    values = arrays["v"].reshape(B, -1, H, V)
    n = steps[0] if steps else 1
    y = forward(chunk=8, scale=scale, steps=n)(arrays, ids)[0]
    assert_close(np.einsum("bhts,bshv->bthv", matrix, values), y, 1e-13)
    assert not np.triu(np.asarray(matrix)[..., n - 1 :: n], 1).any()


@pytest.mark.parametrize("kind, vectors", [("none", HK), ("head", HK), ("channel", H)])
def test_so_is_that_of_the_diagonal_plus_rank_one(kind, vectors, x64):
    arrays = rank_one(kind, 19, vectors)
    del arrays["state"]
    y = jit(lambda arrays: diagonal_plus_rank_one(**arrays, segment_ids=jnp.asarray(IDS), scale=0.7)[0])(arrays)
    v = arrays.pop("v")
    matrix = jit(lambda given: rank_one_mixing_matrix(**given, segment_ids=jnp.asarray(IDS), scale=0.7))(arrays)
    matrix = np.repeat(matrix, H // matrix.shape[1], axis=1)  # without decays and heads of its own
    assert_close(np.einsum("bhts,bshv->bthv", matrix, v), y, 1e-13)


# Costs, and calls that do not fit


@pytest.mark.parametrize("kind", ["head", "channel"])
def test_flops_are_those_that_xla_counts(kind):
    b, hk, h, k, v = size = (1, 2, 4, 32, 64)
    for time in (64, 1):
        arrays = {name: jnp.asarray(x, jnp.float32) for name, x in draw(kind, time, size=size).items()}
        counted = lambda op, arrays: jit(lambda a: op(**a)).lower(arrays).compile().cost_analysis()["flops"]
        formula = delta.delta_rule_flops(b, time, h, hk, k, v, per_channel=kind == "channel")
        assert abs(formula / counted(delta_rule, arrays) - 1) < 0.05
        arrays |= dict(left=arrays["k"] + 1, right=arrays["k"] + 2)
        del arrays["beta"]
        formula = delta.diagonal_plus_rank_one_flops(b, time, h, hk, k, v, per_channel=kind == "channel")
        assert abs(formula / counted(diagonal_plus_rank_one, arrays) - 1) < 0.05


BAD = {
    "beta: expected shape (B=2, T=5, n=1, H=4), got (2, 5, 1, 2)": dict(beta=np.zeros((2, 5, 2))),
    "v: expected a number of heads divisible by Hk=2, got H=3": dict(
        v=np.zeros((2, 5, 3, V)), beta=np.zeros((2, 5, 3)), state=None, log_decay=None
    ),
    "erase: expected shape (2, 5, 1, Hk=2 or H=4, K=4), got (2, 5, 1, 3, 4)": dict(erase=np.zeros((2, 5, 3, 4))),
    "log_decay: expected shape (H), (B, T, H) or (B, T, H, K)": dict(log_decay=np.zeros((5, 4))),
    "log_decay: expected shape (B=2, T=5, H=4), got (2, 5, 2)": dict(log_decay=np.zeros((2, 5, 2))),
    "k: expected shape (B, T, steps=3, Hk, K), got (2, 5, 2, 2, 4)": dict(
        k=np.zeros((2, 5, 2, HK, K)), v=np.zeros((2, 5, 2, H, V)), beta=np.zeros((2, 5, 2, H)), steps=3
    ),
    "k: expected shape (B, T, n, Hk, K), got (2, 5, 2, 4)": dict(steps=2),
    "state: expected shape (B=2, H=4, K=4, V=3), got (2, 4, 3, 4)": dict(state=np.zeros((B, H, V, K))),
    "q: expected a floating dtype, got int32": dict(q=np.zeros((B, 5, HK, K), np.int32)),
    "erase: expected a floating dtype, got int32": dict(erase=np.zeros((B, 5, HK, K), np.int32)),
    "chunk: expected a power of two, got 48": dict(chunk=48),
    "segment_ids: expected shape (B=2, T=5), got (2, 4)": dict(segment_ids=np.ones((2, 4), np.int32)),
    "implementation: expected one of gpu, chunked, reference for delta_rule, got 'chunk'; did you mean": dict(
        implementation="chunk"
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_what_does_not_fit_is_said_in_one_line(message):
    with pytest.raises(ValueError) as error:
        delta_rule(**draw("head", 5) | BAD[message])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_so_it_is_for_the_diagonal_plus_rank_one():
    arrays = rank_one("head", 5, H)
    with pytest.raises(ValueError, match="^left: expected shape .2, 5, Hk=2 or H=4, K=4., got"):
        diagonal_plus_rank_one(**arrays | dict(left=np.zeros((B, 5, H, V))))
    with pytest.raises(ValueError, match="^right: expected a floating dtype, got int"):
        diagonal_plus_rank_one(**arrays | dict(right=np.zeros((B, 5, H, K), int)))
