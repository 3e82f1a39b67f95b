"""GateLoop: fully data-controlled linear recurrence (Katsch, arXiv 2311.01927).

    q, k, v, gate  = x W_q, x W_k, x W_v, x W_gate             [B, T, H, K] each
    a              = exp(log_mag + i phase)                    [B, T, H, K] complex, a decay per channel of k
      separate:      log_mag = log_sigmoid(x W_mag),   phase = x W_phase           real projections, the paper's
      complex:       log_mag = log_sigmoid(|z|),       phase = arg z,  z = x W_mag + i x W_phase   (|a| >= 1/2)
    S_t            = diag(a_t) S_{t-1} + k_t v_t^T,            mixed_t = Re(q_t^T S_t)
    y              = W_out (mixed * silu(gate))

By default there are as many heads as channels (K = 1, the "max-headed" form of the paper's experiments), a scalar
complex state each: `linear_scan`. With fewer heads the state is a matrix, and the complex recurrence is computed as
the real one of `linear_attention` over 2 K channels: with the angles P_t = phase_1 + .. + phase_t,

    Re(q_t a_{s+1} .. a_t k_s) = |a_{s+1}| .. |a_t| (q_t cos P_t, q_t sin P_t) . (k_s cos P_s, k_s sin P_s)

which is the paper's surrogate attention, data-controlled rotary positions times decays. Nothing is divided by
prefix products. A state is kept as its real and imaginary parts, in the frame of the last token. "complex" is what
lucidrains/gateloop-transformer computes, with which this agrees (docs/peer_checks.md); it reduces the gradient into
W_mag and W_phase to 0.9 of itself (here `a_lr_scale` sets their learning rate).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.ops.dispatch import NAMES
from seqmix.ops.linear import linear_attention, linear_attention_flops
from seqmix.ops.linear_reference import linear_mixing_matrix
from seqmix.ops.scan import linear_scan
from seqmix.parts.qkv import AXES, head_params, out_param, phase_features, project

TRANSITIONS = ("separate", "complex")
_STEP = 2 * math.pi / 1024
_STEP_HIGH = round(_STEP * 2**19) / 2**19


@dataclass(frozen=True, kw_only=True)
class GateLoop(Mixer):
    """GateLoop's token mixer. Raises ValueError for fields that do not fit."""

    heads: int | None = None  # H, a divisor of d_model; None: d_model, a scalar state for each channel
    transition: str = "separate"  # how decay and phase come about: separate or complex
    a_lr_scale: float = 1.0  # factor on the learning rate of W_mag and W_phase, > 0
    chunk: int = 64  # tokens that the op computes at once, a power of two
    implementation: str | None = None  # of the op; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["linear_scan"]

    def __post_init__(self):
        self.positive(chunk=self.chunk, **({} if self.heads is None else {"heads": self.heads}))
        wrong = None
        if self.chunk & (self.chunk - 1):
            wrong = f"chunk: expected a power of two, got {self.chunk}"
        elif self.transition not in TRANSITIONS:
            wrong = f"transition: expected one of {', '.join(TRANSITIONS)}, got {self.transition!r}"
        elif not self.a_lr_scale > 0:
            wrong = f"a_lr_scale: expected a positive number, got {self.a_lr_scale}"
        elif self.heads and self.d_model % self.heads:
            wrong = f"heads: expected a divisor of d_model={self.d_model}, got {self.heads}"
        if wrong:
            raise ValueError(f"GateLoop.{wrong}")

    @property
    def sizes(self) -> tuple[int, int]:
        """H and K."""
        heads = self.heads or self.d_model
        return heads, self.d_model // heads

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        D, (H, K) = self.d_model, self.sizes
        slow = {name: Param((D, H, K), ("embed", *AXES), lr_scale=self.a_lr_scale) for name in ("mag", "phase")}
        return {**head_params(D, dict.fromkeys(("q", "k", "v", "gate"), (H, K))), **slow, "out": out_param(H, K, D)}

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, None, segment_ids)
        return y, {}

    def _run(self, params, x, state, segment_ids):
        q, k, v, gate = project(params, x, ("q", "k", "v", "gate"))
        log_mag, phase = self._transition(params, x)
        options = {"segment_ids": segment_ids, "chunk": self.chunk, "implementation": self.implementation}
        mix = self._scan if self.sizes[1] == 1 else self._matrix
        mixed, state = mix(q, k, v, log_mag, phase, state, options)
        return self.merge(params, {"gate": gate}, mixed), state

    def _scan(self, q, k, v, log_mag, phase, state, options):
        """Scalar states: (mixed, state) of arrays [B, T, H, 1]."""
        if state is not None:
            state = jax.lax.complex(state["re"], state["im"])[..., 0]
        kv = k.astype(log_mag.dtype) * v.astype(log_mag.dtype)
        h, state = linear_scan(kv, jax.lax.complex(log_mag, phase), state=state, **options)
        state = state[..., None]
        return (q.astype(log_mag.dtype) * h.real).astype(v.dtype), {"re": state.real, "im": state.imag}

    def _matrix(self, q, k, v, log_mag, phase, state, options):
        """Matrix states: (mixed, state) of arrays [B, T, H, K]."""
        real = None if options["segment_ids"] is None else options["segment_ids"] != 0
        angles = _angles(phase, real)
        q, k = phase_features(q, angles), phase_features(k, angles)
        # Real and imaginary part of S e^{-i P_t} are the sums over k cos P_s and -k sin P_s.
        if state is not None:
            state = jnp.concatenate([state["re"], -state["im"]], axis=-2)
        mixed, state = linear_attention(q, k, v, jnp.concatenate([log_mag, log_mag], axis=-1), state=state, **options)
        re, im = jnp.split(state, 2, axis=-2)
        cos, sin = jnp.cos(angles[:, -1, :, :, None]), jnp.sin(angles[:, -1, :, :, None])
        return mixed, {"re": re * cos + im * sin, "im": re * sin - im * cos}

    def _transition(self, params, x):
        """log |a| and the angle of a, [B, T, H, K] in promote(x.dtype, float32)."""
        mag, phase = project(params, x, ("mag", "phase"), dtype=jnp.promote_types(x.dtype, jnp.float32))
        if self.transition == "complex":
            # Neither |z| nor arg z has a derivative at 0, where padding may lie: there, as at 1e-19, z counts as that.
            square = mag * mag + phase * phase
            safe = square > jnp.finfo(square.dtype).tiny
            size = jnp.sqrt(jnp.where(safe, square, jnp.finfo(square.dtype).tiny))
            mag, phase = size, jnp.where(safe, jnp.arctan2(phase, jnp.where(safe, mag, 1)), 0)
        return jax.nn.log_sigmoid(mag), phase

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        v, gate = project(params, x, ("v", "gate"))
        return v, {"gate": gate}

    def merge(self, params, context, mixed):
        gate = context["gate"]
        h = (mixed * jax.nn.silu(gate)).astype(gate.dtype)
        return jnp.einsum("bthk,hkd->btd", h, params["out"].astype(h.dtype))

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M[t, s] = Re sum_k q[t, k] k[s, k] a[s + 1, k] .. a[t, k] for s <= t, [B, H, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        q, k = project(params, x, ("q", "k"))
        log_mag, phase = self._transition(params, x)
        angles = _angles(phase, None if segment_ids is None else segment_ids != 0)
        decay = jnp.concatenate([log_mag, log_mag], axis=-1)
        return linear_mixing_matrix(
            phase_features(q, angles), phase_features(k, angles), decay, segment_ids=segment_ids
        )

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros, the real and imaginary parts "re" and "im" [B, H, K, K] in float32 at least."""
        self.check_inputs(inputs)
        H, K = self.sizes
        zeros = jnp.zeros((batch, H, K, K), jnp.promote_types(dtype, jnp.float32))
        return {"re": zeros, "im": zeros}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, new = self._run(params, x, state, segment_ids)
        return y, jax.tree.map(lambda part, old: part.astype(old.dtype), new, state)

    def state_axes(self):
        axes = ("batch", *AXES, None)
        return {"re": axes, "im": axes}

    def state_size(self, context: int) -> int:
        heads, key_dim = self.sizes
        return 2 * heads * key_dim * key_dim

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        D, (H, K), tokens = self.d_model, self.sizes, batch * seq
        projections = matmul(tokens, D, 7 * D)
        if K > 1:
            op = linear_attention_flops(batch, seq, H, H, 2 * K, K, self.chunk, per_channel=True) + 12 * tokens * D
        else:
            op = 12 * tokens * D  # of a scan a channel: exp, a complex product and a sum, twice between chunks
        return projections + op + 12 * tokens * D  # the transitions and the gate


def _angles(phase, real=None):
    """Sums of the phases up to each token, modulo 2 pi; phases where `real` [B, T] does not hold count for nothing.

    Each phase is a multiple of 2 pi / 1024 and a rest. Multiples are added as integers, exactly and with no harm from
    wrapping around; rests stay small, so that their sum over a long sequence keeps its precision.
    """
    if real is not None:
        phase = jnp.where(real[..., None, None], phase, 0)
    units = jnp.round(jax.lax.stop_gradient(phase) / _STEP)
    # units * _STEP without rounding: the first factor has 12 bits, as many as a float32 leaves for units.
    rest = phase - units * _STEP_HIGH - units * (_STEP - _STEP_HIGH)
    whole = jnp.cumsum(units.astype(jnp.int32), axis=1, dtype=jnp.int32) % 1024
    return whole.astype(phase.dtype) * _STEP + jnp.cumsum(rest, axis=1)
