"""Native Sparse Attention: Hardware-Aligned and Natively Trainable Sparse Attention (arXiv 2502.11089).

    q = x W_q [B, T, H, K];  k, v = x W_k, x W_v [B, T, Hk, K] for each branch  (q and k rotated)
    compressed  kc_c, vc_c = pool(k), pool(v) over the positions from c stride to c stride + compress - 1
                yc_t = softmax over {c that have ended by t} of q_t . kc_c / sqrt(K), applied to vc
    selected    pc_tc    = those weights, summed over the H / Hk query heads of a key head
                score_tb = sum_c pc_tc (strides that compressed block c and block b share),  b of `size` tokens
                ys_t = softmax over the `count` blocks with the best scores, j <= t; among them, always,
                       the `first` first ones and the `local` last ones, with that of t
    window      yw_t = softmax over the last `window` tokens
    y   = W_out sum over branches of sigmoid(x W_gate) y_branch           a gate for each token, head and branch

pool = "mlp": W2 gelu(W1 (block + position)), weights for keys and for values, shared by the heads, hidden width K;
"mean": the mean, which has none. The paper says "a learnable MLP with intra-block position encoding" and no more;
keys are pooled after their rotation. It gives each branch keys and values of its own; branch_kv=False shares them, as
the public kernels do. The scores get no gradient of their own: pc does, through yc. Blocks are counted from the start
of a segment. The index of the paper's equation 9 is read as what it describes, the blocks that overlap. Decoding
keeps the tokens of the selected branch, the last ones of the two others, and compressed blocks; a step reads count
blocks of tokens.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from seqmix.core import packing, param
from seqmix.core.flops import matmul
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.ops.softmax import attention, attention_flops
from seqmix.ops.summed_weights import block_weights, unsupported
from seqmix.parts import cached_attention, chosen_blocks, kv_cache
from seqmix.parts.chunks import token_places
from seqmix.parts.qkv import head_params, head_size, out_param, project
from seqmix.parts.rotary import rotate

BRANCHES, POOLS = ("compressed", "selected", "window"), ("mlp", "mean")
SCORES = 2**26  # of compressed blocks, for the selection, that exist at once in a row


class Pools(NamedTuple):
    """Compressed blocks."""

    k: jax.Array  # [B, n, Hk, K]
    v: jax.Array  # [B, n, Hk, K]
    runs: jax.Array  # [B, n] the segment of each, 0 where there is none
    number: jax.Array  # [B, n] of a block in its segment


@dataclass(frozen=True, kw_only=True)
class NativeSparseAttention(Mixer):
    """Three branches of attention, gated. Raises ValueError for fields that do not fit."""

    heads: int = 64  # H, query heads
    kv_heads: int | None = 4  # Hk, key and value heads, a divisor of heads, which share what is selected; None: heads
    head_dim: int | None = None  # K, even where rotated; None: d_model / heads
    size: int = 64  # tokens of a selected block, a multiple of stride
    count: int = 16  # selected blocks of a query, those that are always there among them
    first: int = 1  # blocks at the start of a segment that are always selected, >= 0
    local: int = 2  # the last blocks, with the query's own, that are always selected, >= 1
    compress: int = 32  # tokens of a compressed block, a multiple of stride from 2 on
    stride: int = 16  # tokens from one compressed block to the next
    pool: str = "mlp"  # of a block's keys and values: mlp or mean
    window: int = 512  # tokens that the window branch sees
    branch_kv: bool = True  # keys and values of its own for each branch
    rope: bool = True  # rotate queries and keys by their positions
    rope_base: float = 10000.0  # > 1
    block: int = 512  # queries and keys whose scores exist at once
    implementation: str | None = None  # of the ops: None, gpu, chunked, reference
    implementations: ClassVar[tuple[str, ...]] = "gpu", "tpu", "chunked", "reference"

    def __post_init__(self):
        names = "heads", "size", "count", "local", "compress", "stride", "window", "block", "kv_heads", "head_dim"
        self.positive(**{name: x for name in names if (x := getattr(self, name)) is not None})
        wrong = None
        if self.heads % self._kv_heads:
            wrong = f"kv_heads: expected a divisor of heads={self.heads}, got {self.kv_heads}"
        elif not isinstance(self.first, int) or self.first < 0:
            wrong = f"first: expected an integer >= 0, got {self.first!r}"
        elif self.size % self.stride:
            wrong = f"size: expected a multiple of stride={self.stride}, got {self.size}"
        elif self.compress % self.stride or self.compress < 2:
            wrong = f"compress: expected a multiple of stride={self.stride}, >= 2, got {self.compress}"
        elif self.count < self.first + self.local:
            wrong = f"count: expected at least first + local = {self.first + self.local}, got {self.count}"
        elif self.pool not in POOLS:
            wrong = f"pool: expected one of {', '.join(POOLS)}, got {self.pool!r}"
        elif not self.rope_base > 1:
            wrong = f"rope_base: expected a number above 1, got {self.rope_base}"
        elif (self.d_model or self.head_dim) and self.rope and self._head_dim % 2:
            wrong = f"head_dim: expected an even number with rope, got {self._head_dim}"
        if wrong:
            raise ValueError(f"NativeSparseAttention.{wrong}")

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
        branches = BRANCHES if self.branch_kv else ("shared",)
        tree = head_params(D, {"q": (H, K)}) | {name: dict.fromkeys(branches, keys) for name in "kv"}
        if self.pool == "mlp":
            pool = {
                "position": Param((self.compress, K), (None, "head_dim"), param.normal(0.02), decay=False),
                "in": Param((self.compress, K, K), (None, "head_dim", None), fan_in=self.compress * K),
                "out": Param((K, K), (None, "head_dim")),
            }
            tree["pool"] = {"k": pool, "v": pool}
        return tree | {"gate": Param((D, H, 3), ("embed", "heads", None)), "out": out_param(H, K, D)}

    # Training and scoring

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y [B, T, D], {}). `positions` [B, T] only rotate; blocks and the window are counted in tokens."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, None, segment_ids, positions)[0], {}

    def _run(self, params, x, state, segment_ids, positions):
        length = None if state is None else state["length"]
        runs, place, _ = token_places(x, segment_ids, length)
        q, keys = self._inputs(params, x, place if positions is None else positions)
        caches = None if state is None else {name: state[name] | {"length": length} for name in BRANCHES}
        mixed, kept = self.branches(params, q, keys, runs, place, segment_ids, caches)
        gate = jax.nn.sigmoid(jnp.einsum("btd,dhn->btnh", x, params["gate"].astype(x.dtype)))[..., None]
        mixed = sum(gate[:, :, n] * y for n, y in enumerate(mixed))
        y = jnp.einsum("bthk,hkd->btd", mixed, params["out"].astype(x.dtype))
        if state is None:
            return y, None
        new = {}
        for name, cache in caches.items():
            plain = {key: cache[key] for key in ("k", "v", "length")}
            new[name] = kv_cache.append(plain, *keys[name], runs)
            length = new[name].pop("length")
        new["compressed"] |= kept
        return y, new | {"length": length}

    def branches(self, params, q, keys, runs, place, segment_ids=None, caches=None):
        """(mixed values of each of BRANCHES [B, T, H, K], what the state keeps of compressed blocks).

        q [B, T, H, K] and keys {branch: (k, v)} [B, T, Hk, K] are rotated, runs and place those of
        `parts.chunks.token_places`, caches those of a state, by branch. Of the weights, the pools' alone are read.
        """
        caches, ids = caches or dict.fromkeys(BRANCHES), segment_ids
        pools, kept = self._pools(params, *keys["compressed"], runs, place, caches["compressed"], ids)
        ended = dict(segment_ids=runs, kv_segment_ids=pools.runs, q_positions=place, kv_positions=self._end(pools))
        if caches["compressed"] is ids is None and (self.implementation == "gpu" or self._by_kernel(q, pools.k)):
            ended = {"mask": chosen_blocks.Ended(self.compress, self.stride)}
        compressed, lse = attention(q, pools.k, pools.v, return_lse=True, **ended, **self._options)
        cache = caches["selected"]
        tokens = chosen_blocks.after(cache, self.size - 1, *keys["selected"], runs, place, ids)
        blocks = chosen_blocks.whole(tokens, self.size, self.size)
        index = self._select(q, lse, pools, blocks, runs, place, cache)
        selected = chosen_blocks.attend(q, tokens, blocks, index, self.size, cache, **self._options)
        at = {"segment_ids": ids, "runs": runs, "place": place, "cache": caches["window"]}
        window = cached_attention.attend(q, *keys["window"], window=self.window, **at, **self._options)
        return (compressed, selected, window), kept

    def _by_kernel(self, q, key) -> bool:  # whether the weights of the compressed blocks come from a kernel
        return self.implementation in (None, "gpu") and unsupported(q, key, self._head_dim**-0.5) is None

    @property
    def _options(self) -> dict:
        return {"block": self.block, "implementation": self.implementation}

    def _inputs(self, params, x, positions):
        """Rotated q, and {branch: (rotated k, v)}."""
        (q,) = project(params, x, "q")
        turn = (lambda y: rotate(y, positions, base=self.rope_base)) if self.rope else (lambda y: y)
        k, v = ({name: project(params[n], x, (name,))[0] for name in params[n]} for n in "kv")
        k = {name: turn(y) for name, y in k.items()}
        return turn(q), {name: (k.get(name, k.get("shared")), v.get(name, v.get("shared"))) for name in BRANCHES}

    def _pooled(self, params, name, blocks):
        """One key or value for each block [B, n, compress, Hk, K]."""
        if self.pool == "mean":
            acc = jnp.promote_types(blocks.dtype, jnp.float32)
            return jnp.mean(blocks.astype(acc), axis=2).astype(blocks.dtype)
        w = jax.tree.map(lambda y: y.astype(blocks.dtype), params["pool"][name])
        hidden = jnp.einsum("bnljk,lkf->bnjf", blocks + w["position"][:, None], w["in"])
        return jnp.einsum("bnjf,fk->bnjk", jax.nn.gelu(hidden), w["out"])

    def _pools(self, params, k, v, runs, place, cache, segment_ids):
        """Compressed blocks, those of the state and then the new ones, as `Pools`; and what the state keeps of them."""
        tokens = chosen_blocks.after(cache, self.compress - 1, k, v, runs, place, segment_ids)
        blocks = chosen_blocks.whole(tokens, self.compress, self.stride)
        new = {name: self._pooled(params, name, y) for name, y in (("k", blocks.k), ("v", blocks.v))}
        if cache is None:
            return Pools(**new, runs=blocks.runs, number=blocks.number), {}
        old = {name: cache[f"pooled_{name}"] for name in new}
        held = chosen_blocks.held_blocks(cache["length"], old["k"].shape[1], self.compress, self.stride)
        pools = {name: jnp.concatenate([old[name].astype(y.dtype), y], axis=1) for name, y in new.items()}
        places = (jnp.concatenate(pair, axis=1) for pair in zip(held, blocks[2:], strict=True))
        last = packing.last_run(runs)
        kept = {f"pooled_{name}": chosen_blocks.keep_blocks(old[name], y, blocks, last) for name, y in new.items()}
        return Pools(**pools, **dict(zip(("runs", "number"), places, strict=True))), kept

    def _end(self, pools):
        """The last position of each compressed block: who stands there or later sees it."""
        return pools.number * self.stride + self.compress - 1

    def _select(self, q, lse, pools, blocks, runs, place, cache):
        """The blocks that each token and key head selects beside its own [B, Hk, T, c], as `attend` counts them."""
        q, key, lse = (jax.lax.stop_gradient(y) for y in (q, pools.k, lse))
        block_runs, number = blocks.runs, blocks.number
        if cache is not None:
            held = chosen_blocks.held_blocks(cache["length"], cache["k"].shape[1] // self.size, self.size, self.size)
            block_runs, number = (jnp.concatenate(pair, axis=1) for pair in zip(held, blocks[2:], strict=True))
        low, each = number[:, None] * (self.size // self.stride), pools.number[..., None]
        shared = jnp.minimum(each + self.compress // self.stride, low + self.size // self.stride)
        shared = jnp.maximum(shared - jnp.maximum(each, low), 0)  # strides, [B, compressed blocks, blocks]

        def weights(q, lse, runs, place, **options):
            seen = (runs[:, :, None] == pools.runs[:, None]) & (self._end(pools)[:, None] <= place[:, :, None])
            return block_weights(q, key, lse, seen & (runs != 0)[..., None], scale=scale, **options)

        def chosen(weight, runs, place):
            score = jnp.einsum("btjn,bnm->bjtm", weight, shared.astype(weight.dtype))
            forced = number[:, None] > place[..., None] // self.size - self.local
            forced |= number[:, None] < self.first
            seen = chosen_blocks.past(runs, place, block_runs, number, self.size)
            return chosen_blocks.choose(score, seen, self.count - 1, forced)

        def whole(q, lse, runs, place):
            weight = weights(q, jnp.swapaxes(lse, 1, 2), runs, place, implementation="chunked")
            return chosen(jnp.swapaxes(weight, 1, 2), runs, place)

        scale, rows = self._head_dim**-0.5, SCORES // key.shape[1]
        if not self._by_kernel(q, key):
            lse, most = jnp.swapaxes(lse, 1, 2), max(1, rows // q.shape[2])
            return chosen_blocks.by_stretches(whole, most, q, lse, runs, place)
        same = cache is None and self.compress == self.stride == self.size  # the weights are the scores
        weight = weights(q, lse, runs, place, by_keys=same, implementation="gpu")
        if cache is not None:
            weight, most = jnp.swapaxes(weight, 1, 2), max(1, rows // weight.shape[1])
            return chosen_blocks.by_stretches(chosen, most, weight, runs, place)
        score = weight if same else jnp.einsum("bjtn,bnm->bjmt", weight, shared.astype(weight.dtype))
        return chosen_blocks.choose_in_ranges(score, runs, place, self.size, self.count - 1, self.first, self.local)

    # Decoding

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        """For max_len tokens a row: keys and values of each branch, the compressed blocks, the rows' lengths."""
        self.check_inputs(inputs)
        J, K = self._kv_heads, self._head_dim
        state = {}
        for name, slots in self._slots(max_len).items():
            cache = kv_cache.init(batch, slots, J, K, K, dtype)
            if name == "pooled":
                state["compressed"] |= {"pooled_k": cache["k"], "pooled_v": cache["v"]}
            else:
                state[name] = {"k": cache["k"], "v": cache["v"]}
        return state | {"length": cache["length"]}

    def _slots(self, max_len: int) -> dict:
        """Tokens that the state of each branch has room for, and compressed blocks."""
        whole = -(-max_len // self.size) * self.size
        pooled = max(1, (max_len - self.compress) // self.stride + 1)
        window = kv_cache.n_slots(max_len, self.window)
        return {"compressed": self.compress - 1, "selected": whole, "window": window, "pooled": pooled}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return self._run(params, x, state, segment_ids, positions)

    def state_axes(self):
        cached = ("batch", None, "kv_heads", "head_dim")
        axes = {name: {"k": cached, "v": cached} for name in BRANCHES}
        axes["compressed"] |= {"pooled_k": cached, "pooled_v": cached}
        return axes | {"length": ("batch",)}

    def state_size(self, context: int) -> int:
        return 2 * sum(self._slots(context).values()) * self._kv_heads * self._head_dim + 1

    # Costs

    def flops(self, batch: int, seq: int) -> float:
        """Projections, the pools, and the scores of each branch; those of selection as if all blocks were seen."""
        D, H, J, K, tokens = self.d_model, self.heads, self._kv_heads, self._head_dim, batch * seq
        sets = 3 if self.branch_kv else 1
        projections = (
            matmul(tokens, D, (2 * H + 2 * sets * J) * K + 3 * H) + 3 * self.rope * tokens * (H + sets * J) * K
        )
        pools, n = max(1, seq // self.stride), max(1, seq // self.size)
        pooling = 2 * batch * pools * J * (self.compress * K)
        if self.pool == "mlp":
            pooling = 2 * (matmul(batch * pools * J, self.compress * K, K) + matmul(batch * pools * J, K, K))
        compressed = tokens * pools * (H * (4 * K + 7) + H * (2 * K + 5) + 2 * n * J)
        own = attention_flops(batch, min(seq, self.size), H, K, K, block=self.block) * -(-seq // self.size)
        selected = own + tokens * H * min(self.count - 1, n) * self.size * (4 * K + 7)
        window = attention_flops(batch, seq, H, K, K, window=self.window, block=self.block)
        return projections + pooling + compressed + selected + window + 5 * tokens * H * K
