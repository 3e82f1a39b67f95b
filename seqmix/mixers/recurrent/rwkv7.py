"""RWKV-7 "Goose": dynamic state evolution, a generalised delta rule (Peng et al., arXiv 2503.14456, section 4).

    x_i        = x_t + (x_{t-1} - x_t) mu_i                          for i in r, w, k, v, a, g: the token shift
    r, k, v    = x_r W_r, x_k W_k, x_v W_v                           [B, T, H, K]
    log_w      = -e^(-1/2) sigmoid(b_w + tanh(x_w D_w) U_w)          the decay per channel, at least e^(-0.607)
    a          = sigmoid(b_a + x_a D_a U_a)                          the learning rate in context, per channel
    g          = sigmoid(x_g D_g) U_g                                the output gate
    kappa      = l2norm(k k_k),  k' = k (1 + (a - 1) k_a)            what is erased, and what is written
    S_t        = (diag(w_t) - (a_t kappa_t) kappa_t^T) S_{t-1} + k'_t v_t^T,     mixed_t = S_t^T r_t
    y          = W_out ((groupnorm(mixed) + (r . (k' r_k)) v) g)     norm per head, with scale and bias

S is [K, V], the transpose of the paper's state. This is the time mixing alone; the paper's channel mixing takes the
place of an MLP. With `value_residual` the values of later layers move towards those of the stack's first,
v + (v_first - v) sigmoid(b_v + x_v D_v U_v), which travel along the stack as shared["v_first"]; the first layer's
gate is then idle. mu, b_w and the rates start as in the released code by the place of the layer, here the field
`depth`; down projections at zero, up projections with the variance of its orthogonal ones; r, k and v uniformly, and
W_out not at zero but as everywhere in this library. It agrees with the time mixing of the authors' rwkv
package (docs/peer_checks.md).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.core import param
from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.ops.conv import short_conv
from seqmix.ops.delta import diagonal_plus_rank_one, diagonal_plus_rank_one_flops
from seqmix.ops.delta_matrix import rank_one_mixing_matrix
from seqmix.ops.dispatch import NAMES
from seqmix.parts.norms import l2_norm
from seqmix.parts.qkv import AXES, out_param, project

SHIFTED = ("r", "w", "k", "v", "a", "g")
SHIFT_POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
RANKS = {"w": 2.5, "a": 2.5, "g": 5.0, "v": 1.7}  # times sqrt(d_model), to a multiple of 32


@dataclass(frozen=True, kw_only=True)
class RWKV7(Mixer):
    """RWKV-7's time mixing. Raises ValueError for fields that do not fit."""

    head_dim: int = 64  # K, channels of a head; divides d_model
    decay_rank: int | None = None  # channels that the decay comes through; None: 2.5 sqrt(d_model), in 32s
    rate_rank: int | None = None  # of a; None: as the decay
    gate_rank: int | None = None  # of g; None: 5 sqrt(d_model), in 32s
    value_rank: int | None = None  # of the value residual's gate; None: 1.7 sqrt(d_model), in 32s
    value_residual: bool = False  # take and give shared["v_first"]
    depth: float = 0.5  # place in the stack that initial values are for, in [0, 1]: 0 the first layer, 1 the last
    norm_eps: float = 1e-5  # times head_dim, added to the variance
    chunk: int = 64  # tokens that the op solves as one system, a power of two
    implementation: str | None = None  # of diagonal_plus_rank_one; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "state"
    implementations: ClassVar[tuple[str, ...]] = NAMES["diagonal_plus_rank_one"]

    @property
    def takes(self) -> tuple[str, ...]:
        return ("shared",) if self.value_residual else ()

    def __post_init__(self):
        ranks = ("decay_rank", "rate_rank", "gate_rank", "value_rank")
        given = {name: getattr(self, name) for name in ranks if getattr(self, name) is not None}
        self.positive(head_dim=self.head_dim, chunk=self.chunk, **given)
        if self.chunk & (self.chunk - 1):
            raise ValueError(f"RWKV7.chunk: expected a power of two, got {self.chunk}")
        if not 0 <= self.depth <= 1:
            raise ValueError(f"RWKV7.depth: expected a number in [0, 1], got {self.depth}")
        if self.d_model % self.head_dim:
            got = f"{self.head_dim} and d_model {self.d_model}"
            raise ValueError(f"RWKV7.head_dim: expected a divisor of d_model, got {got}")

    @property
    def sizes(self) -> tuple[int, int]:
        """H and K."""
        return self.d_model // self.head_dim, self.head_dim

    def _rank(self, name: str) -> int:
        field = {"w": self.decay_rank, "a": self.rate_rank, "g": self.gate_rank, "v": self.value_rank}[name]
        return max(32, round(RANKS[name] * self.d_model**0.5 / 32) * 32) if field is None else field

    # Weights

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        D, (H, K) = self.d_model, self.sizes
        vector = lambda init: Param((H, K), AXES, init, decay=False)
        column = np.linspace(-0.5, 0.5, D)
        within = np.linspace(-1.0, 1.0, K) if K > 1 else np.zeros(1)
        wave = np.tile(within * np.abs(within), H)
        decay = -5.5 + 6 * (column + 0.5) ** (1 + self.depth**0.3) + 2.5 * wave
        tree = {
            "mix": {name: Param((D,), (None,), self._init_shift(name), decay=False) for name in SHIFTED},
            **{name: self._projection(scale) for name, scale in (("r", 0.5), ("k", 0.05), ("v", 0.5))},
            "w": self._low_rank("w", decay, lr_scale=2.0),
            "a": self._low_rank("a", -0.19 + 0.3 * wave + 0.4 * column),
            "g": self._low_rank("g"),
            "k_k": vector(_fixed(0.71 - 0.1 * column)),
            "k_a": vector(param.constant(1.02)),
            "r_k": vector(param.constant(-0.04)),
            "norm": {"scale": vector(param.ones), "bias": vector(param.zeros)},
            "out": out_param(H, K, D),
        }
        return tree | {"v_gate": self._low_rank("v", 0.73 - 0.4 * column)} if self.value_residual else tree

    def _init_shift(self, name):
        place = np.arange(self.d_model) / self.d_model
        return _fixed(1 - place ** (SHIFT_POWERS[name] * (1 - self.depth)))

    def _projection(self, scale):
        bound = scale * self.d_model**-0.5
        init = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
        return Param((self.d_model, *self.sizes), ("embed", *AXES), init)

    def _low_rank(self, name, bias=None, lr_scale=1.0):
        rank, up = self._rank(name), param.normal(0.1 * self.d_model**-0.5)
        tree = {
            "down": Param((self.d_model, rank), ("embed", None), param.zeros, decay=False),
            "up": Param((rank, *self.sizes), (None, *AXES), up, decay=False),
        }
        if bias is not None:
            tree["bias"] = Param(self.sizes, AXES, _fixed(bias), decay=False, lr_scale=lr_scale)
        return tree

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y [B, T, D], aux); aux["shared"] with value_residual."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _, shared = self._run(params, x, {"shift": None, "kv": None}, segment_ids, inputs.get("shared"))
        return y, {"shared": shared} if self.value_residual else {}

    def _run(self, params, x, state, segment_ids, shared):
        """y, the state after it, and what later layers share; entries of the state may be None."""
        tokens, shift, shared = self._inputs(params, x, state["shift"], segment_ids, shared)
        options = {"chunk": self.chunk, "implementation": self.implementation, "segment_ids": segment_ids}
        names = ("r", "k", "v", "left", "right", "log_w")
        mixed, kv = diagonal_plus_rank_one(*(tokens[name] for name in names), state=state["kv"], **options)
        y = self.merge(params, self._context(params, tokens, segment_ids), mixed)
        return y, {"shift": shift, "kv": kv}, shared

    def _inputs(self, params, x, shift, segment_ids, shared):
        """Everything of [B, T, H, K] by name, the last token of each row, and what later layers share."""
        acc = jnp.promote_types(x.dtype, jnp.float32)
        taps = jnp.broadcast_to(jnp.array([[1], [0]], x.dtype), (2, self.d_model))
        before, shift = short_conv(x, taps, state=shift, segment_ids=segment_ids)
        moved = {name: x + (before - x) * mu.astype(x.dtype) for name, mu in params["mix"].items()}
        r, k, v = (project(params, moved[name], (name,))[0] for name in ("r", "k", "v"))

        def low_rank(name, x, inner=lambda h: h):
            p = params[name]
            up = project(p, inner(x @ p["down"].astype(x.dtype)), ("up",), dtype=acc)[0]
            return up + p["bias"].astype(acc) if "bias" in p else up

        log_w = -(np.e**-0.5) * jax.nn.sigmoid(low_rank("w", moved["w"], jnp.tanh))
        a = jax.nn.sigmoid(low_rank("a", moved["a"]))
        g = low_rank("g", moved["g"], jax.nn.sigmoid).astype(x.dtype)
        if self.value_residual:
            v, shared = _towards_first(v, shared or {}, jax.nn.sigmoid(low_rank("v_gate", moved["v"])))
        kappa = l2_norm(k * params["k_k"].astype(x.dtype), eps=1e-12)
        left = (-a * kappa).astype(x.dtype)
        k = (k * (1 + (a - 1) * params["k_a"].astype(acc))).astype(x.dtype)
        return {"r": r, "k": k, "v": v, "left": left, "right": kappa, "log_w": log_w, "g": g}, shift, shared

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        tokens, _, _ = self._inputs(params, x, None, segment_ids, inputs.get("shared"))
        return tokens["v"], self._context(params, tokens, segment_ids)

    def _context(self, params, tokens, segment_ids):
        r, k, v = (tokens[name] for name in ("r", "k", "v"))
        r_k = params["r_k"].astype(jnp.promote_types(v.dtype, jnp.float32))
        return {"bonus": jnp.sum(r * r_k * k, -1, keepdims=True) * v, "g": tokens["g"], "segment_ids": segment_ids}

    def merge(self, params, context, mixed):
        g, ids, norm = context["g"], context["segment_ids"], params["norm"]
        h = mixed.astype(jnp.promote_types(mixed.dtype, jnp.float32))
        h = h - jnp.mean(h, axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + self.norm_eps * self.head_dim)
        h = (h * norm["scale"] + norm["bias"] + context["bonus"]) * g
        y = jnp.einsum("bthk,hkd->btd", h.astype(g.dtype), params["out"].astype(g.dtype))
        return y if ids is None else jnp.where(ids[..., None] != 0, y, 0)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """r_t^T (diag(w_t) - (a_t kappa_t) kappa_t^T) .. (the same of s + 1) k'_s for s <= t, [B, H, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        tokens, _, _ = self._inputs(params, x, None, segment_ids, inputs.get("shared"))
        names = ("r", "k", "left", "right", "log_w")
        return rank_one_mixing_matrix(*(tokens[name] for name in names), segment_ids=segment_ids)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros: "shift" [B, 1, D], the last token in `dtype`, and "kv" [B, H, K, K] in float32 at least."""
        self.check_inputs(inputs)
        H, K = self.sizes
        kv = jnp.zeros((batch, H, K, K), jnp.promote_types(dtype, jnp.float32))
        return {"shift": jnp.zeros((batch, 1, self.d_model), dtype), "kv": kv}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        """(y, state); with value_residual the state has an entry "shared"."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, new, shared = self._run(params, x, state, segment_ids, inputs.get("shared"))
        new["kv"] = new["kv"].astype(state["kv"].dtype)
        return y, new | {"shared": shared} if self.value_residual else new

    def state_axes(self):
        return {"shift": ("batch", None, None), "kv": ("batch", *AXES, None)}

    def state_size(self, context: int) -> int:
        return self.d_model * (1 + self.head_dim)

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        D, (H, K), tokens = self.d_model, self.sizes, batch * seq
        ranks = sum(self._rank(name) for name in "wag") + (self._rank("v") if self.value_residual else 0)
        projections = matmul(tokens, D, 4 * D) + 2 * matmul(tokens, D, ranks)
        op = diagonal_plus_rank_one_flops(batch, seq, H, H, K, K, self.chunk, per_channel=True)
        # 16 for the shift, 14 for w, a and the keys, 4 for kappa, 4 for the bonus, 9 for the norm and the gate.
        return projections + op + 47 * tokens * D


def _fixed(values):
    """Initialiser: these values, in the shape of the weight."""
    return lambda key, shape, dtype: jnp.asarray(values, dtype).reshape(shape)


def _towards_first(v, shared, gate):
    """v, moved towards the first layer's where there is one, and what later layers share."""
    first, known = shared.get("v_first", v), shared.get("v_first_known", jnp.zeros((), bool))
    moved = (v + (first.astype(v.dtype) - v) * gate.astype(v.dtype)).astype(v.dtype)
    shared = {"v_first": jnp.where(known, first, v), "v_first_known": jnp.ones((), bool)}
    return jnp.where(known, moved, v), shared
