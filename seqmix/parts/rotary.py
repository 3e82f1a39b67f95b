"""Rotary position embedding, and the ways to stretch it over longer contexts."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from seqmix.core.shapes import dims, factor, positive

KINDS = ("linear", "ntk", "llama3")


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How the angular frequencies f_i = base^(-2i/n), 0 <= i < n/2, of n rotated dimensions are lowered.

    linear: f_i / factor, which is position / factor                (position interpolation, arXiv 2306.15595)
    ntk:    base becomes base factor^(n / (n - 2)): f_0 stays, the lowest is divided by factor
            (NTK-aware interpolation, arXiv 2309.00071, section 3.1)
    llama3: with r_i = original_len f_i / (2 pi) turns within the original context,
            f_i / factor where r_i < low_freq_factor, f_i where r_i > high_freq_factor, and between them
            (1 - u) f_i / factor + u f_i,  u = (r_i - low_freq_factor) / (high_freq_factor - low_freq_factor)
            (Llama 3.1's released code; the paper, arXiv 2407.21783, gives no formula)

    Raises ValueError for an unknown kind and numbers out of range.
    """

    kind: str  # linear, ntk or llama3
    factor: float  # how many times longer the context becomes, >= 1
    low_freq_factor: float = 1.0  # llama3: below this many turns a frequency is divided
    high_freq_factor: float = 4.0  # llama3: above this many turns a frequency is kept
    original_len: int = 8192  # llama3: context length of pretraining

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("factor", "low_freq_factor", "high_freq_factor"):
            factor(name, getattr(self, name))
        if self.factor < 1:
            raise ValueError(f"factor: expected a number >= 1, got {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor: expected 0 < low_freq_factor < high_freq_factor={self.high_freq_factor}, "
                f"got {self.low_freq_factor}"
            )
        positive("original_len", self.original_len)


def frequencies(size: int, *, base: float = 10000.0, scaling: RotaryScaling | None = None) -> np.ndarray:
    """Angle per position of each pair of `size` rotated dimensions, [size / 2] float64, on the host.

    Raises ValueError for an odd size, a base that is not above 1, and ntk of fewer than 4 dimensions.
    """
    if size < 2 or size % 2:
        raise ValueError(f"size: expected an even number of rotated dimensions, got {size}")
    if not isinstance(base, int | float) or not base > 1:
        raise ValueError(f"base: expected a number above 1, got {base!r}")
    kind = None if scaling is None else scaling.kind
    if kind == "ntk":
        if size < 4:
            raise ValueError(f"scaling: expected at least 4 rotated dimensions for ntk, got {size}")
        base = base * scaling.factor ** (size / (size - 2))
    plain = base ** (-np.arange(0, size, 2) / size)
    if kind == "linear":
        return plain / scaling.factor
    if kind == "llama3":
        turns = scaling.original_len * plain / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)
        return (1 - keep) * plain / scaling.factor + keep * plain
    return plain


def rotated_dims(key_dim: int, fraction: float) -> int:
    """How many of `key_dim` dimensions a fraction rotates; ValueError unless that is even and within them."""
    size = round(key_dim * fraction)
    if not 0 < fraction <= 1 or size < 2 or size % 2:
        raise ValueError(
            f"fraction: expected one in (0, 1] that rotates an even number of K={key_dim} dimensions, got {fraction}"
        )
    return size


def rotate(x, positions, *, base=10000.0, fraction=1.0, scaling: RotaryScaling | None = None):
    """x [B, T, H, K] with its first n = fraction K dimensions turned by angles that grow with the position.

        y_i       = x_i cos(a_i) - x_{i+n/2} sin(a_i)
        y_{i+n/2} = x_i sin(a_i) + x_{i+n/2} cos(a_i)        a_i = position f_i,  0 <= i < n/2

    with f from `frequencies`, so that rotated q . k depends on the difference of their positions alone
    (RoFormer, arXiv 2104.09864, with the halves of GPT-NeoX in place of neighbouring pairs). positions
    [B, T], or [1, T] for all rows, are integers or floats. Angles and products are in promote(x.dtype,
    float32); returns x.dtype. Raises ValueError for shapes that disagree and for what `frequencies` and
    `rotated_dims` refuse.
    """
    d = dims({"x": "B T H K", "positions": "P T"}, x=x, positions=positions)
    if d.P not in (1, d.B):
        raise ValueError(f"positions: expected shape (B={d.B}, T={d.T}), got {tuple(positions.shape)}")
    size = rotated_dims(d.K, fraction)
    acc = jnp.promote_types(x.dtype, jnp.float32)
    per_position = jnp.asarray(frequencies(size, base=base, scaling=scaling), acc)
    angles = positions[..., None].astype(acc) * per_position
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second, rest = jnp.split(x, [size // 2, size], axis=-1)
    first, second = first.astype(acc), second.astype(acc)
    turned = first * cos - second * sin, first * sin + second * cos
    return jnp.concatenate([*(half.astype(x.dtype) for half in turned), rest], axis=-1)
