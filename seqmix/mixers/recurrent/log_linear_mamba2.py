"""Log-linear Mamba-2: Mamba-2 with a state for each level of distance (Guo et al., arXiv 2506.04761).

    z, x, B, C, dt, log_decay   as in Mamba-2 (2405.21060)
    level_scales                = softplus(scale * (u W_level))                            [B, T, H, NL]
    y_t = sum_{s <= t} level_scales[t, lev(t, s)] exp(log_decay_{s+1} + ... + log_decay_t) (C_t . B_s) dt_s x_s + D x_t
    out = W_out (rmsnorm(y * silu(z)) * scale)

lev(t, s), the number of bits of t xor s for positions within a document, has NL = log2(max_len) + 1 values: near
tokens are told apart, far ones share a state. With all level_scales 1 this is Mamba-2. Training costs
O(T log T), decoding O(log T) states. Positions may not pass max_len, as NL is fixed with the weights.

A and W_in start as in this library's Mamba-2. Decoding
keeps states that are independent of each other where the paper merges them (see `ops/log_linear.py`): as many, with
the same y.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from seqmix.core.mixer import Mixer
from seqmix.ops.dispatch import NAMES
from seqmix.ops.linear_reference import linear_mixing_matrix
from seqmix.ops.log_linear import log_linear_attention, log_linear_flops
from seqmix.ops.log_linear_reference import level_matrix
from seqmix.parts import levels, ssd_heads


@dataclass(frozen=True, kw_only=True)
class LogLinearMamba2(Mixer):
    """The block without its pre-norm and residual. Raises ValueError for fields that do not fit, and more tokens
    than max_len.
    """

    max_len: int = 16384  # positions that a sequence can have, at least 2
    d_state: int = 128  # N, rows of the state of a head
    head_dim: int = 64  # P, channels of a head; divides expand * d_model
    expand: int = 2  # d_inner / d_model
    n_groups: int = 1  # G, pairs of B and C, each shared by H / G heads; divides H
    conv_width: int = 4  # taps of the convolutions, at least 1
    chunk: int = 64  # tokens that the op computes as one matrix, a power of two
    dt_min: float = 1e-3  # the initial time steps are log-uniform from here, > 0
    dt_max: float = 0.1  # to here
    dt_floor: float = 1e-4  # and at least this
    a_min: float = 1.0  # the initial -A are uniform from here, > 0
    a_max: float = 16.0  # to here
    norm_eps: float = 1e-5  # added to the mean square in the gated norm
    conv_bias: bool = True  # whether the convolutions add a bias
    implementation: str | None = None  # of log_linear_attention; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["log_linear_attention"]

    def __post_init__(self):
        levels.check(self)
        ssd_heads.check(self)

    @property
    def heads(self) -> int:
        """H = expand * d_model / head_dim."""
        return self.expand * self.d_model // self.head_dim

    def params(self) -> dict:
        return ssd_heads.params(self) | {"level": levels.params(self)}

    def check(self, x, **given):
        super().check(x, **given)
        levels.check_tokens(self, x)

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, {}, segment_ids)
        return y, {}

    def _run(self, params, x, state, segment_ids):
        """y and the state after it; {} for none before it."""
        z, dt, log_decay, parts, again, conv = ssd_heads.inputs(
            params, x, conv=state.get("conv"), segment_ids=segment_ids
        )
        v = (dt[..., None] * parts["x"]).astype(x.dtype)
        options = {"chunk": self.chunk, "implementation": self.implementation, "segment_ids": segment_ids}
        scales = levels.scales(params["level"], x)
        args = parts["C"], parts["B"], v, scales, log_decay
        mixed, after = log_linear_attention(*args, state=levels.pair(state), **options)
        y = ssd_heads.way_out(self, params, z, mixed, again["x"])
        return y, {"conv": conv, **levels.unpaired(after, state)}

    # The mixing matrix

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """Values [B, T, H, P]: the convolved x. Time steps and the skip belong to the matrix."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        z, _, _, parts, *_ = ssd_heads.inputs(params, x, segment_ids=segment_ids)
        return parts["x"], {"z": z}

    def merge(self, params, context, mixed):
        return ssd_heads.way_out(self, params, context["z"], mixed)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """level_scales[t, lev(t, s)] times the matrix of Mamba-2, and the skip: [B, H, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        _, dt, log_decay, parts, *_ = ssd_heads.inputs(params, x, segment_ids=segment_ids)
        scores = linear_mixing_matrix(parts["C"], parts["B"], log_decay, segment_ids=segment_ids)
        scores = scores * level_matrix(levels.scales(params["level"], x), segment_ids=segment_ids)
        return ssd_heads.with_steps(params, scores, dt, segment_ids)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros: the convolutions' last inputs in `dtype`, "levels" [B, H, log2(max_len), N, P] in float32 at least,
        and "length" [B].
        """
        self.check_inputs(inputs)
        state = levels.zero_state(self, batch, max_len, (self.d_state, self.head_dim), dtype)
        return state | {"conv": ssd_heads.conv_state(self, batch, dtype)}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, state, segment_ids)

    def state_axes(self):
        axes = ("batch", "heads", None, "state", "head_dim")
        return {"conv": ssd_heads.conv_axes(), "levels": axes, "length": ("batch",)}

    def state_size(self, context: int) -> int:
        return ssd_heads.conv_elements(self) + levels.elements(self, context, (self.d_state, self.head_dim))

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        op = log_linear_flops(batch, seq, self.heads, self.n_groups, self.d_state, self.head_dim, self.chunk)
        return ssd_heads.flops(self, batch, seq) + levels.flops(self, batch * seq) + op
