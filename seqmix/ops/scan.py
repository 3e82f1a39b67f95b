"""Elementwise linear recurrences, real or complex, in both directions: h_t = exp(log_a_t) h_{t-1} + x_t."""

import jax.numpy as jnp
from jax import lax

from seqmix.core import packing
from seqmix.core.shapes import boolean, check_arrays, filled, positive
from seqmix.ops import dispatch, scan_context, scan_kernels
from seqmix.ops.mesh import layout
from seqmix.ops.scan_chunked import Way, chunked


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
    reverse = boolean("reverse", reverse)
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
        options = dict(reverse=reverse, chunk=chunk, implementation=kernel or implementation, masks=_masks, dtype=dtype)
        return scan_context.linear(lay, linear_scan, x, log_a, state.astype(acc), segment_ids, **options)
    chosen = dispatch.pick("linear_scan", implementation, reasons | {"chunked": None, "reference": None})
    args = x, log_a, real, opened, state.astype(acc)
    if chosen in reasons:
        return scan_kernels.scan(chosen, x, log_a, real, opened, state.astype(acc))
    if chosen == "reference":
        return _reference(*args, reverse, dtype)
    return chunked(Way(chunk, reverse, dtype), *args)


def _check(x, log_a, state, segment_ids, chunk):
    check_arrays(x=x, log_a=log_a, **({} if state is None else {"state": state}))
    for name, array in (("x", x), ("log_a", log_a)):
        if not jnp.issubdtype(array.dtype, jnp.inexact) or array.dtype.itemsize < 2:
            raise ValueError(f"{name}: expected a floating (16 bits or more) or complex dtype, got {array.dtype}")
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
    filled(x=x)
    positive("chunk", chunk)


def _masks(segment_ids, reverse):
    """Where tokens are no padding, and where they open a segment other than the first met, [B, T] each."""
    if segment_ids is None:
        return None, None
    ids = jnp.flip(segment_ids, 1) if reverse else segment_ids
    opened = packing.starts(packing.runs(ids))
    return segment_ids != 0, jnp.flip(opened, 1) if reverse else opened


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
