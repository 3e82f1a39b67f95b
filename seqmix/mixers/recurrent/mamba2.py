"""Mamba-2: state space duality (Dao and Gu, arXiv 2405.21060, section 7).

    z, x, B, C, dt = split(u W_in)
    x, B, C        = silu(conv(x)), silu(conv(B)), silu(conv(C))        depthwise, causal, conv_width taps
    dt             = softplus(dt + dt_bias),   log_decay = -exp(A_log) dt
    S_t            = exp(log_decay_t) S_{t-1} + B_t (dt_t x_t)^T
    y_t            = C_t S_t + D x_t
    out            = W_out (rmsnorm(y * silu(z)) * scale)               norm over d_inner / n_groups channels

for each head of head_dim channels of x, d_inner = expand d_model in all; head h reads the B and C of group
h // (H / n_groups).

W_in is held as one weight per part, with heads as a dimension, so that heads are cut over a mesh and no part
straddles two shards; concatenating z, x, B, C, dt (and conv's x, B, C) gives the published matrices, and the
number of weights is theirs. The published code draws W_in uniformly, with a third of the variance used here.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmix.core import param
from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.core.sharding import constrain
from seqmix.ops.conv import short_conv, short_conv_flops
from seqmix.ops.linear import linear_attention, linear_attention_flops
from seqmix.ops.linear_reference import linear_mixing_matrix
from seqmix.parts import time_steps
from seqmix.parts.norms import norm_params, rms_norm


def _uniform(bound: float):
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


@dataclass(frozen=True, kw_only=True)
class Mamba2(Mixer):
    """The Mamba-2 block without its pre-norm and residual. Raises ValueError for fields that do not fit."""

    d_state: int = 128  # N, rows of the state of a head
    head_dim: int = 64  # P, channels of a head; divides expand * d_model
    expand: int = 2  # d_inner / d_model
    n_groups: int = 1  # G, pairs of B and C, each shared by H / G heads; divides H
    conv_width: int = 4  # taps of the convolutions, at least 1
    chunk: int = 256  # tokens that the op computes as one matrix, a power of two
    dt_min: float = 1e-3  # the initial time steps are log-uniform from here, > 0
    dt_max: float = 0.1  # to here
    dt_floor: float = 1e-4  # and at least this
    a_min: float = 1.0  # the initial -A are uniform from here, > 0
    a_max: float = 16.0  # to here
    norm_eps: float = 1e-5  # added to the mean square in the gated norm
    conv_bias: bool = True  # whether the convolutions add a bias
    implementation: str | None = None  # of linear_attention; None: the best there is

    packable: ClassVar[bool] = True
    decodes: ClassVar[bool] = True
    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"

    def __post_init__(self):
        sizes = ("d_state", "head_dim", "expand", "n_groups", "conv_width", "chunk")
        self.positive(**{name: getattr(self, name) for name in sizes})
        time_steps.check_ranges(self, ("dt_min", "dt_max"), ("a_min", "a_max"))
        if self.d_model == 0:
            return
        inner = self.expand * self.d_model
        if inner % self.head_dim:
            got = f"{self.expand} * {self.d_model} = {inner} and head_dim {self.head_dim}"
            raise ValueError(f"Mamba2.head_dim: expected a divisor of expand * d_model, got {got}")
        if self.heads % self.n_groups:
            got = f"{self.heads} heads and n_groups {self.n_groups}"
            raise ValueError(f"Mamba2.n_groups: expected a divisor of the number of heads, got {got}")

    @property
    def heads(self) -> int:
        """H = expand * d_model / head_dim."""
        return self.expand * self.d_model // self.head_dim

    # Weights

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        D, H, P, W = self.d_model, self.heads, self.head_dim, self.conv_width
        group, axes = (self.n_groups, self.d_state), ("kv_heads", "state")
        shapes = {"x": ((H, P), ("heads", "head_dim")), "B": (group, axes), "C": (group, axes)}
        uniform = _uniform(W**-0.5)  # as PyTorch draws the weights and biases of a depthwise convolution
        a_log = time_steps.a_log_init(self.a_min, self.a_max)
        dt_bias = time_steps.dt_bias_init(self.dt_min, self.dt_max, self.dt_floor)
        tree = {
            "in": {
                **{k: Param((D, *s), ("embed", *a)) for k, (s, a) in {"z": shapes["x"], **shapes}.items()},
                "dt": Param((D, H), ("embed", "heads")),
            },
            "conv": {k: Param((W, *s), (None, *a), uniform) for k, (s, a) in shapes.items()},
            "A_log": Param((H,), ("heads",), a_log, decay=False),
            "D": Param((H,), ("heads",), param.ones, decay=False),
            "dt_bias": Param((H,), ("heads",), dt_bias, decay=False),
            "norm": norm_params((H, P), ("heads", "head_dim")),
            "out": Param((H, P, D), ("heads", "head_dim", "embed"), fan_in=H * P),
        }
        if self.conv_bias:
            tree["conv_bias"] = {k: Param(s, a, uniform, decay=False) for k, (s, a) in shapes.items()}
        return tree

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, {"conv": None, "ssm": None}, segment_ids)
        return y, {}

    def _run(self, params, x, state, segment_ids):
        """y and the state after it; entries of the state may be None."""
        z, dt, log_decay, parts, conv = self._inputs(params, x, state["conv"], segment_ids)
        options = {"write": dt, "chunk": self.chunk, "implementation": self.implementation}
        mixed, ssm = linear_attention(
            parts["C"], parts["B"], parts["x"], log_decay, state=state["ssm"], segment_ids=segment_ids, **options
        )
        mixed = mixed + params["D"].astype(dt.dtype)[:, None] * parts["x"]
        y = self.merge(params, {"z": z, "segment_ids": segment_ids}, mixed)
        return y, {"conv": conv, "ssm": ssm}

    def _inputs(self, params, x, conv_state, segment_ids):
        """z, dt, log_decay, {x, B, C} after the convolutions, and the state of these."""
        acc = jnp.promote_types(x.dtype, jnp.float32)
        weights = {k: w.astype(x.dtype) for k, w in params["in"].items()}
        dt = jnp.einsum("btd,dh->bth", x, weights.pop("dt"), preferred_element_type=acc)
        parts = {k: jnp.einsum("btd,dhp->bthp", x, w) for k, w in weights.items()}
        for key, over in (("z", "heads"), ("x", "heads"), ("B", "kv_heads"), ("C", "kv_heads")):
            parts[key] = constrain(parts[key], "batch", "time", over, None)
        dt = jax.nn.softplus(constrain(dt, "batch", "time", "heads") + params["dt_bias"].astype(acc))
        log_decay = -jnp.exp(params["A_log"].astype(acc)) * dt
        z = parts.pop("z")
        parts, conv_state = short_conv(
            parts, params["conv"], params.get("conv_bias"), state=conv_state, segment_ids=segment_ids
        )
        return z, dt, log_decay, jax.tree.map(jax.nn.silu, parts), conv_state

    # The mixing matrix

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """Values [B, T, H, P]: the convolved x. Time steps and the skip belong to the matrix."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        z, _, _, parts, _ = self._inputs(params, x, None, segment_ids)
        return parts["x"], {"z": z, "segment_ids": segment_ids}

    def merge(self, params, context, mixed):
        z, ids = context["z"], context["segment_ids"]
        scale, out = params["norm"]["scale"], params["out"].astype(z.dtype)
        h = rms_norm(mixed, scale, eps=self.norm_eps, groups=self.n_groups, gate=z, gate_first=True)
        y = jnp.einsum("bthp,hpd->btd", h.astype(z.dtype), out)
        return y if ids is None else jnp.where(ids[..., None] != 0, y, 0)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M[t, s] = (C_t . B_s) exp(log_decay_{s+1} + ... + log_decay_t) dt_s + D [t = s]: [B, H, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        _, dt, log_decay, parts, _ = self._inputs(params, x, None, segment_ids)
        scores = linear_mixing_matrix(parts["C"], parts["B"], log_decay, scale=1.0, segment_ids=segment_ids)
        skip = params["D"].astype(dt.dtype)[:, None, None] * jnp.eye(x.shape[1], dtype=dt.dtype)
        if segment_ids is not None:
            skip = jnp.where(segment_ids[:, None, :, None] != 0, skip, 0)
        return scores * jnp.moveaxis(dt, 1, 2)[:, :, None, :] + skip

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros: the convolutions' last inputs in `dtype`, and "ssm" [B, H, N, P] in float32 at least."""
        self.check_inputs(inputs)
        H, P, G, N, rows = self.heads, self.head_dim, self.n_groups, self.d_state, self.conv_width - 1
        sizes = {"x": (H, P), "B": (G, N), "C": (G, N)}
        return {
            "conv": {k: jnp.zeros((batch, rows, *size), dtype) for k, size in sizes.items()},
            "ssm": jnp.zeros((batch, H, N, P), jnp.promote_types(dtype, jnp.float32)),
        }

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, new = self._run(params, x, state, segment_ids)
        return y, new | {"ssm": new["ssm"].astype(state["ssm"].dtype)}

    def state_axes(self):
        group = ("batch", None, "kv_heads", "state")
        return {
            "conv": {"x": ("batch", None, "heads", "head_dim"), "B": group, "C": group},
            "ssm": ("batch", "heads", "state", "head_dim"),
        }

    def state_size(self, context: int) -> int:
        inner, group = self.heads * self.head_dim, self.n_groups * self.d_state
        return (self.conv_width - 1) * (inner + 2 * group) + inner * self.d_state

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        H, P, G, N = self.heads, self.head_dim, self.n_groups, self.d_state
        inner, convolved, tokens = H * P, H * P + 2 * G * N, batch * seq
        projections = matmul(tokens, self.d_model, 3 * inner + 2 * G * N + H)  # into z, x, B, C, dt, and out
        conv = short_conv_flops(batch, seq, convolved, self.conv_width, self.conv_bias)
        op = linear_attention_flops(batch, seq, H, G, N, P, self.chunk)
        # 8 a channel: dt x, D x, its sum, gate, square, mean, norm, scale; 4 a silu; 8 a head's dt and decay.
        elementwise = tokens * (8 * inner + 4 * (inner + convolved) + 8 * H)
        return projections + conv + op + elementwise
