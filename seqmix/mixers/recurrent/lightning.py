"""Lightning attention: TransNormerLLM's mixer (Qin et al., Various Lengths, Constant Speed, arXiv 2405.17381).

    q, k           = silu(x W_q), silu(x W_k)                      [B, T, H, K];  v, u = x W_v, x W_u  [B, T, H, V]
    S_t            = lambda_h S_{t-1} + k_t v_t^T,   mixed_t = q_t^T S_t           no softmax, no denominator
    y              = W_out (srms(mixed) * u)                       srms(z) = z / rms(z) over H V channels, no gain

The decay lambda = exp(log_decay) is fixed. At a layer of relative depth `depth`, for heads h = 0 .. H - 1,

    alibi:   log_decay = -2^(-8 (h + 1) / H) (1 - depth + 1e-5)    depth = l / (L - 1): what the released code runs
    paper:   log_decay = -(8 h / H) (1 - depth)                    depth = l / L: the equation of 2307.14995
    none:    log_decay = 0                                         plain linear attention

These are far apart: with 8 heads at depth 0, 0.5 .. 0.0039 against 0 .. 7 a token. A stack that scans over equal
layers has one depth for all of them; for others put several mixers into its period. `lrpe` (the published model
has it in its first layer) adds learned angles, k_s^T q_t becoming sum_k q_k k_k cos(theta_k (t - s)) (LRPE-d).

The op's algorithm is Lightning Attention-2's (2401.04658). With the alibi decays of a power of two of heads (for other
numbers that code interleaves two such series) it agrees with the reference of the authors' lightning-attention package
(docs/peer_checks.md). The example of a layer there has silu on v, a layer norm and a low-rank sigmoid gate; this is
the paper's form.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.ops.dispatch import NAMES
from seqmix.ops.linear import linear_attention, linear_attention_flops
from seqmix.ops.linear_reference import linear_mixing_matrix
from seqmix.parts.qkv import (
    AXES,
    check_sizes,
    head_params,
    head_size,
    out_param,
    phase_features,
    places,
    project,
    way_out,
)

DECAYS = ("alibi", "paper", "none")


@dataclass(frozen=True, kw_only=True)
class Lightning(Mixer):
    """Lightning attention with its gate and norm. Raises ValueError for fields that do not fit."""

    heads: int = 8  # H
    key_dim: int | None = None  # K; None: d_model / heads
    value_dim: int | None = None  # V; None: d_model / heads
    decay: str = "alibi"  # alibi, paper or none
    depth: float = 0.0  # of the layer in its stack, 0 (first: strongest decay) to 1 (last: hardly any)
    lrpe: bool = False  # learned angles of positions per channel of q and k; doubles the width of the state
    norm_eps: float = 1e-5  # added to the mean square
    chunk: int = 128  # tokens that the op computes as one matrix, a power of two
    implementation: str | None = None  # of linear_attention; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["linear_attention"]

    def __post_init__(self):
        check_sizes(self)
        if self.decay not in DECAYS:
            raise ValueError(f"Lightning.decay: expected one of {', '.join(DECAYS)}, got {self.decay!r}")
        if not 0 <= self.depth <= 1:
            raise ValueError(f"Lightning.depth: expected a number from 0 to 1, got {self.depth}")

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size(self, "key_dim"), head_size(self, "value_dim")

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        H, (K, V) = self.heads, self.sizes
        tree = head_params(self.d_model, {"q": (H, K), "k": (H, K), "v": (H, V), "gate": (H, V)})
        if self.lrpe:
            tree["theta"] = Param((H, K), AXES, _init_theta, decay=False)
        return {**tree, "out": out_param(H, V, self.d_model)}

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y [B, T, D], {}). `positions` [B, T] only turn (lrpe); decays count tokens."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, {"kv": None, "length": None}, segment_ids, positions)
        return y, {}

    def _run(self, params, x, state, segment_ids, positions):
        """y and the state after it; entries of the state may be None."""
        place, length = places(x, segment_ids, positions, length=state.get("length"))
        q, k = self._queries_keys(params, x, place)
        v, gate = project(params, x, ("v", "gate"))
        options = {"chunk": self.chunk, "implementation": self.implementation, "segment_ids": segment_ids}
        options["return_state"] = state["kv"] is not None
        mixed, kv = linear_attention(q, k, v, self._log_decay(x.dtype), state=state["kv"], **options)
        y = self.merge(params, {"gate": gate}, mixed)
        return y, {"kv": kv, "length": length} if self.lrpe else {"kv": kv}

    def _queries_keys(self, params, x, place):
        q, k = (jax.nn.silu(y) for y in project(params, x, ("q", "k")))
        if self.lrpe:
            acc = jnp.promote_types(x.dtype, jnp.float32)
            angles = place[..., None, None].astype(acc) * params["theta"].astype(acc)
            q, k = phase_features(q, angles), phase_features(k, angles)
        return q, k

    def _log_decay(self, dtype):
        """[H], or None."""
        h, left = np.arange(self.heads), 1 - self.depth
        if self.decay == "none":
            return None
        if self.decay == "alibi":
            decay = -np.exp2(-8 * (h + 1) / self.heads) * (left + 1e-5)
        else:
            decay = -8 * h / self.heads * left
        return jnp.asarray(decay, jnp.promote_types(dtype, jnp.float32))

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        v, gate = project(params, x, ("v", "gate"))
        return v, {"gate": gate}

    def merge(self, params, context, mixed):
        gate = context["gate"]
        linear = {"activation": lambda u: u, "groups": 1}
        return way_out(params, mixed, gate=gate, eps=self.norm_eps, dtype=gate.dtype, **linear)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M[t, s] = (q_t . k_s) exp(log_decay (t - s)) for s <= t, [B, H, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        q, k = self._queries_keys(params, x, places(x, segment_ids, positions)[0])
        return linear_mixing_matrix(q, k, self._log_decay(x.dtype), segment_ids=segment_ids)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros: "kv" [B, H, K or 2 K, V] in float32 at least; with lrpe "length" [B], the next position."""
        self.check_inputs(inputs)
        key_dim, value_dim = self.sizes
        shape = (batch, self.heads, key_dim * (1 + self.lrpe), value_dim)
        state = {"kv": jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))}
        return state | {"length": jnp.zeros(batch, jnp.int32)} if self.lrpe else state

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, new = self._run(params, x, state, segment_ids, positions)
        return y, new | {"kv": new["kv"].astype(state["kv"].dtype)}

    def state_axes(self):
        axes = {"kv": ("batch", *AXES, None)}
        return axes | {"length": ("batch",)} if self.lrpe else axes

    def state_size(self, context: int) -> int:
        key_dim, value_dim = self.sizes
        return self.heads * key_dim * (1 + self.lrpe) * value_dim + self.lrpe

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        H, (K, V), tokens = self.heads, self.sizes, batch * seq
        projections = matmul(tokens, self.d_model, H * (2 * K + 3 * V))
        op = linear_attention_flops(batch, seq, H, H, K * (1 + self.lrpe), V, self.chunk)
        # 4 a silu and 5 for its angle (lrpe) of q and k; 4 for the norm of v and 1 for its gate.
        return projections + op + tokens * H * ((8 + 10 * self.lrpe) * K + 5 * V)


def _init_theta(key, shape, dtype):
    """10000^(-2 i / (H K)), i counting the channels of all heads; `shape` ends in H, K."""
    size = shape[-2] * shape[-1]
    theta = 10000.0 ** (-2 * np.arange(size) / size)
    return jnp.broadcast_to(jnp.asarray(theta.reshape(shape[-2:]), dtype), shape)
