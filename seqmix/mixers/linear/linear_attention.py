"""Linear attention: Transformers are RNNs (Katharopoulos et al., arXiv 2006.16236, equations 8 and 16 to 20).

    q, k, v  = x W_q, x W_k, x W_v                              [B, T, H, K], [.., K], [.., V]
    mixed_t  = phi(q_t)^T sum_{s <= t} phi(k_s) v_s^T / (phi(q_t) . sum_{s <= t} phi(k_s) + eps)
    y        = mixed W_out

with phi from `parts.feature_maps` by its name: elu (the paper's, elu + 1), relu, hedgehog (2402.04347), taylor2
(2402.18668), random (Performers, 2009.14794). Without `causal` the sums go over the whole segment. No positions, no
biases and no norm of the output. The published code is remembered to project with biases and to have eps 1e-6; it
was not opened. Equations checked against the paper's.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.ops.dispatch import NAMES
from seqmix.parts import feature_maps
from seqmix.parts.feature_attention import (
    STATE_AXES,
    attend,
    attend_flops,
    attention_weights,
    state_elements,
    zero_state,
)
from seqmix.parts.qkv import check_sizes, head_params, head_size, out_param, project


@dataclass(frozen=True, kw_only=True)
class LinearAttention(Mixer):
    """Normalised linear attention with a named feature map. Raises ValueError for fields that do not fit."""

    heads: int = 8  # H
    key_dim: int | None = None  # K; None: d_model / heads
    value_dim: int | None = None  # V; None: d_model / heads
    feature_map: str = "elu"  # elu, relu, hedgehog, hedgehog_exp, hedgehog_whole, taylor2 or random
    features: int | None = None  # of the random map; None: 4 K
    causal: bool = True  # hide later tokens; without it there is no decoding
    eps: float = 1e-6  # added to the denominator, >= 0
    chunk: int = 64  # tokens that the op computes as one matrix, a power of two
    implementation: str | None = None  # of linear_attention; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["linear_attention"]

    @property
    def decodes(self) -> bool:
        return self.causal

    def __post_init__(self):
        check_sizes(self)
        try:
            _ = self._map
        except ValueError as error:
            raise ValueError(f"LinearAttention.{error}") from None
        if not self.eps >= 0:
            raise ValueError(f"LinearAttention.eps: expected a number >= 0, got {self.eps}")

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size(self, "key_dim"), head_size(self, "value_dim")

    @property
    def _map(self):
        return feature_maps.named(self.feature_map, self.features)

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        H, (K, V) = self.heads, self.sizes
        tree = head_params(self.d_model, {"q": (H, K), "k": (H, K), "v": (H, V)})
        weights = self._map.params(H, K)
        return {**tree, **({"features": weights} if weights else {}), "out": out_param(H, V, self.d_model)}

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, None, segment_ids)
        return y, {}

    def _run(self, params, x, state, segment_ids):
        (v,) = project(params, x, ("v",))
        options = {"chunk": self.chunk, "implementation": self.implementation, "causal": self.causal}
        mixed, state = attend(
            *self._features(params, x), v, eps=self.eps, state=state, segment_ids=segment_ids, **options
        )
        return self.merge(params, {}, mixed), state

    def _features(self, params, x):
        """phi(q) and phi(k), [B, T, H, F]."""
        return self._map.apply(params.get("features", {}), *project(params, x, ("q", "k")))

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return project(params, x, ("v",))[0], {}

    def merge(self, params, context, mixed):
        return jnp.einsum("bthv,hvd->btd", mixed, params["out"].astype(mixed.dtype))

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M[t, s] = phi(q_t) . phi(k_s) / (sum over visible u of phi(q_t) . phi(k_u) + eps), [B, H, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        options = {"segment_ids": segment_ids, "causal": self.causal}
        return attention_weights(*self._features(params, x), eps=self.eps, **options)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros in float32 at least: "kv" [B, H, F, V] and "k" [B, H, F], sums over phi(k)."""
        self._need_decoding()
        self.check_inputs(inputs)
        K, V = self.sizes
        return zero_state(batch, self.heads, self._map.dim(K), V, dtype)

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self._need_decoding()
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, state, segment_ids)

    def _need_decoding(self):
        if not self.causal:
            raise ValueError(self.denial("decode without causality"))

    def state_axes(self):
        self._need_decoding()
        return STATE_AXES

    def state_size(self, context: int) -> int:
        self._need_decoding()
        K, V = self.sizes
        return state_elements(self.heads, self._map.dim(K), V)

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        H, (K, V), tokens = self.heads, self.sizes, batch * seq
        projections = matmul(tokens, self.d_model, H * (2 * K + 2 * V))
        op = attend_flops(batch, seq, H, self._map.dim(K), V, self.chunk, self.causal)
        return projections + op + tokens * H * (self._map.flops(K) + V)
