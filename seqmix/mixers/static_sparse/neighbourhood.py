"""Neighbourhood attention on sequences, images and video (arXiv 2504.16922, 2204.07143, 2403.04690, 2209.15001).

    q, k, v = x W_q, x W_k, x W_v [B, T, H, K],   y = softmax(q k^T / sqrt(K) + visible) v W_out

Tokens are those of a grid in row-major order, and each sees a window of keys about it on every axis: shifted
inwards at the borders, with a stride in common with its neighbours, dilated, or causal along an axis
(`ops.masks.Neighbourhood` has the rule). stride 1 is neighbourhood attention (2204.07143), dilation its dilated
form (2209.15001), stride = window is blocked attention, and window = length is dense.

Inside, tokens are put in the order of boxes (`ops.masks.Boxed`), so that the tiles of the op are boxes of the
grid and few of them are visited; `speed_up` says how few. The papers' relative position bias, and extra keys that all
tokens see, are left out; positions are up to the model around it. The rule is that of the reference mask of the
released code (SHI-Labs/NATTEN, read, not run). No decoding: a grid is whole.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import jax.numpy as jnp

from seqmix.core.mixer import Mixer
from seqmix.core.shapes import described
from seqmix.ops import masks
from seqmix.ops.block_sparse import block_sparse_attention, block_sparse_flops
from seqmix.ops.dispatch import NAMES
from seqmix.ops.mask_grid import from_boxes, speed_up, to_boxes
from seqmix.parts.qkv import head_params, head_size, out_param, project

BOXES = {1: (128,), 2: (8, 8), 3: (4, 4, 4)}


@dataclass(frozen=True, kw_only=True)
class Neighbourhood(Mixer):
    """Generalised neighbourhood attention. Raises ValueError for fields that do not fit each other."""

    heads: int = 8  # H
    head_dim: int | None = None  # K; None: d_model / heads
    window: tuple[int, ...] = (13, 13)  # keys on each axis, 1 to 3 of them
    stride: tuple[int, ...] | None = None  # queries that share a window, 1 to window; None: 1
    dilation: tuple[int, ...] | None = None  # distance of neighbours; None: 1
    causal_axes: tuple[bool, ...] | None = None  # axes on which a query sees nothing after itself; None: none
    box: tuple[int, ...] | None = None  # of tokens in a tile; None: 64 in all, on a line 128
    implementation: str | None = None  # of block_sparse_attention; None: the best there is

    packable: ClassVar[bool] = False
    decodes: ClassVar[bool] = False
    linear_in_v: ClassVar[bool] = True
    context_form: ClassVar[str] = "gather"
    implementations: ClassVar[tuple[str, ...]] = NAMES["block_sparse_attention"]

    @property
    def takes(self) -> tuple[str, ...]:
        """The grid; a sequence has none."""
        return ("grid",) if len(self.window) > 1 else ()

    @property
    def causal(self) -> bool:
        """On every axis, and so in row-major order too."""
        return self.causal_axes is not None and all(self.causal_axes)

    def __post_init__(self):
        self.positive(heads=self.heads)
        if self.head_dim is not None:
            self.positive(head_dim=self.head_dim)
        window = self.window
        if not isinstance(window, tuple) or not 1 <= len(window) <= 3:
            raise ValueError(f"Neighbourhood.window: expected a tuple of 1 to 3 lengths, one an axis, got {window!r}")
        for name in ("stride", "dilation", "causal_axes", "box"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, tuple) or len(value) != len(window)):
                raise ValueError(f"Neighbourhood.{name}: expected a value for each axis of {window}, got {value!r}")
        try:
            dilation = self.dilation or (1,) * len(window)
            masks.Boxed(self.mask(tuple(max(1, w * r) for w, r in zip(window, dilation, strict=True))), self._box)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Neighbourhood.{error}") from None

    @property
    def _head_dim(self) -> int:
        return head_size(self, "head_dim")

    @property
    def _box(self) -> tuple[int, ...]:
        return BOXES[len(self.window)] if self.box is None else self.box

    def params(self):
        self.positive(d_model=self.d_model)
        size = self.heads, self._head_dim
        return {**head_params(self.d_model, dict.fromkeys("qkv", size)), "out": out_param(*size, self.d_model)}

    def mask(self, grid: tuple[int, ...]) -> masks.Neighbourhood:
        """Who sees whom on a grid, in row-major order."""
        if not isinstance(grid, tuple | list) or len(grid) != len(self.window):
            raise ValueError(f"grid: expected {len(self.window)} lengths, as many as of window, got {described(grid)}")
        causal = False if self.causal_axes is None else self.causal_axes
        return masks.Neighbourhood(tuple(grid), self.window, self.stride or 1, self.dilation or 1, causal)

    def boxed(self, grid: tuple[int, ...]) -> masks.Boxed:
        """The mask in the order of boxes, which are not larger than the grid."""
        return masks.Boxed(self.mask(grid), tuple(map(min, self._box, grid)))

    def speed_up(self, grid: tuple[int, ...]) -> float:
        """Tiles of dense attention for each tile that is visited: a bound on what the pattern can gain."""
        mask = self.boxed(grid)
        return speed_up(mask, (prod(mask.box),) * 2, mask.length)

    def _grid(self, time, inputs):
        grid = inputs["grid"] if self.takes else (time,)
        if prod(self.mask(grid).grid) != time:
            raise ValueError(f"grid: expected {len(self.window)} lengths whose product is T={time}, got {grid}")
        return tuple(grid)

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y [B, T, D], {}) of row-major tokens of `grid`, a tuple of 2 or 3 lengths, or of a sequence."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs, need=self.takes)
        grid = self._grid(x.shape[1], inputs)
        mask = self.boxed(grid)
        q, k, v = (to_boxes(y, grid, mask.box) for y in project(params, x, "qkv"))
        sizes = (prod(mask.box),) * 2
        mixed = block_sparse_attention(q, k, v, mask=mask, sizes=sizes, implementation=self.implementation)
        return self.merge(params, {}, from_boxes(mixed, grid, mask.box)), {}

    # The mixing matrix, over G = heads groups

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        return project(params, x, "v")[0], {}

    def merge(self, params, context, mixed):
        return jnp.einsum("bthk,hkd->btd", mixed, params["out"].astype(mixed.dtype))

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """softmax over visible j of q_i . k_j / sqrt(K), [B, H, T, T] in promote(x.dtype, float32)."""
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs, need=self.takes)
        q, k = project(params, x, "qk")
        acc = jnp.promote_types(x.dtype, jnp.float32)
        score = jnp.einsum("bihk,bjhk->bhij", q.astype(acc), k.astype(acc)) / self._head_dim**0.5
        seen = self.mask(self._grid(x.shape[1], inputs)).dense(x.shape[1])  # each row sees itself
        weight = jnp.exp(score - jnp.max(jnp.where(seen, score, -jnp.inf), axis=-1, keepdims=True))
        weight = jnp.where(seen, weight, 0)
        return weight / jnp.sum(weight, axis=-1, keepdims=True)

    def flops(self, batch, seq):
        """Projections, and the scores of the tiles of a sequence; of a grid those of the visible keys alone."""
        h, k = self.heads, self._head_dim
        projections = 8 * batch * seq * self.d_model * h * k
        if len(self.window) > 1:
            return projections + batch * seq * h * min(prod(self.window), seq) * (4 * k + 7)
        mask = self.boxed((seq,))
        return projections + block_sparse_flops(batch, mask.length, h, k, k, mask=mask, sizes=mask.box * 2)
