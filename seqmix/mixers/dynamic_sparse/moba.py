"""MoBA: Mixture of Block Attention for Long-Context LLMs (arXiv 2502.13189).

    q, k, v = x W_q [B, T, H, K], x W_k, x W_v [B, T, Hk, K]  (q and k rotated)
    kbar_b  = mean of the keys of block b, of `size` tokens
    g_tb    = q_t . kbar_b                         for whole blocks b before that of t; no scale, no weights
    M_t     = {j <= t in t's own block} + {j in one of the count - 1 blocks with the best g_tb}
    y       = W_out (softmax over M_t of q_t . k_j / sqrt(K), applied to v_j)

Every query head chooses for each token, and reads key head h // (H // Hk). The own block counts as one of `count`,
and gates are in float32 at least. With as many blocks as there are, this is causal softmax attention; with count = 1,
a block diagonal of it. No gradient reaches the choice. Blocks are counted from the start of a segment. Decoding keeps
keys and values and the means of whole blocks: a step scores the means and reads count blocks, where the released code
falls back to dense attention. What the paper adds (full attention in the last layers, or in a last phase of training,
for which the weights serve unchanged) is the stack's and the run's concern. Equations after the technical report and
notes on the released code (MoonshotAI/MoBA).
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from seqmix.core import packing
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.ops import block_groups
from seqmix.ops.dispatch import NAMES
from seqmix.ops.softmax import attention_flops
from seqmix.parts import chosen_blocks, kv_cache
from seqmix.parts.chunks import token_places
from seqmix.parts.qkv import head_size, out_param, project
from seqmix.parts.rotary import rotate


@dataclass(frozen=True, kw_only=True)
class MoBA(Mixer):
    """Attention to the best blocks by mean key. Raises ValueError for fields that do not fit."""

    heads: int = 8  # H, query heads
    kv_heads: int | None = None  # Hk, key and value heads, a divisor of heads; None: heads
    head_dim: int | None = None  # K, even where rotated; None: d_model / heads
    size: int = 512  # tokens of a block
    count: int = 3  # blocks that a query sees, its own among them
    rope: bool = True  # rotate queries and keys by their positions
    rope_base: float = 10000.0  # > 1
    block: int = 512  # queries and keys of the own block whose scores exist at once
    implementation: str | None = None  # of the ops: None, gpu (all of them, from 64 tokens on), chunked, reference

    linear_in_v: ClassVar[bool] = True
    implementations: ClassVar[tuple[str, ...]] = NAMES["block_sparse_attention"]

    def __post_init__(self):
        given = {"kv_heads": self.kv_heads, "head_dim": self.head_dim}
        given = {name: size for name, size in given.items() if size is not None}
        self.positive(heads=self.heads, size=self.size, count=self.count, block=self.block, **given)
        if self.heads % self._kv_heads:
            raise ValueError(f"MoBA.kv_heads: expected a divisor of heads={self.heads}, got {self.kv_heads}")
        if not self.rope_base > 1:
            raise ValueError(f"MoBA.rope_base: expected a number above 1, got {self.rope_base}")
        if (self.d_model or self.head_dim) and self.rope and self._head_dim % 2:
            raise ValueError(f"MoBA.head_dim: expected an even number with rope, got {self._head_dim}")

    @property
    def _kv_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def _head_dim(self) -> int:
        return head_size(self, "head_dim")

    def params(self):
        self.positive(d_model=self.d_model)
        D, H, J, K = self.d_model, self.heads, self._kv_heads, self._head_dim
        keys = Param((D, J, K), ("embed", "kv_heads", "head_dim"))
        return {"q": Param((D, H, K), ("embed", "heads", "head_dim")), "k": keys, "v": keys, "out": out_param(H, K, D)}

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y [B, T, D], {}). `positions` [B, T] only rotate; blocks are counted in tokens."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, None, segment_ids, positions)[0], {}

    def _run(self, params, x, state, segment_ids, positions):
        length = None if state is None else state["length"]
        runs, place, _ = token_places(x, segment_ids, length)
        q, k, v = self._inputs(params, x, place if positions is None else positions)
        tokens = chosen_blocks.after(state, self.size - 1, k, v, runs, place, segment_ids)
        blocks = chosen_blocks.whole(tokens, self.size, self.size)
        acc = jnp.promote_types(k.dtype, jnp.float32)
        means = jnp.mean(blocks.k.astype(acc), axis=2)
        found = [(means, blocks.runs, blocks.number)]
        if state is not None:
            held = chosen_blocks.held_blocks(length, state["mean"].shape[1], self.size, self.size)
            found.insert(0, (state["mean"].astype(acc), *held))
        gates, seen = [], []
        for mean, block_runs, number in found:
            gates.append(self._gates(q, mean))
            seen.append(chosen_blocks.past(runs, place, block_runs, number, self.size))
        index = chosen_blocks.choose(jnp.concatenate(gates, -1), jnp.concatenate(seen, -1), self.count - 1)
        options = {"block": self.block, "implementation": self.implementation}
        y = self.merge(params, {}, chosen_blocks.attend(q, tokens, blocks, index, self.size, state, **options))
        if state is None:
            return y, None
        kept = chosen_blocks.keep_blocks(state["mean"], means, blocks, packing.last_run(runs))
        return y, kv_cache.append({name: state[name] for name in ("k", "v", "length")}, k, v, runs) | {"mean": kept}

    def _inputs(self, params, x, positions):
        """q and k, rotated, and v."""
        q, k, v = project(params, x, "qkv")
        if self.rope:
            q, k = (rotate(y, positions, base=self.rope_base) for y in (q, k))
        return q, k, v

    def _gates(self, q, means):
        """q . means [B, H, T, n] of means [B, n, Hk, K], in their dtype."""
        grouped = q.astype(means.dtype).reshape(*q.shape[:2], self._kv_heads, -1, q.shape[-1])
        gates = jnp.einsum("btjrk,bnjk->bjrtn", grouped, means)
        return gates.reshape(q.shape[0], self.heads, *gates.shape[3:])

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """A `parts.kv_cache` of whole blocks for max_len tokens, and "mean" [B, n, Hk, K] in float32 at least."""
        self.check_inputs(inputs)
        n, J, K = -(-max_len // self.size), self._kv_heads, self._head_dim
        means = jnp.zeros((batch, n, J, K), jnp.promote_types(dtype, jnp.float32))
        return kv_cache.init(batch, n * self.size, J, K, K, dtype) | {"mean": means}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, state, segment_ids, positions)

    def state_axes(self):
        cached = ("batch", None, "kv_heads", "head_dim")
        return {"k": cached, "v": cached, "mean": cached, "length": ("batch",)}

    def state_size(self, context: int) -> int:
        return -(-context // self.size) * (2 * self.size + 1) * self._kv_heads * self._head_dim + 1

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return jnp.repeat(project(params, x, "v")[0], self.heads // self._kv_heads, axis=2), {}

    def merge(self, params, context, mixed):
        return jnp.einsum("bthk,hkd->btd", mixed, params["out"].astype(mixed.dtype))

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """One softmax over the union of what a query sees, [B, H, T, T] in promote(x.dtype, float32)."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        runs, place, _ = token_places(x, segment_ids)
        q, k, _ = self._inputs(params, x, place if positions is None else positions)
        acc = jnp.promote_types(x.dtype, jnp.float32)
        number = place // self.size
        one = (runs[:, :, None] == runs[:, None]) & (runs != 0)[:, None]
        ahead = number[:, :, None] - number[:, None]
        mine = (one & (ahead == 0)).astype(acc)
        mean = jnp.einsum("bts,bsjk->btjk", mine, k.astype(acc)) / jnp.maximum(mine.sum(-1), 1)[..., None, None]
        gate, before = self._gates(q, mean), (one & (ahead > 0))[:, None]
        chosen = jnp.zeros_like(before)
        if self.count > 1:  # each block has one vote, that of its first token
            ranked = jnp.sort(jnp.where(before & (place % self.size == 0)[:, None, None], gate, -jnp.inf), axis=-1)
            chosen = before & (gate >= ranked[..., -min(self.count - 1, x.shape[1]), None])
        own = one & (ahead == 0) & (place[:, :, None] >= place[:, None])
        seen = own[:, None] | chosen
        score = self._gates(q, k.astype(acc)) * self._head_dim**-0.5
        score = jnp.where(seen, score, jnp.finfo(acc).min)
        weight = jnp.where(seen, jnp.exp(score - jnp.max(score, axis=-1, keepdims=True)), 0)
        return weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), jnp.finfo(acc).tiny)

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        """Projections, gates of all tokens with all blocks, and the scores of own and chosen blocks, as computed: the
        tokens that chose a block fill whole tiles.
        """
        n = max(1, seq // self.size)
        return self._flops(batch, seq, n, block_groups.computed_rows(seq, min(self.count - 1, n), n))

    def chunkless_flops(self, batch: int, seq: int) -> float:
        """`flops` without what fills up tiles."""
        n = max(1, seq // self.size)
        return self._flops(batch, seq, n, seq * min(self.count - 1, n))

    def _flops(self, batch, seq, n, rows):
        H, J, K, tokens = self.heads, self._kv_heads, self._head_dim, batch * seq
        projections = 4 * tokens * self.d_model * (H + J) * K + 3 * self.rope * tokens * (H + J) * K
        own = attention_flops(batch, min(seq, self.size), H, K, K, block=self.block) * -(-seq // self.size)
        return projections + own + 2 * tokens * n * H * K + batch * H * rows * self.size * (4 * K + 7)
