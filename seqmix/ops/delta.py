"""The delta rule: a matrix state that is corrected towards its values instead of only added to."""

import jax.numpy as jnp

from seqmix.core import packing
from seqmix.core.shapes import dims
from seqmix.ops import dispatch
from seqmix.ops.delta_chunked import delta_rule_chunked, rank_one_chunked
from seqmix.ops.delta_reference import delta_rule_reference, rank_one_reference


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
    """Recurrence whose state predicts the value at a key and is corrected by beta times the error.

        S_t = (I - beta_t k_t a_t^T) diag(exp(log_decay_t)) S_{t-1} + beta_t k_t v_t^T,     a_t = k_t or erase_t
        y_t = scale S_t^T q_t

    With `steps` = n > 1, a token decays once and then takes n such corrections, each with its own k, v, beta and
    erase; y is read after the last. Head h reads key head h // (H / Hk). Nothing is normalised: for keys of
    length one, beta in (0, 1) moves the prediction towards v, (0, 2) gives contractions with eigenvalues
    in (-1, 1); longer keys may diverge.

    Args:
        q: [B, T, Hk, K], k: [B, T, Hk, K], v: [B, T, H, V]; Hk divides H. Floating, one dtype.
        beta: [B, T, H], any range.
        log_decay: None, [H], [B, T, H] or, per channel, [B, T, H, K]; at most 0, however low. Like beta it is
            read in float32 (float64 for float64 inputs).
        erase: [B, T, Hk or H, K], what the correction is read with, instead of k.
        steps: corrections a token; k, v, beta and erase are [B, T, n, ...] for n > 1 (as they may be for 1).
        state: [B, H, K, V] before the first token; None for zeros.
        segment_ids: [B, T] int, 0 for padding, or None.
        chunk: tokens (times steps) solved at once, a power of two.
        implementation: None, "chunked" or "reference".

    Returns:
        y [B, T, H, V] in the dtype of v, 0 at padding, and the state after it, [B, H, K, V] in float32 (float64).

    Raises ValueError for shapes, dtypes or an implementation that do not fit.
    DeltaNet (Schlag et al., arXiv 2102.11174; chunks: 2406.06484), Gated DeltaNet (2412.06464), KDA (decays per
    channel, 2510.26692), DeltaProduct (steps, 2502.10297).
    """
    if k.ndim == 4 and steps == 1:
        k, v, beta = (x[:, :, None] for x in (k, v, beta))
        erase = None if erase is None else erase[:, :, None]
    d = dims(
        {"k": "B T n Hk K", "q": "B T Hk K", "v": "B T n H V", "beta": "B T n H"}, k=k, q=q, v=v, beta=beta
    )
    if d.n != steps:
        raise ValueError(f"k: expected steps={steps} steps in (B, T, steps, Hk, K), got {k.shape}")
    if erase is not None:
        _check_vector("erase", erase, (d.B, d.T, d.n), d)
    log_decay, state, run_ids = _check(d, q, k, v, log_decay, state, segment_ids, chunk)
    args = q, k, v, beta, log_decay, k if erase is None else erase
    options = dict(scale=scale, state=state, run_ids=run_ids)
    picked = dispatch.pick("delta_rule", implementation, {"chunked": None, "reference": None})
    if picked == "reference" or d.T == 1:
        return delta_rule_reference(*args, **options)
    return delta_rule_chunked(*args, **options, chunk=chunk)


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
    """Recurrence with a transition of a diagonal and a rank one of vectors of its own.

        S_t = (diag(exp(log_decay_t)) + left_t right_t^T) S_{t-1} + k_t v_t^T
        y_t = scale S_t^T q_t

    `right` reads the state before the step's decay. RWKV-7 (Peng et al., arXiv 2503.14456), whose state is the
    transpose of this one, has log_decay = log w, right = kappa, left = -a * kappa, and its replaced key for k.
    `delta_rule` is the case right = exp(log_decay) a, left = -beta k with a write of beta k v^T.

    Args:
        q, k: [B, T, Hk, K], v: [B, T, H, V]; Hk divides H. Floating, one dtype.
        left, right: [B, T, Hk or H, K]. The transition's norm is the caller's care.
        log_decay, state, segment_ids, chunk, implementation: as for `delta_rule`.

    Returns y [B, T, H, V] and the state [B, H, K, V], as `delta_rule` does.
    Raises ValueError for shapes, dtypes or an implementation that do not fit.
    """
    d = dims({"k": "B T Hk K", "q": "B T Hk K", "v": "B T H V"}, k=k, q=q, v=v)
    _check_vector("left", left, (d.B, d.T), d)
    _check_vector("right", right, (d.B, d.T), d)
    log_decay, state, run_ids = _check(d, q, k, v, log_decay, state, segment_ids, chunk)
    args = q, k, v, left, right, log_decay
    options = dict(scale=scale, state=state, run_ids=run_ids)
    picked = dispatch.pick("diagonal_plus_rank_one", implementation, {"chunked": None, "reference": None})
    if picked == "reference" or d.T == 1:
        return rank_one_reference(*args, **options)
    return rank_one_chunked(*args, **options, chunk=chunk)


def _check_vector(name, x, lead, d):
    heads = (d.Hk, d.H)
    if x.ndim != len(lead) + 2 or x.shape[:-2] != lead or x.shape[-2] not in heads or x.shape[-1] != d.K:
        shown = ", ".join(map(str, lead))
        raise ValueError(f"{name}: expected shape ({shown}, Hk={d.Hk} or H={d.H}, K={d.K}), got {x.shape}")


def _check(d, q, k, v, log_decay, state, segment_ids, chunk):
    """log_decay [B, T, H, 1 or K] or None, the state in the accumulating dtype, the runs of the segments."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")
    if d.H % d.Hk:
        raise ValueError(f"v: expected a multiple of Hk={d.Hk} heads, got H={d.H}")
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk: expected a power of two, got {chunk}")
    acc = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    if log_decay is not None:
        allowed = {1: (d.H,), 3: (d.B, d.T, d.H), 4: (d.B, d.T, d.H, d.K)}
        if log_decay.shape != allowed.get(log_decay.ndim):
            expected = f"(H={d.H},), (B={d.B}, T={d.T}, H={d.H}) or (B, T, H, K={d.K})"
            raise ValueError(f"log_decay: expected shape {expected}, got {log_decay.shape}")
        log_decay = log_decay if log_decay.ndim == 4 else log_decay[..., None]
        log_decay = jnp.broadcast_to(log_decay.astype(acc), (d.B, d.T, *log_decay.shape[-2:]))
    if state is None:
        state = jnp.zeros((d.B, d.H, d.K, d.V), acc)
    elif state.shape != (d.B, d.H, d.K, d.V):
        raise ValueError(
            f"state: expected shape (B={d.B}, H={d.H}, K={d.K}, V={d.V}), got {tuple(state.shape)}"
        )
    run_ids = None
    if segment_ids is not None:
        packing.check(segment_ids, d.B, d.T)
        run_ids = packing.runs(segment_ids)
    return log_decay, state.astype(acc), run_ids
