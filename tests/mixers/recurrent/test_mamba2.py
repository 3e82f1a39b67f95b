"""Mamba-2 against its equations, decoding against forward, packed against separate rows, size and cost."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.recurrent.mamba2 import Mamba2
from seqmix.models import LM

SMALL = Mamba2(d_model=6, d_state=5, head_dim=3, expand=2, n_groups=2, conv_width=4, chunk=4)  # 4 heads
TIGHT = dict(rtol=0, atol=1e-11)  # float64, outputs of order one


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def weights(mixer, dtype=np.float64):
    """Weights of order a half, none at its special start (ones, zeros)."""
    rng = np.random.default_rng(0)
    draw = lambda p: jnp.asarray(0.5 * rng.standard_normal(p.shape), dtype)
    return param.map_params(draw, mixer.params())


def tokens(batch, time, seed=7):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, time, SMALL.d_model)))


def flat(tree, keys, lead):
    """Parts side by side, as the published block holds them."""
    return jnp.concatenate([tree[k].reshape(*tree[k].shape[:lead], -1) for k in keys], axis=-1)


def by_the_equations(mixer, p, u):
    """The published block, token by token: one input projection, one convolution over [x, B, C]."""
    H, P, G, N, W = mixer.heads, mixer.head_dim, mixer.n_groups, mixer.d_state, mixer.conv_width
    inner, batch = H * P, len(u)
    w_in, taps = flat(p["in"], ("z", "x", "B", "C", "dt"), 1), flat(p["conv"], ("x", "B", "C"), 1)
    bias = flat(p["conv_bias"], ("x", "B", "C"), 0) if mixer.conv_bias else 0
    window = [jnp.zeros((batch, inner + 2 * G * N))] * W
    state, ys = jnp.zeros((batch, H, N, P)), []
    for t in range(u.shape[1]):
        z, xbc, dt = jnp.split(u[:, t] @ w_in, (inner, 2 * inner + 2 * G * N), axis=-1)
        window = window[1:] + [xbc]
        x, b, c = jnp.split(jax.nn.silu(sum(w * v for w, v in zip(taps, window)) + bias), (inner, inner + G * N), -1)
        x, b, c = x.reshape(batch, H, P), b.reshape(batch, G, N), c.reshape(batch, G, N)
        b, c = (jnp.repeat(a, H // G, axis=1) for a in (b, c))
        dt = jnp.log1p(jnp.exp(dt + p["dt_bias"]))
        decay = jnp.exp(-jnp.exp(p["A_log"]) * dt)
        state = decay[..., None, None] * state + b[..., None] * (dt[..., None] * x)[:, :, None]
        y = jnp.sum(c[..., None] * state, axis=2) + p["D"][:, None] * x
        g = (y.reshape(batch, inner) * z / (1 + jnp.exp(-z))).reshape(batch, G, -1)
        g = g / jnp.sqrt(jnp.mean(g**2, axis=-1, keepdims=True) + mixer.norm_eps)
        ys.append((g.reshape(batch, inner) * p["norm"]["scale"].reshape(-1)) @ p["out"].reshape(inner, -1))
    return jnp.stack(ys, axis=1)


@pytest.mark.parametrize("mixer", [SMALL, dataclasses.replace(SMALL, n_groups=1, conv_bias=False, conv_width=1)])
def test_forward_and_its_gradients_are_those_of_the_equations(mixer):
    p, x = weights(mixer), tokens(2, 6)
    cotangent = tokens(2, 6, seed=8)

    def run(f):
        return jax.jit(jax.value_and_grad(lambda p, x: (jnp.sum(f(p, x) * cotangent), f(p, x)), (0, 1), has_aux=True))

    (_, got), got_grads = run(lambda p, x: mixer.forward(p, x)[0])(p, x)
    (_, y), grads = run(lambda p, x: by_the_equations(mixer, p, x))(p, x)
    assert float(jnp.max(jnp.abs(y))) > 0.5
    np.testing.assert_allclose(got, y, **TIGHT)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got_grads), jax.tree.leaves(grads), strict=True):
        assert float(jnp.max(jnp.abs(b))) > 1e-3, path
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=str(path))


def test_prefill_in_parts_and_steps_equal_forward():
    p, x = weights(SMALL), tokens(2, 11)
    y, _ = jax.jit(SMALL.forward)(p, x)
    prefill, step = jax.jit(SMALL.prefill), jax.jit(SMALL.step)
    for cut in (1, 2, 8):
        state = SMALL.init_state(p, 2, 11, jnp.float64)
        out, state = prefill(p, x[:, :cut], state)
        more, state = prefill(p, x[:, cut:9], state)
        parts = [out, more]
        for t in (9, 10):
            out, state = step(p, x[:, t : t + 1], state)
            parts.append(out)
        np.testing.assert_allclose(jnp.concatenate(parts, axis=1), y, **TIGHT)


def test_packed_rows_equal_separate_rows():
    p, x = weights(SMALL), tokens(2, 11)
    ids = np.array([[0, 3, 3, 3, 1, 1, 1, 0, 2, 2, 2], [1, 1, 0, 1, 0, 0, 4, 4, 0, 4, 0]])  # padding inside too
    run = jax.jit(SMALL.forward)
    y, _ = run(p, x, segment_ids=ids)
    assert np.all(np.asarray(y)[ids == 0] == 0)
    places = [(row, np.flatnonzero(ids[row] == i)) for row, i in ((0, 3), (0, 1), (0, 2), (1, 1), (1, 4))]
    alone, _ = run(p, jnp.stack([x[row, place] for row, place in places]))
    np.testing.assert_allclose(jnp.stack([y[row, place] for row, place in places]), alone, **TIGHT)


def test_ragged_prompts_padded_on_the_left_decode_as_if_alone():
    p, x = weights(SMALL), tokens(3, 8)
    lengths = (6, 2, 0)
    ids = jnp.array([[0] * (6 - n) + [1] * n for n in lengths])
    y, state = jax.jit(SMALL.prefill)(p, x[:, :6], SMALL.init_state(p, 3, 8, jnp.float64), segment_ids=ids)
    after, _ = jax.jit(SMALL.step)(p, x[:, 6:7], state)
    y = jnp.concatenate([y, after], axis=1)
    run = jax.jit(SMALL.forward)
    for row, n in enumerate(lengths):
        alone, _ = run(p, x[row : row + 1, 6 - n : 7])
        np.testing.assert_allclose(y[row, 6 - n :], alone[0], **TIGHT)
        assert np.all(y[row, : 6 - n] == 0)


def test_the_mixing_matrix_reproduces_forward():
    p, x = weights(SMALL), tokens(2, 7)
    for ids in (None, jnp.array([[1, 1, 2, 2, 2, 0, 2], [0, 0, 5, 5, 5, 5, 0]])):

        @jax.jit
        def run(p, x, ids=ids):
            matrix = SMALL.mixing_matrix(p, x, segment_ids=ids)
            values, context = SMALL.project(p, x, segment_ids=ids)
            mixed = jnp.einsum("bgts,bsgv->btgv", matrix, values)
            return matrix, SMALL.merge(p, context, mixed), SMALL.forward(p, x, segment_ids=ids)[0]

        matrix, merged, y = run(p, x)
        assert matrix.shape == (2, 4, 7, 7) and np.all(np.triu(matrix, 1) == 0)
        np.testing.assert_allclose(merged, y, **TIGHT)


def test_bfloat16_stays_near_float32():
    p, x = weights(SMALL, jnp.float32), tokens(2, 16).astype(jnp.bfloat16)
    run = jax.jit(SMALL.prefill)
    state = SMALL.init_state(p, 2, 16, jnp.bfloat16)
    y, after = run(p, x, state)
    exact, _ = run(p, x.astype(jnp.float32), state)
    assert y.dtype == jnp.bfloat16
    # Some six roundings to 8 significant bits on the way, each 2^-9 of its term on average.
    error = jnp.sqrt(jnp.mean((y - exact) ** 2) / jnp.mean(exact**2))
    assert float(error) < 0.015
    kinds = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
    assert kinds(after) == kinds(state) and after["ssm"].dtype == jnp.float32


def test_the_state_is_as_declared():
    state = SMALL.init_state(None, 1, 8)
    assert sum(a.size for a in jax.tree.leaves(state)) == SMALL.state_size(8) == SMALL.state_size(10**6)
    axes = jax.tree.map(len, SMALL.state_axes(), is_leaf=lambda a: isinstance(a, tuple))
    assert axes == jax.tree.map(jnp.ndim, state)


def test_initial_time_steps_and_decays_lie_in_their_ranges():
    mixer = Mamba2(d_model=1024, head_dim=8)  # 256 heads
    p = jax.jit(lambda key: param.materialise({k: mixer.params()[k] for k in ("dt_bias", "A_log")}, key))(
        jax.random.key(1)
    )
    dt, a = jax.nn.softplus(p["dt_bias"]), jnp.exp(p["A_log"])
    assert mixer.dt_min * 0.999 <= dt.min() < 0.002 and 0.05 < dt.max() <= mixer.dt_max * 1.001
    assert abs(jnp.mean(jnp.log(dt)) - math.log(1e-2)) < 0.25  # log-uniform: 4 standard errors of the mean
    assert 1 <= a.min() < 2 and 15 < a.max() <= 16.001 and abs(jnp.mean(a) - 8.5) < 1.1
    floored = dataclasses.replace(mixer, dt_floor=0.01).params()["dt_bias"]
    assert jax.nn.softplus(floored.initializer(jax.random.key(0), (64,), jnp.float32)).min() > 0.00999


def test_the_weights_are_the_published_ones_in_number():
    mixer = Mamba2(d_model=2048, d_state=128, head_dim=64)
    inner, heads, convolved = 4096, 64, 4096 + 2 * 128
    tree = mixer.params()
    assert param.count(tree["in"]) == 2048 * (2 * inner + 2 * 128 + heads)
    assert param.count(tree["conv"]) == 4 * convolved and param.count(tree["conv_bias"]) == convolved
    assert tree["norm"]["scale"].shape == (64, 64) and tree["out"].shape == (64, 64, 2048)
    lm = LM(vocab=50288, d_model=2048, n_layers=48, mixers=(Mamba2(),))
    assert lm.count() == 1_343_757_312
    decayed = {name for name, p in param.entries(tree) if p.decay}
    assert decayed == {f"in/{k}" for k in ("z", "x", "B", "C", "dt")} | {f"conv/{k}" for k in "xBC"} | {"out"}
    assert "conv_bias" not in dataclasses.replace(mixer, conv_bias=False).params()


@pytest.mark.parametrize("mixer", [Mamba2(d_model=32, chunk=64), Mamba2(d_model=64, n_groups=2, chunk=32)])
def test_flops_are_those_that_xla_counts(mixer):
    """Before and after its fusions, which may compute the convolutions once for each use."""
    with jax.enable_x64(False):
        mixer = dataclasses.replace(mixer, d_state=16, head_dim=16)
        x = jax.ShapeDtypeStruct((2, mixer.chunk, mixer.d_model), jnp.float32)
        lowered = jax.jit(lambda p, x: mixer.forward(p, x)[0]).lower(param.abstract(mixer.params()), x)
        for stage in (lowered, lowered.compile()):
            counted = stage.cost_analysis()["flops"]
            assert mixer.flops(2, mixer.chunk) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(d_model=6, head_dim=5), "Mamba2.head_dim: expected a divisor"),
        (dict(d_model=6, head_dim=4, n_groups=2), "Mamba2.n_groups: expected a divisor"),
        (dict(d_state=0), "Mamba2.d_state: expected a positive integer"),
        (dict(conv_width=0), "Mamba2.conv_width: expected a positive integer"),
        (dict(dt_min=0.2), "Mamba2.dt_min: expected 0 < dt_min <= dt_max"),
        (dict(a_min=0.0), "Mamba2.a_min: expected 0 < a_min <= a_max"),
    ],
)
def test_bad_fields_are_named_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        Mamba2(**fields)
    assert "\n" not in str(error.value)


def test_what_it_cannot_take_is_refused_by_name():
    p, x = weights(SMALL), tokens(1, 3)
    with pytest.raises(ValueError, match="memory: Mamba2 does not take"):
        SMALL.forward(p, x, memory=x)
    with pytest.raises(ValueError, match="Mamba2.d_model: expected a positive integer"):
        Mamba2().params()
    with pytest.raises(ValueError, match="implementation: expected one of"):
        jax.eval_shape(dataclasses.replace(SMALL, implementation="fast").forward, p, x)
