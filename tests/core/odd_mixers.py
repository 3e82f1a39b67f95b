"""Odd mechanisms in toy form, each the least that shows how it fits core/mixer.py (test_protocol_fits.py)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from seqmix.core import packing, param
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param


def square(mixer, *names):
    return {name: Param((mixer.d_model,) * 2, ("embed", "mlp")) for name in names}


def visible(x, segment_ids):
    run = packing.runs(jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids)
    return jnp.tril((run[:, :, None] == run[:, None]) & (run != 0)[:, None])


def softmax(scores, seen):
    return jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1), 0)


@dataclass(frozen=True, kw_only=True)
class Learner(Mixer):
    """W_t = W_{t-1} - (W_{t-1} k_t - v_t) k_t^T / 4 from a learned W_0; y_t = W_t q_t (MIRAS, linear)."""

    def params(self):
        return square(self, "q", "k", "v", "start")

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        state = self.init_state(params, x.shape[0], x.shape[1])
        return self.prefill(params, x, state, segment_ids=segment_ids)[0], {}

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        return jnp.broadcast_to(params["start"], (batch, *params["start"].shape))

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        run = packing.runs(jnp.ones(x.shape[:2], jnp.int32) if segment_ids is None else segment_ids)

        def body(w, t):
            q, k, v, fresh = t
            w = jnp.where(fresh[:, None, None], params["start"], w)
            error = jnp.einsum("bij,bj->bi", w, k) - v
            w = w - 0.25 * error[:, :, None] * k[:, None]
            return w, jnp.einsum("bij,bj->bi", w, q)

        xs = *(jnp.moveaxis(x @ params[n], 1, 0) for n in "qkv"), packing.starts(run).T
        state, y = jax.lax.scan(body, state, xs)
        return jnp.moveaxis(y, 0, 1), state


@dataclass(frozen=True, kw_only=True)
class ScoreConv(Mixer):
    """P = softmax(sum_a taps_a S[t - a]), S = q k^T of visible pairs (multi-token attention); keeps old queries."""

    linear_in_v: ClassVar[bool] = True

    def params(self):
        return {"taps": Param((3,), (None,), param.normal(1.0)), **square(self, "q", "k", "v", "out")}

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        values, context = self.project(params, x)
        matrix = self.mixing_matrix(params, x, segment_ids=segment_ids)
        return self.merge(params, context, jnp.einsum("bgts,bsgv->btgv", matrix, values)), {}

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        return (x @ params["v"])[:, :, None], {}

    def merge(self, params, context, mixed):
        return mixed[:, :, 0] @ params["out"]

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        return self._matrix(params, x @ params["q"], x @ params["k"], visible(x, segment_ids))[:, None]

    def _matrix(self, params, q, k, seen):
        scores = jnp.pad(jnp.where(seen, jnp.einsum("btk,bsk->bts", q, k), 0), ((0, 0), (2, 0), (0, 0)))
        return softmax(sum(params["taps"][a] * scores[:, 2 - a : scores.shape[1] - a] for a in range(3)), seen)

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        cache = jnp.zeros((batch, max_len, self.d_model), dtype)
        return {"k": cache, "v": cache, "q": cache[:, :2], "length": jnp.zeros((), jnp.int32)}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        put = lambda name: jax.lax.dynamic_update_slice_in_dim(state[name], x @ params[name], state["length"], 1)
        k, v, q = put("k"), put("v"), jnp.concatenate([state["q"], x @ params["q"]], axis=1)
        place = state["length"] + jnp.arange(-2, x.shape[1])[:, None]
        seen = jnp.broadcast_to(jnp.arange(k.shape[1]) <= place, (x.shape[0], q.shape[1], k.shape[1]))
        mixed = jnp.einsum("bts,bsv->btv", self._matrix(params, q, k, seen)[:, 2:], v)
        return mixed @ params["out"], {"k": k, "v": v, "q": q[:, -2:], "length": state["length"] + x.shape[1]}


@dataclass(frozen=True, kw_only=True)
class Trilinear(Mixer):
    """y_t = sum_{j,l} softmax_{jl}(sum_c q_tc k_jc m_lc) v_j * w_l (2-simplicial attention): one group a channel."""

    linear_in_v: ClassVar[bool] = True
    decodes: ClassVar[bool] = False

    def params(self):
        return square(self, "q", "k", "m", "v", "w")

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        pairs = self._pairs(params, x, segment_ids)
        return jnp.einsum("btjl,bjc,blc->btc", pairs, x @ params["v"], x @ params["w"]), {}

    def _pairs(self, params, x, segment_ids):
        q, k, m = (x @ params[name] for name in "qkm")
        seen = visible(x, segment_ids)
        both = seen[:, :, :, None] & seen[:, :, None, :]
        flat = (*both.shape[:2], -1)
        scores = jnp.einsum("btc,bjc,blc->btjl", q, k, m)
        return softmax(scores.reshape(flat), both.reshape(flat)).reshape(both.shape)

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        return (x @ params["v"])[..., None], {}

    def merge(self, params, context, mixed):
        return mixed[..., 0]

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        return jnp.einsum("btjl,blc->bctj", self._pairs(params, x, segment_ids), x @ params["w"])


@dataclass(frozen=True, kw_only=True)
class Select(Mixer):
    """Writes for later layers which token so far is the largest."""

    takes: ClassVar[tuple[str, ...]] = ("shared",)

    def params(self):
        return square(self, "out")

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        y, state = self.prefill(params, x, self.init_state(params, x.shape[0], x.shape[1]))
        return y, {"shared": state["shared"]}

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        return {"size": jnp.zeros(batch), "index": jnp.zeros(batch, jnp.int32), "length": jnp.zeros((), jnp.int32)}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        def body(held, t):
            size, place = t
            held = jax.tree.map(lambda new, old: jnp.where(size > held[0], new, old), (size, place), held)
            return held, held[1]

        places = jnp.broadcast_to(state["length"] + jnp.arange(x.shape[1])[:, None], x.shape[1::-1])
        sizes = jnp.sum(x.astype(jnp.float32) ** 2, axis=-1).T
        (size, last), index = jax.lax.scan(body, (state["size"], state["index"]), (sizes, places))
        state = {"size": size, "index": last, "length": state["length"] + x.shape[1]}
        return x @ params["out"].astype(x.dtype), state | {"shared": {"index": index.T}}


@dataclass(frozen=True, kw_only=True)
class Follow(Mixer):
    """Attends to the token that an earlier layer chose (LessIsMore shares a set of them)."""

    takes: ClassVar[tuple[str, ...]] = ("shared",)

    def params(self):
        return square(self, "out")

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        return self.prefill(params, x, self.init_state(params, *x.shape[:2], x.dtype), **inputs)[0], {}

    def init_state(self, params, batch, max_len, dtype=jnp.float32, **inputs):
        return {"x": jnp.zeros((batch, max_len, self.d_model), dtype), "length": jnp.zeros((), jnp.int32)}

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        cache = jax.lax.dynamic_update_slice_in_dim(state["x"], x, state["length"], 1)
        chosen = jnp.take_along_axis(cache, inputs["shared"]["index"][..., None], axis=1)
        return chosen @ params["out"].astype(x.dtype), {"x": cache, "length": state["length"] + x.shape[1]}


@dataclass(frozen=True, kw_only=True)
class Routed(Mixer):
    """Tokens attend within the cluster of their nearest centroid; centroids follow their tokens (Routing Transformer).

    Hashing is the same with centroids that are drawn once and never written.
    """

    balanced: bool = True  # clusters take their nearest tokens, as published, later ones among them

    decodes: ClassVar[bool] = False

    @property
    def selects_over_time(self):
        return self.balanced

    def params(self):
        fixed = Param((2, self.d_model), (None, "embed"), param.normal(1.0), trainable=False, decay=False)
        return {"centroids": fixed, **square(self, "v")}

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        near = jnp.argmax(jax.lax.stop_gradient(x @ params["centroids"].T.astype(x.dtype)), axis=-1)
        seen = visible(x, segment_ids) & (near[:, :, None] == near[:, None])
        members = jax.nn.one_hot(near, 2)
        mean = jnp.einsum("btc,btd->cd", members, x) / jnp.maximum(members.sum((0, 1)), 1)[:, None]
        moved = 0.9 * params["centroids"] + 0.1 * mean.astype(jnp.float32)
        y = softmax(jnp.einsum("btd,bsd->bts", x, x), seen) @ (x @ params["v"].astype(x.dtype))
        return y, {"update/centroids": jax.lax.stop_gradient(moved), "used": members.mean((0, 1)).max()}


@dataclass(frozen=True, kw_only=True)
class Threshold(Mixer):
    """Keeps the scores above a calibrated threshold per head, given with each call (Top-theta), and drops
    some in training. A table that each layer has of its own is a weight that is not trainable instead.
    """

    drop: float = 0.5

    takes: ClassVar[tuple[str, ...]] = ("thresholds",)
    stochastic: ClassVar[bool] = True
    decodes: ClassVar[bool] = False

    def params(self):
        return square(self, "v")

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        self.check(x, segment_ids=segment_ids, inputs=inputs, need=("thresholds",))
        scores = jnp.einsum("btd,bsd->bts", x, x)
        seen = visible(x, segment_ids) & (scores >= inputs["thresholds"][0])
        if rng is not None:
            seen &= jax.random.bernoulli(rng, 1 - self.drop, seen.shape)
        return softmax(scores, seen) @ (x @ params["v"]), {"kept": jnp.mean(seen)}
