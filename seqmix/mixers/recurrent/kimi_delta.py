"""Kimi Delta Attention, KDA (Kimi Linear, arXiv 2510.26692, section 3): the delta rule with a decay per channel.

    q, k       = l2norm(silu(conv(x W_q))), l2norm(silu(conv(x W_k)))      [B, T, H, K]
    v          = silu(conv(x W_v))                                         [B, T, H, V]
    beta       = beta_max sigmoid(x W_beta)                                [B, T, H]
    log_decay  = -exp(A_log) softplus(x W_down W_up + dt_bias)             [B, T, H, K]; A_log [H]
    S_t        = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T,    mixed_t = K^-1/2 S_t^T q_t
    y          = W_out (rmsnorm(mixed) * scale * sigmoid(x G_down G_up + b))     norm per head, one scale for all heads

Convolutions are depthwise, causal, of conv_width taps, without bias. Decays and the output gate come through
`gate_rank` channels: W_down, W_up, A_log and dt_bias are "decay" in the tree, G_down, G_up and b "gate". Where decays
are equal over the channels this is Gated DeltaNet, but for the gate's sigmoid. The paper interleaves three such layers
with one of full attention without positions. A_log and dt_bias start as in Gated DeltaNet. It agrees with
flash-linear-attention's layer (docs/peer_checks.md).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmix.core import param
from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.ops.delta import delta_rule, delta_rule_flops
from seqmix.ops.delta_matrix import delta_mixing_matrix
from seqmix.ops.dispatch import NAMES
from seqmix.parts import delta_heads
from seqmix.parts.norms import norm_params
from seqmix.parts.qkv import AXES, head_size, out_param, project, way_out
from seqmix.parts.time_steps import a_log_init, check_ranges, dt_bias_init, log_decay


@dataclass(frozen=True, kw_only=True)
class KimiDeltaAttention(Mixer):
    """Kimi Delta Attention. Raises ValueError for fields that do not fit."""

    heads: int = 16  # H
    key_dim: int | None = None  # K; None: d_model / heads (128 as published)
    value_dim: int | None = None  # V; None: d_model / heads
    gate_rank: int | None = None  # channels that decays, and output gates, come through; None: V
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
        if self.gate_rank is not None:
            self.positive(gate_rank=self.gate_rank)

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size(self, "key_dim"), head_size(self, "value_dim")

    @property
    def _rank(self) -> int:
        return self.sizes[1] if self.gate_rank is None else self.gate_rank

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        D, H, R, (K, V) = self.d_model, self.heads, self._rank, self.sizes
        return {
            **delta_heads.params(self),
            "decay": {
                "down": Param((D, R), ("embed", None)),
                "up": Param((R, H, K), (None, *AXES)),
                "A_log": Param((H,), ("heads",), a_log_init(self.a_min, self.a_max), decay=False),
                "dt_bias": Param((H, K), AXES, dt_bias_init(self.dt_min, self.dt_max), decay=False),
            },
            "gate": {
                "down": Param((D, R), ("embed", None)),
                "up": Param((R, H, V), (None, *AXES)),
                "bias": Param((H, V), AXES, param.zeros, decay=False),
            },
            "norm": norm_params((V,), ("head_dim",)),
            "out": out_param(H, V, D),
        }

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, {"kv": None}, segment_ids)
        return y, {}

    def _run(self, params, x, state, segment_ids):
        """y and the state after it; entries of the state may be None."""
        heads, beta, conv = delta_heads.inputs(self, params, x, conv=state.get("conv"), segment_ids=segment_ids)
        decay = self._log_decay(params, x)
        options = {"chunk": self.chunk, "implementation": self.implementation, "segment_ids": segment_ids}
        mixed, kv = delta_rule(*heads, beta, decay, scale=self._scale, state=state["kv"], **options)
        y = self.merge(params, self._context(params, x), mixed)
        return y, {"conv": conv, "kv": kv} if self.conv_width else {"kv": kv}

    def _log_decay(self, params, x):
        """[B, T, H, K] in promote(x.dtype, float32)."""
        p = params["decay"]
        return log_decay(_low_rank(p, x), p["A_log"][:, None], p["dt_bias"])

    @property
    def _scale(self) -> float:
        return self.sizes[0] ** -0.5

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        (_, _, v), _, _ = delta_heads.inputs(self, params, x, segment_ids=segment_ids)
        return v, self._context(params, x)

    def _context(self, params, x):
        gate = _low_rank(params["gate"], x)
        return {"gate": (gate + params["gate"]["bias"].astype(gate.dtype)).astype(x.dtype)}

    def merge(self, params, context, mixed):
        gate, scale = context["gate"], params["norm"]["scale"]
        options = {"activation": jax.nn.sigmoid, "eps": self.norm_eps, "dtype": gate.dtype}
        return way_out(params, mixed, gate=gate, scale=scale, **options)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """K^-1/2 tril(Q K^T D) (I + tril(diag(beta) K K^T D, -1))^-1 diag(beta), [B, H, T, T].

        D weighs channel k of the products by exp(log_decay[s + 1, k] + .. + log_decay[t, k]).
        """
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        (q, k, _), beta, _ = delta_heads.inputs(self, params, x, segment_ids=segment_ids)
        decay = self._log_decay(params, x)
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
        D, H, R, (K, V), tokens = self.d_model, self.heads, self._rank, self.sizes, batch * seq
        projections = matmul(tokens, D, H * V + 2 * R) + matmul(tokens, R, H * (K + V))
        op = delta_rule_flops(batch, seq, H, H, K, V, self.chunk, per_channel=True)
        # 4 a decay; of v: 5 for the norm and its scale, 6 for the gate.
        return projections + delta_heads.flops(self, batch, seq) + op + tokens * H * (4 * K + 11 * V)


def _low_rank(p, x):
    """x W_down W_up, [B, T, H, K], in promote(x.dtype, float32)."""
    low = x @ p["down"].astype(x.dtype)
    return project(p, low, ("up",), dtype=jnp.promote_types(x.dtype, jnp.float32))[0]
