"""Mixture of Sparse Attention: Content-Based Learnable Sparse Attention via Expert-Choice Routing (arXiv 2505.00315).

    r       = sigmoid(x W_router)                     [B, T, H], a score for each token and head
    I_h     = the tokens that head h takes            about T / sparsity of them
    q, k, v = x_i W_q, x_i W_k, x_i W_v for i in I_h  (the first half of q and k rotated, by the token's own position)
    o_i     = softmax over {j in I_h, j <= i} of q_i . k_j / sqrt(K), applied to v_j
    y_i     = sum over the heads that take i of r_i o_i W_out,h  +  the dense heads

The dense heads are `dense_heads` of causal softmax attention, within `window` where there is one. r is how gradients
reach the router. Two rules of what a head takes:

    "published"  the max(2, T // sparsity) tokens of best score in the whole sequence. That sees the future: whether a
                 token takes part, and so y, depends on later tokens. No language model, no packing, no decoding.
    "causal"     a token whose score's logit is above the head's threshold, while the head has taken fewer than
                 (tokens so far) // sparsity in its segment. A threshold is no trained weight: forward returns the
                 update that moves the share of tokens above it towards 1 / sparsity.

The causal rule is of this library: it is exact in any split, and bounds the tokens taken as the published one does,
so that a head costs (T / sparsity)^2 and keeps T / sparsity keys. The published option to force the first token is
not there: it may be taken by dense heads. Equations after a summary of the released code (piotrpiekos/MoSA), which
was not opened itself.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmix.core import packing, param
from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.ops.softmax import attention, attention_flops, merge
from seqmix.parts import budget, cached_attention, kv_cache
from seqmix.parts.chunks import token_places
from seqmix.parts.qkv import head_params, head_size, out_param, project
from seqmix.parts.rotary import rotate, rotated_dims

RULES = "causal", "published"


@dataclass(frozen=True, kw_only=True)
class MoSA(Mixer):
    """Heads that take tokens of their own, beside dense ones. Raises ValueError for fields that do not fit."""

    heads: int = 16  # H, heads that take tokens
    dense_heads: int = 4  # heads that take all, >= 0
    head_dim: int | None = None  # K; None: d_model / heads
    sparsity: int = 16  # of so many tokens a head takes one
    rule: str = "causal"  # how it takes them: causal or published, which sees the future
    threshold_rate: float = 0.01  # step of the thresholds for an excess of one, >= 0
    window: int | None = None  # tokens that dense heads see; None: all
    rope: bool = True  # rotate queries and keys by their positions
    rope_base: float = 10000.0  # > 1
    rope_fraction: float = 0.5  # of head_dim that is rotated, in (0, 1]
    block: int = 512  # queries and keys whose scores exist at once
    implementation: str | None = None  # of `attention`: None, chunked, reference

    linear_in_v: ClassVar[bool] = True
    implementations: ClassVar[tuple[str, ...]] = "cudnn", "tokamax", "splash", "gpu", "tpu", "chunked", "reference"

    def __post_init__(self):
        names = "heads", "sparsity", "block", "head_dim", "window"
        self.positive(**{name: x for name in names if (x := getattr(self, name)) is not None})
        wrong = None
        if not isinstance(self.dense_heads, int) or self.dense_heads < 0:
            wrong = f"dense_heads: expected an integer >= 0, got {self.dense_heads!r}"
        elif self.rule not in RULES:
            wrong = f"rule: expected one of {', '.join(RULES)}, got {self.rule!r}"
        elif not self.threshold_rate >= 0:
            wrong = f"threshold_rate: expected a number >= 0, got {self.threshold_rate}"
        elif not self.rope_base > 1:
            wrong = f"rope_base: expected a number above 1, got {self.rope_base}"
        elif (self.d_model or self.head_dim) and self.rope:
            try:
                rotated_dims(self._head_dim, self.rope_fraction)
            except ValueError as error:
                wrong = f"rope_{error}"
        if wrong:
            raise ValueError(f"MoSA.{wrong}")

    @property
    def causal(self) -> bool:
        return self.rule == "causal"

    packable = decodes = causal

    @property
    def selects_over_time(self) -> bool:
        return self.rule == "published"

    @property
    def _head_dim(self) -> int:
        return head_size(self, "head_dim")

    def params(self):
        self.positive(d_model=self.d_model)
        D, H, K = self.d_model, self.heads, self._head_dim
        tree = {**head_params(D, dict.fromkeys("qkv", (H, K))), "out": out_param(H, K, D)}
        tree["router"] = Param((D, H), ("embed", "heads"))
        if self.rule == "causal":
            tree["threshold"] = Param((H,), ("heads",), param.zeros, trainable=False, decay=False)
        if self.dense_heads:
            size = self.dense_heads, K
            tree["dense"] = {**head_params(D, dict.fromkeys("qkv", size)), "out": out_param(*size, D)}
        return tree

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y [B, T, D], the thresholds' update). `positions` [B, T] only rotate."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        y, _, update = self._run(params, x, None, segment_ids, positions)
        return y, update

    def _run(self, params, x, state, segment_ids, positions):
        runs, place, length = token_places(x, segment_ids, None if state is None else state["length"])
        logits = self._logits(params, x)
        taken = self._taken(params, logits, runs, place, None if state is None else state["count"])
        positions = place if positions is None else positions
        y, kept = self._sparse(params, x, logits, taken, runs, positions, state)
        if self.dense_heads:
            q, k, v = self._inputs(params["dense"], x, positions)
            cache = state and {"k": state["dense_k"], "v": state["dense_v"], "length": state["length"]}
            at = {"segment_ids": segment_ids, "runs": runs, "place": place, "cache": cache, "window": self.window}
            y += _way_out(params["dense"], cached_attention.attend(q, k, v, **at, **self._options))
            if state is not None:
                cache = kv_cache.append(cache, k, v, runs)
                kept |= {f"dense_{name}": cache[name] for name in "kv"}
        if state is not None:
            return y, kept | {"length": length}, {}
        return y, None, self._update(params, logits, runs)

    @property
    def _options(self) -> dict:
        return {"block": self.block, "implementation": self.implementation}

    def _logits(self, params, x):
        """[B, T, H] in promote(x.dtype, float32)."""
        acc = jnp.promote_types(x.dtype, jnp.float32)
        return jnp.einsum("btd,dh->bth", x, params["router"].astype(x.dtype), preferred_element_type=acc)

    def _inputs(self, params, x, positions):
        """q and k, rotated, and v, of tokens x [B, T, D] in all heads."""
        q, k, v = project(params, x, "qkv")
        return *(self._rotated(y, positions) for y in (q, k)), v

    def _rotated(self, y, positions):
        return rotate(y, positions, base=self.rope_base, fraction=self.rope_fraction) if self.rope else y

    def _candidates(self, params, logits, runs):
        return (logits > params["threshold"].astype(logits.dtype)) & (runs != 0)[..., None]

    def _taken(self, params, logits, runs, place, count):
        """Whether a head takes a token, [B, T, H] bool; `count` [B, H] were taken before in the first segment."""
        if self.rule == "published":
            k = min(max(2, logits.shape[1] // self.sparsity), logits.shape[1])
            best = jnp.moveaxis(jax.lax.top_k(jnp.moveaxis(logits, 1, 2), k)[1], 1, 2)
            batch, head = jnp.arange(logits.shape[0])[:, None, None], jnp.arange(self.heads)
            return jnp.zeros(logits.shape, bool).at[batch, best, head].set(True)
        limit = jnp.broadcast_to(((place + 1) // self.sparsity)[..., None], logits.shape)
        return budget.take(self._candidates(params, logits, runs), limit, runs, count)

    def _update(self, params, logits, runs) -> dict:
        """Thresholds that take nearer to one in `sparsity` of the tokens."""
        if self.rule == "published":
            return {}
        ready = self._candidates(params, logits, runs).astype(logits.dtype)
        share = jnp.sum(ready, axis=(0, 1)) / jnp.maximum(jnp.sum(runs != 0), 1)
        moved = params["threshold"] + self.threshold_rate * (share - 1 / self.sparsity)
        return {"update/threshold": moved.astype(params["threshold"].dtype)}

    def _sparse(self, params, x, logits, taken, runs, positions, state):
        """y [B, T, D] of the heads that take tokens, and what the state keeps of them."""
        (batch, time, _), heads = x.shape, self.heads
        room = time // self.sparsity
        if self.rule == "published":
            room = min(max(2, room), time)
        elif state is not None:
            room = min(time, room + state["k"].shape[1])
        index = jnp.argsort(~taken, axis=1, stable=True)[:, : max(1, room)]
        row, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)

        def fold(y):  # [B, n, H, ...] to [B H, n, ...]
            return jnp.moveaxis(y, 2, 1).reshape(batch * heads, y.shape[1], *y.shape[3:])

        tokens = jnp.asarray(x)[row, index]
        ids = jnp.where(taken[row, index, head], runs[row, index], 0)
        at = fold(jnp.asarray(positions)[row, index])
        q, k, v = (
            fold(jnp.einsum("bnhd,dhk->bnhk", tokens, params[name].astype(x.dtype)))[:, :, None] for name in "qkv"
        )
        q, k = (self._rotated(y, at) for y in (q, k))
        options = {"segment_ids": fold(ids), "return_lse": True, **self._options}
        parts, kept = [attention(q, k, v, **options)], {}
        if state is not None:
            cache = {name: fold(state[name])[:, :, None] for name in "kv"} | {"length": state["count"].reshape(-1)}
            there = (jnp.arange(cache["k"].shape[1]) < cache["length"][:, None]).astype(jnp.int32)
            old = (cache[name].astype(x.dtype) for name in "kv")
            parts.append(attention(q, *old, causal=False, kv_segment_ids=there, **options))
            new = kv_cache.append(cache, k, v, fold(ids))
            kept = {n: jnp.moveaxis(new[n].reshape(batch, heads, -1, self._head_dim), 1, 2) for n in "kv"}
            # A head that took nothing of the row's last segment has nothing of it.
            last = packing.last_run(runs)[:, None]
            none = (last > 1) & (jnp.max(ids, axis=1) != last)
            kept["count"] = jnp.where(none, 0, new["length"].reshape(batch, heads))
        mixed = jnp.moveaxis(merge(parts)[0].reshape(batch, heads, -1, self._head_dim), 1, 2)
        mixed *= jax.nn.sigmoid(logits[row, index, head])[..., None].astype(mixed.dtype)
        y = jnp.einsum("bnhk,hkd->bnhd", mixed, params["out"].astype(x.dtype))
        return jnp.zeros_like(x).at[row, index].add(y), kept

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """Keys and values of the tokens taken, how many each head has; those of the dense heads; the rows' lengths."""
        self._need_order()
        self.check_inputs(inputs)
        K = self._head_dim
        state = kv_cache.init(batch, self._slots(max_len), self.heads, K, K, dtype)
        if self.dense_heads:
            dense = kv_cache.init(batch, max_len, self.dense_heads, K, K, dtype, window=self.window)
            state |= {f"dense_{name}": dense[name] for name in "kv"}
        return state | {"count": jnp.zeros((batch, self.heads), jnp.int32)}

    def _need_order(self):
        if not self.decodes:
            raise ValueError(self.denial("decode by the published rule, which sees the future"))

    def _slots(self, max_len: int) -> int:
        return max(1, max_len // self.sparsity)

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self._need_order()
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, state, segment_ids, positions)[:2]

    def state_axes(self):
        self._need_order()
        cached = ("batch", None, "heads", "head_dim")
        names = ("k", "v", "dense_k", "dense_v") if self.dense_heads else ("k", "v")
        return dict.fromkeys(names, cached) | {"count": ("batch", "heads"), "length": ("batch",)}

    def state_size(self, context: int) -> int:
        self._need_order()
        dense = self.dense_heads * kv_cache.n_slots(context, self.window)
        return 2 * (self._slots(context) * self.heads + dense) * self._head_dim + self.heads + 1

    # The mixing matrix, over G = heads + dense_heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        trees = (params, params["dense"]) if self.dense_heads else (params,)
        return jnp.concatenate([project(tree, x, "v")[0] for tree in trees], axis=2), {}

    def merge(self, params, context, mixed):
        y = _way_out(params, mixed[:, :, : self.heads])
        return y + _way_out(params["dense"], mixed[:, :, self.heads :]) if self.dense_heads else y

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """r_i softmax over what the head has taken, 0 in other rows, [B, G, T, T] in promote(x.dtype, float32)."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        runs, place, _ = token_places(x, segment_ids)
        logits = self._logits(params, x)
        taken = jnp.moveaxis(self._taken(params, logits, runs, place, None), 2, 1)
        gate = jnp.moveaxis(jax.nn.sigmoid(logits), 2, 1)
        behind = place[:, :, None] - place[:, None]
        order = ((runs[:, :, None] == runs[:, None]) & (runs != 0)[:, None] & (behind >= 0))[:, None]
        near = True if self.window is None else (behind < self.window)[:, None]
        positions = place if positions is None else positions
        parts = [gate[..., None] * self._weights(params, x, positions, order & taken[..., None] & taken[:, :, None])]
        if self.dense_heads:
            parts.append(self._weights(params["dense"], x, positions, order & near))
        return jnp.concatenate(parts, axis=1)

    def _weights(self, params, x, positions, seen):
        """Softmax over what is seen, [B, H, T, T]."""
        q, k, _ = self._inputs(params, x, positions)
        acc = jnp.promote_types(x.dtype, jnp.float32)
        score = jnp.einsum("bihk,bjhk->bhij", q.astype(acc), k.astype(acc)) * self._head_dim**-0.5
        return jnp.where(seen, jax.nn.softmax(jnp.where(seen, score, jnp.finfo(acc).min)), 0)

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        """Projections and scores of as many tokens as a head may take, the router, and the dense heads."""
        D, H, K, n = self.d_model, self.heads, self._head_dim, max(1, seq // self.sparsity)
        if self.rule == "published":
            n = min(max(2, n), seq)
        shape = {"block": self.block}
        sparse = matmul(batch * n, D, 4 * H * K) + attention_flops(batch * H, n, 1, K, K, **shape)
        router = matmul(batch * seq, D, H) + batch * seq * H * 8
        dense = matmul(batch * seq, D, 4 * self.dense_heads * K)
        if self.dense_heads:
            dense += attention_flops(batch, seq, self.dense_heads, K, K, window=self.window, **shape)
        return sparse + router + dense + batch * n * H * (K + D)


def _way_out(params, mixed):
    return jnp.einsum("bthk,hkd->btd", mixed, params["out"].astype(mixed.dtype))
