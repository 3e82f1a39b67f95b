"""Mamba-2: state space duality (Dao and Gu, arXiv 2405.21060, section 7).

    z, x, B, C, dt = split(u W_in)
    x, B, C        = silu(conv(x)), silu(conv(B)), silu(conv(C))        depthwise, causal, conv_width taps
    dt             = softplus(dt + dt_bias),   log_decay = -exp(A_log) dt
    S_t            = exp(log_decay_t) S_{t-1} + B_t (dt_t x_t)^T
    y_t            = C_t S_t + D x_t
    out            = W_out (rmsnorm(y * silu(z)) * scale)               norm over d_inner / n_groups channels

for each head of head_dim channels of x, d_inner = expand d_model in all; head h reads the B and C of group
h // (H / n_groups).

W_in is held as one weight per part, with heads as a dimension, so that heads are cut over a mesh and no part
straddles two shards; concatenating z, x, B, C, dt (and conv's x, B, C) gives the published matrices, and the
number of weights is theirs. The published code draws W_in uniformly, with a third of the variance used here. The
op agrees with the paper's minimal listing (docs/peer_checks.md).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from seqmix.core.mixer import Mixer
from seqmix.ops.dispatch import NAMES
from seqmix.ops.linear import linear_attention, linear_attention_flops
from seqmix.ops.linear_reference import linear_mixing_matrix
from seqmix.parts import ssd_heads


@dataclass(frozen=True, kw_only=True)
class Mamba2(Mixer):
    """The Mamba-2 block without its pre-norm and residual. Raises ValueError for fields that do not fit."""

    d_state: int = 128  # N, rows of the state of a head
    head_dim: int = 64  # P, channels of a head; divides expand * d_model
    expand: int = 2  # d_inner / d_model
    n_groups: int = 1  # G, pairs of B and C, each shared by H / G heads; divides H
    conv_width: int = 4  # taps of the convolutions, at least 1
    chunk: int = 256  # tokens that the op computes as one matrix, a power of two
    dt_min: float = 1e-3  # the initial time steps are log-uniform from here, > 0
    dt_max: float = 0.1  # to here
    dt_floor: float = 1e-4  # and at least this
    a_min: float = 1.0  # the initial -A are uniform from here, > 0
    a_max: float = 16.0  # to here
    norm_eps: float = 1e-5  # added to the mean square in the gated norm
    conv_bias: bool = True  # whether the convolutions add a bias
    implementation: str | None = None  # of linear_attention; None: the best there is

    packable: ClassVar[bool] = True
    decodes: ClassVar[bool] = True
    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["linear_attention"]

    def __post_init__(self):
        ssd_heads.check(self)

    @property
    def heads(self) -> int:
        """H = expand * d_model / head_dim."""
        return self.expand * self.d_model // self.head_dim

    def params(self) -> dict:
        return ssd_heads.params(self)

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, {"conv": None, "ssm": None}, segment_ids)
        return y, {}

    def _run(self, params, x, state, segment_ids):
        """y and the state after it; entries of the state may be None."""
        z, dt, log_decay, parts, again, conv = ssd_heads.inputs(params, x, conv=state["conv"], segment_ids=segment_ids)
        options = {"write": dt, "chunk": self.chunk, "implementation": self.implementation}
        options["return_state"] = state["ssm"] is not None
        mixed, ssm = linear_attention(
            parts["C"], parts["B"], parts["x"], log_decay, state=state["ssm"], segment_ids=segment_ids, **options
        )
        return ssd_heads.way_out(self, params, z, mixed, again["x"]), {"conv": conv, "ssm": ssm}

    # The mixing matrix

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """Values [B, T, H, P]: the convolved x. Time steps and the skip belong to the matrix."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        z, _, _, parts, *_ = ssd_heads.inputs(params, x, segment_ids=segment_ids)
        return parts["x"], {"z": z}

    def merge(self, params, context, mixed):
        return ssd_heads.way_out(self, params, context["z"], mixed)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M[t, s] = (C_t . B_s) exp(log_decay_{s+1} + ... + log_decay_t) dt_s + D [t = s]: [B, H, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        _, dt, log_decay, parts, *_ = ssd_heads.inputs(params, x, segment_ids=segment_ids)
        scores = linear_mixing_matrix(parts["C"], parts["B"], log_decay, segment_ids=segment_ids)
        return ssd_heads.with_steps(params, scores, dt, segment_ids)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros: the convolutions' last inputs in `dtype`, and "ssm" [B, H, N, P] in float32 at least."""
        self.check_inputs(inputs)
        shape = batch, self.heads, self.d_state, self.head_dim
        ssm = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
        return {"conv": ssd_heads.conv_state(self, batch, dtype), "ssm": ssm}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, new = self._run(params, x, state, segment_ids)
        return y, new | {"ssm": new["ssm"].astype(state["ssm"].dtype)}

    def state_axes(self):
        return {"conv": ssd_heads.conv_axes(), "ssm": ("batch", "heads", "state", "head_dim")}

    def state_size(self, context: int) -> int:
        return ssd_heads.conv_elements(self) + self.heads * self.head_dim * self.d_state

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        sizes = self.heads, self.n_groups, self.d_state, self.head_dim
        return ssd_heads.flops(self, batch, seq) + linear_attention_flops(batch, seq, *sizes, self.chunk)
