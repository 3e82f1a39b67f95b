"""Mixers for testing what is around mixers, small and obviously right; they run through conformance as well."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmix.core import packing, param
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.core.shapes import dims
from seqmix.core.sharding import constrain


@dataclass(frozen=True, kw_only=True)
class Leaky(Mixer):
    """S_t = exp(-exp(rate)) S_{t-1} + v_t,  y_t = out(S_t + noise):  the least mixer with all traits.

    Its weights are nested, and one of them, a running mean of x, is written by "update/mean".
    """

    heads: int = 2  # divides d_model
    noise: float = 0.0  # standard deviation of what is added to the states in training
    block: int = 0  # the state starts anew at every multiple of it; 0: never

    linear_in_v: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    def __post_init__(self):
        self.positive(heads=self.heads)

    @property
    def align(self):
        return self.block or 1

    def params(self):
        width, heads = self.d_model, self.heads
        head_dim = width // heads
        return {
            "in": {
                "value": Param((width, heads, head_dim), ("embed", "heads", "head_dim")),
                "rate": Param((heads,), ("heads",), param.constant(-1.0), decay=False),
            },
            "out": Param((heads, head_dim, width), ("heads", "head_dim", "embed"), fan_in=width),
            "mean": Param((width,), ("embed",), param.zeros, trainable=False, decay=False),
        }

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        state = self.init_state(params, x.shape[0], x.shape[1], x.dtype)
        states, _ = self._scan(params, x, state["s"], segment_ids)
        if rng is not None and self.noise:
            states = states + self.noise * jax.random.normal(rng, states.shape, states.dtype)
        y = self.merge(params, {"real": _real(x, segment_ids)}, states)
        mean = 0.9 * params["mean"] + 0.1 * jnp.mean(x, axis=(0, 1)).astype(params["mean"].dtype)
        return y, {"loss/size": 1e-3 * jnp.mean(jnp.square(states)), "update/mean": mean}

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        self.check_inputs(inputs)
        acc = jnp.promote_types(dtype, jnp.float32)
        return {"s": jnp.zeros((batch, self.heads, self.d_model // self.heads), acc)}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        states, last = self._scan(params, x, state["s"], segment_ids)
        return self.merge(params, {"real": _real(x, segment_ids)}, states), {"s": last}

    def state_axes(self):
        return {"s": ("batch", "heads", "head_dim")}

    def state_size(self, context):
        return self.d_model

    def flops(self, batch, seq):
        return 4 * batch * seq * self.d_model**2

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        values = jnp.einsum("btd,dhk->bthk", x, params["in"]["value"].astype(x.dtype))
        return constrain(values, "batch", "time", "heads", None), {"real": _real(x, segment_ids)}

    def merge(self, params, context, mixed):
        y = jnp.einsum("bthk,hkd->btd", mixed, params["out"].astype(mixed.dtype))
        return (y * context["real"][..., None]).astype(context["real"].dtype)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        run = packing.runs(ids)
        age = jnp.cumsum(run != 0, axis=1)
        seen = (run[:, :, None] == run[:, None, :]) & (run != 0)[:, None, :]
        seen &= jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
        if self.block:
            block = jnp.arange(x.shape[1]) // self.block
            seen &= block[:, None] == block
        rate = -jnp.exp(params["in"]["rate"])[None, :, None, None]
        gap = jnp.where(seen, age[:, :, None] - age[:, None, :], 0)[:, None]
        return jnp.where(seen[:, None], jnp.exp(rate * gap), 0)

    def _scan(self, params, x, start, segment_ids):
        values, _ = self.project(params, x, segment_ids=segment_ids)
        run = packing.runs(jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids)
        real, fresh = (run != 0)[..., None, None], packing.starts(run)[..., None, None]
        if self.block:
            fresh |= real & (jnp.arange(x.shape[1]) % self.block == 0)[:, None, None]
        keep = jnp.exp(-jnp.exp(params["in"]["rate"].astype(start.dtype)))[:, None]
        keep = jnp.where(fresh, 0.0, jnp.where(real, keep, 1.0))
        write = jnp.where(real, values.astype(start.dtype), 0.0)

        def body(s, xs):
            s = xs[0] * s + xs[1]
            return s, s

        last, states = jax.lax.scan(body, start, (jnp.moveaxis(keep, 1, 0), jnp.moveaxis(write, 1, 0)))
        return jnp.moveaxis(states, 0, 1), last


def _real(x, segment_ids):
    if segment_ids is None:
        return jnp.ones(x.shape[:2], x.dtype)
    return (segment_ids != 0).astype(x.dtype)


@dataclass(frozen=True, kw_only=True)
class Cross(Mixer):
    """y_t = out sum_s softmax_s(q_t . k_s) v_s over a memory: tokens see the memory with their segment's id.

    No ids mean 1 everywhere, on either side. A token without any memory gets 0.
    """

    takes: ClassVar[tuple[str, ...]] = ("memory", "memory_segment_ids")
    linear_in_v: ClassVar[bool] = True

    def params(self):
        square = lambda: Param((self.d_model,) * 2, ("embed", "head_dim"))
        return {"q": square(), "k": square(), "v": square(), "out": square()}

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs, need=("memory",))
        state = self.init_state(params, x.shape[0], x.shape[1], x.dtype, **inputs)
        return self.prefill(params, x, state, segment_ids=segment_ids)[0], {}

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        self.check_inputs(inputs, need=("memory",))
        memory, ids = inputs["memory"], inputs.get("memory_segment_ids")
        dims({"memory": f"{batch} S {self.d_model}", "memory_segment_ids": f"{batch} S"}, **inputs)
        keys = {name: (memory @ params[name].astype(memory.dtype)).astype(dtype) for name in ("k", "v")}
        ids = jnp.ones(memory.shape[:2], jnp.int32) if ids is None else ids
        return keys | {"ids": ids, "current": jnp.ones(batch, jnp.int32)}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs)
        ids = self._ids(x, state, segment_ids)
        mixed = jnp.einsum("bts,bsv->btv", self._weights(params, x, state, ids), state["v"].astype(x.dtype))
        index = jnp.argmax(jnp.where(ids != 0, jnp.arange(x.shape[1]), -1), axis=1)[:, None]
        last = jnp.take_along_axis(ids, index, axis=1)[:, 0]
        current = jnp.where(last != 0, last, state["current"])
        return self.merge(params, {}, mixed[:, :, None]), state | {"current": current}

    def state_axes(self):
        kept = ("batch", None, "head_dim")
        return {"k": kept, "v": kept, "ids": ("batch", None), "current": ("batch",)}

    def state_size(self, context, memory):
        return memory * (2 * self.d_model + 1) + 1

    def flops(self, batch, seq, memory):
        return 4 * batch * self.d_model * (seq * self.d_model + memory * self.d_model + seq * memory)

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        return self.init_state(params, x.shape[0], x.shape[1], x.dtype, **inputs)["v"][:, :, None], {}

    def merge(self, params, context, mixed):
        return mixed[:, :, 0] @ params["out"].astype(mixed.dtype)

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        state = self.init_state(params, x.shape[0], x.shape[1], x.dtype, **inputs)
        return self._weights(params, x, state, self._ids(x, state, segment_ids))[:, None]

    def _ids(self, x, state, segment_ids):
        if segment_ids is None:
            return jnp.broadcast_to(state["current"][:, None], x.shape[:2])
        return segment_ids

    def _weights(self, params, x, state, ids):
        seen = (ids[:, :, None] == state["ids"][:, None]) & (ids != 0)[:, :, None]
        q = x @ params["q"].astype(x.dtype) * self.d_model**-0.5
        scores = jnp.einsum("btk,bsk->bts", q, state["k"].astype(x.dtype))
        return jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1), 0)


@dataclass(frozen=True, kw_only=True)
class Grid(Mixer):
    """Each token of a (H, W) grid is mixed with its neighbours above and below, left and right: no order."""

    takes: ClassVar[tuple[str, ...]] = ("grid",)
    causal: ClassVar[bool] = False
    packable: ClassVar[bool] = False
    decodes: ClassVar[bool] = False

    def params(self):
        out = Param((self.d_model,) * 2, ("embed", "mlp"))
        return {"taps": Param((5, self.d_model), (None, "embed")), "out": out}

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, positions=positions, inputs=inputs, need=("grid",))
        grid = inputs["grid"]
        if grid[0] * grid[1] != x.shape[1]:
            raise ValueError(f"grid: expected a product of T={x.shape[1]}, got {grid}")
        image = x.reshape(x.shape[0], *grid, x.shape[-1])
        padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
        around = [
            padded[:, 1 + i : 1 + i + grid[0], 1 + j : 1 + j + grid[1]]
            for i, j in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
        ]
        mixed = sum(tap * near for tap, near in zip(params["taps"].astype(x.dtype), around, strict=True))
        return mixed.reshape(x.shape) @ params["out"].astype(x.dtype), {}

    def flops(self, batch, seq):
        return 2 * batch * seq * self.d_model**2 + 9 * batch * seq * self.d_model
