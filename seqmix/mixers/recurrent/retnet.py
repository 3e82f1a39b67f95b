"""RetNet: multi-scale retention (Sun et al., Retentive Network, arXiv 2307.08621, equations 5 to 8).

    q, k           = rot(x W_q), rot(x W_k)                 [B, T, H, K], turned by e^{i theta n}; v = x W_v [.., V]
    log_decay_h    = log(1 - 2^(-5 - h))                    fixed, h = 0 .. H - 1
    S_t            = exp(log_decay) S_{t-1} + k_t v_t^T,    mixed_t = K^-1/2 q_t^T S_t
    y              = W_out (norm(mixed) * silu(x W_gate))   norm per head, no gain

As a matrix: (q k^T * D) v with D[t, s] = exp(log_decay (t - s)) for s <= t.

xPos would scale q_n and k_n by powers n and -n of a number per channel; with one decay per head that scale is the
decay itself, so rotary positions remain. The published form divides scores by sqrt(K), D by the root of its rows'
sums, and each row of scores by max(|its sum|, 1): all scale a whole row, which the norm undoes (up to its eps),
so only the first is kept. The norm is the paper's group norm; its later code takes the root mean square instead
(norm="rms"). A gain would be absorbed by W_out. Angles are rotary's base^(-2i/K) on halves, where the released code
turns neighbours by base^(-i/(K/2 - 1)). With the same angles its layer agrees (docs/peer_checks.md).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.ops.dispatch import NAMES
from seqmix.ops.linear import linear_attention, linear_attention_flops
from seqmix.ops.linear_reference import linear_mixing_matrix
from seqmix.parts.qkv import AXES, check_sizes, head_params, head_size, out_param, places, project, way_out
from seqmix.parts.rotary import frequencies, rotate

NORMS = ("group", "rms")


@dataclass(frozen=True, kw_only=True)
class RetNet(Mixer):
    """Multi-scale retention. Raises ValueError for fields that do not fit."""

    heads: int = 8  # H
    key_dim: int | None = None  # K, even; None: d_model / heads (256 as published)
    value_dim: int | None = None  # V; None: 2 * d_model / heads
    rope_base: float = 10000.0  # > 1
    norm: str = "group"  # of a head's channels: group (mean subtracted) or rms
    norm_eps: float = 1e-5  # added to the variance or mean square
    chunk: int = 128  # tokens that the op computes as one matrix, a power of two
    implementation: str | None = None  # of linear_attention; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["linear_attention"]

    def __post_init__(self):
        check_sizes(self)
        if self.norm not in NORMS:
            raise ValueError(f"RetNet.norm: expected one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.d_model:
            key_dim, _ = self.sizes
            try:
                frequencies(key_dim, base=self.rope_base)
            except ValueError as error:
                raise ValueError(f"RetNet.key_dim, rope_base: {error}") from None

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size(self, "key_dim"), head_size(self, "value_dim", 2)

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        H, (K, V) = self.heads, self.sizes
        sizes = {"q": (H, K), "k": (H, K), "v": (H, V), "gate": (H, V)}
        return {**head_params(self.d_model, sizes), "out": out_param(H, V, self.d_model)}

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y [B, T, D], {}). `positions` [B, T] only rotate; decays count tokens."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, {"retention": None, "length": None}, segment_ids, positions)
        return y, {}

    def _run(self, params, x, state, segment_ids, positions):
        """y and the state after it; entries of the state may be None."""
        place, length = places(x, segment_ids, positions, length=state["length"])
        q, k = self._rotated(params, x, place)
        v, gate = project(params, x, ("v", "gate"))
        options = {"chunk": self.chunk, "implementation": self.implementation, "segment_ids": segment_ids}
        options["return_state"] = state["retention"] is not None
        mixed, retention = linear_attention(
            q, k, v, self._log_decay(x.dtype), scale=self._scale, state=state["retention"], **options
        )
        return self.merge(params, {"gate": gate}, mixed), {"retention": retention, "length": length}

    def _rotated(self, params, x, place):
        return tuple(rotate(y, place, base=self.rope_base) for y in project(params, x, ("q", "k")))

    def _log_decay(self, dtype):
        """[H]"""
        decay = np.log1p(-np.exp2(-5.0 - np.arange(self.heads)))
        return jnp.asarray(decay, jnp.promote_types(dtype, jnp.float32))

    @property
    def _scale(self) -> float:
        return self.sizes[0] ** -0.5

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        v, gate = project(params, x, ("v", "gate"))
        return v, {"gate": gate}

    def merge(self, params, context, mixed):
        gate = context["gate"]
        if self.norm == "group":
            mixed = mixed.astype(jnp.promote_types(mixed.dtype, jnp.float32))
            mixed = mixed - jnp.mean(mixed, axis=-1, keepdims=True)
        return way_out(params, mixed, gate=gate, eps=self.norm_eps, dtype=gate.dtype)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M[t, s] = K^-1/2 (q_t . k_s) exp(log_decay (t - s)) for s <= t, [B, H, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        q, k = self._rotated(params, x, places(x, segment_ids, positions)[0])
        return linear_mixing_matrix(q, k, self._log_decay(x.dtype), scale=self._scale, segment_ids=segment_ids)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros: "retention" [B, H, K, V] in float32 at least, and "length" [B], the position of the next token."""
        self.check_inputs(inputs)
        shape = (batch, self.heads, *self.sizes)
        retention = jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))
        return {"retention": retention, "length": jnp.zeros(batch, jnp.int32)}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, new = self._run(params, x, state, segment_ids, positions)
        return y, new | {"retention": new["retention"].astype(state["retention"].dtype)}

    def state_axes(self):
        return {"retention": ("batch", *AXES, None), "length": ("batch",)}

    def state_size(self, context: int) -> int:
        key_dim, value_dim = self.sizes
        return self.heads * key_dim * value_dim + 1

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        H, (K, V), tokens = self.heads, self.sizes, batch * seq
        projections = matmul(tokens, self.d_model, H * (2 * K + 3 * V))
        op = linear_attention_flops(batch, seq, H, H, K, V, self.chunk)
        # 3 a rotated channel of q and k; of v: 2 for the mean, 4 for the norm, 5 for the gate.
        return projections + op + tokens * H * (6 * K + 11 * V)
