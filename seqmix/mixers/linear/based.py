"""Based: linear attention by the Taylor series of the exponential (Arora et al., arXiv 2402.18668, section 4).

    q, k, v  = x W_q, x W_k, x W_v                        [B, T, H, K], [.., K], [.., V], K small (16)
    mixed_t  = sum_{s <= t} w_ts v_s / (sum_{s <= t} w_ts + eps),    w = 1 + u + u^2 / 2,  u = q_t . k_s / sqrt(K)
    y        = mixed W_out

as phi(q) . phi(k) with 1 + K + K (K + 1) / 2 features (`parts.feature_maps.Taylor2`; 153 of K = 16, where the
published code, which keeps both halves of the symmetric products, has 273). No positions, no gate and no norm.

This is the global half of Based. The paper mixes it with exact attention in a narrow window by layers: of every five,
one of these, then one softmax attention with window=64 to 128 (256 in the released 360M model) and rotary positions;
the others are gated convolutions of width 3. A period with the two halves is

    LM(..., mixers=(Based(), Attention(window=64)))

The op with this map agrees with flash-linear-attention's naive form (docs/peer_checks.md).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.ops.dispatch import NAMES
from seqmix.parts.feature_attention import (
    STATE_AXES,
    attend,
    attend_flops,
    attention_weights,
    state_elements,
    zero_state,
)
from seqmix.parts.feature_maps import Taylor2
from seqmix.parts.qkv import check_sizes, head_params, head_size, out_param, project

TAYLOR = Taylor2()


@dataclass(frozen=True, kw_only=True)
class Based(Mixer):
    """Taylor linear attention. Raises ValueError for fields that do not fit."""

    heads: int = 16  # H
    key_dim: int = 16  # K; the state grows with its square
    value_dim: int | None = None  # V; None: d_model / heads
    eps: float = 1e-12  # added to the denominator, which is at least 1/2, >= 0
    chunk: int = 64  # tokens that the op computes as one matrix, a power of two
    implementation: str | None = None  # of linear_attention; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["linear_attention"]

    def __post_init__(self):
        self.positive(key_dim=self.key_dim)
        check_sizes(self)
        if not self.eps >= 0:
            raise ValueError(f"Based.eps: expected a number >= 0, got {self.eps}")

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return self.key_dim, head_size(self, "value_dim")

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        H, (K, V) = self.heads, self.sizes
        tree = head_params(self.d_model, {"q": (H, K), "k": (H, K), "v": (H, V)})
        return {**tree, "out": out_param(H, V, self.d_model)}

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, None, segment_ids)
        return y, {}

    def _run(self, params, x, state, segment_ids):
        q, k, v = project(params, x, ("q", "k", "v"))
        q, k = TAYLOR.apply({}, q, k)
        options = {"chunk": self.chunk, "implementation": self.implementation, "segment_ids": segment_ids}
        mixed, state = attend(q, k, v, eps=self.eps, state=state, **options)
        return self.merge(params, {}, mixed), state

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return project(params, x, ("v",))[0], {}

    def merge(self, params, context, mixed):
        return jnp.einsum("bthv,hvd->btd", mixed, params["out"].astype(mixed.dtype))

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M[t, s] = w_ts / (sum over visible u of w_tu + eps), [B, H, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        q, k = TAYLOR.apply({}, *project(params, x, ("q", "k")))
        return attention_weights(q, k, eps=self.eps, segment_ids=segment_ids)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros in float32 at least: "kv" [B, H, F, V] and "k" [B, H, F], sums over phi(k)."""
        self.check_inputs(inputs)
        K, V = self.sizes
        return zero_state(batch, self.heads, TAYLOR.dim(K), V, dtype)

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, state, segment_ids)

    def state_axes(self):
        return STATE_AXES

    def state_size(self, context: int) -> int:
        K, V = self.sizes
        return state_elements(self.heads, TAYLOR.dim(K), V)

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        H, (K, V), tokens = self.heads, self.sizes, batch * seq
        projections = matmul(tokens, self.d_model, H * (2 * K + 2 * V))
        op = attend_flops(batch, seq, H, TAYLOR.dim(K), V, self.chunk)
        return projections + op + tokens * H * (TAYLOR.flops(K) + V)
