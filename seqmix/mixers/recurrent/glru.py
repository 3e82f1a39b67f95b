"""GLRU: the gated linear recurrent unit that the author of GateLoop (Katsch, arXiv 2311.01927) released after it.

    z, i, f, o     = tanh(x W_z + b_z), sigmoid(x W_i + b_i), sigmoid(x W_f + b_f), sigmoid(x W_o + b_o)
    h_t            = f_t h_{t-1} + i_t z_t                     per channel, real; tied: f = 1 - i
    y              = W_out (tanh(h) * o)

No paper describes it; the equations are those of tobiaskatsch/GatedLinearRNN in its parallel mode, with which this
agrees (docs/peer_checks.md) but for the bias of its W_out. There the gates of its other mode see h_{t-1}, which no
scan computes.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmix.core import param
from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.ops.dispatch import NAMES
from seqmix.ops.linear_reference import linear_mixing_matrix
from seqmix.ops.scan import linear_scan
from seqmix.parts.qkv import AXES, head_params, out_param, project


@dataclass(frozen=True, kw_only=True)
class GLRU(Mixer):
    """Gated linear recurrent unit. Raises ValueError for fields that do not fit."""

    width: int | None = None  # H, channels of the recurrence, each a head of one; None: d_model
    tied: bool = True  # f = 1 - i in place of a forget gate of its own
    chunk: int = 32  # tokens between two stored states of the scan
    implementation: str | None = None  # of linear_scan; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["linear_scan"]

    def __post_init__(self):
        self.positive(chunk=self.chunk, **({} if self.width is None else {"width": self.width}))

    @property
    def _width(self) -> int:
        return self.d_model if self.width is None else self.width

    @property
    def _inputs(self) -> tuple[str, ...]:
        return ("z", "i", "o") if self.tied else ("z", "i", "f", "o")

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        size = (self._width, 1)
        bias = Param(size, AXES, param.zeros, decay=False)
        tree = head_params(self.d_model, dict.fromkeys(self._inputs, size))
        return {**tree, "bias": dict.fromkeys(self._inputs, bias), "out": out_param(*size, self.d_model)}

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, None, segment_ids)
        return y, {}

    def _run(self, params, x, state, segment_ids):
        z, i, log_f, o = self._gates(params, x)
        options = {"chunk": self.chunk, "implementation": self.implementation, "segment_ids": segment_ids}
        h, state = linear_scan(i * z, log_f, state=state, **options)
        return self.merge(params, {"o": o, "like": x}, h), state

    def _gates(self, params, x):
        """z, i, log f and o, [B, T, H, 1] each, in promote(x.dtype, float32)."""
        acc = jnp.promote_types(x.dtype, jnp.float32)
        logits = dict(zip(self._inputs, project(params, x, self._inputs, dtype=acc)))
        logits = {name: y + params["bias"][name].astype(acc) for name, y in logits.items()}
        log_f = jax.nn.log_sigmoid(-logits["i"] if self.tied else logits["f"])
        return jnp.tanh(logits["z"]), jax.nn.sigmoid(logits["i"]), log_f, jax.nn.sigmoid(logits["o"])

    # The mixing matrix, over G = H groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """Values [B, T, H, 1]: z. The input gate belongs to the matrix."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        z, _, _, o = self._gates(params, x)
        return z, {"o": o, "like": x}

    def merge(self, params, context, mixed):
        h = (jnp.tanh(mixed) * context["o"]).astype(context["like"].dtype)
        return jnp.einsum("bthk,hkd->btd", h, params["out"].astype(h.dtype))

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M[t, s] = f[s + 1] .. f[t] i[s] for s <= t, [B, H, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        _, i, log_f, _ = self._gates(params, x)
        return linear_mixing_matrix(jnp.ones_like(i), i, log_f, segment_ids=segment_ids)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros [B, H, 1] in float32 at least."""
        self.check_inputs(inputs)
        return jnp.zeros((batch, self._width, 1), jnp.promote_types(dtype, jnp.float32))

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, new = self._run(params, x, state, segment_ids)
        return y, new.astype(state.dtype)

    def state_axes(self):
        return ("batch", *AXES)

    def state_size(self, context: int) -> int:
        return self._width

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        elements = batch * seq * self._width
        n = len(self._inputs)
        # A bias and 4 of an activation for each input, 2 of the scan and 3 around it.
        return matmul(elements, self.d_model, n + 1) + elements * (5 * n + 5)
