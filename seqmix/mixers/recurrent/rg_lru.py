"""RG-LRU: Griffin's recurrent block (De et al., arXiv 2402.19427, sections 2.3 and 2.4).

    u              = conv(x W_x)                                  depthwise, causal, conv_width taps, with a bias
    r, i           = sigmoid(u W_a + b_a), sigmoid(u W_i + b_i)   W block-diagonal over H heads of channels
    log_a          = c r log_sigmoid(Lambda)                      a = sigmoid(Lambda)^(c r), per channel
    h_t            = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)
    y              = W_out (h * gelu(x W_gate))

1 - a^2 is taken as -expm1(2 log_a), so that it does not vanish where a is near 1. Lambda starts such that a^c is
uniform in [rad_min, rad_max] (the released code puts a itself there). That code feeds in the first token of a
document with 1 in place of sqrt(1 - a^2), which the equations do not have, and its projections have biases. Else its
RG-LRU agrees with this (docs/peer_checks.md).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmix.core import param
from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.ops.conv import short_conv, short_conv_flops
from seqmix.ops.dispatch import NAMES
from seqmix.ops.linear_reference import linear_mixing_matrix
from seqmix.ops.scan import linear_scan
from seqmix.parts.qkv import AXES, head_params, out_param, project


@dataclass(frozen=True, kw_only=True)
class RGLRU(Mixer):
    """Griffin's recurrent block. Raises ValueError for fields that do not fit."""

    width: int | None = None  # D_rnn, channels of the recurrence; None: d_model (4 / 3 of it as published)
    heads: int = 8  # H, blocks of W_a and W_i; divides width
    conv_width: int = 4  # taps of the convolution, at least 1
    c: float = 8.0  # exponent of the decay, > 0
    rad_min: float = 0.9  # at first a^c is uniform from here, > 0
    rad_max: float = 0.999  # to here, < 1
    chunk: int = 32  # tokens between two stored states of the scan
    implementation: str | None = None  # of linear_scan; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["linear_scan"]

    def __post_init__(self):
        given = {} if self.width is None else {"width": self.width}
        self.positive(heads=self.heads, conv_width=self.conv_width, chunk=self.chunk, **given)
        if not self.c > 0:
            raise ValueError(f"RGLRU.c: expected a positive number, got {self.c}")
        if not 0 < self.rad_min <= self.rad_max < 1:
            got = f"{self.rad_min} and {self.rad_max}"
            raise ValueError(f"RGLRU.rad_min: expected 0 < rad_min <= rad_max < 1, got {got}")
        if self._width % self.heads:
            raise ValueError(f"RGLRU.heads: expected a divisor of the width {self._width}, got {self.heads}")

    @property
    def _width(self) -> int:
        return self.d_model if self.width is None else self.width

    @property
    def sizes(self) -> tuple[int, int]:
        """H and P, the channels of a head."""
        return self.heads, self._width // self.heads

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        D, W, (H, P) = self.d_model, self.conv_width, self.sizes
        block = {
            "weight": Param((H, P, P), ("heads", "head_dim", None), fan_in=P),
            "bias": Param((H, P), AXES, param.zeros, decay=False),
        }
        return {
            **head_params(D, {"x": (H, P), "gate": (H, P)}),
            "conv": Param((W, H, P), (None, *AXES)),
            "conv_bias": Param((H, P), AXES, param.zeros, decay=False),
            "a": block,
            "i": block,
            "Lambda": Param((H, P), AXES, self._init_lambda, decay=False),
            "out": out_param(H, P, D),
        }

    def _init_lambda(self, key, shape, dtype):
        log_a = jnp.log(jax.random.uniform(key, shape, dtype, self.rad_min, self.rad_max)) / self.c
        return log_a - jnp.log(-jnp.expm1(log_a))  # the inverse of log_sigmoid

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, {"conv": None, "h": None}, segment_ids)
        return y, {}

    def _run(self, params, x, state, segment_ids):
        """y and the state after it; entries of the state may be None."""
        u, gate, conv = self._inputs(params, x, state["conv"], segment_ids)
        log_a, weight = self._gates(params, u)
        options = {"chunk": self.chunk, "implementation": self.implementation, "segment_ids": segment_ids}
        h, last = linear_scan(weight * u, log_a, state=state["h"], **options)
        return self.merge(params, {"gate": gate}, h), {"conv": conv, "h": last}

    def _inputs(self, params, x, conv, segment_ids):
        """u and the gate [B, T, H, P], and the state of the convolution."""
        u, gate = project(params, x, ("x", "gate"))
        u, conv = short_conv(u, params["conv"], params["conv_bias"], state=conv, segment_ids=segment_ids)
        return u, gate, conv

    def _gates(self, params, u):
        """log_a and sqrt(1 - a^2) i, [B, T, H, P] in promote(u.dtype, float32)."""
        acc = jnp.promote_types(u.dtype, jnp.float32)
        u = u.astype(acc)  # batches of bfloat16 into float32 are more than XLA for CPUs multiplies; blocks are small

        def gate(p):
            return jax.nn.sigmoid(jnp.einsum("bthi,hij->bthj", u, p["weight"].astype(acc)) + p["bias"].astype(acc))

        log_a = self.c * gate(params["a"]) * jax.nn.log_sigmoid(params["Lambda"].astype(acc))
        # The root has no derivative at 0, which r or log_sigmoid(Lambda) reach by underflow.
        root = jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), jnp.finfo(acc).tiny))
        return log_a, root * gate(params["i"])

    # The mixing matrix, over G = D_rnn groups of one channel

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """Values [B, T, D_rnn, 1]: the convolved u. Gates belong to the matrix."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        u, gate, _ = self._inputs(params, x, None, segment_ids)
        return u.reshape(*u.shape[:2], -1, 1), {"gate": gate}

    def merge(self, params, context, mixed):
        gate = context["gate"]
        h = (mixed.reshape(gate.shape) * jax.nn.gelu(gate)).astype(gate.dtype)
        return jnp.einsum("bthp,hpd->btd", h, params["out"].astype(h.dtype))

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M[t, s] = a[s + 1] .. a[t] sqrt(1 - a_s^2) i_s for s <= t, [B, D_rnn, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        u, _, _ = self._inputs(params, x, None, segment_ids)
        log_a, weight = (z.reshape(*z.shape[:2], -1) for z in self._gates(params, u))
        weight = weight[..., None]
        return linear_mixing_matrix(jnp.ones_like(weight), weight, log_a, segment_ids=segment_ids)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros: "conv" [B, W - 1, H, P], the last inputs in `dtype`, and "h" [B, H, P] in float32 at least."""
        self.check_inputs(inputs)
        return {
            "conv": jnp.zeros((batch, self.conv_width - 1, *self.sizes), dtype),
            "h": jnp.zeros((batch, *self.sizes), jnp.promote_types(dtype, jnp.float32)),
        }

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, new = self._run(params, x, state, segment_ids)
        return y, new | {"h": new["h"].astype(state["h"].dtype)}

    def state_axes(self):
        return {"conv": ("batch", None, *AXES), "h": ("batch", *AXES)}

    def state_size(self, context: int) -> int:
        return self._width * self.conv_width

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        width, tokens = self._width, batch * seq
        projections = matmul(tokens, self.d_model, 3 * width) + matmul(tokens, width, 2 * self.sizes[1])
        conv = short_conv_flops(batch, seq, width, self.conv_width)
        # 2 biases, 8 for r and i, 5 for log_a and the root, 2 for the input, 3 for the scan, 9 for the gelu gate.
        return projections + conv + 29 * tokens * width
