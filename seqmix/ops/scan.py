"""Elementwise linear recurrences, real or complex, in both directions: h_t = exp(log_a_t) h_{t-1} + x_t.

The chunked form steps through all chunks of a sequence side by side: once for what each chunk makes of a zero
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

from seqmix.core import packing
from seqmix.core.shapes import is_array
from seqmix.ops import dispatch, scan_context, scan_kernels
from seqmix.ops.mesh import layout


def linear_scan(
    x,
    log_a,
    *,
    state=None,
    segment_ids=None,
    reverse=False,
    chunk: int = 32,
    implementation: str | None = None,
):
    """h_t = exp(log_a_t) * h_{t-1} + x_t over time, elementwise; h_{-1} is the incoming state.

    Args:
      x: [B, T, ...], real or complex.
      log_a: log decay, real part <= 0 and of any size (0, -1e4, -inf). Broadcast against the whole of x by
        NumPy's rules: [B, T, ...], [B, T, H, 1], or [D] where it is constant in time. Complex for a phase.
      state: [B, ...], of x without time; zeros by default.
      segment_ids: [B, T] int, 0 for padding, where h is 0. Segments begin from 0, a row's first from `state`.
      reverse: from right to left, h_t = exp(log_a_t) h_{t+1} + x_t: the scan of the flipped arrays, flipped.
        The incoming state then belongs to a row's last segment and the outgoing one to its first.
      chunk: tokens between two stored states of the chunked form; changes speed and rounding alone.
      implementation: None (the best for the call), "gpu" (Hopper kernels), "tpu" (TPU kernels; compiled, not run on a
        chip) or "triton" (other NVIDIA GPUs, with the extra triton), all real, bfloat16 or float32 and left to right,
        "chunked" or "reference".
    Returns:
      (h [B, T, ...], state [B, ...]). The state has the accumulation dtype: of x and log_a, at least float32
      or complex64. h has the dtype of x, or of the state where log_a is complex.
    Raises:
      ValueError for shapes that disagree, integers, a chunk below 1, or an unknown implementation.

    Source: the recurrence of RG-LRU (arXiv 2402.19427, eq. 4), S5 (2208.04933) and GateLoop (2311.01927).
    """
    _check(x, log_a, state, segment_ids, chunk)
    acc = jnp.promote_types(jnp.promote_types(x.dtype, log_a.dtype), jnp.float32)
    dtype = acc if jnp.iscomplexobj(log_a) else x.dtype
    log_a = log_a.reshape((1,) * (x.ndim - log_a.ndim) + log_a.shape)
    if state is None:
        state = jnp.zeros_like(x, shape=(x.shape[0], *x.shape[2:]), dtype=acc)
    real, opened = _masks(segment_ids, reverse)
    reasons = scan_kernels.reasons(x, log_a, reverse)
    lay = layout(*x.shape[:2], *x.shape[2:3])
    kernel = None if lay is None else scan_context.kernel(lay, implementation, x, log_a, reverse)
    if lay is not None and (lay.time or kernel):
        options = dict(reverse=reverse, chunk=chunk, implementation=kernel or implementation)
        return scan_context.linear(lay, linear_scan, x, log_a, state.astype(acc), segment_ids, **options)
    chosen = dispatch.pick("linear_scan", implementation, reasons | {"chunked": None, "reference": None})
    args = x, log_a, real, opened, state.astype(acc)
    if chosen in reasons:
        return scan_kernels.scan(chosen, x, log_a, real, opened, state.astype(acc))
    if chosen == "reference":
        return _reference(*args, reverse, dtype)
    return _chunked(_Way(chunk, reverse, dtype), *args)


def _check(x, log_a, state, segment_ids, chunk):
    for name, array in (("x", x), ("log_a", log_a), ("state", state)):
        if not (is_array(array) or (name == "state" and state is None)):
            raise ValueError(f"{name}: expected an array, got {type(array).__name__}")
    for name, array in (("x", x), ("log_a", log_a)):
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            raise ValueError(f"{name}: expected a floating or complex dtype, got {array.dtype}")
    if x.ndim < 2 or x.shape[1] < 1:
        raise ValueError(f"x: expected shape (B, T, ...) with T >= 1, got {tuple(x.shape)}")
    aligned = (1,) * (x.ndim - log_a.ndim) + tuple(log_a.shape)
    if len(aligned) != x.ndim or any(a not in (1, size) for a, size in zip(aligned, x.shape, strict=True)):
        raise ValueError(f"log_a: expected a shape that broadcasts to {tuple(x.shape)} of x, got {tuple(log_a.shape)}")
    shape = (x.shape[0], *x.shape[2:])
    if state is not None and tuple(state.shape) != shape:
        raise ValueError(f"state: expected shape {shape}, x without time, got {tuple(state.shape)}")
    if state is not None and jnp.iscomplexobj(state) and not (jnp.iscomplexobj(x) or jnp.iscomplexobj(log_a)):
        raise ValueError(f"state: expected a real dtype as of x and log_a, got {state.dtype}")
    if segment_ids is not None:
        packing.check(segment_ids, *x.shape[:2])
    check_chunk(chunk)


def check_chunk(chunk):
    """Raises ValueError unless `chunk` is a positive number of tokens."""
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk: expected a positive number of tokens, got {chunk!r}")


def _masks(segment_ids, reverse):
    """Where tokens are no padding, and where they open a segment other than the first met, [B, T] each."""
    if segment_ids is None:
        return None, None
    ids = jnp.flip(segment_ids, 1) if reverse else segment_ids
    opened = packing.starts(packing.runs(ids))
    return segment_ids != 0, jnp.flip(opened, 1) if reverse else opened


def _wide(log_a, acc):
    """log_a in the precision of `acc`, real where it is real."""
    return log_a.astype(acc if jnp.iscomplexobj(log_a) else jnp.finfo(acc).dtype)


def _decay(log_a, real, opened, acc):
    """exp(log_a); 1 at padding (whatever stands there), 0 where a segment opens."""
    if real is not None:
        log_a = jnp.where(real, log_a, 0)
    a = jnp.exp(_wide(log_a, acc))
    return a if opened is None else jnp.where(opened, 0, a)


def _reference(x, log_a, real, opened, state, reverse, dtype):
    """The recurrence as it is written, one token at a time."""
    tokens = [x, jnp.broadcast_to(log_a, x.shape)]
    if real is not None:
        tokens += [m.reshape(*m.shape, *[1] * (x.ndim - 2)) for m in (real, opened)]

    def step(h, token):
        x, log_a, real, opened = token if len(token) == 4 else (*token, True, False)
        a = jnp.exp(jnp.where(real, log_a, 0).astype(jnp.promote_types(log_a.dtype, jnp.finfo(h.dtype).dtype)))
        h = jnp.where(real, jnp.where(opened, 0, a * h) + x, h).astype(h.dtype)
        return h, jnp.where(real, h, 0).astype(dtype)

    state, h = lax.scan(step, state, [jnp.moveaxis(t, 1, 0) for t in tokens], reverse=reverse)
    return jnp.moveaxis(h, 0, 1), state


class _Way(NamedTuple):
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


def _sweep(way: _Way, chunks: _Chunks, carry, emit="h"):
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


def _join(out, time):
    """[B, n, C, ...] as [B, T, ...]."""
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :time]


def _run(way: _Way, x, log_a, real, opened, state):
    """(h [B, T, ...], outgoing state, each chunk's incoming state [B, n, ...])."""
    chunks = _split(x, log_a, real, opened, way.chunk)
    n = chunks.x.shape[1]
    if n == 1:
        incoming = state[:, None]
    else:
        zero = jnp.zeros_like(x, shape=(x.shape[0], n, *x.shape[2:]), dtype=state.dtype)
        ends, _ = _sweep(way, chunks, zero, emit=None)
        logs = chunks.log_a if chunks.real is None else jnp.where(chunks.real, chunks.log_a, 0)
        repeats = chunks.x.shape[2] // logs.shape[2]  # a decay constant in time is there once
        log_total = repeats * jnp.sum(_wide(logs, state.dtype), 2)
        closed = None if opened is None else jnp.any(chunks.opened, 2).reshape(-1, n)
        incoming = incoming_states(ends, log_total, closed, state, way.reverse)
    last, h = _sweep(way, chunks, incoming)
    return _join(h, x.shape[1]), last[:, 0 if way.reverse else -1], incoming


def incoming_states(ends, log_total, closed, state, reverse: bool):
    """States with which chunks begin, from what each makes of a zero state: [B, n, ...] like `ends`.

    log_total, broadcast against `ends`, is the sum of a chunk's log decays; no state passes through a chunk
    that is `closed` [B, n] (a segment opens in it; or None). `state` [B, ...] comes in at the first chunk met.
    """
    way = _Way(max(8, math.isqrt(ends.shape[1])), reverse, state.dtype)
    h, _, _ = _run(way, ends, log_total, None, closed, state)
    state = state[:, None]
    return jnp.concatenate([h[:, 1:], state] if reverse else [state, h[:, :-1]], 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(way: _Way, x, log_a, real, opened, state):
    return _run(way, x, log_a, real, opened, state)[:2]


def _forward(way, x, log_a, real, opened, state):
    h, state, incoming = _run(way, x, log_a, real, opened, state)
    return (h, state), (x, log_a, real, opened, incoming)


def _backward(way, residuals, cotangents):
    x, log_a, real, opened, incoming = residuals
    dh, dstate = cotangents
    acc = dstate.dtype
    back = _Way(way.chunk, not way.reverse, acc, adjoint=True)
    dx, dstate, _ = _run(back, dh, log_a, real, opened, dstate)
    # d log_a_t = dx_t a_t h_{t-1}; the product a_t h_{t-1} is run again, so that h is not kept.
    chunks = _split(x, log_a, real, opened, way.chunk)
    _, prior = _sweep(way._replace(dtype=acc), chunks, incoming, emit="prior")
    dlog_a = dx * _join(prior, x.shape[1])
    axes = [i for i, size in enumerate(log_a.shape) if size != x.shape[i]]
    dlog_a = jnp.sum(dlog_a, axes, keepdims=True) if axes else dlog_a
    return _like(x, dx), _like(log_a, dlog_a), None, None, dstate


_chunked.defvjp(_forward, _backward)


def _like(primal, cotangent):
    """A cotangent in the dtype of its primal: the real part where that is real."""
    cotangent = cotangent if jnp.iscomplexobj(primal) else cotangent.real
    return cotangent.astype(primal.dtype)
