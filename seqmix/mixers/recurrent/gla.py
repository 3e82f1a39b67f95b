"""Gated linear attention: GLA (Yang et al., arXiv 2312.06635, section 4).

    q, k, v        = x W_q, x W_k, x W_v                        [B, T, H, K], [.., K], [.., V]; with conv_width
                     silu(conv(.)) of each, depthwise and causal
    log_decay      = log_sigmoid(x W_down W_up + b) / tau       [B, T, H, K], through `gate_rank` channels
    S_t            = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T,  mixed_t = K^-1/2 q_t^T S_t
    y              = W_out (rmsnorm(mixed) * scale * silu(x W_gate))     norm per head, one scale for all heads

W_down, W_up and b are "decay" in the tree. The paper norms by a layer norm and gives the output gate a bias; the
authors' later code has the RMS norm and no bias, as here. Convolutions are no part of the paper but an option of that
code (there, too, without bias). It agrees with flash-linear-attention's layer (docs/peer_checks.md).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmix.core import param
from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.ops.conv import short_conv_flops
from seqmix.ops.dispatch import NAMES
from seqmix.ops.linear import linear_attention, linear_attention_flops
from seqmix.ops.linear_reference import linear_mixing_matrix
from seqmix.parts.norms import norm_params
from seqmix.parts.qkv import (
    AXES,
    check_sizes,
    conv_state,
    convolve,
    head_params,
    head_size,
    out_param,
    project,
    way_out,
)

QKV = ("q", "k", "v")


@dataclass(frozen=True, kw_only=True)
class GLA(Mixer):
    """Gated linear attention. Raises ValueError for fields that do not fit."""

    heads: int = 4  # H
    key_dim: int | None = None  # K; None: d_model / (2 * heads)
    value_dim: int | None = None  # V; None: d_model / heads
    gate_rank: int = 16  # channels that the decays come through
    tau: float = 16.0  # divides log decays, > 0: the larger, the slower they are at first
    conv_width: int = 0  # taps of short convolutions over q, k and v; 0: none
    norm_eps: float = 1e-5  # added to the mean square
    chunk: int = 64  # tokens that the op computes as one matrix, a power of two
    implementation: str | None = None  # of linear_attention; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["linear_attention"]

    def __post_init__(self):
        check_sizes(self)
        self.positive(gate_rank=self.gate_rank)
        if not isinstance(self.conv_width, int) or self.conv_width < 0:
            raise ValueError(f"GLA.conv_width: expected an integer >= 0, got {self.conv_width!r}")
        if not self.tau > 0:
            raise ValueError(f"GLA.tau: expected a positive number, got {self.tau}")

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size(self, "key_dim", 0.5), head_size(self, "value_dim")

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        D, H, R, (K, V) = self.d_model, self.heads, self.gate_rank, self.sizes
        sizes = {"q": (H, K), "k": (H, K), "v": (H, V), "gate": (H, V)}
        return {
            **head_params(D, sizes, conv_width=self.conv_width, convolved=QKV),
            "decay": {
                "down": Param((D, R), ("embed", None)),
                "up": Param((R, H, K), (None, *AXES)),
                "bias": Param((H, K), AXES, param.zeros, decay=False),
            },
            "norm": norm_params((V,), ("head_dim",)),
            "out": out_param(H, V, D),
        }

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, {"conv": None, "kv": None}, segment_ids)
        return y, {}

    def _run(self, params, x, state, segment_ids):
        """y and the state after it; entries of the state may be None."""
        heads, conv = self._qkv(params, x, state.get("conv"), segment_ids)
        (gate,) = project(params, x, ("gate",))
        options = {"chunk": self.chunk, "implementation": self.implementation, "segment_ids": segment_ids}
        options["return_state"] = state["kv"] is not None
        mixed, kv = linear_attention(
            *(heads[name] for name in QKV), self._log_decay(params, x), scale=self._scale, state=state["kv"], **options
        )
        y = self.merge(params, {"gate": gate}, mixed)
        return y, {"conv": conv, "kv": kv} if self.conv_width else {"kv": kv}

    def _qkv(self, params, x, conv, segment_ids):
        heads = dict(zip(QKV, project(params, x, QKV)))
        return convolve(params, heads, state=conv, segment_ids=segment_ids)

    def _log_decay(self, params, x):
        """[B, T, H, K] in promote(x.dtype, float32)."""
        acc, p = jnp.promote_types(x.dtype, jnp.float32), params["decay"]
        low = x @ p["down"].astype(x.dtype)
        (logits,) = project(p, low, ("up",), dtype=acc)
        return jax.nn.log_sigmoid(logits + p["bias"].astype(acc)) / self.tau

    @property
    def _scale(self) -> float:
        return self.sizes[0] ** -0.5

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        (gate,) = project(params, x, ("gate",))
        return self._qkv(params, x, None, segment_ids)[0]["v"], {"gate": gate}

    def merge(self, params, context, mixed):
        gate, scale = context["gate"], params["norm"]["scale"]
        return way_out(params, mixed, gate=gate, scale=scale, eps=self.norm_eps, dtype=gate.dtype)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M[t, s] = K^-1/2 sum_k q[t, k] k[s, k] exp(log_decay[s + 1, k] + .. + log_decay[t, k]), [B, H, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        heads, _ = self._qkv(params, x, None, segment_ids)
        decay = self._log_decay(params, x)
        return linear_mixing_matrix(heads["q"], heads["k"], decay, scale=self._scale, segment_ids=segment_ids)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros: "kv" [B, H, K, V] in float32 at least; with conv_width "conv", the last inputs in `dtype`."""
        self.check_inputs(inputs)
        shape = (batch, self.heads, *self.sizes)
        state = {"kv": jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))}
        return state | {"conv": conv_state(self.params()["conv"], batch, dtype)} if self.conv_width else state

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, new = self._run(params, x, state, segment_ids)
        return y, new | {"kv": new["kv"].astype(state["kv"].dtype)}

    def state_axes(self):
        axes = {"kv": ("batch", *AXES, None)}
        return axes | {"conv": dict.fromkeys(QKV, ("batch", None, *AXES))} if self.conv_width else axes

    def state_size(self, context: int) -> int:
        H, (K, V) = self.heads, self.sizes
        return H * K * V + max(self.conv_width - 1, 0) * H * (2 * K + V)

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        D, H, R, (K, V), tokens = self.d_model, self.heads, self.gate_rank, self.sizes, batch * seq
        projections = matmul(tokens, D, H * (2 * K + 3 * V) + R) + matmul(tokens, R, H * K)
        op = linear_attention_flops(batch, seq, H, H, K, V, self.chunk, per_channel=True)
        convolved = H * (2 * K + V)
        conv = short_conv_flops(batch, seq, convolved, self.conv_width, bias=False) + 4 * tokens * convolved
        # 6 a decay; of v: 5 for the norm and its scale, 5 for the gate.
        return projections + op + tokens * H * (6 * K + 10 * V) + (conv if self.conv_width else 0)
