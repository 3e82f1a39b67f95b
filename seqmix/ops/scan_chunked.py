"""The chunked form of `linear_scan`.

It steps through all chunks of a sequence side by side: once for what each chunk makes of a zero
state, then the same recurrence over the chunks for their incoming states, then once more for h. These are few steps
(88 for 2048 tokens), forward nothing as large as x is made but h, and with time sharded all but the short scan over
the chunks is local. On a CPU it compiles in a third of the time of `jax.lax.associative_scan` and runs five times
faster. Decays are summed as logarithms from chunk to chunk: one of 1e-8 a token is not lost in float32.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


def _wide(log_a, acc):
    """log_a in the precision of `acc`, real where it is real."""
    return log_a.astype(acc if jnp.iscomplexobj(log_a) else jnp.finfo(acc).dtype)


def _decay(log_a, real, opened, acc):
    """exp(log_a); 1 at padding (whatever stands there), 0 where a segment opens."""
    if real is not None:
        log_a = jnp.where(real, log_a, 0)
    a = jnp.exp(_wide(log_a, acc))
    return a if opened is None else jnp.where(opened, 0, a)


class Way(NamedTuple):
    """How a chunked scan runs."""

    chunk: int
    reverse: bool
    dtype: jnp.dtype  # of what it emits
    adjoint: bool = False  # h_t = c_t + x_t and c_{t+1} = a_t h_t: the cotangent's recurrence, decayed after the sum


class _Chunks(NamedTuple):
    """Arguments of a scan as [B, n, C, ...], padded to whole chunks; n = C = 1 for what is constant in time."""

    x: jax.Array
    log_a: jax.Array
    real: jax.Array | None
    opened: jax.Array | None

    def at(self, i):
        """The i-th token of every chunk: [B, n, ...] each."""
        return jax.tree.map(
            lambda a: a[:, :, 0] if a.shape[2] == 1 else lax.dynamic_index_in_dim(a, i, 2, keepdims=False),
            self,
        )


def _split(x, log_a, real, opened, chunk) -> _Chunks:
    time = x.shape[1]
    chunk = min(chunk, time)
    pad = -time % chunk
    if pad and real is None:
        real = jnp.ones((1, time), bool)

    def split(a):
        if a.shape[1] != time:
            return a[:, :, None]
        a = jnp.pad(a, ((0, 0), (0, pad), *[(0, 0)] * (a.ndim - 2)))
        return a.reshape(a.shape[0], -1, chunk, *a.shape[2:])

    masks = (None if m is None else m.reshape(*m.shape, *[1] * (x.ndim - 2)) for m in (real, opened))
    return jax.tree.map(split, _Chunks(x, log_a, *masks))


def _sweep(way: Way, chunks: _Chunks, carry, emit="h"):
    """Steps through all chunks at once from carries [B, n, ...]: (carries at their ends, what is emitted).

    That is h, or the decayed state before x is added ("prior"), as [B, n, C, ...] in way.dtype; or None.
    """
    acc = carry.dtype
    length = chunks.x.shape[2]

    def step(loop, i):
        carry, out = loop
        x, log_a, real, opened = chunks.at(i)
        x = x if real is None else jnp.where(real, x, 0)
        a = _decay(log_a, real, opened, acc)
        if way.adjoint:
            h = prior = carry + x
            carry = a * h
        else:
            prior = a * carry
            carry = h = prior + x
        carry = carry.astype(acc)
        if emit:
            value = h if emit == "h" else prior
            value = value if real is None else jnp.where(real, value, 0)
            out = lax.dynamic_update_index_in_dim(out, value.astype(way.dtype), i, 2)
        return (carry, out), None

    out = jnp.zeros_like(chunks.x, dtype=way.dtype) if emit else None
    return lax.scan(step, (carry, out), jnp.arange(length), reverse=way.reverse)[0]


class _Begun(NamedTuple):
    """A scan of which all is known but the state that comes in."""

    way: Way
    chunks: _Chunks
    ends: jax.Array | None  # what each chunk makes of a zero state, [B, n, ...], where it was asked for
    log_total: jax.Array | None  # a chunk's log decays, summed
    closed: jax.Array | None  # chunks in which a segment opens

    def whole(self):
        """What all chunks make of a zero state, and what they leave of an incoming one, segments aside: [B, ...]."""
        zero = jnp.zeros_like(self.ends[:, 0])
        way = _over_chunks(self.ends, self.way.reverse, zero.dtype)
        end = _run(way, self.ends, self.log_total, None, self.closed, zero)[1]
        repeats = self.ends.shape[1] // self.log_total.shape[1]  # a decay constant in time is there once
        return end, jnp.exp(repeats * jnp.sum(self.log_total, 1))

    def finish(self, state):
        """(h [B, padded T, ...], outgoing state, each chunk's incoming state [B, n, ...])."""
        way, n = self.way, self.chunks.x.shape[1]
        if n == 1:
            incoming = state[:, None]
        else:
            incoming = incoming_states(self.ends, self.log_total, self.closed, state, way.reverse)
        last, h = _sweep(way, self.chunks, incoming)
        return h.reshape(h.shape[0], -1, *h.shape[3:]), last[:, 0 if way.reverse else -1], incoming


def _begin(way: Way, x, log_a, real, opened, acc, need_ends=False) -> _Begun:
    """need_ends: also of a single chunk."""
    chunks = _split(x, log_a, real, opened, way.chunk)
    n = chunks.x.shape[1]
    if n == 1 and not need_ends:
        return _Begun(way, chunks, None, None, None)
    zero = jnp.zeros_like(x, shape=(x.shape[0], n, *x.shape[2:]), dtype=acc)
    ends, _ = _sweep(way, chunks, zero, emit=None)
    logs = chunks.log_a if chunks.real is None else jnp.where(chunks.real, chunks.log_a, 0)
    repeats = chunks.x.shape[2] // logs.shape[2]  # a decay constant in time is there once
    log_total = repeats * jnp.sum(_wide(logs, acc), 2)
    closed = None if opened is None else jnp.any(chunks.opened, 2).reshape(-1, n)
    return _Begun(way, chunks, ends, log_total, closed)


def _run(way: Way, x, log_a, real, opened, state):
    """(h [B, T, ...], outgoing state, each chunk's incoming state [B, n, ...])."""
    h, last, incoming = _begin(way, x, log_a, real, opened, state.dtype).finish(state)
    return h[:, : x.shape[1]], last, incoming


def _over_chunks(ends, reverse, dtype) -> Way:
    return Way(max(8, math.isqrt(ends.shape[1])), reverse, dtype)


def incoming_states(ends, log_total, closed, state, reverse: bool):
    """States with which chunks begin, from what each makes of a zero state: [B, n, ...] like `ends`.

    log_total, broadcast against `ends`, is the sum of a chunk's log decays; no state passes through a chunk
    that is `closed` [B, n] (a segment opens in it; or None). `state` [B, ...] comes in at the first chunk met.
    """
    h, _, _ = _run(_over_chunks(ends, reverse, state.dtype), ends, log_total, None, closed, state)
    state = state[:, None]
    return jnp.concatenate([h[:, 1:], state] if reverse else [state, h[:, :-1]], 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked(way: Way, x, log_a, real, opened, state):
    """(h, state) of `linear_scan`; log_a has as many axes as x, `real` and `opened` are [B, T] or None."""
    return _run(way, x, log_a, real, opened, state)[:2]


def _forward(way, x, log_a, real, opened, state):
    h, state, incoming = _run(way, x, log_a, real, opened, state)
    return (h, state), (x, log_a, real, opened, incoming)


def _backward(way, residuals, cotangents):
    dh, dstate = cotangents
    back = _back(way, residuals, dh, dstate.dtype)
    dx, first, _ = back.finish(dstate)
    dx, dlog_a = _gradients(way, residuals, dx)
    return dx, dlog_a, None, None, first


chunked.defvjp(_forward, _backward)


def _back(way, residuals, dh, acc, need_ends=False) -> _Begun:
    """The cotangents' walk."""
    _, log_a, real, opened, _ = residuals
    return _begin(Way(way.chunk, not way.reverse, acc, adjoint=True), dh, log_a, real, opened, acc, need_ends)


def _gradients(way, residuals, dx):
    """Those of x and log_a from the former in the accumulating dtype, [B, padded T, ...]."""
    x, log_a, real, opened, incoming = residuals
    dx = dx[:, : x.shape[1]]
    # d log_a_t = dx_t a_t h_{t-1}; the product a_t h_{t-1} is run again, so that h is not kept.
    chunks = _split(x, log_a, real, opened, way.chunk)
    _, prior = _sweep(way._replace(dtype=dx.dtype), chunks, incoming, emit="prior")
    dlog_a = dx * prior.reshape(dx.shape[0], -1, *dx.shape[2:])[:, : x.shape[1]]
    axes = [i for i, size in enumerate(log_a.shape) if size != x.shape[i]]
    dlog_a = jnp.sum(dlog_a, axes, keepdims=True) if axes else dlog_a
    return _like(x, dx), _like(log_a, dlog_a)


class Halves(NamedTuple):
    """The chunked form in two halves, as `scan_context` needs it: before and after the entering state is known."""

    way: Way
    acc: jnp.dtype

    @property
    def reverse(self):
        return self.way.reverse

    def begin(self, x, log_a, real, opened):
        """(end, left, finish): of all tokens as in `_Begun.whole`, and entering state -> (h, what `back` needs)."""
        begun = _begin(self.way, x, log_a, real, opened, self.acc, need_ends=True)

        def finish(state):
            h, _, incoming = begun.finish(state)
            return h[:, : x.shape[1]], (x, log_a, real, opened, incoming)

        return *begun.whole(), finish

    def back(self, kept, dh):
        """(the entering state's gradient if the end's is 0, finish), finish: the end's gradient -> (dx, dlog_a)."""
        begun = _back(self.way, kept, dh, self.acc, need_ends=True)
        return begun.whole()[0], lambda dend: _gradients(self.way, kept, begun.finish(dend)[0])


def _like(primal, cotangent):
    """A cotangent in the dtype of its primal: the real part where that is real."""
    cotangent = cotangent if jnp.iscomplexobj(primal) else cotangent.real
    return cotangent.astype(primal.dtype)
