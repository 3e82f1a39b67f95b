"""Log-linear attention: linear attention or the delta rule with one state for each level of distance."""

import functools

import jax.numpy as jnp

from seqmix.core.flops import matmul
from seqmix.core.shapes import check_arrays, dims
from seqmix.ops import log_linear_context
from seqmix.ops.delta import prepare
from seqmix.ops.dispatch import pick
from seqmix.ops.linear_chunked import plan
from seqmix.ops.linear_reference import decay_spec
from seqmix.ops.log_linear_chunked import chunked, read_levels
from seqmix.ops.log_linear_reference import recurrence
from seqmix.ops.mesh import layout
from seqmix.ops.triangular import unit_lower_inverse_flops


def log_linear_attention(
    q,
    k,
    v,
    level_scales,
    log_decay=None,
    *,
    scale=1.0,
    state=None,
    segment_ids=None,
    chunk=64,
    implementation=None,
):
    """Linear attention in which a token weighs another by the level of their distance, of which there are log T.

        y_t       = scale sum_{s <= t} level_scales[t, lev(t, s)] M_ts v_s
        M_ts      = q_t . (exp(log_decay_{s+1} + ... + log_decay_t) k_s)
        lev(t, s) = number of bits of t xor s, for positions t, s within their segment: 0 for s = t

    Level l >= 1 joins each token of the later half of a block
    of 2^l positions, blocks side by side from 0 on, with all of the earlier half. So it is a recurrence of its own

        S_l = exp(log_decay_t) S_l (0 where such a block begins) + k_t v_t^T (in the earlier half alone)

    that is read in the later half, and level_scales of 1 give `linear_attention`. Cost grows as T log T.

    Args:
      q, k: [B, T, Hk, K], floating; Hk divides H.
      v: [B, T, H, V], floating.
      level_scales: [B, T, H, NL], floating, of any sign and read in the accumulating dtype. Positions stay below
        2^(NL - 1); T may not be more.
      log_decay: None, [H], [B, T, H] or [B, T, H, K], floating, <= 0, however low.
      scale: factor on y.
      state: what earlier tokens left, as returned: the pair of the levels' states [B, H, L, K, V], 1 <= L < NL, and
        of the row's length [B], integers. Positions then stay below 2^L (unchecked: tokens of a higher level would
        be missed), and scales of levels above L are not read. None: zeros, L = NL - 1.
      segment_ids: [B, T] integers. A new non-zero id starts from zeros, at position 0; 0 is padding: it neither
        writes, decays nor advances positions, and y is 0 there. `state` belongs to a row's first segment, the one
        returned to its last. Segments may start anywhere in a chunk; without ids and state fewer levels are computed.
      chunk: tokens computed as one matrix by the chunked form, a power of two.
      implementation: None (the best for the call), "chunked" or "reference".

    Returns:
      (y [B, T, H, V] in the dtype of v, state), the levels' states in promote(dtype of q, k and v, float32).

    Raises: ValueError for shapes, dtypes, options or an implementation that do not fit.

    Source: Guo et al. 2506.04761, with states per level that do not depend on each other (the paper's are merged and
    moved up a level as blocks end: S_l here is that one's, or in the earlier half the sum of those below l).
    """
    return _log_linear(
        "log_linear_attention", q, k, v, None, level_scales, log_decay, scale, state, segment_ids, chunk, implementation
    )


def log_linear_delta_rule(
    q,
    k,
    v,
    beta,
    level_scales,
    log_decay=None,
    *,
    scale=1.0,
    state=None,
    segment_ids=None,
    chunk=64,
    implementation=None,
):
    """The delta rule whose mixing matrix M [T, T] is weighed by levels, as `log_linear_attention` weighs its own.

        y_t = sum_{s <= t} level_scales[t, lev(t, s)] M_ts v_s,     M v = delta_rule(q, k, v, beta, log_decay)
        S_l = (I - beta_t k_t k_t^T) exp(log_decay_t) S_l (0 where a block of 2^l begins)
              + beta_t k_t v_t^T (in the block's earlier half alone), read in its later half

    Args: beta [B, T, H], floating, of any range; all others, what is returned and raised as for
    `log_linear_attention`. level_scales of 1 give `delta_rule`.
    """
    return _log_linear(
        "log_linear_delta_rule",
        q,
        k,
        v,
        beta,
        level_scales,
        log_decay,
        scale,
        state,
        segment_ids,
        chunk,
        implementation,
    )


def levels_of(length: int) -> int:
    """L, the levels above 0 of `length` positions (at least 1): pairs of tokens below it have lev <= L."""
    return max(1, (length - 1).bit_length())


def log_linear_flops(batch, seq, heads, key_heads, key_dim, value_dim, chunk=64, delta=False) -> int:
    """FLOPs of the chunked form's forward pass without segments and state, with a decay per head, a multiply-add
    being two; the last state, which costs more, not counted. `delta`: of `log_linear_delta_rule`. The other
    arguments are B, T, H, Hk, K, V, C of the ops.
    """
    near, far = read_levels(seq, chunk)
    c = plan(seq, chunk, 1)[2]
    tile, square = c * key_dim, c * c
    head = matmul(square, value_dim) + (8 + 3 * near) * square
    if delta:
        head += unit_lower_inverse_flops(c) + matmul(square, key_dim) + matmul(square, c) + 4 * square
    between = 2 * matmul(tile, value_dim) + (6 * c + 2 * key_dim) * value_dim
    if delta:
        between += matmul(tile, value_dim) + matmul(square, value_dim)
    shared = (2 if delta else 1) * matmul(square, key_dim)
    return batch * -(-seq // c) * (heads * (head + max(0, far - near) * between) + key_heads * shared)


def _log_linear(op, q, k, v, beta, level_scales, log_decay, scale, state, segment_ids, chunk, implementation):
    levels, length = _pair(state)
    specs = {"q": "B T Hk K", "k": "B T Hk K", "v": "B T H V", "beta": "B T H", "level_scales": "B T H NL"}
    specs |= {"log_decay": decay_spec(log_decay), "state": "B H L K V"}
    check_arrays(level_scales=level_scales)
    floats = dict(q=q, k=k, v=v, level_scales=level_scales, log_decay=log_decay, state=levels)
    if op == "log_linear_delta_rule":
        floats |= dict(beta=beta)
        check_arrays(beta=beta)
    d = dims(specs, **floats)
    log_decay, run_ids, acc = prepare(d, floats, segment_ids, chunk, scale)
    if not 2 <= d.NL <= 31:
        raise ValueError(f"level_scales: expected between 2 and 31 levels, got {d.NL}")
    if d.T > 1 << (d.NL - 1):
        raise ValueError(f"level_scales: expected at least {levels_of(d.T) + 1} levels for T={d.T}, got {d.NL}")
    if levels is not None:
        if not 1 <= d.L < d.NL:
            raise ValueError(f"state: expected at least 1 and less than NL={d.NL} levels, got {d.L}")
        if length.shape != (d.B,) or not jnp.issubdtype(length.dtype, jnp.integer):
            got = f"{length.dtype} {tuple(length.shape)}"
            raise ValueError(f"state: expected integer lengths of shape (B={d.B}), got {got}")
        levels, level_scales = levels.astype(acc), level_scales[..., : d.L + 1]
    level_scales = level_scales.astype(acc)
    beta = None if beta is None else beta.astype(acc)
    name = pick(op, implementation, {"chunked": None, "reference": None})
    args = q, k, v, beta, log_decay, level_scales
    lay, fast = layout(d.B, d.T, d.H, d.Hk), name == "chunked" and d.T > 1
    cut = lay is not None and lay.time
    if levels is None and (cut or not fast):
        levels = jnp.zeros((d.B, d.H, d.NL - 1, d.K, d.V), acc)
        length = jnp.zeros(d.B, jnp.int32)
    form = functools.partial(chunked, chunk=chunk) if fast else recurrence
    form = functools.partial(log_linear_context.run, lay, form, d) if cut else form
    y, levels, length = form(*args, scale=scale, state=levels, length=length, run_ids=run_ids)
    return y, (levels, length)


def _pair(state):
    if state is None:
        return None, None
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise ValueError(f"state: expected the pair (levels, length), got {type(state).__name__}")
    for held in state:
        check_arrays(state=held)
    return state
