"""Sparse Transformer attention: Generating Long Sequences with Sparse Transformers (arXiv 1904.10509).

    q, k, v = x W_q, x W_k, x W_v [B, T, H, K] (q and k rotated),   y = softmax(q k^T / sqrt(K) + visible) v W_out

A causal pattern over n tokens falls into two factors, each of about sqrt(n) keys where the stride l is sqrt(n):

    strided:  A1 = {j: 0 <= i - j < l},             A2 = {j <= i: (i - j) % l = 0}
    fixed:    A1 = {j <= i: j // l = i // l},       A2 = {j <= i: j % l >= l - c}

so that what A2 reaches, A1 carries on to every token after. `factors` says how they are used: "merged" sees their
union, "heads" gives the first half of the heads A1 and the others A2, "first" and "second" see one of them, for
stacks that alternate. i and j are positions within a segment. With "second" and the fixed pattern the first l - c
tokens see nothing and give y = 0.

The paper's networks have learned embeddings of rows and columns, a scaled init and recomputed attention; here
positions are rotary and optional, and the rest is the stack's. Their heads may read different columns of the
fixed pattern, ours read the same. The patterns were checked against the paper's definitions by hand, not its code.
Decoding keeps all keys and values: the published patterns leave none of them out for good.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from seqmix.core import packing
from seqmix.core.mixer import Mixer
from seqmix.ops import masks
from seqmix.ops.block_sparse import block_sparse_attention, block_sparse_flops
from seqmix.ops.softmax import merge
from seqmix.parts import kv_cache
from seqmix.parts.qkv import head_params, head_size, out_param, places, project
from seqmix.parts.rotary import rotate


@dataclass(frozen=True, kw_only=True)
class SparseTransformer(Mixer):
    """Factorised sparse attention. Raises ValueError when built from fields that do not fit each other."""

    heads: int = 8  # H
    head_dim: int | None = None  # K, even where rotated; None: d_model / heads
    pattern: str = "strided"  # strided or fixed
    stride: int = 128  # l, about the square root of the length
    summary: int = 8  # c, columns of each stride that later tokens see (fixed), 1 to l
    factors: str = "merged"  # merged, heads, first or second
    rope: bool = True  # rotate queries and keys by their positions
    rope_base: float = 10000.0  # > 1
    block: int = 128  # queries and keys of a block of scores
    implementation: str | None = None  # of block_sparse_attention; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "none"

    def __post_init__(self):
        self.positive(heads=self.heads, stride=self.stride, summary=self.summary, block=self.block)
        wrong = None
        if self.pattern not in ("strided", "fixed"):
            wrong = f"pattern: expected strided or fixed, got {self.pattern!r}"
        elif self.factors not in ("merged", "heads", "first", "second"):
            wrong = f"factors: expected merged, heads, first or second, got {self.factors!r}"
        elif self.pattern == "fixed" and self.summary > self.stride:
            wrong = f"summary: expected at most stride={self.stride}, got {self.summary}"
        elif self.factors == "heads" and self.heads % 2:
            wrong = f"heads: expected an even number with factors='heads', got {self.heads}"
        elif not self.rope_base > 1:
            wrong = f"rope_base: expected a number above 1, got {self.rope_base}"
        if wrong:
            raise ValueError(f"SparseTransformer.{wrong}")
        if self.head_dim is not None:
            self.positive(head_dim=self.head_dim)
        if (self.d_model or self.head_dim) and self.rope and self._head_dim % 2:
            raise ValueError(f"SparseTransformer.head_dim: expected an even number with rope, got {self._head_dim}")

    @property
    def _head_dim(self) -> int:
        return head_size(self, "head_dim")

    def params(self):
        self.positive(d_model=self.d_model)
        size = self.heads, self._head_dim
        return {**head_params(self.d_model, dict.fromkeys("qkv", size)), "out": out_param(*size, self.d_model)}

    # Who sees whom

    @property
    def patterns(self) -> tuple[masks.Mask, masks.Mask]:
        """A1 and A2."""
        if self.pattern == "strided":
            return masks.Window(self.stride), masks.Causal() & masks.Dilated(self.stride)
        columns = masks.Strided(self.stride, self.summary, self.stride - self.summary)
        return masks.Causal() & masks.Blocks(self.stride), masks.Causal() & columns

    @property
    def groups(self) -> tuple[tuple[slice, masks.Mask], ...]:
        """(heads, what they see) for each group of heads."""
        first, second = self.patterns
        half = self.heads // 2
        return {
            "merged": ((slice(None), first | second),),
            "heads": ((slice(half), first), (slice(half, None), second)),
            "first": ((slice(None), first),),
            "second": ((slice(None), second),),
        }[self.factors]

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y [B, T, D], {}). `positions` [B, T] only rotate; who sees whom is counted in tokens."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        q, k, v = self._qkv(params, x, places(x, segment_ids, positions)[0])
        data = None
        if segment_ids is not None:
            ids = packing.runs(segment_ids)
            data = _data(ids, ids, packing.positions(ids), packing.positions(ids))
        return self._out(params, self._attend(q, k, v, data)[0]), {}

    def _qkv(self, params, x, positions):
        q, k, v = project(params, x, "qkv")
        if self.rope:
            q, k = (rotate(y, positions, base=self.rope_base) for y in (q, k))
        return q, k, v

    def _attend(self, q, k, v, data=None, *, later=True):
        """(mixed, lse). With data, positions are given; `later`: keys of later index are at later positions."""
        parts = []
        for heads, mask in self.groups:
            if data is not None:
                mask = masks.Positions(mask) & masks.Segments()
                mask = masks.Causal() & mask if later else mask
            options = {"mask": mask, "data": data, "sizes": (self.block,) * 2, "implementation": self.implementation}
            parts.append(block_sparse_attention(*(y[:, :, heads] for y in (q, k, v)), return_lse=True, **options))
        mixed, lse = zip(*parts, strict=True)
        return jnp.concatenate(mixed, axis=2), jnp.concatenate(lse, axis=1)

    def _out(self, params, mixed):
        return jnp.einsum("bthk,hkd->btd", mixed, params["out"].astype(mixed.dtype))

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """A cache of max_len tokens a row; a row that grows beyond it keeps its newest tokens."""
        self.check_inputs(inputs)
        return kv_cache.init(batch, max_len, self.heads, self._head_dim, self._head_dim, dtype)

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        """(y [B, T, D], state): the new tokens attend to the cached ones and to each other, joined by LSE."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else packing.runs(segment_ids)
        place = packing.positions(ids, start=state["length"])
        q, k, v = self._qkv(params, x, place if positions is None else positions)
        held = kv_cache.positions(state["length"], state["k"].shape[1])
        cached = (state[name].astype(k.dtype) for name in ("k", "v"))
        # What is cached belongs to the first segment.
        old = self._attend(q, *cached, _data(ids, (held >= 0).astype(jnp.int32), place, held), later=False)
        new = self._attend(q, k, v, _data(ids, ids, place, place))
        return self._out(params, merge([old, new])[0]), kv_cache.append(state, k, v, ids)

    def state_axes(self):
        cached = ("batch", None, "heads", "head_dim")
        return {"k": cached, "v": cached, "length": ("batch",)}

    def state_size(self, context):
        return 2 * context * self.heads * self._head_dim + 1

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return project(params, x, "v")[0], {}

    def merge(self, params, context, mixed):
        return self._out(params, mixed)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """softmax over visible j of q_i . k_j / sqrt(K), [B, H, T, T] in promote(x.dtype, float32)."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        q, k, _ = self._qkv(params, x, places(x, segment_ids, positions)[0])
        acc = jnp.promote_types(x.dtype, jnp.float32)
        score = jnp.einsum("bihk,bjhk->bhij", q.astype(acc), k.astype(acc)) / self._head_dim**0.5
        ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else packing.runs(segment_ids)
        place = packing.positions(ids)
        one = (ids[:, :, None] == ids[:, None, :]) & (ids[:, :, None] > 0)
        seen = [one & mask.visible(place[:, :, None], place[:, None, :]) for _, mask in self.groups]
        seen = jnp.repeat(jnp.stack(seen, axis=1), self.heads // len(seen), axis=1)
        weight = jnp.where(seen, jnp.exp(score - jnp.max(jnp.where(seen, score, -1e30), -1, keepdims=True)), 0)
        total = jnp.sum(weight, axis=-1, keepdims=True)
        return weight / jnp.where(total > 0, total, 1)

    def flops(self, batch, seq):
        """Projections, rotations, and the scores of the tiles that the pattern leaves."""
        h, k = self.heads, self._head_dim
        each = h // len(self.groups)
        shape = (batch, seq, each, k, k)
        mixed = sum(block_sparse_flops(*shape, mask=mask, sizes=(self.block,) * 2) for _, mask in self.groups)
        return 8 * batch * seq * self.d_model * h * k + mixed + 6 * self.rope * batch * seq * h * k


def _data(q_ids, k_ids, q_positions, k_positions) -> dict:
    """The inputs of `Positions` and `Segments`."""
    return {
        "segment_ids": q_ids,
        "kv_segment_ids": k_ids,
        "q_positions": q_positions,
        "kv_positions": k_positions,
    }
