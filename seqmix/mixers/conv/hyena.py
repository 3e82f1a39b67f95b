"""Hyena Hierarchy: Towards Larger Convolutional Language Models (Poli et al., arXiv 2302.10866).

    x_0 .. x_{N-1}, v = short_conv(x W_in + b_in)                        D channels each, depthwise, with a bias
    v      = (h_n * (x_n v)) + bias_n (x_n v)      for n = N-1, .., 1    a causal convolution over the whole past
    y      = (x_0 v) W_out + b_out

    h_n[j] = (e^(-delta j / (L - 1)) + shift) MLP(z_j)                   the filter at lag j, L = max_len
    MLP(z) = W_3 s(W_2 s(W_1 s(W_0 z + b_0) + b_1) + b_2),               s(u) = sin(frequency u), the same for all
    z_j    = [j / (L - 1), cos(2 pi f j / L), -sin(2 pi f j / L)],       f from 1e-4 to (features - 3) / 2

delta is fixed and evenly spaced over the D (N - 1) channels of all filters, so that windows fall to 0.01 within 1.5
to 0.3 of max_len. The filters are not normalised, weight decay is off for their weights, and
z is a weight with a hundredth of their learning rate. Both, and the equations, after a summary of the
released code (HazyResearch/safari), which was not opened itself.

There is no state of constant size: decoding keeps the inputs of every long convolution, and a step evaluates the
filters again, O(max_len). A kernel reaches over every boundary, so rows cannot be packed or padded.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.core import param
from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.core.sharding import constrain
from seqmix.ops.conv import short_conv, short_conv_flops
from seqmix.ops.fft_conv import long_conv, long_conv_flops, long_conv_prefill

TARGET, FAST, SLOW = 1e-2, 0.3, 1.5  # the window falls to TARGET after FAST to SLOW of max_len


@dataclass(frozen=True, kw_only=True)
class Hyena(Mixer):
    """Hyena operator. Raises ValueError for fields that do not fit and for more than max_len tokens."""

    order: int = 2  # N: gates x_0 .. x_{N-1} and N - 1 long convolutions, at least 2
    max_len: int = 8192  # L, the longest sequence, which scales the filters' positions
    conv_width: int = 3  # taps of the short convolution
    filter_features: int = 3  # numbers that describe a lag, odd, at least 3
    filter_width: int = 64  # hidden units of a filter's MLP
    frequency: float = 1.0  # of the sine at first; 10 to 14 in published language models
    shift: float = 0.0  # added to the window that multiplies the filters, >= 0

    linear_in_v: ClassVar[bool] = True
    packable: ClassVar[bool] = False
    context_form: ClassVar[str] = "heads"
    fft: ClassVar[bool] = True

    def __post_init__(self):
        self.positive(max_len=self.max_len, conv_width=self.conv_width, filter_width=self.filter_width)
        if not isinstance(self.order, int) or self.order < 2:
            raise ValueError(f"Hyena.order: expected an integer >= 2, got {self.order!r}")
        if self.max_len < 2:
            raise ValueError(f"Hyena.max_len: expected at least 2, got {self.max_len}")
        if not isinstance(self.filter_features, int) or self.filter_features < 3 or self.filter_features % 2 == 0:
            raise ValueError(f"Hyena.filter_features: expected an odd integer >= 3, got {self.filter_features!r}")
        if not self.frequency > 0:
            raise ValueError(f"Hyena.frequency: expected a positive number, got {self.frequency}")
        if not self.shift >= 0:
            raise ValueError(f"Hyena.shift: expected a number >= 0, got {self.shift}")

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        D, N, W, F, width = self.d_model, self.order, self.conv_width, self.filter_features, self.filter_width

        def layer(inputs, shape, axes):
            return Param(shape, axes, _uniform(inputs), decay=False, fan_in=inputs)

        filters = {
            "z": Param((self.max_len, F), ("table", None), self._features, decay=False, lr_scale=0.01),
            "frequency": Param((width,), (None,), param.constant(self.frequency), decay=False),
            "in": layer(F, (F, width), (None, None)),
            "in_bias": layer(F, (width,), (None,)),
            "hidden": layer(width, (2, width, width), (None,) * 3),
            "hidden_bias": layer(width, (2, width), (None,) * 2),
            "out": layer(width, (width, N - 1, D), (None, None, "mlp")),
        }
        return {
            "in": Param((D, N + 1, D), ("embed", None, "mlp")),
            "in_bias": Param((N + 1, D), (None, "mlp"), param.zeros, decay=False),
            "conv": Param((W, N + 1, D), (None, None, "mlp"), _uniform(W), fan_in=W),
            "conv_bias": Param((N + 1, D), (None, "mlp"), param.zeros, decay=False),
            "filter": filters,
            "bias": Param((N - 1, D), (None, "mlp"), param.normal(1.0), decay=False),
            "out": Param((D, D), ("mlp", "embed")),
            "out_bias": Param((D,), ("embed",), param.zeros, decay=False),
        }

    def _features(self, key, shape, dtype):
        """z [L, F] at first."""
        place = np.arange(self.max_len)[:, None]
        bands = (self.filter_features - 1) // 2
        angle = np.linspace(1e-4, bands - 1, bands) * 2 * np.pi * place / self.max_len
        z = np.concatenate([place / (self.max_len - 1), np.cos(angle), -np.sin(angle)], axis=1)
        return jnp.asarray(z, dtype)

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y [B, T, D], {}). Ignores `positions`: lags are counted in tokens."""
        self._check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        gates, v, _ = self._inputs(params, x)
        filters = self.filters(params, x.shape[1], _acc(x))
        for n in range(self.order - 1, 0, -1):
            v = long_conv(gates[n] * v, filters[n - 1], skip=params["bias"][n - 1])
        return self._out(params, gates[0] * v), {}

    def _check(self, x, **given):
        self.check(x, **given)
        if x.shape[1] > self.max_len:
            raise ValueError(f"x: expected at most max_len={self.max_len} tokens for Hyena, got {x.shape[1]}")

    def _inputs(self, params, x, state=None):
        """x_0 .. x_{N-1} [N, B, T, D], v [B, T, D] and the short convolution's state."""
        u = jnp.einsum("btd,dne->btne", x, params["in"].astype(x.dtype)) + params["in_bias"].astype(x.dtype)
        u = constrain(u, "batch", "time", None, "mlp")
        u, state = short_conv(u, params["conv"], params["conv_bias"], state=state)
        return jnp.moveaxis(u[:, :, :-1], 2, 0), u[:, :, -1], state

    def filters(self, params, lags, dtype=jnp.float32):
        """h [N - 1, D, lags] in `dtype`, lags up to max_len."""
        p = jax.tree.map(lambda w: w.astype(dtype), params["filter"])
        sine = lambda u: jnp.sin(p["frequency"] * u)
        u = sine(p["z"][:lags] @ p["in"] + p["in_bias"])
        for weight, bias in zip(p["hidden"], p["hidden_bias"], strict=True):
            u = sine(u @ weight + bias)
        h = jnp.einsum("lf,fnd->ndl", u, p["out"])
        delta = np.linspace(-math.log(TARGET) / SLOW, -math.log(TARGET) / FAST, h.shape[0] * h.shape[1])
        delta = jnp.asarray(delta.reshape(*h.shape[:2], 1), dtype)
        window = jnp.exp(-delta * jnp.arange(lags, dtype=dtype) / (self.max_len - 1))
        return constrain(h * (window + self.shift), None, None, None)

    def _out(self, params, h):
        return h @ params["out"].astype(h.dtype) + params["out_bias"].astype(h.dtype)

    # The mixing matrix, over G = D groups of one channel

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """Values [B, T, D, 1]: the convolved v. The gates x_n belong to the matrix."""
        self._check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._inputs(params, x)[1][..., None], {}

    def merge(self, params, context, mixed):
        return self._out(params, mixed[..., 0])

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """diag(x_0) (H_1 + bias_1) diag(x_1) .. (H_{N-1} + bias_{N-1}) diag(x_{N-1}), [B, D, T, T], H Toeplitz."""
        self._check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        time, acc = x.shape[1], _acc(x)
        gates = jnp.moveaxis(self._inputs(params, x)[0], 3, 2).astype(acc)  # [N, B, D, T]
        h = self.filters(params, time, acc)
        h = h.at[..., 0].add(params["bias"].astype(acc))
        lag = np.arange(time)[:, None] - np.arange(time)
        toeplitz = jnp.where(lag >= 0, h[..., np.maximum(lag, 0)], 0)  # [N - 1, D, T, T]
        matrix = gates[0][..., None] * jnp.eye(time, dtype=acc)
        for n in range(1, self.order):
            matrix = jnp.einsum("bdtu,dus->bdts", matrix, toeplitz[n - 1]) * gates[n][:, :, None]
        return matrix

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros in `dtype`: "conv" [B, W - 1, N + 1, D], and in "past" a [B, max_len, D] per long convolution.

        With "length" [B], the number of tokens so far.
        """
        self.check_inputs(inputs)
        if not 1 <= max_len <= self.max_len:
            raise ValueError(f"max_len: expected 1 to {self.max_len} tokens for Hyena, got {max_len}")
        D, N = self.d_model, self.order
        return {
            "conv": jnp.zeros((batch, self.conv_width - 1, N + 1, D), dtype),
            "past": [jnp.zeros((batch, max_len, D), dtype) for _ in range(N - 1)],
            "length": jnp.zeros(batch, jnp.int32),
        }

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        """(y [B, T, D], state). All rows get T tokens: there are no segment ids."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        gates, v, conv = self._inputs(params, x, state["conv"])
        past, length = list(state["past"]), state["length"]
        filters = self.filters(params, past[0].shape[1], _acc(x))
        for n in range(self.order - 1, 0, -1):
            kernel, skip = filters[n - 1], params["bias"][n - 1]
            v, past[n - 1], after = long_conv_prefill(_whole(gates[n] * v), past[n - 1], length, kernel, skip=skip)
        return self._out(params, gates[0] * v), {"conv": conv, "past": past, "length": after}

    def state_axes(self):
        past = [("batch", None, "mlp") for _ in range(self.order - 1)]
        return {"conv": ("batch", None, None, "mlp"), "past": past, "length": ("batch",)}

    def state_size(self, context: int) -> int:
        return self.d_model * ((self.conv_width - 1) * (self.order + 1) + context * (self.order - 1)) + 1

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        """Forward; the filters are evaluated once for the whole batch."""
        D, N, F, width, tokens = self.d_model, self.order, self.filter_features, self.filter_width, batch * seq
        projections = matmul(tokens, D, (N + 2) * D) + tokens * D * (N + 2)
        short = short_conv_flops(batch, seq, (N + 1) * D, self.conv_width)
        mlp = matmul(seq, width, F + 2 * width + (N - 1) * D) + 6 * seq * width
        window = 3 * seq * (N - 1) * D
        return projections + short + mlp + window + (N - 1) * long_conv_flops(batch, seq, D) + tokens * D * N


def _whole(x):
    """x [B, T, D] with all times and channels on each device: XLA does not partition FFTs, it gathers them."""
    return constrain(x, "batch", None, None)


def _acc(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _uniform(inputs):
    """Uniform with variance 1 / (3 inputs), as the released code starts its layers."""
    bound = inputs**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
