"""The delta rule: a matrix state that is corrected towards its values instead of only added to."""

import functools

import jax.numpy as jnp

from seqmix.core import packing
from seqmix.core.flops import matmul
from seqmix.core.shapes import check_arrays, dims, factor, filled, floating, positive, power_of_two
from seqmix.ops import delta_context, step_kernels
from seqmix.ops.delta_chunked import delta_rule_chunked, rank_one_chunked
from seqmix.ops.delta_reference import delta_rule_reference, rank_one_reference
from seqmix.ops.dispatch import pick
from seqmix.ops.linear_chunked import plan
from seqmix.ops.linear_reference import decay_spec
from seqmix.ops.mesh import layout
from seqmix.ops.triangular import unit_lower_inverse_flops


def delta_rule(
    q,
    k,
    v,
    beta,
    log_decay=None,
    *,
    erase=None,
    scale=1.0,
    steps=1,
    state=None,
    segment_ids=None,
    chunk=64,
    implementation=None,
):
    """Recurrence whose state predicts the value at a key, and is corrected by beta times the error.

        S_t = (I - beta_t k_t a_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T,    a_t = k_t unless `erase`
        y_t = scale S_t^T q_t

    With `steps` = n > 1 a token decays once, and then makes n such corrections, one after the other, each with its
    own k, v, beta and erase; y is read after the last. Head h takes the queries and keys of head h // (H / Hk).
    Nothing is normalised here: for keys of length one, beta in (0, 1) moves the prediction towards v, and (0, 2)
    allows transitions with eigenvalues in (-1, 1). Longer keys make the state grow where beta |k|^2 > 2.

    Args:
        q, k: [B, T, Hk, K], floating; Hk divides H (grouped heads are not repeated, but for decays per channel).
        v: [B, T, H, V], floating.
        beta: [B, T, H], of any range; nothing is clamped.
        log_decay: None, [H], [B, T, H] or, per channel, [B, T, H, K]; <= 0, however low. Like beta it is read in
            the accumulating dtype, promote(dtype of q, k and v, float32).
        scale: factor on y.
        erase: [B, T, Hk or H, K], with which the prediction is read instead of with k.
        steps: n; where it is not 1, k, v, beta and erase are [B, T, n, ...] (for n = 1 they may be).
        state: [B, H, K, V], what earlier tokens left; None for zeros.
        segment_ids: [B, T] integers. A new non-zero id starts from zeros, 0 is padding: it neither writes nor
            decays, and y is 0 there. `state` belongs to a row's first segment, the one returned to its last.
        chunk: steps that the chunked form solves as one system, a power of two.
        implementation: None (the best for the call), "gpu" (a Hopper kernel that reads and writes the state once, for
            one token and step alone), "chunked" or "reference". Where a GPU has few rows
            and heads and many chunks, "chunked" goes through parts of time side by side; those have no forward-mode
            derivative.

    Returns:
        (y [B, T, H, V] in the dtype of v, state [B, H, K, V] in the accumulating dtype).

    Raises: ValueError for shapes, dtypes, options or an implementation that do not fit.

    Source: DeltaNet (Schlag et al. 2102.11174; in chunks Yang et al. 2406.06484), Gated DeltaNet (2412.06464), Kimi
    Delta Attention (decays per channel, 2510.26692), DeltaProduct (several steps, 2502.10297).
    """
    check_arrays(q=q, k=k, v=v, beta=beta, erase=k if erase is None else erase)
    positive("steps", steps)
    if k.ndim == 4 and steps == 1:
        k, v, beta = (x[:, :, None] for x in (k, v, beta))
        erase = None if erase is None else erase[:, :, None]
    specs = {"k": "B T n Hk K", "q": "B T Hk K", "v": "B T n H V", "beta": "B T n H", "state": "B H K V"}
    specs["log_decay"] = decay_spec(log_decay)
    floats = dict(k=k, q=q, v=v, beta=beta, log_decay=log_decay, state=state)
    d = dims(specs, **floats)
    if d.n != steps:
        raise ValueError(f"k: expected shape (B, T, steps={steps}, Hk, K), got {tuple(k.shape)}")
    if erase is not None:
        _check_vector("erase", erase, (d.B, d.T, d.n), d)
    given = log_decay
    log_decay, run_ids, acc = prepare(d, floats, segment_ids, chunk, scale)
    state = jnp.zeros((d.B, d.H, d.K, d.V), acc) if state is None else state.astype(acc)
    erase = k if erase is None else erase
    args = q, k, v, beta, log_decay, erase
    options = dict(scale=scale, state=state, run_ids=run_ids)
    lay = layout(d.B, d.T, d.H, d.Hk)
    reason = "has a kernel for one step of one token alone"
    if steps == d.T == 1:
        k, v, beta, erase = (x[:, :, 0] for x in (k, v, beta, erase))
        one = state, q, k, v, given, beta, erase, None
        reason = step_kernels.reason(implementation, one, run_ids, scale=scale, lay=lay)
    name = pick("delta_rule", implementation, {"gpu": reason, "chunked": None, "reference": None})
    if name == "gpu":
        return step_kernels.run(one, scale=scale, lay=lay)
    plain = name == "reference" or d.T == 1
    form = delta_rule_reference if plain else functools.partial(delta_rule_chunked, chunk=chunk)
    chunk = None if plain else chunk
    return delta_context.run(lay, form, d, args, (2, 3, 3, 3, 2, 3), chunk=chunk, **options)


def diagonal_plus_rank_one(
    q,
    k,
    v,
    left,
    right,
    log_decay=None,
    *,
    scale=1.0,
    state=None,
    segment_ids=None,
    chunk=64,
    implementation=None,
):
    """Recurrence whose transition is a diagonal plus a product of two vectors, neither of which need be the key.

        S_t = (diag(exp(log_decay_t)) + left_t right_t^T) S_{t-1} + k_t v_t^T
        y_t = scale S_t^T q_t

    `right` reads the state as it was before the step's decay. RWKV-7 (Peng et al. 2503.14456, whose
    state is this one's transpose, diag(w) - kappa^T (a * kappa) on its right) has log_decay = log w, right = kappa,
    left = -a * kappa and the key k as it is written. `delta_rule` is the case left = -beta k, right = exp(log_decay)
    a, with beta k written.

    Args:
        q, k: [B, T, Hk, K], v: [B, T, H, V], floating; Hk divides H.
        left, right: [B, T, Hk or H, K]. That the transition does not grow is the caller's care.
        log_decay, scale, state, segment_ids, chunk, implementation: as for `delta_rule`.

    Returns: (y [B, T, H, V] in the dtype of v, state [B, H, K, V] in the accumulating dtype).

    Raises: ValueError for shapes, dtypes, options or an implementation that do not fit.
    """
    specs = {"k": "B T Hk K", "q": "B T Hk K", "v": "B T H V", "state": "B H K V"}
    specs["log_decay"] = decay_spec(log_decay)
    floats = dict(k=k, q=q, v=v, log_decay=log_decay, state=state)
    d = dims(specs, **floats)
    _check_vector("left", left, (d.B, d.T), d)
    _check_vector("right", right, (d.B, d.T), d)
    given = log_decay
    log_decay, run_ids, acc = prepare(d, floats, segment_ids, chunk, scale)
    state = jnp.zeros((d.B, d.H, d.K, d.V), acc) if state is None else state.astype(acc)
    args = q, k, v, left, right, log_decay
    options = dict(scale=scale, state=state, run_ids=run_ids)
    lay = layout(d.B, d.T, d.H, d.Hk)
    one = state, q, k, v, given, None, right, left
    reason = step_kernels.reason(implementation, one, run_ids, scale=scale, lay=lay)
    reasons = {"gpu": reason, "chunked": None, "reference": None}
    name = pick("diagonal_plus_rank_one", implementation, reasons)
    if name == "gpu":
        return step_kernels.run(one, scale=scale, lay=lay)
    plain = name == "reference" or d.T == 1
    form = rank_one_reference if plain else functools.partial(rank_one_chunked, chunk=chunk)
    chunk = None if plain else chunk
    return delta_context.run(lay, form, d, args, (2,) * 6, chunk=chunk, **options)


def delta_rule_flops(batch, seq, heads, key_heads, key_dim, value_dim, chunk=64, per_channel=False, steps=1) -> int:
    """FLOPs of the chunked form's forward pass, a multiply-add being two: with a decay per head or per channel (and
    some per cent less without). The arguments are B, T, H, Hk, K, V, C, n of `delta_rule`.
    """
    if seq == 1:
        return 4 * (steps + 1) * batch * heads * key_dim * value_dim
    return _flops(batch, seq * steps, heads, key_heads, key_dim, value_dim, chunk, per_channel, False)


def diagonal_plus_rank_one_flops(batch, seq, heads, key_heads, key_dim, value_dim, chunk=64, per_channel=False) -> int:
    """`delta_rule_flops` for `diagonal_plus_rank_one`, with Hk heads of `left` and `right`."""
    if seq == 1:
        return 9 * batch * heads * key_dim * value_dim
    return _flops(batch, seq, heads, key_heads, key_dim, value_dim, chunk, per_channel, True)


def _flops(batch, length, heads, key_heads, key_dim, value_dim, chunk, per_channel, rank_one):
    blocks, chunks, c = plan(length, chunk, batch * heads)
    scores = 4 if rank_one else 2
    tile, square = c * key_dim, c * c
    head = (4 if rank_one else 3) * matmul(tile, value_dim) + scores * matmul(square, value_dim)
    head += unit_lower_inverse_flops(c) + 2 * key_dim * value_dim + 6 * c * value_dim + 5 * square
    if per_channel:  # the levels of a score, and what reads and writes the state
        head += scores * (square * key_dim + (2 * (c.bit_length() - 1) + 2) * tile) + (scores + 1) * tile
    else:
        head += 7 * square
    shared = 0 if per_channel else scores * matmul(square, key_dim)
    return batch * blocks * chunks * (heads * head + key_heads * shared)


def _check_vector(name, x, lead, d):
    check_arrays(**{name: x})
    if x.shape not in ((*lead, d.Hk, d.K), (*lead, d.H, d.K)):
        shown = ", ".join(map(str, lead))
        raise ValueError(f"{name}: expected shape ({shown}, Hk={d.Hk} or H={d.H}, K={d.K}), got {tuple(x.shape)}")
    floating(**{name: x})


def prepare(d, floats, segment_ids, chunk, scale):
    """log_decay [B, T, H, 1 or K] or None, the segments' runs or None, the accumulating dtype, after the checks left
    to make of sizes `d` and arrays `floats` by name.
    """
    floating(**floats)
    filled(**{name: floats[name] for name in "qkv"})
    if d.H % d.Hk:
        raise ValueError(f"v: expected a number of heads divisible by Hk={d.Hk}, got H={d.H}")
    power_of_two("chunk", chunk)
    factor("scale", scale)
    acc = jnp.promote_types(jnp.result_type(floats["q"], floats["k"], floats["v"]), jnp.float32)
    log_decay, run_ids = floats["log_decay"], None
    if log_decay is not None:
        log_decay = log_decay.astype(acc) if log_decay.ndim == 4 else log_decay.astype(acc)[..., None]
        log_decay = jnp.broadcast_to(log_decay, (d.B, d.T, d.H, log_decay.shape[-1]))
    if segment_ids is not None:
        packing.check(segment_ids, d.B, d.T)
        run_ids = packing.runs(segment_ids)
    return log_decay, run_ids, acc
