"""Gated DeltaNet: the delta rule with a decay (Yang et al., arXiv 2412.06464, section 3).

    q, k       = l2norm(silu(conv(x W_q))), l2norm(silu(conv(x W_k)))      [B, T, H, K]
    v          = silu(conv(x W_v))                                         [B, T, H, V]
    beta       = beta_max sigmoid(x W_beta)                                [B, T, H]
    log_decay  = -exp(A_log) softplus(x W_dt + dt_bias)                    [B, T, H]
    S_t        = exp(log_decay_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,    mixed_t = K^-1/2 S_t^T q_t
    y          = W_out (rmsnorm(mixed) * scale * silu(x W_gate))           norm per head, one scale for all heads

Convolutions are depthwise, causal, of conv_width taps, without bias. With K = 3/4 and V = 3/2 of d_model / H, as by
default, a layer has 6 D^2 weights. exp(A_log) starts uniform in [a_min, a_max], as in Mamba-2 (the released code
draws from [0, 16]), softplus(dt_bias) log-uniform in [dt_min, dt_max]. beta_max = 2 allows negative eigenvalues
(2411.12537). It agrees with flash-linear-attention's layer (docs/peer_checks.md).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.ops.delta import delta_rule, delta_rule_flops
from seqmix.ops.delta_matrix import delta_mixing_matrix
from seqmix.ops.dispatch import NAMES
from seqmix.parts import delta_heads
from seqmix.parts.qkv import head_size, project, way_out
from seqmix.parts.time_steps import check_ranges


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet(Mixer):
    """Gated DeltaNet's token mixer. Raises ValueError for fields that do not fit."""

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
    implementation: str | None = None  # of delta_rule; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["delta_rule"]

    def __post_init__(self):
        delta_heads.check(self)
        check_ranges(self, ("dt_min", "dt_max"), ("a_min", "a_max"))

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size(self, "key_dim", 0.75), head_size(self, "value_dim", 1.5)

    def params(self) -> dict:
        return delta_heads.gated_params(self)

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, {"kv": None}, segment_ids)
        return y, {}

    def _run(self, params, x, state, segment_ids):
        """y and the state after it; entries of the state may be None."""
        heads, beta, conv = delta_heads.inputs(self, params, x, conv=state.get("conv"), segment_ids=segment_ids)
        decay = delta_heads.log_decay(params, x)
        options = {"chunk": self.chunk, "implementation": self.implementation, "segment_ids": segment_ids}
        mixed, kv = delta_rule(*heads, beta, decay, scale=self._scale, state=state["kv"], **options)
        y = self.merge(params, self._context(params, x), mixed)
        return y, {"conv": conv, "kv": kv} if self.conv_width else {"kv": kv}

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
        """K^-1/2 tril(Q K^T * D) (I + tril(diag(beta) K K^T * D, -1))^-1 diag(beta), [B, H, T, T].

        D[t, s] = exp(log_decay[s + 1] + .. + log_decay[t]).
        """
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        (q, k, _), beta, _ = delta_heads.inputs(self, params, x, segment_ids=segment_ids)
        decay = delta_heads.log_decay(params, x)
        return delta_mixing_matrix(q, k, beta, decay, scale=self._scale, segment_ids=segment_ids)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros: "kv" [B, H, K, V] in float32 at least; with conv_width "conv", the last inputs in `dtype`."""
        self.check_inputs(inputs)
        return delta_heads.zero_state(self, batch, dtype)

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, new = self._run(params, x, state, segment_ids)
        return y, new | {"kv": new["kv"].astype(state["kv"].dtype)}

    def state_axes(self):
        return delta_heads.state_axes(self)

    def state_size(self, context: int) -> int:
        return delta_heads.state_elements(self)

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        D, H, (K, V), tokens = self.d_model, self.heads, self.sizes, batch * seq
        projections = matmul(tokens, D, 2 * H * V + H)
        op = delta_rule_flops(batch, seq, H, H, K, V, self.chunk)
        # Of v: 5 for the norm and its scale, 5 for the gate.
        return projections + delta_heads.flops(self, batch, seq) + op + tokens * H * 10 * V
