"""Linear attention with or without decay: one op for every matrix-valued state that is only decayed and added to."""

import jax.numpy as jnp

from seqmix.core import packing
from seqmix.core.flops import matmul
from seqmix.core.shapes import boolean, check_arrays, dims, factor, filled, finite, floating, power_of_two
from seqmix.ops import linear_chunked, linear_context, linear_kernels, linear_reference
from seqmix.ops.dispatch import pick
from seqmix.ops.linear_reference import decay_spec
from seqmix.ops.mesh import layout


def linear_attention(
    q,
    k,
    v,
    log_decay=None,
    *,
    write=None,
    scale=1.0,
    state=None,
    segment_ids=None,
    normalize=False,
    eps=0.0,
    causal=True,
    chunk=64,
    return_state=True,
    implementation=None,
):
    """Reads a matrix-valued state that decays and takes up an outer product k v^T at each token.

        S_t = exp(log_decay_t) * S_{t-1} + write_t k_t v_t^T     y_t = scale * q_t^T S_t
        z_t = exp(log_decay_t) * z_{t-1} + k_t                   (normalize)
        y_t = scale * q_t^T S_t / (scale * q_t^T z_t + eps)      (normalize)

    Value head h reads the queries and keys of head h // (H // Hk). The first decay acts on `state`.

    Args:
      q, k: [B, T, Hk, K], floating; Hk divides H (grouped heads are never repeated in memory).
      v: [B, T, H, V], floating.
      log_decay: None (no decay), [H] (constant), [B, T, H] (per head) or [B, T, H, K] (per channel of k), floating,
        <= 0 (not checked). Any size is right; no bound is assumed.
      write: None (1) or [B, T, H], floating, >= 0 (not checked): the weight of what a token writes, such as Mamba-2's
        time step; without normalize only. It is v * write, but v need not be multiplied in memory.
      scale: factor on q.
      state: what earlier tokens left, as returned: [B, H, K, V], or with normalize the pair (S, z) with
        z [B, H, K]. None: zeros.
      segment_ids: [B, T] integers. A new non-zero id starts from zeros, 0 is padding: it neither writes nor decays,
        and y is 0 there. `state` belongs to a row's first segment, the state returned to its last.
      normalize: divide by the same sum without the values. Meant for positive feature maps, q, k >= 0: of either
        sign, the denominator can come near 0. Where it is 0 (no key met), y is 0.
      eps: added to the denominator, >= 0; only with normalize.
      causal: False lets each token read its whole segment, y_t = scale * q_t^T sum over all s of k_s v_s^T; without
        log_decay and state only. The state returned is the last segment's total.
      chunk: tokens computed as one matrix by the chunked form, a power of two. It changes rounding and speed alone.
      return_state: False gives None in place of the state, which the Hopper kernels then do not write to memory.
      implementation: None (the best for the call), "gpu" (Hopper kernels; those for a decay per channel take no
        `write`), "tpu" (TPU kernels; compiled, not run on a chip) or "triton" (other
        NVIDIA GPUs, with the extra triton; for a decay per head or none), all for bfloat16, "chunked" or "reference".
        With one token "gpu" is a kernel that reads and writes the state once.

    Returns:
      (y [B, T, H, V] in the dtype of v, state in promote(dtype of q, k and v, float32) or None). Matmul operands are
      in the common dtype of q, k and v, accumulated in float32 or wider, and so are decays.

    Raises: ValueError for shapes, dtypes, options or an implementation that do not fit.

    Source: Katharopoulos et al. 2006.16236 (equations 16-20); RetNet 2307.08621, GLA 2312.06635, Mamba-2 2405.21060
    and Lightning 2405.17381 are it with their decays.
    """
    d, acc = _check(q, k, v, log_decay, write, state, segment_ids, normalize, eps, causal, chunk, scale)
    runs = None if segment_ids is None else packing.runs(segment_ids)
    lay = layout(d.B, d.T, d.H, d.Hk)
    call = (q, k, v, log_decay, state, runs, write)
    return_state = boolean("return_state", return_state)
    kind = dict(scale=scale, normalize=normalize)
    if lay is not None and causal:
        kernel = linear_context.kernel(lay, implementation, *call, **kind)
        if lay.time or kernel:
            options = kind | dict(eps=eps, chunk=chunk, return_state=return_state)
            options |= dict(implementation=kernel or implementation)
            return linear_context.run(lay, linear_attention, d, acc, *call, **options)
    reasons = linear_kernels.reasons(implementation, *call, **kind, causal=causal)
    name = pick("linear_attention", implementation, reasons | {"chunked": None, "reference": None})
    if name in reasons:
        return linear_kernels.run(name, *call, scale, return_state)
    out_dtype, dtype = v.dtype, jnp.result_type(q, k, v)
    if write is not None:
        v = v * write[..., None].astype(acc)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    decay = _decay(log_decay, acc, d.T)
    if runs is not None:
        q, k, v, decay = (_without_padding(x, runs) for x in (q, k, v, decay))

    # The denominator is one more value, 1 at each token, and z its state.
    values = (v, jnp.ones((d.B, d.T, d.H, 1), dtype)) if normalize else (v,)
    states = _states(state, normalize, d, acc)

    def finish(outputs):
        if not normalize:
            return (scale * outputs[0]).astype(out_dtype)
        below = scale * outputs[1] + eps
        y = jnp.where(below == 0, 0, scale * outputs[0] / jnp.where(below == 0, 1, below))
        return y.astype(out_dtype)

    if causal and name == "reference":
        y, states = linear_reference.recurrence(q, k, values, decay, states, runs, finish)
    elif causal:
        y, states = linear_chunked.chunked(q, k, values, decay, states, runs, finish, chunk=chunk)
    elif name == "reference":
        y, states = linear_reference.bidirectional(q, k, values, states, runs, finish)
    else:
        y, states = linear_chunked.bidirectional(q, k, values, states, runs, finish, chunk=chunk)
    if not return_state:
        return y, None
    return y, (states[0], states[1][..., 0]) if normalize else states[0]


def _check(q, k, v, log_decay, write, state, segment_ids, normalize, eps, causal, chunk, scale):
    """Sizes by letter and the accumulating dtype; raises ValueError for what does not fit."""
    normalize, causal = boolean("normalize", normalize), boolean("causal", causal)
    pair = isinstance(state, tuple | list) and len(state) == 2
    if state is not None and pair != normalize:
        expected = "the pair (S, z) with normalize" if normalize else "one array without normalize"
        raise ValueError(f"state: expected {expected}, got {type(state).__name__}")
    specs = {"q": "B T Hk K", "k": "B T Hk K", "v": "B T H V", "log_decay": decay_spec(log_decay)}
    specs |= {"write": "B T H", "state": "B H K V", "state_z": "B H K"}
    state, state_z = state if pair else (state, None)
    if pair:
        check_arrays(state=state, state_z=state_z)
    arrays = dict(q=q, k=k, v=v, log_decay=log_decay, write=write, state=state, state_z=state_z)
    d = dims(specs, **arrays)
    floating(**arrays)
    filled(q=q, k=k, v=v)
    if d.H % d.Hk:
        raise ValueError(f"v: expected a number of heads divisible by Hk={d.Hk}, got H={d.H}")
    if segment_ids is not None:
        packing.check(segment_ids, d.B, d.T)
    factor("scale", scale)
    if finite("eps", eps) < 0 or (eps and not normalize):
        raise ValueError(f"eps: expected {'a value >= 0' if normalize else '0 without normalize'}, got {eps}")
    if write is not None and normalize:
        raise ValueError("write: expected None with normalize, got an array")
    if not causal and (log_decay is not None or state is not None):
        given = "log_decay" if log_decay is not None else "state"
        raise ValueError(f"{given}: expected None with causal=False, got an array")
    power_of_two("chunk", chunk)
    return d, jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)


def _decay(log_decay, acc, length):
    """log_decay in the accumulating dtype; [H] as [1, T, H]."""
    if log_decay is None:
        return None
    log_decay = log_decay.astype(acc)
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (1, length, *log_decay.shape))
    return log_decay


def _without_padding(x, runs):
    """Zeros at padding: nothing is read or written there, and nothing decays."""
    return None if x is None else jnp.where((runs != 0).reshape(*runs.shape, *[1] * (x.ndim - 2)), x, 0)


def _states(state, normalize, d, acc):
    """The states of the values, [B, H, K, V] and [B, H, K, 1]."""
    if state is None:
        widths = (d.V, 1) if normalize else (d.V,)
        return tuple(jnp.zeros((d.B, d.H, d.K, width), acc) for width in widths)
    state = (state[0], state[1][..., None]) if normalize else (state,)
    return tuple(s.astype(acc) for s in state)


def linear_attention_flops(batch, seq, heads, key_heads, key_dim, value_dim, chunk=64, per_channel=False) -> int:
    """FLOPs of the chunked form's forward pass, causal, with a decay per head or per channel, a multiply-add being two.

    As XLA counts them: whole C x C squares, and exp for nothing. Without a decay it is some 6 C^2 per chunk and head
    less. The arguments are B, T, H, Hk, K, V, C of `linear_attention`; a short T makes the chunk shorter.
    """
    if seq == 1:
        return 5 * batch * heads * key_dim * value_dim
    blocks, size, c = linear_chunked.plan(seq, chunk, batch * heads)
    chunks, tile = batch * blocks * size, c * key_dim
    head = 2 * matmul(tile, value_dim) + matmul(c, c, value_dim) + (2 * key_dim + c) * value_dim
    if per_channel:
        levels = c.bit_length() - 1
        return chunks * heads * (head + tile * (c - 1 + 2 * levels + 4))
    return chunks * (key_heads * matmul(tile, c) + heads * (head + 2 * c * value_dim + 7 * c * c))
