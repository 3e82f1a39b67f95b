"""The FFT convolution against a dense Toeplitz matrix in float64: lags, directions, decoding, costs, refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.ops.fft_conv import fft_size, long_conv, long_conv_flops, long_conv_prefill, long_conv_step

B, D = 2, 3


def draw(time, lags, ahead=None, seed=0):
    """x, kernel, ahead (or None) and skip, float64."""
    rng = np.random.default_rng(seed)
    back = rng.normal(size=(D, lags))
    return rng.normal(size=(B, time, D)), back, ahead and rng.normal(size=(D, ahead)), rng.normal(size=D)


def toeplitz(x, kernel, ahead=None, skip=None):
    """The convolution as a matrix [T, T] per channel."""
    time = x.shape[1]
    lag = np.arange(time)[:, None] - np.arange(time)

    def matrix(weights, lag):
        inside = (lag >= 0) & (lag < weights.shape[1])
        return jnp.where(inside, weights[:, np.where(inside, lag, 0)], 0)

    total = matrix(kernel, lag)
    if ahead is not None:
        total = total + matrix(ahead, -lag)
    if skip is not None:
        total = total + skip[:, None, None] * np.eye(time)
    return jnp.einsum("dts,bsd->btd", total, x)


def value_and_gradients(f, x, kernel, ahead, skip):
    given = {k: v for k, v in dict(x=x, kernel=kernel, ahead=ahead, skip=skip).items() if v is not None}
    weights = np.random.default_rng(9).normal(size=x.shape)

    @jax.jit
    def run(given):
        y, pull = jax.vjp(lambda a: f(**a), given)
        return y, pull(jnp.asarray(weights, y.dtype))[0]

    return run(given)


def close(got, want, tolerance=1e-12):
    # An FFT's error is relative to the largest entry, which here is some 10 of size one; sums over time make 100.
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * max(1, np.abs(w).max())), got, want
    )


@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_it_is_the_toeplitz_product_with_all_gradients(x64, time):
    # Fewer lags than tokens, as many, and more; the other combinations at one length.
    rare = ((5, None), (7, 65), (65, 1)) if time == 65 else ()
    for lags, ahead in ((time, None), (time + 7, time + 3), *rare):
        arrays = draw(time, lags, ahead)
        close(value_and_gradients(long_conv, *arrays), value_and_gradients(toeplitz, *arrays))


def test_it_is_causal_to_rounding(x64):
    x, kernel, _, skip = draw(100, 100)
    influence = jax.jit(jax.jacobian(lambda x: long_conv(x, kernel, skip=skip)[0, :, 0]))(x)[:, 0, :, 0]
    assert np.abs(np.triu(influence, 1)).max() < 1e-12
    assert np.abs(np.tril(influence)).max() > 1


def test_two_sided_is_both_directions_added(x64):
    x, kernel, ahead, _ = draw(33, 33, 20)
    close(long_conv(x, kernel, ahead=ahead), long_conv(x, kernel) + long_conv(x[:, ::-1], ahead)[:, ::-1])


def test_a_kernel_of_one_lag_is_a_product(x64):
    x, kernel, _, _ = draw(10, 1)
    close(long_conv(x, kernel), x * kernel[:, 0])


def test_low_precision_is_transformed_in_float32():
    x, kernel, _, skip = draw(200, 200)
    for dtype, bound in ((jnp.float32, 1e-6), (jnp.bfloat16, 3e-3)):  # of bfloat16, y is rounded: 2^-9 at most
        arrays = jnp.asarray(x, dtype), jnp.asarray(kernel, jnp.float32), None, jnp.asarray(skip, jnp.float32)
        y, grads = value_and_gradients(long_conv, *arrays)
        assert (y.dtype, grads["x"].dtype, grads["kernel"].dtype) == (dtype, dtype, jnp.float32)
        with jax.enable_x64(True):
            exact = [a if a is None else np.asarray(a, np.float64) for a in arrays]
            want = value_and_gradients(toeplitz, *exact)
        want = np.asarray(want[0])
        assert np.sqrt(np.mean((np.asarray(y, np.float64) - want) ** 2) / np.mean(want**2)) < bound


def test_sizes_are_the_least_of_their_kind():
    allowed = sorted(m << k for m in (1, 3, 5, 9, 15) for k in range(12))
    for least in range(1, 600):
        assert fft_size(least) == next(n for n in allowed if n >= least)


@pytest.mark.parametrize("lags", [4, 20])
def test_any_split_over_prefill_and_steps_is_the_forward_pass(x64, lags):
    x, kernel, _, skip = draw(12, lags)
    weights = np.random.default_rng(1).normal(size=x.shape)

    def decode(x, kernel, skip, sizes=(5, 1, 4, 1, 1), room=16):
        buffer, length, ys = jnp.zeros((B, room, D)), jnp.zeros(B, jnp.int32), []
        for start, size in zip(np.cumsum((0, *sizes)), sizes, strict=False):
            part = x[:, start : start + size]
            if size == 1:
                y, buffer, length = long_conv_step(part[:, 0], buffer, length, kernel, skip=skip)
                y = y[:, None]
            else:
                y, buffer, length = long_conv_prefill(part, buffer, length, kernel, skip=skip)
            ys.append(y)
        return jnp.concatenate(ys, 1)

    whole = lambda x, kernel, skip: long_conv(x, kernel, skip=skip)
    total = lambda f: jax.jit(jax.grad(lambda *a: (jnp.sum(weights * f(*a)), f(*a)), (0, 1, 2), has_aux=True))
    want = total(whole)(x, kernel, skip)
    close(total(decode)(x, kernel, skip), want)
    close(jax.jit(lambda *a: decode(*a, sizes=(12,), room=12))(x, kernel, skip), want[1])


def test_ragged_prompts_decode_wherever_their_padding_stands(x64):
    x, kernel, _, skip = draw(11, 11)
    mask = np.array([[0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 0, 1, 0, 1, 0, 0]], bool)
    spoilt = np.where(mask[..., None], x, np.nan)
    state = jnp.zeros((B, 16, D)), jnp.zeros(B, jnp.int32)
    ys = []
    for start, stop in ((0, 5), (5, 10)):
        now = slice(start, stop)
        y, *state = jax.jit(long_conv_prefill)(spoilt[:, now], *state, kernel, skip=skip, mask=mask[:, now])
        ys.append(y)
    y, buffer, length = jax.jit(long_conv_step)(spoilt[:, 10], *state, kernel, skip=skip, mask=mask[:, 10])
    got = np.concatenate([*ys, y[:, None]], 1)
    np.testing.assert_array_equal(length, mask.sum(1))
    for b in range(B):
        alone = x[b, mask[b]][None]
        close(got[b, mask[b]], toeplitz(alone, kernel, skip=skip)[0])
        np.testing.assert_array_equal(buffer[b, : length[b]], alone[0])
        assert not np.any(got[b, ~mask[b]]) and not np.any(buffer[b, length[b] :])


@pytest.mark.parametrize("two_sided", [False, True])
def test_flops_are_what_xla_counts(two_sided):
    for time, lags in ((200, 200), (128, 128), (300, 40)):
        shapes = dict(x=(4, time, 8), kernel=(8, lags), skip=(8,)) | (dict(ahead=(8, lags)) if two_sided else {})
        args = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
        counted = jax.jit(lambda a: long_conv(**a)).lower(args).compile().cost_analysis()["flops"]
        assert abs(long_conv_flops(4, time, 8, lags, two_sided) / counted - 1) < 0.05


def test_bad_input_is_named():
    x, kernel = jnp.ones((2, 5, 3)), jnp.ones((3, 5))
    buffer, length = jnp.zeros((2, 4, 3)), jnp.zeros(2, jnp.int32)
    for message, call in {
        r"kernel: expected shape \(D=3, K\)": lambda: long_conv(x, kernel.T),
        r"skip: expected shape \(D=3\)": lambda: long_conv(x, kernel, skip=jnp.ones(5)),
        "x: expected at least one token": lambda: long_conv(x[:, :0], kernel),
        "kernel: expected at least one lag": lambda: long_conv(x, kernel[:, :0]),
        "buffer: expected room for T=5 tokens, got 4": lambda: long_conv_prefill(x, buffer, length, kernel),
        r"length: expected shape \(B=2\)": lambda: long_conv_prefill(x[:, :1], buffer, length[:1], kernel),
        r"x: expected shape \(B, D\)": lambda: long_conv_step(x, buffer, length, kernel),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
