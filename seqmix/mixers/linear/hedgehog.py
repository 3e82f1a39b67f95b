"""Hedgehog: linear attention with learned maps that mimic the softmax (Zhang et al., arXiv 2402.04347, section 4).

    q, k, v  = rot(x W_q), rot(x W_k), x W_v              [B, T, H, K] each
    phi(x)   = [softmax(W x + b), softmax(-W x - b)]      W, b per head, for q and for k; W starts as the identity
    mixed_t  = phi(q_t)^T sum_{s <= t} phi(k_s) v_s^T / (phi(q_t) . sum_{s <= t} phi(k_s) + eps)
    y        = mixed W_out

The weights q, k, v, out are those of `mixers.dense.attention` with the same heads, so that a trained attention layer
is converted by copying them and fitting phi, row by row, to its softmax (`mixing_matrix` of both: the paper's
distillation minimises their cross-entropy). For that, positions are rotary as there; GPT-2 and BERT, which the paper
converts, have learned ones (rope=False). q . k is not divided by sqrt(K) here, as W can. `form` names what stands for
the paper's [exp(u), exp(-u)]: softmax over each half (LoLCATs' code, the default), over both, or the exponentials
themselves (`parts.feature_maps.Hedgehog`). Equations checked against LoLCATs' code.
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
from seqmix.parts.qkv import check_sizes, head_params, head_size, out_param, places, project
from seqmix.parts.rotary import frequencies, rotate


@dataclass(frozen=True, kw_only=True)
class Hedgehog(Mixer):
    """Linear attention with Hedgehog's map. Raises ValueError for fields that do not fit."""

    heads: int = 8  # H
    key_dim: int | None = None  # K, even with rope; None: d_model / heads
    value_dim: int | None = None  # V; None: d_model / heads
    form: str = "halves"  # of phi: halves, whole or exp
    rope: bool = True  # rotate queries and keys by their positions, before phi
    rope_base: float = 10000.0  # > 1
    eps: float = 1e-12  # added to the denominator, >= 0
    chunk: int = 64  # tokens that the op computes as one matrix, a power of two
    implementation: str | None = None  # of linear_attention; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["linear_attention"]

    def __post_init__(self):
        check_sizes(self)
        _ = self._map  # raises, naming Hedgehog.form
        if not self.eps >= 0:
            raise ValueError(f"Hedgehog.eps: expected a number >= 0, got {self.eps}")
        if self.rope and self.d_model:
            try:
                frequencies(self.sizes[0], base=self.rope_base)
            except ValueError as error:
                raise ValueError(f"Hedgehog.key_dim, rope_base: {error}") from None

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size(self, "key_dim"), head_size(self, "value_dim")

    @property
    def _map(self):
        return feature_maps.Hedgehog(self.form)

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        H, (K, V) = self.heads, self.sizes
        tree = head_params(self.d_model, {"q": (H, K), "k": (H, K), "v": (H, V)})
        return {**tree, "features": self._map.params(H, K), "out": out_param(H, V, self.d_model)}

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y [B, T, D], {}). `positions` [B, T] only rotate."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, None, segment_ids, positions)
        return y, {}

    def _run(self, params, x, state, segment_ids, positions):
        state = None if state is None else dict(state)
        length = state.pop("length", None) if state else None
        place, length = places(x, segment_ids, positions, length=length)
        q, k = self._features(params, x, place)
        (v,) = project(params, x, ("v",))
        options = {"chunk": self.chunk, "implementation": self.implementation, "segment_ids": segment_ids}
        mixed, state = attend(q, k, v, eps=self.eps, state=state, **options)
        return self.merge(params, {}, mixed), state if length is None else state | {"length": length}

    def _features(self, params, x, place):
        """phi(q) and phi(k), [B, T, H, 2 K]."""
        q, k = project(params, x, ("q", "k"))
        if self.rope:
            q, k = (rotate(y, place, base=self.rope_base) for y in (q, k))
        return self._map.apply(params["features"], q, k)

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return project(params, x, ("v",))[0], {}

    def merge(self, params, context, mixed):
        return jnp.einsum("bthv,hvd->btd", mixed, params["out"].astype(mixed.dtype))

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M[t, s] = phi(q_t) . phi(k_s) / (sum over visible u of phi(q_t) . phi(k_u) + eps), [B, H, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        q, k = self._features(params, x, places(x, segment_ids, positions)[0])
        return attention_weights(q, k, eps=self.eps, segment_ids=segment_ids)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros in float32 at least: "kv" [B, H, 2 K, V], "k" [B, H, 2 K], sums over phi(k); "length" [B] with rope."""
        self.check_inputs(inputs)
        K, V = self.sizes
        state = zero_state(batch, self.heads, self._map.dim(K), V, dtype)
        return state | {"length": jnp.zeros(batch, jnp.int32)} if self.rope else state

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, state, segment_ids, positions)

    def state_axes(self):
        return STATE_AXES | {"length": ("batch",)} if self.rope else STATE_AXES

    def state_size(self, context: int) -> int:
        K, V = self.sizes
        return state_elements(self.heads, self._map.dim(K), V) + self.rope

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        H, (K, V), tokens = self.heads, self.sizes, batch * seq
        projections = matmul(tokens, self.d_model, H * (2 * K + 2 * V))
        op = attend_flops(batch, seq, H, self._map.dim(K), V, self.chunk)
        return projections + op + tokens * H * (self._map.flops(K) + V + 6 * K * self.rope)
