"""The selective scan of Mamba: a diagonal state [D, N] whose decay, input and read-out depend on the token.

The chunked form never holds [B, T, D, N]. Forward, all chunks are stepped through side by side, as in
`seqmix.ops.scan`: for their ends, for their incoming states, for y. Backward, those incoming states (T / chunk
of them) are the only ones kept: a few chunks at a time recompute theirs and sweep back.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from seqmix.core import packing
from seqmix.core.shapes import check_arrays, dims, filled, floating, positive
from seqmix.ops import dispatch, scan_context
from seqmix.ops.mesh import layout
from seqmix.ops.scan_chunked import incoming_states

_SPAN = 128  # tokens of a row whose states the backward pass holds at once, if chunks are not longer


def selective_scan(
    u,
    dt,
    A,
    B,
    C,
    D=None,
    *,
    state=None,
    segment_ids=None,
    chunk: int = 32,
    implementation: str | None = None,
):
    """h_t = exp(dt_t A) h_{t-1} + dt_t u_t B_t ; y_t = sum_n C_t[n] h_t[n] + D u_t, for each channel.

    Args:
      u: [B, T, D], the input.
      dt: [B, T, D], step sizes >= 0, after the softplus.
      A: [D, N], negative.
      B, C: [B, T, G, N], or [B, T, N] for G = 1; G divides D, and channel d reads group d // (D // G).
      D: [D], the skip; none by default.
      state: [B, D, N]; zeros by default.
      segment_ids: [B, T] int, 0 for padding, where y is 0. Segments begin from 0, a row's first from `state`.
      chunk: tokens between two stored states; changes speed, memory and rounding alone.
    Returns:
      (y [B, T, D] in the dtype of u, state [B, D, N] in the widest dtype of the arguments, at least float32).
    Raises:
      ValueError for shapes that disagree, integers or complex numbers, groups that do not divide D, a chunk
      below 1, or an unknown implementation.

    Source: Mamba (arXiv 2312.00752, eq. 2 with the zero-order hold for A); B is discretised by Euler's rule,
    as in the authors' released code. A decay that does not depend on n is cheaper as `linear_attention`.
    """
    check_arrays(u=u, dt=dt, A=A, B=B, C=C)
    B, C = (m[:, :, None] if m.ndim == 3 else m for m in (B, C))
    spec = {
        "u": "B T D",
        "dt": "B T D",
        "A": "D N",
        "B": "B T G N",
        "C": "B T G N",
        "D": "D",
        "state": "B D N",
    }
    d = dims(spec, u=u, dt=dt, A=A, B=B, C=C, D=D, state=state)
    floating(u=u, dt=dt, A=A, B=B, C=C, D=D, state=state)
    if d.G < 1 or d.D % d.G:
        raise ValueError(f"B: expected groups that divide D={d.D}, got {d.G}")
    filled(u=u)
    if segment_ids is not None:
        packing.check(segment_ids, d.B, d.T)
    positive("chunk", chunk)
    real = None if segment_ids is None else (segment_ids != 0)[..., None]
    if segment_ids is not None:
        # A step of size 0 neither writes nor decays; the rest is cleared of what may stand at padding.
        u, dt = (jnp.where(real, a, 0) for a in (u, dt))
        B, C = (jnp.where(real[..., None], a, 0) for a in (B, C))
    acc = functools.reduce(jnp.promote_types, (a.dtype for a in (u, dt, A, B, C)), jnp.float32)
    state = jnp.zeros_like(u, shape=(d.B, d.D, d.N), dtype=acc) if state is None else state.astype(acc)
    chosen = dispatch.pick("selective_scan", implementation, {"chunked": None, "reference": None})
    form = _reference if chosen == "reference" else functools.partial(_by_chunks, chunk=chunk)
    lay = layout(d.B, d.T, d.D, d.G)
    if lay is not None and lay.time:
        y, state = scan_context.selective(lay, form, d, u, dt, A, B, C, state, segment_ids)
    else:
        y, state = form(u, dt, A, B, C, state, segment_ids)
    if D is not None:
        y = y + D.astype(acc) * u.astype(acc)
    if segment_ids is not None:
        y = jnp.where(real, y, 0)
    return y.astype(u.dtype), state


def selective_scan_flops(batch: int, seq: int, width: int, state: int, chunk: int = 32) -> int:
    """FLOPs of a chunked forward pass with the skip; exponentials are not counted.

    Six per element of the state and token: dt A, exp(.) h, u B, a sum, C h, a sum; four of them once more where
    there is more than one chunk.
    """
    passes = 6 if seq <= chunk else 10
    return batch * seq * width * (passes * state + 3)


def _reference(u, dt, A, B, C, state, segment_ids):
    """The recurrence as it is written, one token at a time."""
    repeats = u.shape[2] // B.shape[2]
    ids = jnp.ones(u.shape[:2], jnp.int32) if segment_ids is None else packing.runs(segment_ids)

    def step(h, token):
        u, dt, B, C, real, opened = token
        u, dt, real, opened = (a[..., None] for a in (u, dt.astype(h.dtype), real[:, None], opened[:, None]))
        B, C = (jnp.repeat(m, repeats, axis=1) for m in (B, C))
        new = jnp.where(opened, 0, jnp.exp(dt * A) * h) + dt * u * B
        h = jnp.where(real, new, h)
        return h, jnp.sum(C * h, -1)

    tokens = (u, dt, B, C, ids != 0, packing.starts(ids))
    state, y = lax.scan(step, state, jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tokens))
    return jnp.moveaxis(y, 0, 1), state


def _by_chunks(u, dt, A, B, C, state, segment_ids, chunk):
    """The chunked form in channels by group, and last: u, dt [B, T, G, E], A [G, N, E], state [B, G, N, E]."""
    batch, time, groups, _ = B.shape
    opened = None
    if segment_ids is not None:
        opened = packing.starts(packing.runs(segment_ids))[..., None, None]
        opened = jnp.broadcast_to(opened, (batch, time, groups, 1))
    u, dt = (a.reshape(batch, time, groups, -1) for a in (u, dt))
    A = jnp.swapaxes(A.astype(state.dtype).reshape(groups, -1, A.shape[1]), 1, 2)
    state = jnp.swapaxes(state.reshape(batch, groups, -1, state.shape[2]), 2, 3)
    y, state = _chunked(_plan(time, chunk), u, dt, A, B, C, opened, state)
    state = jnp.swapaxes(state, 2, 3)
    return y.reshape(batch, time, -1), state.reshape(batch, -1, state.shape[3])


class _Plan(NamedTuple):
    """n = side * turns chunks of C tokens. Chunk i * turns + j is one of `side` that are worked on in turn j."""

    chunk: int
    side: int
    turns: int

    def split(self, a):
        """[B, T, ...] as [B, n, C, ...], padded with zeros."""
        pad = self.chunk * self.side * self.turns - a.shape[1]
        a = jnp.pad(a, ((0, 0), (0, pad), *[(0, 0)] * (a.ndim - 2)))
        return a.reshape(a.shape[0], -1, self.chunk, *a.shape[2:])

    def turn(self, a, j):
        """The chunks of turn j, [B, side, ...]: they lie spread over time, and so over devices that share it."""
        a = a.reshape(a.shape[0], self.side, self.turns, *a.shape[2:])
        return lax.dynamic_index_in_dim(a, j, 2, keepdims=False)


def _plan(time, chunk) -> _Plan:
    chunk = min(chunk, time)
    chunks = -(-time // chunk)
    turns = -(-chunks // max(1, _SPAN // chunk))
    return _Plan(chunk, -(-chunks // turns), turns)


def _slim(a, axes=3):
    """`a` without those of its first axes [B, n, G] that are one: they slow XLA's loops on a CPU 3 to 9 times."""
    return a.reshape(*[size for size in a.shape[:axes] if size != 1], *a.shape[axes:])


def _at(tokens, i):
    """The i-th token of every chunk: [B, n, G, ...] of [B, n, C, G, ...], slim."""
    return jax.tree.map(lambda a: _slim(lax.dynamic_index_in_dim(a, i, 2, keepdims=False)), tokens)


def _token(A, u, dt, B, opened):
    """Decay and input of tokens [..., E], [..., N], as [..., N, E] each, and dt in the dtype of A."""
    dt = dt.astype(A.dtype)
    decay = jnp.exp(dt[..., None, :] * A)
    if opened is not None:
        decay = jnp.where(opened[..., None, :], 0, decay)
    return decay, (dt * u)[..., None, :] * B[..., None], dt


def _through(A, dt, opened):
    """What each chunk lets through of a state: its log decay [B, n, G, N, E], and whether it is closed [B, n]."""
    total = jnp.sum(dt.astype(A.dtype), 2)[..., None, :] * A
    return total, None if opened is None else jnp.any(opened[..., 0, 0], 2)


def _run(plan, u, dt, A, B, C, opened, state):
    """(y [B, T, G, E] in the dtype of A, outgoing state, each chunk's incoming state [B, n, G, N, E])."""
    time = u.shape[1]
    tokens = u, dt, B, C, opened = jax.tree.map(plan.split, (u, dt, B, C, opened))
    shape, index, lean = (*u.shape[:2], *A.shape), jnp.arange(plan.chunk), _slim(A, 1)

    def advance(h, i):
        u, dt, B, C, opened = _at(tokens, i)
        decay, written, _ = _token(lean, u, dt, B, opened)
        return decay * h + written, C

    def read(loop, i):
        h, y = loop
        h, C = advance(h, i)
        now = jnp.sum(C[..., None] * h, -2).reshape(y.shape[:2] + y.shape[3:])
        return (h, lax.dynamic_update_index_in_dim(y, now, i, 2)), None

    incoming = state[:, None]
    if shape[1] > 1:
        zero = jnp.zeros_like(u, shape=shape, dtype=A.dtype)
        ends, _ = lax.scan(lambda h, i: (advance(h, i)[0], None), _slim(zero), index)
        incoming = incoming_states(ends.reshape(shape), *_through(A, dt, opened), state, reverse=False)
    (last, y), _ = lax.scan(read, (_slim(incoming), jnp.zeros_like(u, dtype=A.dtype)), index)
    return y.reshape(y.shape[0], -1, *y.shape[3:])[:, :time], last.reshape(shape)[:, -1], incoming


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(plan, u, dt, A, B, C, opened, state):
    return _run(plan, u, dt, A, B, C, opened, state)[:2]


def _forward(plan, u, dt, A, B, C, opened, state):
    y, state, incoming = _run(plan, u, dt, A, B, C, opened, state)
    return (y, state), (u, dt, A, B, C, opened, incoming)


def _backward(plan, residuals, cotangents):
    *arguments, incoming = residuals
    u, dt, A, B, C, opened = arguments
    dy, dstate = cotangents
    tokens = jax.tree.map(plan.split, (u, dt, B, C, opened, dy))
    lean = _slim(A, 1)

    def recede(g, i):
        u, dt, B, C, opened, dy = _at(tokens, i)
        decay, _, _ = _token(lean, u, dt, B, opened)
        return decay * (g + dy[..., None, :] * C[..., None]), None

    outgoing = dstate[:, None]
    if incoming.shape[1] > 1:
        zero = _slim(jnp.zeros_like(incoming))
        ends, _ = lax.scan(recede, zero, jnp.arange(plan.chunk), reverse=True)
        through = _through(A, tokens[1], tokens[4])
        outgoing = incoming_states(ends.reshape(incoming.shape), *through, dstate, reverse=True)

    def turn(dA, j):
        part, grads, g = _turn(A, *jax.tree.map(lambda a: plan.turn(a, j), (tokens, incoming, outgoing)))
        return dA + part, (grads, g)

    dA, (grads, first) = lax.scan(turn, jnp.zeros_like(A), jnp.arange(plan.turns))
    # [turns, C, B, side, G, ...] as [B, T, G, ...].
    grads = [jnp.moveaxis(g, (0, 1), (2, 3)) for g in grads]
    du, ddt, dB, dC = (
        g.reshape(g.shape[0], -1, *g.shape[4:])[:, : a.shape[1]].astype(a.dtype)
        for g, a in zip(grads, (u, dt, B, C), strict=True)
    )
    return du, ddt, dA, dB, dC, None, first[0, :, 0]


_chunked.defvjp(_forward, _backward)


def _turn(A, tokens, h, g):
    """Gradients of some chunks [B, side, C, ...] from their incoming states h and the cotangents g of their ends.

    (dA, (du, ddt, dB, dC) as [C, B, side, G, ...], cotangents of h).
    """
    shape, lean, index = h.shape, _slim(A, 1), jnp.arange(tokens[0].shape[2])

    def forth(h, i):
        u, dt, B, _, opened, _ = _at(tokens, i)
        decay, written, _ = _token(lean, u, dt, B, opened)
        kept = decay * h
        return kept + written, kept

    def back(carry, token):
        g, dA = carry
        i, kept = token
        u, dt, B, C, opened, dy = _at(tokens, i)
        decay, written, dt = _token(lean, u, dt, B, opened)
        dC = jnp.sum(dy[..., None, :] * (kept + written), -1)
        g = g + dy[..., None, :] * C[..., None]
        dB = jnp.sum(g * (dt * u)[..., None, :], -1)
        du = jnp.sum(g * B[..., None], -2)  # of dt u
        flow = g * kept  # of the log decay
        ddt = du * u + jnp.sum(flow * lean, -2)
        return (decay * g, dA + flow * dt[..., None, :]), (du * dt, ddt, dB, dC)

    _, kept = lax.scan(forth, _slim(h), index)
    g = _slim(g)
    (g, dA), grads = lax.scan(back, (g, jnp.zeros_like(g)), (index, kept), reverse=True)
    dA = jnp.sum(dA.reshape(shape), (0, 1))
    return dA, [a.reshape(len(index), *shape[:3], a.shape[-1]) for a in grads], g.reshape(shape)
