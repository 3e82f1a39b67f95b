"""Softmax attention with multi-, grouped- or single-head keys (arXiv 1706.03762, 2305.13245, 1911.02150).

    q = rot(norm(x W_q)) [B, T, H, K],  k = rot(norm(x W_k)) [B, T, Hk, K],  v = x W_v [B, T, Hk, K]
    y = softmax(cap(q k^T / sqrt(K)) + visible) v W_out,   head h reads key head h // (H // Hk)

No biases. Options: rotary positions (`parts.rotary`; they restart with each segment), RMS norm of queries and
keys per head (arXiv 2302.05442, there a layer norm), a sliding window (Mistral, arXiv 2310.06825), attention
sinks (StreamingLLM, arXiv 2309.17453: there positions are those within the cache, here all tokens keep their
own), a learned sink logit per head (gpt-oss, arXiv 2508.10925), a soft cap on scores (Gemma 2, arXiv
2408.00118), no causality (an encoder). Decoding keeps rotated keys in a ring buffer (`parts.kv_cache`).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from seqmix.core import packing, param
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.core.sharding import constrain
from seqmix.ops.dispatch import NAMES
from seqmix.ops.softmax import attention, attention_flops, merge
from seqmix.ops.softmax_context import FORMS
from seqmix.parts import kv_cache
from seqmix.parts.norms import norm_params, rms_norm
from seqmix.parts.rotary import RotaryScaling, frequencies, rotate, rotated_dims


@dataclass(frozen=True, kw_only=True)
class Attention(Mixer):
    """Softmax attention. Raises ValueError when built from fields that do not fit each other."""

    heads: int = 8  # H, query heads
    kv_heads: int | None = None  # Hk, key and value heads, a divisor of heads; None: heads
    head_dim: int | None = None  # K, width of a head; None: d_model / heads
    rope: bool = True  # rotate queries and keys by their positions
    rope_base: float = 10000.0  # > 1
    rope_fraction: float = 1.0  # of head_dim that is rotated, in (0, 1]
    rope_scaling: RotaryScaling | None = None  # stretches the rotation over longer contexts
    qk_norm: bool = False  # RMS norm of queries and keys, per head
    window: int | None = None  # a query sees positions less than this far away; None: all
    sinks: int = 0  # first tokens of a segment that stay visible beyond the window
    sink_logits: bool = False  # a learned logit per head in the denominator
    soft_cap: float | None = None  # bound on scores, > 0
    causal: bool = True  # hide later tokens; without it there is no decoding
    block: int = 512  # queries and keys whose scores exist at once
    norm_eps: float = 1e-6  # added to the mean square in qk_norm
    context: str | None = None  # of the op, where time is cut over a mesh: None, ring, zigzag, heads, gather
    implementation: str | None = None  # of the op: None, cudnn, tokamax, splash, gpu, chunked, reference

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "ring"
    implementations: ClassVar[tuple[str, ...]] = NAMES["attention"]

    @property
    def decodes(self) -> bool:
        return self.causal

    def __post_init__(self):
        given = {"kv_heads": self.kv_heads, "head_dim": self.head_dim, "window": self.window}
        self.positive(heads=self.heads, block=self.block, **{k: x for k, x in given.items() if x is not None})
        wrong = None
        if self.heads % self._kv_heads:
            wrong = f"kv_heads: expected a divisor of heads={self.heads}, got {self.kv_heads}"
        elif not isinstance(self.sinks, int) or self.sinks < 0:
            wrong = f"sinks: expected an integer >= 0, got {self.sinks!r}"
        elif self.sinks and (self.window is None or not self.causal):
            wrong = f"sinks: expected 0 without a causal window, got {self.sinks}"
        elif self.soft_cap is not None and self.soft_cap <= 0:
            wrong = f"soft_cap: expected a positive number, got {self.soft_cap}"
        elif self.context not in (None, *FORMS):
            wrong = f"context: expected None or one of {', '.join(FORMS)}, got {self.context!r}"
        elif not self.norm_eps > 0:
            wrong = f"norm_eps: expected a positive number, got {self.norm_eps}"
        if wrong:
            raise ValueError(f"Attention.{wrong}")
        if self.d_model or self.head_dim is not None:
            self._check_head_dim()

    def _check_head_dim(self):
        """What waits for d_model where head_dim follows from it."""
        if self.head_dim is None and (self.d_model < 1 or self.d_model % self.heads):
            raise ValueError(
                f"Attention.d_model: expected a positive multiple of heads={self.heads}, got {self.d_model}"
            )
        if self.rope:
            try:
                size = rotated_dims(self._head_dim, self.rope_fraction)
                frequencies(size, base=self.rope_base, scaling=self.rope_scaling)
            except ValueError as error:
                raise ValueError(f"Attention.rope_{error}") from None

    @property
    def _kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def _head_dim(self) -> int:
        return self.d_model // self.heads if self.head_dim is None else self.head_dim

    def params(self):
        self.positive(d_model=self.d_model)
        h, j, k, d = self.heads, self._kv_heads, self._head_dim, self.d_model
        tree = {
            "q": Param((d, h, k), ("embed", "heads", "head_dim")),
            "k": Param((d, j, k), ("embed", "kv_heads", "head_dim")),
            "v": Param((d, j, k), ("embed", "kv_heads", "head_dim")),
            "out": Param((h, k, d), ("heads", "head_dim", "embed"), fan_in=h * k),
        }
        if self.qk_norm:
            tree |= {name: norm_params((k,), ("head_dim",)) for name in ("q_norm", "k_norm")}
        if self.sink_logits:
            tree["sink_logits"] = Param((h,), ("heads",), param.zeros, decay=False)
        return tree

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y [B, T, D], {}). `positions` [B, T] only rotate; who sees whom is counted in tokens."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        q, k, v = self._qkv(params, x, _places(x, segment_ids, positions))
        return self._out(params, self._attend(params, q, k, v, segment_ids=segment_ids)), {}

    def _qkv(self, params, x, positions):
        """Rotated q [B, T, H, K] and k [B, T, Hk, K], and v [B, T, Hk, K]."""
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, params[n].astype(x.dtype)) for n in ("q", "k", "v"))
        if self.qk_norm:
            q = rms_norm(q, params["q_norm"]["scale"], eps=self.norm_eps)
            k = rms_norm(k, params["k_norm"]["scale"], eps=self.norm_eps)
        if self.rope:
            options = dict(base=self.rope_base, fraction=self.rope_fraction, scaling=self.rope_scaling)
            q, k = (rotate(y, positions, **options) for y in (q, k))
        q = constrain(q, "batch", "time", "heads", "head_dim")
        return q, *(constrain(y, "batch", "time", "kv_heads", "head_dim") for y in (k, v))

    def _attend(self, params, q, k, v, *, sink=True, **tokens):
        logits = params["sink_logits"] if self.sink_logits and sink else None
        return attention(
            *(q, k, v),
            **dict(causal=self.causal, window=self.window, sinks=self.sinks, soft_cap=self.soft_cap),
            **dict(sink_logits=logits, block=self.block, context=self.context),
            **dict(implementation=self.implementation, **tokens),
        )

    def _out(self, params, mixed):
        return jnp.einsum("bthk,hkd->btd", mixed, params["out"].astype(mixed.dtype))

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """A cache of max_len tokens a row, or of the window and the sinks where that is less.

        Without a window, a row that grows beyond max_len keeps its newest tokens: from there on y is that of a window.
        """
        self._need_decoding()
        self.check_inputs(inputs)
        sizes = self._kv_heads, self._head_dim, self._head_dim
        return kv_cache.init(batch, max_len, *sizes, dtype, window=self.window, sinks=self.sinks)

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        """(y [B, T, D], state): the new tokens attend to the cached ones and to each other, joined by LSE."""
        self._need_decoding()
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else packing.runs(segment_ids)
        place = packing.positions(ids, start=state["length"])
        q, k, v = self._qkv(params, x, place if positions is None else positions)
        held = kv_cache.positions(state["length"], state["k"].shape[1], self.sinks)
        old = self._attend(
            *(params, q, state["k"].astype(k.dtype), state["v"].astype(v.dtype)),
            # What is cached belongs to the first segment.
            **dict(segment_ids=ids, kv_segment_ids=(held >= 0).astype(jnp.int32)),
            **dict(q_positions=place, kv_positions=held, return_lse=True, sink=False),
        )
        # Only sinks need to know how long the row is already; the op does more with positions from zero.
        at = {"q_positions": place, "kv_positions": place} if self.sinks else {}
        new = self._attend(params, q, k, v, segment_ids=segment_ids, return_lse=True, **at)
        y = self._out(params, merge([old, new])[0])
        return y, kv_cache.append(state, k, v, ids, sinks=self.sinks)

    def _need_decoding(self):
        if not self.decodes:
            raise ValueError(self.denial("decode without causality"))

    def state_axes(self):
        self._need_decoding()
        cached = ("batch", None, "kv_heads", "head_dim")
        return {"k": cached, "v": cached, "length": ("batch",)}

    def state_size(self, context):
        """Keys and values of a slot each, and the length."""
        self._need_decoding()
        slots = kv_cache.n_slots(context, self.window, self.sinks)
        return 2 * slots * self._kv_heads * self._head_dim + 1

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        _, _, v = self._qkv(params, x, _places(x, segment_ids, positions))
        return jnp.repeat(v, self.heads // self._kv_heads, axis=2), {}

    def merge(self, params, context, mixed):
        return self._out(params, mixed)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """softmax over visible j of cap(q_i . k_j / sqrt(K)), [B, H, T, T] in promote(x.dtype, float32)."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        q, k, _ = self._qkv(params, x, _places(x, segment_ids, positions))
        acc = jnp.promote_types(x.dtype, jnp.float32)
        k = jnp.repeat(k, self.heads // self._kv_heads, axis=2)
        score = jnp.einsum("bihk,bjhk->bhij", q.astype(acc), k.astype(acc)) / self._head_dim**0.5
        if self.soft_cap is not None:
            score = jnp.tanh(score / self.soft_cap) * self.soft_cap
        ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else packing.runs(segment_ids)
        place = packing.positions(ids)
        behind = place[:, :, None] - place[:, None, :]
        near = True if self.window is None else jnp.abs(behind) < self.window
        near |= place[:, None, :] < self.sinks
        seen = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] > 0) & near
        seen = (seen & (behind >= 0) if self.causal else seen)[:, None]
        score = jnp.where(seen, score, jnp.finfo(acc).min)
        top = jnp.max(score, axis=-1, keepdims=True)
        rest = 0
        if self.sink_logits:
            logits = params["sink_logits"].astype(acc)[:, None, None]
            top = jnp.maximum(top, logits)
            rest = jnp.exp(logits - top)
        weight = jnp.where(seen, jnp.exp(score - top), 0)
        total = jnp.sum(weight, axis=-1, keepdims=True) + rest
        return weight / jnp.where(total > 0, total, 1)

    def flops(self, batch, seq):
        """Projections, scores in blocks, and per rotated or normed element some operations."""
        h, j, k = self.heads, self._kv_heads, self._head_dim
        projections = 4 * batch * seq * self.d_model * (h + j) * k
        shape = dict(window=self.window, causal=self.causal, sinks=self.sinks, block=self.block)
        mixed = attention_flops(batch, seq, h, k, k, soft_cap=self.soft_cap is not None, **shape)
        turned = 3 * self.rope_fraction * self.rope + 4 * self.qk_norm
        return projections + mixed + turned * batch * seq * (h + j) * k


def _places(x, segment_ids, positions):
    """The positions that rotate, [B, T] or [1, T]: those given, else those within the segment."""
    if positions is not None:
        return positions
    if segment_ids is None:
        return jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    return packing.positions(packing.runs(segment_ids))
