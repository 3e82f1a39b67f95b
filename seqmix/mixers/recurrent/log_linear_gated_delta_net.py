"""Log-linear Gated DeltaNet: Gated DeltaNet with a state for each level of distance (Guo et al., arXiv 2506.04761).

    q, k, v, beta, log_decay   as in Gated DeltaNet (2412.06464)
    level_scales               = softplus(scale * (x W_level))                                       [B, T, H, NL]
    M                          = tril(Q K^T * D) (I + tril(diag(beta) K K^T * D, -1))^-1 diag(beta)
    mixed_t                    = K^-1/2 sum_{s <= t} level_scales[t, lev(t, s)] M[t, s] v_s
    y                          = W_out (rmsnorm(mixed) * scale * silu(x W_gate))

D[t, s] = exp(log_decay[s + 1] + .. + log_decay[t]). lev(t, s), the number of bits of t xor s for positions within a
document, has NL = log2(max_len) + 1 values. With all level_scales 1 this is Gated DeltaNet. Training costs
O(T log T), decoding O(log T) states. Positions may not pass max_len, as NL is fixed with the weights.

A_log starts as in this library's Gated DeltaNet. Decoding keeps states that are independent of each other where the
paper merges them (see `ops/log_linear.py`): as many, with the same y.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.ops.delta_matrix import delta_mixing_matrix
from seqmix.ops.dispatch import NAMES
from seqmix.ops.log_linear import log_linear_delta_rule, log_linear_flops
from seqmix.ops.log_linear_reference import level_matrix
from seqmix.parts import delta_heads, levels
from seqmix.parts.qkv import head_size, project, way_out
from seqmix.parts.time_steps import check_ranges


@dataclass(frozen=True, kw_only=True)
class LogLinearGatedDeltaNet(Mixer):
    """The token mixer. Raises ValueError for fields that do not fit, and more tokens than max_len."""

    max_len: int = 16384  # positions that a sequence can have, at least 2
    heads: int = 6  # H
    key_dim: int | None = None  # K; None: 3/4 d_model / heads
    value_dim: int | None = None  # V; None: 3/2 d_model / heads
    conv_width: int = 4  # taps of the convolutions over q, k and v; 0: none
    beta_max: float = 1.0  # of the step towards a value, in (0, 2]
    dt_min: float = 1e-3  # the initial time steps are log-uniform from here, > 0
    dt_max: float = 0.1  # to here
    a_min: float = 1.0  # the initial exp(A_log) are uniform from here, > 0
    a_max: float = 16.0  # to here
    norm_eps: float = 1e-5  # added to the mean square
    chunk: int = 64  # tokens that the op solves as one system, a power of two
    implementation: str | None = None  # of log_linear_delta_rule; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["log_linear_delta_rule"]

    def __post_init__(self):
        levels.check(self)
        delta_heads.check(self)
        check_ranges(self, ("dt_min", "dt_max"), ("a_min", "a_max"))

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size(self, "key_dim", 0.75), head_size(self, "value_dim", 1.5)

    def params(self) -> dict:
        return delta_heads.gated_params(self) | {"level": levels.params(self)}

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
        heads, beta, conv = delta_heads.inputs(self, params, x, conv=state.get("conv"), segment_ids=segment_ids)
        args = *heads, beta, levels.scales(params["level"], x), delta_heads.log_decay(params, x)
        options = {"chunk": self.chunk, "implementation": self.implementation, "segment_ids": segment_ids}
        mixed, after = log_linear_delta_rule(*args, scale=self._scale, state=levels.pair(state), **options)
        y = self.merge(params, self._context(params, x), mixed)
        after = levels.unpaired(after, state)
        return y, {"conv": conv, **after} if self.conv_width else after

    @property
    def _scale(self) -> float:
        return self.sizes[0] ** -0.5

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        (_, _, v), _, _ = delta_heads.inputs(self, params, x, segment_ids=segment_ids)
        return v, self._context(params, x)

    def _context(self, params, x):
        return {"gate": project(params, x, ("gate",))[0]}

    def merge(self, params, context, mixed):
        gate, scale = context["gate"], params["norm"]["scale"]
        return way_out(params, mixed, gate=gate, scale=scale, eps=self.norm_eps, dtype=gate.dtype)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """K^-1/2 level_scales[t, lev(t, s)] M[t, s], [B, H, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        (q, k, _), beta, _ = delta_heads.inputs(self, params, x, segment_ids=segment_ids)
        decay = delta_heads.log_decay(params, x)
        plain = delta_mixing_matrix(q, k, beta, decay, scale=self._scale, segment_ids=segment_ids)
        return plain * level_matrix(levels.scales(params["level"], x), segment_ids=segment_ids)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros: "levels" [B, H, log2(max_len), K, V] in float32 at least, "length" [B]; with conv_width "conv", the
        last inputs in `dtype`.
        """
        self.check_inputs(inputs)
        return levels.zero_state(self, batch, max_len, self.sizes, dtype) | delta_heads.conv_zeros(self, batch, dtype)

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, state, segment_ids)

    def state_axes(self):
        axes = {"levels": ("batch", "heads", None, "head_dim", None), "length": ("batch",)}
        return axes | delta_heads.conv_axes(self)

    def state_size(self, context: int) -> int:
        return levels.elements(self, context, self.sizes) + delta_heads.conv_elements(self)

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        D, H, (K, V), tokens = self.d_model, self.heads, self.sizes, batch * seq
        projections = matmul(tokens, D, 2 * H * V + H)
        op = log_linear_flops(batch, seq, H, H, K, V, self.chunk, delta=True)
        # Of v: 5 for the norm and its scale, 5 for the gate.
        rest = delta_heads.flops(self, batch, seq) + levels.flops(self, tokens)
        return projections + rest + op + tokens * H * 10 * V
