"""Mamba: selective state spaces (Gu and Dao, arXiv 2312.00752, section 3).

    u, z     = silu(conv(x W_u)), x W_z                   [B, T, E] each, E = expand D; conv depthwise, causal
    dt       = softplus(u W_down W_up + dt_bias)          [B, T, E], through dt_rank channels
    B, C     = u W_B, u W_C                               [B, T, N], shared by all channels
    h_t      = exp(dt_t A) * h_{t-1} + (dt_t u_t) B_t     [B, E, N], A = -exp(A_log) [E, N]
    y_t      = h_t C_t + D u_t
    out      = W_out (y * silu(z))

A is discretised by the zero-order hold, B by Euler's rule, as in the authors' code (equation 4 has the hold for both).
Their W_in and W_x are held here as one weight per part. A_log starts at log(1 .. N) in every channel, softplus(dt_bias)
log-uniform in [dt_min, dt_max]; other projections are drawn normally. It agrees with the released layer
(docs/peer_checks.md).
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
from seqmix.ops.dispatch import NAMES
from seqmix.ops.linear_reference import linear_mixing_matrix
from seqmix.ops.selective import selective_scan, selective_scan_flops
from seqmix.parts.time_steps import check_ranges, dt_bias_init


def _uniform(bound: float):
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _log_counts(key, shape, dtype):
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[1] + 1, dtype=dtype)), shape)


@dataclass(frozen=True, kw_only=True)
class Mamba(Mixer):
    """The Mamba block without its pre-norm and residual. Raises ValueError for fields that do not fit."""

    d_state: int = 16  # N, numbers that a channel keeps
    expand: int = 2  # E / D
    conv_width: int = 4  # taps of the convolution, at least 1
    dt_rank: int | None = None  # R, channels that the time steps come through; None: d_model / 16, rounded up
    dt_min: float = 1e-3  # the initial time steps are log-uniform from here, > 0
    dt_max: float = 0.1  # to here
    dt_floor: float = 1e-4  # and at least this
    conv_bias: bool = True  # whether the convolution adds a bias
    chunk: int = 32  # tokens between two stored states of the scan
    implementation: str | None = None  # of selective_scan; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["selective_scan"]

    def __post_init__(self):
        given = {} if self.dt_rank is None else {"dt_rank": self.dt_rank}
        sizes = ("d_state", "expand", "conv_width", "chunk")
        self.positive(**{name: getattr(self, name) for name in sizes}, **given)
        check_ranges(self, ("dt_min", "dt_max"))

    @property
    def width(self) -> int:
        """E."""
        return self.expand * self.d_model

    @property
    def _rank(self) -> int:
        return -(-self.d_model // 16) if self.dt_rank is None else self.dt_rank

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        D, E, N, R, W = self.d_model, self.width, self.d_state, self._rank, self.conv_width
        uniform = _uniform(W**-0.5)  # as PyTorch draws the weights and biases of a depthwise convolution
        tree = {
            "u": Param((D, E), ("embed", "mlp")),
            "z": Param((D, E), ("embed", "mlp")),
            "conv": Param((W, E), (None, "mlp"), uniform),
            "dt": {
                "down": Param((E, R), ("mlp", None)),
                "up": Param((R, E), (None, "mlp"), _uniform(R**-0.5)),
                "bias": Param((E,), ("mlp",), dt_bias_init(self.dt_min, self.dt_max, self.dt_floor), decay=False),
            },
            "B": Param((E, N), ("mlp", "state")),
            "C": Param((E, N), ("mlp", "state")),
            "A_log": Param((E, N), ("mlp", "state"), _log_counts, decay=False),
            "D": Param((E,), ("mlp",), param.ones, decay=False),
            "out": Param((E, D), ("mlp", "embed")),
        }
        return tree | {"conv_bias": Param((E,), ("mlp",), uniform, decay=False)} if self.conv_bias else tree

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _ = self._run(params, x, {"conv": None, "ssm": None}, segment_ids)
        return y, {}

    def _run(self, params, x, state, segment_ids):
        """y and the state after it; entries of the state may be None."""
        u, z, conv = self._inputs(params, x, state["conv"], segment_ids)
        dt, A, B, C = self._selection(params, u)
        options = {"chunk": self.chunk, "implementation": self.implementation}
        y, ssm = selective_scan(u, dt, A, B, C, params["D"], state=state["ssm"], segment_ids=segment_ids, **options)
        return self.merge(params, {"z": z}, y[..., None]), {"conv": conv, "ssm": ssm}

    def _inputs(self, params, x, conv, segment_ids):
        """u and z [B, T, E], and the state of the convolution."""
        u, z = (constrain(x @ params[name].astype(x.dtype), "batch", "time", "mlp") for name in ("u", "z"))
        bias = params.get("conv_bias")
        u, conv = short_conv(u, params["conv"], bias, state=conv, segment_ids=segment_ids)
        return jax.nn.silu(u), z, conv

    def _selection(self, params, u):
        """dt [B, T, E], A [E, N], B and C [B, T, N], in promote(u.dtype, float32)."""
        acc, p = jnp.promote_types(u.dtype, jnp.float32), params["dt"]
        project = lambda x, w: jnp.matmul(x, w.astype(x.dtype), preferred_element_type=acc)
        dt = project(u @ p["down"].astype(u.dtype), p["up"]) + p["bias"].astype(acc)
        dt = constrain(jax.nn.softplus(dt), "batch", "time", "mlp")
        return dt, -jnp.exp(params["A_log"].astype(acc)), project(u, params["B"]), project(u, params["C"])

    # The mixing matrix, over G = E groups of one channel

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """Values [B, T, E, 1]: the convolved u. Time steps and the skip belong to the matrix."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        u, z, _ = self._inputs(params, x, None, segment_ids)
        return u[..., None], {"z": z}

    def merge(self, params, context, mixed):
        z = context["z"]
        y = (mixed[..., 0] * jax.nn.silu(z)).astype(z.dtype)
        return y @ params["out"].astype(z.dtype)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M[t, s] = sum_n C_t[n] exp(A[n] (dt_{s+1} + .. + dt_t)) B_s[n] dt_s + D [t = s], [B, E, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        u, _, _ = self._inputs(params, x, None, segment_ids)
        dt, A, B, C = self._selection(params, u)
        decay = dt[..., None] * A
        scores = linear_mixing_matrix(C[:, :, None], B[:, :, None], decay, segment_ids=segment_ids)
        skip = params["D"].astype(dt.dtype)[:, None, None] * jnp.eye(x.shape[1], dtype=dt.dtype)
        if segment_ids is not None:
            skip = jnp.where(segment_ids[:, None, :, None] != 0, skip, 0)
        return scores * jnp.moveaxis(dt, 1, 2)[:, :, None, :] + skip

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros: "conv" [B, W - 1, E], the last inputs in `dtype`, and "ssm" [B, E, N] in float32 at least."""
        self.check_inputs(inputs)
        ssm = jnp.zeros((batch, self.width, self.d_state), jnp.promote_types(dtype, jnp.float32))
        return {"conv": jnp.zeros((batch, self.conv_width - 1, self.width), dtype), "ssm": ssm}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, new = self._run(params, x, state, segment_ids)
        return y, new | {"ssm": new["ssm"].astype(state["ssm"].dtype)}

    def state_axes(self):
        return {"conv": ("batch", None, "mlp"), "ssm": ("batch", "mlp", "state")}

    def state_size(self, context: int) -> int:
        return self.width * (self.conv_width - 1 + self.d_state)

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        E, N, R, tokens = self.width, self.d_state, self._rank, batch * seq
        projections = matmul(tokens, self.d_model, 3 * E) + matmul(tokens, E, 2 * R + 2 * N)
        conv = short_conv_flops(batch, seq, E, self.conv_width, bias=self.conv_bias)
        # 4 for the convolution's silu, 8 for the time steps, 5 for the gate.
        return projections + conv + selective_scan_flops(batch, seq, E, N, self.chunk) + 17 * tokens * E
