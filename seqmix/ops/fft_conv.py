"""Depthwise convolutions as long as the sequence: by FFT over a whole sequence, by a dot product per decoded token.

Not packable: a kernel reaches over every boundary, so there are no segment ids. Decoding keeps the past inputs of a
row in a buffer, where its tokens lie without gaps; padding anywhere in what is prefilled is left out.
"""

import jax
import jax.numpy as jnp

from seqmix.core import packing
from seqmix.core.shapes import dims
from seqmix.core.sharding import constrain
from seqmix.ops.mesh import layout, on_shares


def fft_size(least: int) -> int:
    """The smallest of 2^k times 1, 3, 5, 9 or 15 that is at least `least`: lengths that FFTs are fast at."""
    if least < 1:
        raise ValueError(f"least: expected a positive length, got {least}")
    return min(m << max(0, -(-least // m) - 1).bit_length() for m in (1, 3, 5, 9, 15))


def long_conv(x, kernel, *, ahead=None, skip=None):
    """y_t = sum_j kernel[j] x_{t-j} (+ sum_j ahead[j] x_{t+j}) (+ skip x_t), per channel, over j >= 0.

    Causal unless `ahead` is given, which is the same convolution run from right to left; lag 0 is in both, so let
    ahead[:, 0] be 0 where it must count once. Lags from T on reach nothing. The sequence is padded with zeros to at
    least T + lags - 1 and transformed in float32 (float64 for float64 inputs): causal up to rounding, about 1e-15 of
    the largest y in float64 and 1e-7 in float32.

    Args:
      x: [B, T, D].
      kernel: [D, K], by lag.
      ahead: [D, R], by lag into the future; none by default.
      skip: [D]; none by default.
    Returns:
      y [B, T, D] in the dtype of x.
    Raises:
      ValueError for shapes that disagree.

    On a mesh each device convolves its channels, laid over it like heads; where time is cut too, time and channels
    change places by all-to-all. Channels that the mesh does not divide are gathered: XLA does not partition FFTs.

    Source: Hyena (arXiv 2302.10866, section 2.1 and appendix A); two-sided as in Mega (2209.10655).
    """
    spec = {"x": "B T D", "kernel": "D K", "ahead": "D R", "skip": "D"}
    d = dims(spec, x=x, kernel=kernel, ahead=ahead, skip=skip)
    _filled(d)
    lay = layout(d.B, d.T, d.D)
    if lay is None:
        return _whole(x, kernel, ahead, skip)
    if d.D // lay.ways("heads") % lay.ways("time") == 0:
        return _on_channels(lay, x, kernel, ahead, skip)
    return constrain(_whole(constrain(x, "batch", None, None), kernel, ahead, skip), "batch", None, None)


def long_conv_flops(batch: int, seq: int, width: int, lags: int | None = None, two_sided: bool = False) -> int:
    """FLOPs of `long_conv` with a skip as XLA counts them: 8 n floor(log2 n) for a real transform of n numbers.

    (A split-radix transform needs less than a third of that.) `lags` is the kernel's, T by default.
    """
    lags = seq if lags is None else min(lags, seq)
    n = fft_size(seq + lags - 1)
    bins = n // 2 + 1
    log = n.bit_length() - 1
    rows = batch * width
    transforms = 8 * log * (n * (rows + width) + bins * rows)
    return transforms + rows * (6 * bins + n + 2 * seq) + two_sided * width * lags


def _filled(d):
    if d.T < 1:
        raise ValueError("x: expected at least one token, got none")
    for name, lags in (("kernel", d.K), ("ahead", getattr(d, "R", 1))):
        if lags < 1:
            raise ValueError(f"{name}: expected at least one lag, got none")


def _whole(x, kernel, ahead, skip):
    y = _convolve(x, kernel, ahead, _accumulator(x, kernel))
    return _add_skip(y, x, skip).astype(x.dtype)


def _on_channels(lay, x, kernel, ahead, skip):
    """`_whole` on each device's share of the channels."""

    def local(x, *weights):
        if not lay.time:
            return _whole(x, *weights)
        x = jax.lax.all_to_all(x, lay.time, 2, 1, tiled=True)
        size, place = x.shape[2], jax.lax.axis_index(lay.time)
        mine = lambda w: jax.lax.dynamic_slice_in_dim(w, place * size, size)
        return jax.lax.all_to_all(_whole(x, *jax.tree.map(mine, weights)), lay.time, 1, 2, tiled=True)

    tokens, lags = ("batch", "time", "heads"), ("heads", None)
    return on_shares(lay, local, (x, kernel, ahead, skip), (tokens, lags, lags, lags[:1]), tokens)


def _accumulator(*arrays):
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def _add_skip(y, x, skip):
    return y if skip is None else y + skip.astype(y.dtype) * x.astype(y.dtype)


# Recomputed in the backward pass: the transforms are several times larger than x.
@jax.checkpoint
def _transformed(x, circular):
    n = circular.shape[-1]
    product = jnp.fft.rfft(jnp.swapaxes(x, 1, 2), n) * jnp.fft.rfft(circular)
    return jnp.swapaxes(jnp.fft.irfft(product, n)[..., : x.shape[1]], 1, 2)


def _convolve(x, kernel, ahead, dtype):
    time = x.shape[1]
    kernel = kernel[:, :time].astype(dtype)
    lags = kernel.shape[1]
    if ahead is not None:
        ahead = ahead[:, :time].astype(dtype)
        lags = max(lags, ahead.shape[1])
    n = fft_size(time + lags - 1)
    circular = jnp.pad(kernel, ((0, 0), (0, n - kernel.shape[1])))
    if ahead is not None:
        # Lag -j stands at n - j: the kernel of the future, flipped, with its lag 0 rolled round to the front.
        flipped = jnp.pad(ahead[:, ::-1], ((0, 0), (n - ahead.shape[1], 0)))
        circular = circular + jnp.roll(flipped, 1, axis=1)
    return _transformed(x.astype(dtype), circular)


def long_conv_prefill(x, buffer, length, kernel, *, skip=None, mask=None):
    """`long_conv` of T more tokens a row, after the `length` tokens that stand in its buffer.

    Any split of a sequence over prefill and step gives what `long_conv` gives, up to rounding. One token a row costs
    O(S) as in `long_conv_step`; more of them one transform of the whole buffer, O(S log S).

    Args:
      x: [B, T, D].
      buffer: [B, S, D], past inputs of each row at 0 .. length - 1; start from zeros.
      length: [B] int, at most S - T. (Tokens past the end of the buffer are lost, and their y is wrong.)
      kernel: [D, K], by lag; K < S forgets older tokens, lags from S on are not read.
      skip: [D]; none by default.
      mask: [B, T] bool, False at padding, which may stand anywhere: it takes no place in the buffer and y is 0 there.
    Returns:
      (y [B, T, D] in the dtype of x, buffer, length).
    Raises:
      ValueError for shapes that disagree.
    """
    spec = {"x": "B T D", "buffer": "B S D", "length": "B", "kernel": "D K", "skip": "D", "mask": "B T"}
    d = dims(spec, x=x, buffer=buffer, length=length, kernel=kernel, skip=skip, mask=mask)
    _filled(d)
    if d.T > d.S:
        raise ValueError(f"buffer: expected room for T={d.T} tokens, got {d.S}")
    real = jnp.ones((d.B, d.T), bool) if mask is None else mask
    place = packing.positions(packing.runs(real.astype(jnp.int32)), start=length)
    # Padding is sent past the end, where a scatter drops it.
    target = jnp.where(real, place, d.S)
    buffer = buffer.at[jnp.arange(d.B)[:, None], target].set(x.astype(buffer.dtype), mode="drop")
    acc = _accumulator(x, kernel)
    if d.T == 1:
        y = _newest(buffer.astype(acc), place[:, 0], kernel.astype(acc))[:, None]
    else:
        y = jnp.take_along_axis(_convolve(buffer, kernel, None, acc), place[..., None], axis=1)
    y = jnp.where(real[..., None], _add_skip(y, x, skip), 0)
    return y.astype(x.dtype), buffer, length + jnp.sum(real, 1, dtype=length.dtype)


def long_conv_step(x, buffer, length, kernel, *, skip=None, mask=None):
    """`long_conv_prefill` of one token a row, x [B, D] and mask [B]: (y [B, D], buffer, length).

    A dot product of the kernel with the buffer, O(S) per token and channel; nothing is shifted.
    """
    dims({"x": "B D", "mask": "B"}, x=x, mask=mask)
    mask = None if mask is None else mask[:, None]
    y, buffer, length = long_conv_prefill(x[:, None], buffer, length, kernel, skip=skip, mask=mask)
    return y[:, 0], buffer, length


def _newest(buffer, place, kernel):
    """sum_j kernel[j] buffer[place - j], [B, D]: the convolution at one place [B] of each row."""
    room = buffer.shape[1]
    # weights[s] = kernel[place - s]: of the kernel flipped and followed by zeros, `room` from room - 1 - place on.
    kernel = kernel[:, :room]
    kernel = jnp.pad(kernel, ((0, 0), (0, room - kernel.shape[1])))
    flipped = jnp.pad(kernel[:, ::-1], ((0, 0), (0, room))).T
    weights = jax.vmap(lambda p: jax.lax.dynamic_slice_in_dim(flipped, room - 1 - p, room))(place)
    return jnp.sum(weights * buffer, axis=1)
