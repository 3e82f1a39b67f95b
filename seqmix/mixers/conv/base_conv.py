"""BaseConv: the simplest gated convolution, of "Zoology: Measuring and Improving Recall in Efficient Language Models".

Arora et al., arXiv 2312.04927, definition 4.1, with short filters:

    y_t = (W x_t + b) * (c + sum_{j < F} h[F-1-j] x_{t-j})        per channel

The released code (HazyResearch/zoology, mixers/base_conv.py; read, not run) adds x to y, which is what the residual
stream around a mixer does, and has implicit long filters beside these.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from seqmix.core import packing, param
from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.ops.conv import short_conv, short_conv_flops


@dataclass(frozen=True, kw_only=True)
class BaseConv(Mixer):
    """Gated short convolution. Raises ValueError for fields that do not fit."""

    conv_width: int = 3  # F, taps, at least 1

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"

    def __post_init__(self):
        self.positive(conv_width=self.conv_width)

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        D, F = self.d_model, self.conv_width
        return {
            "gate": Param((D, D), ("embed", "mlp")),
            "gate_bias": Param((D,), ("mlp",), param.zeros, decay=False),
            "conv": Param((F, D), (None, "mlp")),
            "conv_bias": Param((D,), ("mlp",), param.zeros, decay=False),
        }

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, None, segment_ids)
        return y, {}

    def _run(self, params, x, state, segment_ids):
        u, state = short_conv(x, params["conv"], params["conv_bias"], state=state, segment_ids=segment_ids)
        return self._gate(params, x) * u, state

    def _gate(self, params, x):
        return x @ params["gate"].astype(x.dtype) + params["gate_bias"].astype(x.dtype)

    # The mixing matrix, over G = D groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """Values [B, T, D, 1]: x."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        bias = params["conv_bias"].astype(x.dtype)
        real = True if segment_ids is None else (segment_ids != 0)[..., None]
        return x[..., None], {"gate": self._gate(params, x), "bias": jnp.where(real, bias, 0)}

    def merge(self, params, context, mixed):
        return context["gate"] * (mixed[..., 0] + context["bias"])

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M[t, s] = h[F-1-j] for s the j-th token before t in its segment, j < F: [B, D, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        runs = packing.runs(ids)
        place = packing.positions(runs)
        lag = place[:, :, None] - place[:, None, :]
        seen = (runs[:, :, None] == runs[:, None, :]) & (runs != 0)[:, :, None] & (lag >= 0) & (lag < self.conv_width)
        taps = params["conv"][::-1].T.astype(jnp.promote_types(x.dtype, jnp.float32))
        return jnp.where(seen[:, None], jnp.moveaxis(taps[:, jnp.where(seen, lag, 0)], 0, 1), 0)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros [B, F - 1, D] in `dtype`: the last inputs."""
        self.check_inputs(inputs)
        return jnp.zeros((batch, self.conv_width - 1, self.d_model), dtype)

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, state, segment_ids)

    def state_axes(self):
        return ("batch", None, "mlp")

    def state_size(self, context: int) -> int:
        return (self.conv_width - 1) * self.d_model

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        elements = batch * seq * self.d_model
        return (
            matmul(elements, self.d_model) + 2 * elements + short_conv_flops(batch, seq, self.d_model, self.conv_width)
        )
