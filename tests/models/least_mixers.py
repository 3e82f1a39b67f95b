"""The least mixers with each trait, for tests of stacks."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmix.core.mixer import Mixer
from seqmix.core.param import Param


@dataclass(frozen=True, kw_only=True)
class Decay(Mixer):
    """S_t = a S_{t-1} + x_t W, y = S W_out: the least mixer that decodes and packs."""

    rate: float = 0.7
    takes: ClassVar[tuple[str, ...]] = ()
    causal: ClassVar[bool] = True
    packable: ClassVar[bool] = True
    decodes: ClassVar[bool] = True

    def params(self):
        square = (self.d_model, self.d_model)
        return {"in": Param(square, ("embed", "mlp")), "out": Param(square, ("mlp", "embed"))}

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None):
        state = {"s": jnp.zeros((x.shape[0], self.d_model), jnp.float32)}
        y, _ = Decay.prefill(self, params, x, state, segment_ids=segment_ids)
        size = jnp.mean(jnp.square(y.astype(jnp.float32)))
        return y, {"loss/size": 0.01 * size, "size": size, "update/mean": jnp.mean(x, (0, 1))}

    def init_state(self, params, batch, max_len, dtype):
        return {"s": jnp.zeros((batch, self.d_model), jnp.float32)}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None):
        u = (x @ params["in"].astype(x.dtype)).astype(jnp.float32)
        ids = jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids
        keep = jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)

        def advance(s, xs):
            s = self.rate * s * xs[1][:, None] + xs[0]
            return s, s

        s, ys = jax.lax.scan(advance, state["s"], (jnp.moveaxis(u, 1, 0), keep.T))
        return jnp.moveaxis(ys, 0, 1).astype(x.dtype) @ params["out"].astype(x.dtype), {"s": s}

    def step(self, params, x, state):
        return self.prefill(params, x, state)

    def flops(self, batch, seq):
        return 4 * batch * seq * self.d_model**2


@dataclass(frozen=True, kw_only=True)
class Writer(Decay):
    """Writes its input for later layers to read."""

    takes: ClassVar[tuple[str, ...]] = ("shared",)

    def forward(self, params, x, *, shared, **kwargs):
        y, aux = super().forward(params, x, **kwargs)
        return y, aux | {"shared": {"x": x}}

    def prefill(self, params, x, state, *, shared, **kwargs):
        y, state = super().prefill(params, x, state, **kwargs)
        return y, state | {"shared": {"x": x}}

    def step(self, params, x, state, *, shared):
        return self.prefill(params, x, state, shared=shared)


@dataclass(frozen=True, kw_only=True)
class Reader(Decay):
    """Adds what the last writer wrote."""

    takes: ClassVar[tuple[str, ...]] = ("shared",)

    def forward(self, params, x, *, shared, **kwargs):
        y, aux = super().forward(params, x, **kwargs)
        return y + shared["x"], aux

    def prefill(self, params, x, state, *, shared, **kwargs):
        y, state = super().prefill(params, x, state, **kwargs)
        return y + shared["x"], state

    def step(self, params, x, state, *, shared):
        return self.prefill(params, x, state, shared=shared)


@dataclass(frozen=True, kw_only=True)
class Noisy(Decay):
    """Adds noise of its own."""

    def forward(self, params, x, *, rng=None, **kwargs):
        y, aux = super().forward(params, x, **kwargs)
        return y + (0 if rng is None else 0.1 * jax.random.normal(rng, y.shape, y.dtype)), aux


@dataclass(frozen=True, kw_only=True)
class TwoSided(Decay):
    causal: ClassVar[bool] = False


@dataclass(frozen=True, kw_only=True)
class Chooser(Decay):
    selects_over_time: ClassVar[bool] = True
