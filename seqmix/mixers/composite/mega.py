"""Mega: Moving Average Equipped Gated Attention (Ma et al., arXiv 2209.10655).

    p, decay = sigmoid(delta), 1 - sigmoid(delta) sigmoid(alpha)            [D, N], N averages of each channel
    s_t      = decay s_{t-1} + p beta x_t                                   [B, T, D, N]
    m        = silu(sum_n eta s / sqrt(N) + omega x)                        [B, T, D]
    q, k     = gamma_q silu(m W_z) + bias_q, gamma_k silu(m W_z) + bias_k   [B, T, K], one head
    a        = softmax(q k^T / sqrt(K) + rot(pos_q) rot(pos_k)^T), causal, over the tokens of the same chunk
    h        = silu(m W_h + ((a silu(x W_v)) silu(m W_r)) W_out)            silu(x W_v): [B, T, V]
    y        = sigmoid(m W_u) (h - x)                                       to be added to the stream; biases not shown

The averages run on from chunk to chunk of `chunk` tokens, attention does not; one chunk for all is full attention.
Chunks are counted from the start of a segment, so that segments may start anywhere (in the paper, of a row). The bias
by distance is the rotary one (RoFormer's rotation of two learned vectors), which is a product of queries and keys;
not here are the table of biases, attention by the Laplace function or squared relu, and the two-sided average. The
paper's block subtracts the stream from h before its norm; here x is what the mixer is given. Equations after a
summary of the released code (facebookresearch/mega), which was not opened itself.
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
from seqmix.core.sharding import constrain
from seqmix.ops.scan import linear_scan
from seqmix.ops.softmax import attention, attention_flops, merge
from seqmix.parts import kv_cache
from seqmix.parts.chunks import chunk_ids, token_places
from seqmix.parts.rotary import rotate


@dataclass(frozen=True, kw_only=True)
class Mega(Mixer):
    """Gated attention in chunks to moving averages. Raises ValueError for fields that do not fit."""

    d_state: int = 2  # N, moving averages of a channel; 16 in the paper's long-range tasks
    key_dim: int = 128  # K, an even number
    value_dim: int | None = None  # V; None: 2 d_model
    chunk: int = 2048  # tokens that attend to each other
    block: int = 512  # queries and keys whose scores exist at once
    implementation: str | None = None  # of linear_scan and attention; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "ring"
    implementations: ClassVar[tuple[str, ...]] = "gpu", "tpu", "chunked", "reference"  # of both ops

    def __post_init__(self):
        given = {} if self.value_dim is None else {"value_dim": self.value_dim}
        self.positive(d_state=self.d_state, key_dim=self.key_dim, chunk=self.chunk, block=self.block, **given)
        if self.key_dim % 2:
            raise ValueError(f"Mega.key_dim: expected an even number, got {self.key_dim}")

    @property
    def _value_dim(self) -> int:
        return 2 * self.d_model if self.value_dim is None else self.value_dim

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        D, N, K, V = self.d_model, self.d_state, self.key_dim, self._value_dim
        sizes = {"v": V, "r": V, "u": D, "h": D}

        def average(init):
            return Param((D, N), ("mlp", "state"), init, decay=False)

        def signs(key, shape, dtype):
            return param.normal(0.02)(key, shape, dtype) + jnp.asarray((-1.0) ** np.arange(N), dtype)

        def pair(init):
            return Param((2, K), (None, "head_dim"), init, decay=False)

        return {
            "delta": average(param.normal(0.2)),
            "alpha": average(param.normal(0.2)),
            "beta": average(signs),
            "eta": average(param.normal(1.0)),
            "omega": Param((D,), ("mlp",), param.normal(1.0), decay=False),
            **{name: Param((D, size), ("embed", "mlp")) for name, size in sizes.items()},
            **{f"{name}_bias": Param((size,), ("mlp",), param.zeros, decay=False) for name, size in sizes.items()},
            "z": Param((D, K), ("embed", "head_dim")),
            "z_bias": Param((K,), ("head_dim",), param.zeros, decay=False),
            "gamma": pair(param.normal(0.02)),
            "gamma_bias": pair(param.zeros),
            "position": pair(param.normal(0.02)),
            "out": Param((V, D), ("mlp", "embed")),
        }

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y [B, T, D], {}). Ignores `positions`: chunks and distances are counted in tokens."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, None, segment_ids)[0], {}

    def _run(self, params, x, state, segment_ids):
        m, average = self._average(params, x, None if state is None else state["average"], segment_ids)
        runs, place, after = token_places(x, segment_ids, None if state is None else state["length"])
        q, k = self._queries_and_keys(params, m)
        v = self._linear(params, x, "v")[:, :, None]
        ids = chunk_ids(runs, place, self.chunk)
        options = dict(scale=1.0, return_lse=True, block=self.block, implementation=self.implementation)
        query = self._placed(params, q, place, 0)
        parts = [attention(query, self._placed(params, k, place, 1), v, segment_ids=ids, **options)]
        if state is not None:
            held = kv_cache.positions(state["length"], state["k"].shape[1])
            old = self._placed(params, state["k"].astype(k.dtype), held, 1), state["v"].astype(v.dtype)
            # Those of a chunk that goes on: its new tokens have id 1, which is not given where a chunk opens.
            open_ = held >= (state["length"] // self.chunk * self.chunk)[:, None]
            parts.append(
                attention(query, *old, causal=False, segment_ids=ids, kv_segment_ids=open_.astype(jnp.int32), **options)
            )
        y = self.merge(params, {"x": x, "m": m, "real": runs != 0}, merge(parts)[0])
        if state is None:
            return y, None
        cache = kv_cache.append({name: state[name] for name in ("k", "v", "length")}, k, v, runs)
        return y, cache | {"average": average.astype(state["average"].dtype), "length": after}

    def _average(self, params, x, state, segment_ids):
        """m [B, T, D] and the averages [B, D, N] after the tokens."""
        acc = jnp.promote_types(x.dtype, jnp.float32)
        delta, alpha, beta, eta, omega = (params[n].astype(acc) for n in ("delta", "alpha", "beta", "eta", "omega"))
        written = (jax.nn.sigmoid(delta) * beta) * x[..., None].astype(acc)
        written = constrain(written.astype(x.dtype), "batch", "time", "mlp", "state")
        log_decay = _log_decay(delta, alpha)
        h, state = linear_scan(
            written, log_decay, state=state, segment_ids=segment_ids, implementation=self.implementation
        )
        m = jnp.sum(h * eta, -1) * self.d_state**-0.5 + omega * x
        return jax.nn.silu(m).astype(x.dtype), state

    def _linear(self, params, x, name, activation=jax.nn.silu):
        """activation(x W + b), the bias and the activation in x.dtype."""
        y = x @ params[name].astype(x.dtype) + params[f"{name}_bias"].astype(x.dtype)
        return activation(constrain(y, "batch", "time", "head_dim" if name == "z" else "mlp"))

    def _queries_and_keys(self, params, m):
        """q / sqrt(K) and k, [B, T, 1, K] each."""
        z = self._linear(params, m, "z")[:, :, None]
        gamma, bias = (params[n].astype(m.dtype) for n in ("gamma", "gamma_bias"))
        return (z * gamma[0] + bias[0]) * self.key_dim**-0.5, z * gamma[1] + bias[1]

    def _placed(self, params, y, place, side):
        """[B, T, 1, 2 K]: queries (side 0) or keys (1) with the vector whose products are the bias by distance."""
        vector = params["position"][side].astype(y.dtype)
        turned = rotate(jnp.broadcast_to(vector, y.shape), place)
        return jnp.concatenate([y, turned], axis=-1)

    # The mixing matrix, over one group

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """Values silu(x W_v) [B, T, 1, V]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        real = jnp.ones(x.shape[:2], bool) if segment_ids is None else segment_ids != 0
        m, _ = self._average(params, x, None, segment_ids)
        return self._linear(params, x, "v")[:, :, None], {"x": x, "m": m, "real": real}

    def merge(self, params, context, mixed):
        x, m = context["x"], context["m"]
        h = (mixed[:, :, 0] * self._linear(params, m, "r")).astype(x.dtype) @ params["out"].astype(x.dtype)
        h = jax.nn.silu(self._linear(params, m, "h", lambda y: y) + h)
        y = self._linear(params, m, "u", jax.nn.sigmoid) * (h - x)
        return jnp.where(context["real"][..., None], y, 0)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """a [B, 1, T, T]."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        m, _ = self._average(params, x, None, segment_ids)
        runs, place, _ = token_places(x, segment_ids, None)
        q, k = (self._placed(params, y, place, i)[:, :, 0] for i, y in enumerate(self._queries_and_keys(params, m)))
        ids = chunk_ids(runs, place, self.chunk)
        seen = (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, None] & np.tri(x.shape[1], dtype=bool)
        score = jnp.einsum("btk,bsk->bts", q, k, preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
        weight = jax.nn.softmax(jnp.where(seen, score, jnp.finfo(score.dtype).min))
        return jnp.where(seen, weight, 0)[:, None]

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros: "average" [B, D, N] in float32 at least, and a cache of one chunk in `dtype` (`parts.kv_cache`)."""
        self.check_inputs(inputs)
        cache = kv_cache.init(batch, max_len, 1, self.key_dim, self._value_dim, dtype, window=self.chunk)
        acc = jnp.promote_types(dtype, jnp.float32)
        return cache | {"average": jnp.zeros((batch, self.d_model, self.d_state), acc)}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, state, segment_ids)

    def state_axes(self):
        key, value = ("batch", None, None, "head_dim"), ("batch", None, None, "mlp")
        return {"k": key, "v": value, "average": ("batch", "mlp", "state"), "length": ("batch",)}

    def state_size(self, context: int) -> int:
        slots = kv_cache.n_slots(context, self.chunk)
        return slots * (self.key_dim + self._value_dim) + self.d_model * self.d_state + 1

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        D, N, K, V, tokens = self.d_model, self.d_state, self.key_dim, self._value_dim, batch * seq
        projections = matmul(tokens, D, 3 * V + 2 * D + K)
        whole, rest = divmod(seq, self.chunk)
        sizes = dict(block=self.block)
        mixed = whole * attention_flops(batch, self.chunk, 1, 2 * K, V, **sizes)
        mixed += attention_flops(batch, rest, 1, 2 * K, V, **sizes) if rest else 0
        # Of an average 1 for what is written, 3 for the scan, 2 to read it; 5 for a bias and silu.
        return projections + mixed + tokens * (6 * D * N + 22 * D + 13 * V + 16 * K)


def _log_decay(delta, alpha):
    """log(1 - sigmoid(delta) sigmoid(alpha)), finite where both are 1 in floating point."""
    log = jax.nn.log_sigmoid
    return jnp.logaddexp(log(-delta), log(delta) + log(-alpha))
