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
positions are rotary and optional, and the rest is the stack's. A1 and A2 of the strided pattern are the "local" and
"strided" masks of the released code (openai/sparse_attention, read), whose "fixed" one is the merged pattern here with
l and c in blocks of 32 tokens; there heads may read different columns, here they read the same.
Decoding keeps all keys and values: the published patterns leave none of them out for good.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from seqmix.core.mixer import Mixer
from seqmix.ops import masks
from seqmix.ops.dispatch import NAMES
from seqmix.parts import masked_attention
from seqmix.parts.qkv import project


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
    context_form: ClassVar[str] = "gather"
    implementations: ClassVar[tuple[str, ...]] = NAMES["block_sparse_attention"]

    def __post_init__(self):
        self.positive(stride=self.stride, summary=self.summary)
        masked_attention.check(self)
        wrong = None
        if self.pattern not in ("strided", "fixed"):
            wrong = f"pattern: expected strided or fixed, got {self.pattern!r}"
        elif self.factors not in ("merged", "heads", "first", "second"):
            wrong = f"factors: expected merged, heads, first or second, got {self.factors!r}"
        elif self.pattern == "fixed" and self.summary > self.stride:
            wrong = f"summary: expected at most stride={self.stride}, got {self.summary}"
        elif self.factors == "heads" and self.heads % 2:
            wrong = f"heads: expected an even number with factors='heads', got {self.heads}"
        if wrong:
            raise ValueError(f"SparseTransformer.{wrong}")

    @property
    def _head_dim(self) -> int:
        return masked_attention.head_dim(self)

    def params(self):
        return masked_attention.params(self)

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
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return masked_attention.forward(self, params, x, segment_ids=segment_ids, positions=positions), {}

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        self.check_inputs(inputs)
        return masked_attention.init_state(self, batch, max_len, dtype)

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return masked_attention.prefill(self, params, x, state, segment_ids=segment_ids, positions=positions)

    def state_axes(self):
        return masked_attention.STATE_AXES

    def state_size(self, context):
        return masked_attention.state_elements(self, context)

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return project(params, x, "v")[0], {}

    def merge(self, params, context, mixed):
        return masked_attention.way_out(params, mixed)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return masked_attention.mixing_matrix(self, params, x, segment_ids=segment_ids, positions=positions)

    def flops(self, batch, seq):
        return masked_attention.flops(self, batch, seq)
