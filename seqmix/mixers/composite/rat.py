"""RAT: Bridging RNN Efficiency and Attention Accuracy via Chunk-based Sequence Modeling (arXiv 2507.04416).

    z, v, a = x W_z, x W_v, x W_gate          [B, T, H, K]
    q, k    = x W_q, x W_k                    [B, T, G, K] tiled to H heads, head h having group h % G
    g       = sigmoid(a + b)                  one gate for keys and values, per channel
    kt_t    = g_t kt_{t-1} + (1 - g_t) k_t    vt_t likewise; both begin from 0 at each chunk of `chunk` tokens
    o_t     = softmax over {kt_t and the last kt of every earlier chunk} of q_t . kt / sqrt(K), applied to their vt
    y       = W_out (sigmoid(z) o)

q and kt are rotated (`parts.rotary`) by the number of their chunk. A chunk of 1 with g = 0 is softmax attention, one
as long as the sequence a gated recurrence. Chunks are counted from the start of a segment, so that segments may
start anywhere. b starts as log U(1, chunk - 1). The norm before and the residual after belong to the block. Decoding
keeps the last kt and vt of each whole chunk, and the running ones. Equations after a summary of the
released code (CLAIRE-Labo/RAT), which was not opened itself.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.core.sharding import constrain
from seqmix.ops.linear_reference import linear_mixing_matrix
from seqmix.ops.scan import linear_scan
from seqmix.ops.softmax import attention, merge
from seqmix.parts import kv_cache
from seqmix.parts.chunks import chunk_ids, token_places
from seqmix.parts.qkv import AXES, head_params, out_param, project
from seqmix.parts.rotary import frequencies, rotate


@dataclass(frozen=True, kw_only=True)
class RAT(Mixer):
    """Recurrence within chunks, attention over their ends. Raises ValueError for fields that do not fit."""

    heads: int = 8  # H, of d_model / H channels, an even number
    groups: int = 2  # G, distinct queries and keys; a divisor of heads
    chunk: int = 16  # tokens that a recurrence runs over and that become one key
    rope_base: float = 10000.0  # > 1
    block: int = 512  # queries and keys whose scores exist at once
    implementation: str | None = None  # of linear_scan and attention; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "gather"
    implementations: ClassVar[tuple[str, ...]] = "gpu", "tpu", "chunked", "reference"  # of both ops

    def __post_init__(self):
        self.positive(heads=self.heads, groups=self.groups, chunk=self.chunk, block=self.block)
        if self.heads % self.groups:
            raise ValueError(f"RAT.groups: expected a divisor of heads={self.heads}, got {self.groups}")
        if self.d_model % (2 * self.heads):
            expected = f"heads with an even share of d_model={self.d_model}"
            raise ValueError(f"RAT.heads: expected {expected}, got {self.heads}")
        try:
            frequencies(2, base=self.rope_base)
        except ValueError as error:
            raise ValueError(f"RAT.rope_{error}") from None

    @property
    def _head_dim(self) -> int:
        return self.d_model // self.heads

    def params(self) -> dict:
        self.positive(d_model=self.d_model)
        D, H, G, K = self.d_model, self.heads, self.groups, self._head_dim

        def log_uniform(key, shape, dtype):
            return jnp.log(jax.random.uniform(key, shape, dtype, 1, max(self.chunk - 1, 1)))

        shared = {name: Param((D, G, K), ("embed", "kv_heads", "head_dim")) for name in ("q", "k")}
        tree = head_params(D, {"v": (H, K), "z": (H, K), "gate": (H, K)})
        bias = Param((H, K), AXES, log_uniform, decay=False)
        return tree | shared | {"gate_bias": bias, "out": out_param(H, K, D)}

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y [B, T, D], {}). `positions` [B, T] only rotate, by positions // chunk."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, None, segment_ids, positions)[0], {}

    def _run(self, params, x, state, segment_ids, positions):
        length = None if state is None else state["length"]
        runs, place, after = token_places(x, segment_ids, length)
        q, k, v, z, gate = self._inputs(params, x)
        written = jnp.stack([k, v], 2) * jax.nn.sigmoid(-gate)[:, :, None]
        h, last = linear_scan(
            *(written.astype(x.dtype), jax.nn.log_sigmoid(gate)[:, :, None]),
            **dict(state=None if state is None else state["chunk"], segment_ids=chunk_ids(runs, place, self.chunk)),
            implementation=self.implementation,
        )
        q, k = self._rotated(q, h[:, :, 0], place if positions is None else positions)
        v = h[:, :, 1]
        ends = self._ends(k, v, runs, place)
        mixed = self._attend(q, k, v, runs, place, ends, state)
        y = self.merge(params, {"z": z}, jnp.where((runs != 0)[..., None, None], mixed, 0))
        if state is None:
            return y, None
        whole = {"k": state["k"], "v": state["v"], "length": length // self.chunk}
        whole = kv_cache.append(whole, *ends[:3])
        # A chunk that has ended leaves nothing to the next one.
        last = jnp.where((after % self.chunk == 0)[:, None, None, None], 0, last).astype(state["chunk"].dtype)
        return y, whole | {"chunk": last, "length": after}

    def _inputs(self, params, x):
        """q, k, v and z [B, T, H, K], and the gate's logits in promote(x.dtype, float32)."""
        acc = jnp.promote_types(x.dtype, jnp.float32)
        v, z = project(params, x, ("v", "z"))
        (gate,) = project(params, x, ("gate",), dtype=acc)
        q, k = (jnp.einsum("btd,dgk->btgk", x, params[n].astype(x.dtype)) for n in ("q", "k"))
        q, k = (jnp.tile(y, (1, 1, self.heads // self.groups, 1)) for y in (q, k))
        q, k = (constrain(y, "batch", "time", *AXES) for y in (q, k))
        return q, k, v, z, gate + params["gate_bias"].astype(acc)

    def _rotated(self, q, k, positions):
        return tuple(rotate(y, positions // self.chunk, base=self.rope_base) for y in (q, k))

    def _ends(self, k, v, runs, place):
        """k, v [B, n, H, K], segments and numbers [B, n] of the chunks that end among the tokens, 0 beyond them."""
        batch, time = runs.shape
        n = -(-time // self.chunk)
        ends = (runs != 0) & (place % self.chunk == self.chunk - 1)
        slot = jnp.where(ends, jnp.cumsum(ends, axis=1) - 1, n)  # n is past the end, where a scatter drops it
        token = jnp.broadcast_to(jnp.arange(time, dtype=jnp.int32), runs.shape)
        token = jnp.zeros((batch, n), jnp.int32).at[jnp.arange(batch)[:, None], slot].set(token, mode="drop")
        filled = jnp.arange(n) < jnp.sum(ends, axis=1, keepdims=True)
        k, v = (jnp.take_along_axis(y, token[..., None, None], axis=1) for y in (k, v))
        ids, number = (jnp.take_along_axis(y, token, axis=1) for y in (runs, place // self.chunk))
        return k, v, jnp.where(filled, ids, 0), number

    def _attend(self, q, k, v, runs, place, ends, state):
        """A token's own kt and vt, the ends of earlier chunks among the tokens, and those in the state, joined."""
        options = dict(return_lse=True, block=self.block, implementation=self.implementation)
        acc = jnp.promote_types(q.dtype, jnp.float32)
        own = jnp.einsum("bthk,bthk->bht", q, k, preferred_element_type=acc) * self._head_dim**-0.5
        end_k, end_v, end_runs, number = ends
        new = attention(
            *(q, end_k, end_v),
            **dict(segment_ids=runs, kv_segment_ids=end_runs),
            **dict(q_positions=place // self.chunk, kv_positions=number + 1),  # seen from the next chunk on
            **options,
        )
        parts = [(v, own), new]
        if state is not None:
            slot = jnp.arange(state["k"].shape[1])
            held = (slot < state["length"][:, None] // self.chunk).astype(jnp.int32)  # of the first segment
            old = state["k"].astype(k.dtype), state["v"].astype(v.dtype)
            parts.append(attention(q, *old, causal=False, segment_ids=runs, kv_segment_ids=held, **options))
        return merge(parts)[0]

    # The mixing matrix, over G = d_model groups of one channel

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """Values [B, T, D, 1]: v. The gates 1 - g belong to the matrix."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        _, _, v, z, _ = self._inputs(params, x)
        return v.reshape(*x.shape, 1), {"z": z}

    def merge(self, params, context, mixed):
        z = context["z"]
        h = (mixed.reshape(z.shape) * jax.nn.sigmoid(z)).astype(z.dtype)
        return jnp.einsum("bthk,hkd->btd", h, params["out"].astype(h.dtype))

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """A R [B, D, T, T]: attention to chunks' ends and to the token itself, after the recurrence's matrix."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        runs, place, _ = token_places(x, segment_ids, None)
        q, k, _, _, gate = self._inputs(params, x)
        log_g, taken = (f(y).reshape(x.shape) for f, y in ((jax.nn.log_sigmoid, gate), (jax.nn.sigmoid, -gate)))
        taken = taken[..., None]
        inner = linear_mixing_matrix(jnp.ones_like(taken), taken, log_g, segment_ids=chunk_ids(runs, place, self.chunk))
        inner = inner.reshape(x.shape[0], *k.shape[2:], *inner.shape[2:])
        k = jnp.einsum("bhkus,bshk->buhk", inner, k.astype(inner.dtype))
        q, k = self._rotated(q.astype(inner.dtype), k, place if positions is None else positions)
        number = place // self.chunk
        seen = (runs[:, :, None] == runs[:, None]) & (number[:, :, None] > number[:, None])
        seen &= (place % self.chunk == self.chunk - 1)[:, None]
        seen = ((seen | jnp.eye(x.shape[1], dtype=bool)) & (runs != 0)[:, None])[:, None]
        score = jnp.einsum("bthk,buhk->bhtu", q, k) * self._head_dim**-0.5
        weight = jnp.where(seen, jax.nn.softmax(jnp.where(seen, score, jnp.finfo(score.dtype).min)), 0)
        matrix = jnp.einsum("bhtu,bhkus->bhkts", weight, inner)
        return matrix.reshape(x.shape[0], -1, *matrix.shape[3:])

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Zeros: "k" and "v" [B, slots, H, K] of whole chunks in `dtype`, and what the current one has.

        That is "chunk" [B, 2, H, K], kt and vt, in float32 at least; and "length" [B], tokens so far.
        """
        self.check_inputs(inputs)
        H, K = self.heads, self._head_dim
        return kv_cache.init(batch, self._slots(max_len), H, K, K, dtype) | {
            "chunk": jnp.zeros((batch, 2, H, K), jnp.promote_types(dtype, jnp.float32))
        }

    def _slots(self, max_len: int) -> int:
        return max(max_len // self.chunk, 1)

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, state, segment_ids, positions)

    def state_axes(self):
        cached = ("batch", None, *AXES)
        return {"k": cached, "v": cached, "chunk": cached, "length": ("batch",)}

    def state_size(self, context: int) -> int:
        return 2 * (self._slots(context) + 1) * self.d_model + 1

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        """Projections, the scan, and scores of all tokens with all chunks."""
        D, K, tokens = self.d_model, self._head_dim, batch * seq
        projections = matmul(tokens, D, 4 * D + 2 * self.groups * K)
        scores = tokens * -(-seq // self.chunk) * self.heads * (4 * K + 7)
        # 9 for g and 1 - g, 2 for what is written, 6 for the scan, 6 rotations, 2 own score, 9 joining, 5 way out.
        return projections + scores + 39 * tokens * D
