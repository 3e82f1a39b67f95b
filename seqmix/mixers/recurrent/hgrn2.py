"""HGRN2: gated linear RNN with state expansion (Qin et al., arXiv 2404.07904).

    f              = bound + (1 - bound) sigmoid(x W_f)        [B, T, H, K], the forget gate
    q, k, v        = sigmoid(x W_q), 1 - f, silu(x W_v)        [B, T, H, K], [.., K], [.., V]
    S_t            = diag(f_t) S_{t-1} + k_t v_t^T,            mixed_t = q_t^T S_t
    y              = W_out (rmsnorm(mixed) * scale)            norm over all H V channels

The output gate of HGRN (2311.04823) has become the query; its input gate is tied, so a channel of the state is an
exponential moving average. `bound` in [0, 1) keeps upper layers from forgetting. As published it is the cumulated
softmax over layers of a learned matrix: 0 in the first of L layers and at the start l / L in layer l. Layers here do
not know of each other, and those of one scanned stack have equal fields; so it is a field, which differs between
the mixers of a period, or with `learned_bound` a learned value per channel, sigmoid(w), that starts at the field
and may move either way. The published code takes a layer norm with bias where this has an RMS norm;
flash-linear-attention's layer has that too, but silu for q and nothing for v, and else agrees (docs/peer_checks.md).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmix.core import param
from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.ops.dispatch import NAMES
from seqmix.ops.linear import linear_attention, linear_attention_flops
from seqmix.ops.linear_reference import linear_mixing_matrix
from seqmix.parts.norms import norm_params
from seqmix.parts.qkv import AXES, check_sizes, head_params, head_size, out_param, project, way_out


@dataclass(frozen=True, kw_only=True)
class HGRN2(Mixer):
    """HGRN2's token mixer. Raises ValueError for fields that do not fit."""

    heads: int = 8  # H
    key_dim: int | None = None  # K, the state expansion; None: d_model / heads (128 as published)
    value_dim: int | None = None  # V; None: d_model / heads
    lower_bound: float = 0.0  # of the forget gate, in [0, 1)
    learned_bound: bool = False  # learn the bound per channel, from lower_bound, which is then above 0
    norm_eps: float = 1e-5  # added to the mean square
    chunk: int = 64  # tokens that the op computes as one matrix, a power of two
    implementation: str | None = None  # of linear_attention; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["linear_attention"]

    def __post_init__(self):
        check_sizes(self)
        if not 0 <= self.lower_bound < 1:
            raise ValueError(f"HGRN2.lower_bound: expected a number in [0, 1), got {self.lower_bound}")
        if self.learned_bound and self.lower_bound == 0:
            raise ValueError("HGRN2.lower_bound: expected a number in (0, 1) for learned_bound to start at, got 0")

    @property
    def sizes(self) -> tuple[int, int]:
        """K and V."""
        return head_size(self, "key_dim"), head_size(self, "value_dim")

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        H, (K, V) = self.heads, self.sizes
        tree = head_params(self.d_model, {"q": (H, K), "f": (H, K), "v": (H, V)})
        if self.learned_bound:
            start = math.log(self.lower_bound / (1 - self.lower_bound))
            tree["bound"] = Param((H, K), AXES, param.constant(start), decay=False)
        return {**tree, "norm": norm_params((H, V), AXES), "out": out_param(H, V, self.d_model)}

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, None, segment_ids)
        return y, {}

    def _run(self, params, x, state, segment_ids):
        q, k, log_f = self._gates(params, x)
        options = {"chunk": self.chunk, "implementation": self.implementation, "return_state": state is not None}
        mixed, state = linear_attention(
            q, k, self._values(params, x), log_f, state=state, segment_ids=segment_ids, **options
        )
        return self.merge(params, {}, mixed), state

    def _gates(self, params, x):
        """q, k in x.dtype and log f in promote(x.dtype, float32), [B, T, H, K] each."""
        acc = jnp.promote_types(x.dtype, jnp.float32)
        q, f = project(params, x, ("q", "f"), dtype=acc)
        if self.learned_bound:
            w = params["bound"].astype(acc)
            log_bound, log_rest = jax.nn.log_sigmoid(w), jax.nn.log_sigmoid(-w)
        else:
            log_bound = math.log(self.lower_bound) if self.lower_bound else None
            log_rest = math.log1p(-self.lower_bound)
        # 1 - f = (1 - bound) sigmoid(-f): as a difference it would lose small keys.
        log_f, k = log_rest + jax.nn.log_sigmoid(f), jnp.exp(log_rest + jax.nn.log_sigmoid(-f))
        if log_bound is not None:
            # Each form is precise where the other is not: near f = 1 and near f = 0.
            log_f = jnp.where(k < 0.5, jnp.log1p(-jnp.minimum(k, 0.5)), jnp.logaddexp(log_bound, log_f))
        return jax.nn.sigmoid(q).astype(x.dtype), k.astype(x.dtype), log_f

    def _values(self, params, x):
        return jax.nn.silu(project(params, x, ("v",))[0])

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._values(params, x), {}

    def merge(self, params, context, mixed):
        scale = params["norm"]["scale"]
        return way_out(params, mixed, scale=scale, groups=1, eps=self.norm_eps)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M[t, s] = sum_k q[t, k] (1 - f[s, k]) f[s + 1, k] .. f[t, k] for s <= t, [B, H, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return linear_mixing_matrix(*self._gates(params, x), segment_ids=segment_ids)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros [B, H, K, V] in float32 at least."""
        self.check_inputs(inputs)
        return jnp.zeros((batch, self.heads, *self.sizes), jnp.promote_types(dtype, jnp.float32))

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, new = self._run(params, x, state, segment_ids)
        return y, new.astype(state.dtype)

    def state_axes(self):
        return ("batch", *AXES, None)

    def state_size(self, context: int) -> int:
        key_dim, value_dim = self.sizes
        return self.heads * key_dim * value_dim

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        H, (K, V), tokens = self.heads, self.sizes, batch * seq
        projections = matmul(tokens, self.d_model, 2 * H * (K + V))
        op = linear_attention_flops(batch, seq, H, H, K, V, self.chunk, per_channel=True)
        # 4 for q and 16 for the gates; of v: 4 for its silu and 5 for the norm and its scale.
        return projections + op + tokens * H * (20 * K + 9 * V)
