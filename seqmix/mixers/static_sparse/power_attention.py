"""PowerAttention: Exponentially Scaling of Receptive Fields for Effective Sparse Attention (arXiv 2503.03588).

    q, k, v = x W_q, x W_k, x W_v [B, T, H, K] (q and k rotated),   y = softmax(q k^T / sqrt(K) + visible) v W_out

With blocks of `size` tokens and d = i // size - j // size, a query i sees the keys j <= i with

    j < size (the sink block)   or   d < window   or   d = 0 or a power of two

so that a row of n blocks sees about log2(n) of them, and what l layers reach doubles with each. i and j are positions
within a segment. All heads and layers share the pattern; the paper keeps some layers of a model dense and trains on
from a dense model, which is the stack's and the run's concern. The pattern follows notes on the paper's algorithm 1;
no code was opened. Decoding keeps all keys and values, and reads the blocks in the pattern.
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
class PowerAttention(Mixer):
    """Attention to blocks at distances of powers of two. Raises ValueError for fields that do not fit."""

    heads: int = 8  # H
    head_dim: int | None = None  # K, even where rotated; None: d_model / heads
    size: int = 256  # tokens of a block of the pattern
    window: int = 5  # blocks, its own among them, that a query sees whole
    rope: bool = True  # rotate queries and keys by their positions
    rope_base: float = 10000.0  # > 1
    block: int = 128  # queries and keys of a block of scores
    implementation: str | None = None  # of block_sparse_attention; None: the best there is

    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "gather"
    implementations: ClassVar[tuple[str, ...]] = NAMES["block_sparse_attention"]

    def __post_init__(self):
        self.positive(size=self.size, window=self.window)
        masked_attention.check(self)

    @property
    def _head_dim(self) -> int:
        return masked_attention.head_dim(self)

    def params(self):
        return masked_attention.params(self)

    @property
    def pattern(self) -> masks.Mask:
        """Who sees whom."""
        blocks = masks.Coarse(masks.Window(self.window) | masks.Powers(), self.size)
        return masks.Causal() & (masks.Sinks(self.size) | blocks)

    @property
    def groups(self) -> tuple[tuple[slice, masks.Mask], ...]:
        """(heads, what they see): one group."""
        return ((slice(None), self.pattern),)

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
