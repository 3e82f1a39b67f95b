"""The delta rule and its relatives over chunks of time: matmuls within chunks, a scan over chunks.

Both ops are cases of

    u_t = b_t + c_t right_t^T S'_t,    S_t = D_t S_{t-1} + left_t u_t^T (+ k_t v_t^T),    y_t = scale S_t^T q_t

with D_t = diag(exp(decay_t)). The delta rule has left = k, right = erase, c = -beta, b = beta v and reads
S'_t = D_t S_{t-1}; the diagonal plus rank one has c = 1, b = 0, a write of its own and reads S'_t = S_{t-1}.
Let D_ij be the decay from after token j to token i, D'_ij that to where token i reads, and D_i, D'_i those from
the chunk's start. Unrolling u over a chunk that starts from S gives a unit lower triangular system, the WY or UT
form (Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length", arXiv 2406.06484;
with decays: "Gated Delta Networks", arXiv 2412.06464):

    (I + A) u = b + E v + c (D' right) S,    A_ij = -c_i right_i D'_ij left_j,    E_ij = right_i D'_ij k_j,    j < i

(I + A)^-1, b + E v and all scores are made for a block of chunks at once (anew in the backward pass, from the
block's first state, which alone is kept); the scan over its chunks has three products left.
The right side is summed up before it is multiplied by the inverse: where the state already holds the values, it
is small, and so are its roundings, while the inverse of b and of c (D' right), made apart, would not be.

Layout: [B, H, N chunks, C, ...], or Hk heads for what a group of heads shares and no product needs to repeat.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmix.ops import targets
from seqmix.ops.linear_anchored import channel_scores, contract, head_weights, prefix_suffix
from seqmix.ops.linear_chunked import plan
from seqmix.ops.triangular import unit_lower_inverse

# Chunks that a GPU takes in one step of the loop. XLA launches these as one graph, but one chunk's kernels one by one,
# with copies of its inputs before them.
UNROLL = 4


class Chunks(NamedTuple):
    """The inputs in the layout above; the last four are None without segments."""

    q: jax.Array  # [B, Hk, N, C, K]
    left: jax.Array  # [B, Hk or H, N, C, K]
    right: jax.Array  # [B, Hk or H, N, C, K]
    value: jax.Array  # [B, H, N, C, V]
    key: jax.Array | None  # [B, Hk, N, C, K], of the diagonal plus rank one alone
    beta: jax.Array | None  # [B, H, N, C, 1], of the delta rule alone
    decay: jax.Array | None  # [B, H, N, C, 1 or K], in log space
    same: jax.Array | None  # [B, 1, N, C, C]: whether two tokens are of one segment
    entered: jax.Array | None  # [B, 1, N, C, 1]: whether the token is of the segment that entered the chunk
    leaves: jax.Array | None  # [B, 1, N, C, 1]: whether it is of the segment that leaves the chunk
    kept: jax.Array | None  # [B, 1, N, 1, 1]: whether those two segments are one


def delta_rule_chunked(q, k, v, beta, log_decay, erase, *, scale, state, run_ids, chunk, halves=False):
    """Arguments as for `delta_rule_reference`, and the chunk.

    halves: gives instead the outputs [blocks, B, H, N, C, V] without scale, the state, and what makes y of these.
    """
    steps = k.shape[2]
    k, v, beta, erase = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v, beta, erase))
    if steps > 1:  # one step after the other, the decay before the first, the query after the last
        q = _place(q, steps - 1, steps)
        log_decay = None if log_decay is None else _place(log_decay, 0, steps)
        run_ids = None if run_ids is None else jnp.repeat(run_ids, steps, axis=1)
    y, state = _run(q, k, erase, v, None, beta[..., None], log_decay, state, run_ids, chunk)
    finish = lambda y: (scale * joined(y, v.shape[1], run_ids)[:, steps - 1 :: steps]).astype(v.dtype)
    return (y, state, finish) if halves else (finish(y), state)


def rank_one_chunked(q, k, v, left, right, log_decay, *, scale, state, run_ids, chunk, halves=False):
    """Arguments as for `rank_one_reference`, and the chunk; halves: as for `delta_rule_chunked`."""
    y, state = _run(q, left, right, v, k, None, log_decay, state, run_ids, chunk)
    finish = lambda y: (scale * joined(y, v.shape[1], run_ids)).astype(v.dtype)
    return (y, state, finish) if halves else (finish(y), state)


def _place(x, at, steps):
    """[B, T * steps, ...] with x [B, T, ...] in step `at` of each token, else 0."""
    wide = jnp.pad(x[:, :, None], [(0, 0), (0, 0), (at, steps - 1 - at)] + [(0, 0)] * (x.ndim - 2))
    return wide.reshape(x.shape[0], -1, *x.shape[2:])


def _run(q, left, right, value, key, beta, log_decay, state, run_ids, chunk):
    """y [blocks, B, H, N, C, V] in the dtype of the state and without scale, and the state."""
    batch, time, heads, _ = value.shape
    shape = plan(time, chunk, batch * heads)
    c = in_chunks(q, left, right, value, key, beta, log_decay, state.dtype, run_ids, shape)
    state, y = scan_blocks(_block, state, c)
    return y, state


def in_chunks(q, left, right, value, key, beta, log_decay, acc, run_ids, shape):
    """The inputs [B, T, H, X] as Chunks with blocks in front; shape: (blocks, N, C) of `plan`."""
    dtype = jnp.result_type(q, left, value)
    operands = [cut(x, dtype, run_ids, shape) for x in (q, left, right, value, key)]
    masks = [None] * 4 if run_ids is None else _masks(run_ids, *shape)
    return Chunks(*operands, cut(beta, acc, run_ids, shape), cut(log_decay, acc, run_ids, shape), *masks)


def cut(x, dtype, run_ids, shape):
    """[blocks, B, H, N, C, X] of x [B, T, H, X]. Padding neither writes nor decays."""
    if x is None:
        return None
    if run_ids is not None:
        x = jnp.where((run_ids != 0)[..., None, None], x, 0)
    blocks, chunks, size = shape
    x = jnp.pad(x.astype(dtype), ((0, 0), (0, blocks * chunks * size - x.shape[1]), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, chunks, size, *x.shape[2:]), (1, 4), (0, 2))


def scan_blocks(block, state, xs):
    """The state after all blocks and their results; each block is computed anew by the backward pass."""
    if jax.tree.leaves(xs)[0].shape[0] > 1:
        return jax.lax.scan(jax.checkpoint(block, prevent_cse=False), state, xs)
    state, y = jax.checkpoint(block)(state, jax.tree.map(lambda x: x[0], xs))
    return state, y[None]


def joined(y, time, run_ids):
    """[B, T, H, V] of y [blocks, B, H, N, C, V], 0 at padding."""
    y = jnp.moveaxis(y, (0, 2), (1, 4))
    y = y.reshape(y.shape[0], -1, *y.shape[4:])[:, :time]
    return y if run_ids is None else jnp.where((run_ids != 0)[..., None, None], y, 0)


def _masks(run_ids, blocks, chunks, size):
    """The last four of Chunks. Padding counts as of the segment before it, the incoming state as of the first."""
    run = jnp.maximum(jax.lax.cummax(run_ids, axis=1), 1)
    run = jnp.pad(run, ((0, 0), (0, blocks * chunks * size - run.shape[1])), mode="edge")
    run = run.reshape(run.shape[0], -1, size, 1)
    after = run[:, :, -1:]
    before = jnp.pad(after[:, :-1], ((0, 0), (1, 0), (0, 0), (0, 0)), constant_values=1)
    masks = run == jnp.swapaxes(run, -1, -2), run == before, run == after, before == after
    shape = run.shape[0], 1, blocks, chunks
    return [jnp.moveaxis(x.reshape(*shape, *x.shape[2:]), 2, 0) for x in masks]


def _block(state, c):
    """The state after N chunks, and S_t^T q_t [B, H, N, C, V] in them.

    A state may have more columns than there are values: nothing is written to the last of them.
    """
    written = lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, state.shape[-1] - x.shape[-1])])
    inverse, target, right, right_rows = chunk_system(c)
    to_end = decay_sums(c.decay, reverse=True)
    left, left_rows = decayed(c.left, to_end, c.leaves)
    key = None if c.key is None else decayed(c.key, to_end, c.leaves)[0]
    value = None if c.key is None else c.value
    decay, precision = passing(c), solving(c.q.dtype)

    def advance(s, chunk):
        inverse, target, right, right_rows, left, left_rows, key, value, decay = chunk
        target = written(target) + times(product("bhck,bhkv->bhcv", right, s), right_rows)
        u = jnp.matmul(inverse, target, precision=precision)
        new = times(s, decay) + product("bhck,bhcv->bhkv", left, times(u, left_rows))
        if key is not None:
            new = new + written(product("bhck,bhcv->bhkv", key, times(value, left_rows)))
        return new, (s.astype(right.dtype), u.astype(right.dtype))

    xs = inverse, target, right, right_rows, left, left_rows, key, value, decay
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), xs)
    state, ys = jax.lax.scan(advance, state, xs, unroll=1 if targets.capability() is None else UNROLL)
    entering, u = (jnp.moveaxis(x, 0, 2) for x in ys)
    q, rows = decayed(c.q, decay_sums(c.decay), c.entered)
    y = times(product("bhnck,bhnkv->bhncv", q, entering), rows) + _mix(chunk_scores(c, c.q, c.left), u)
    return state, y if c.key is None else y + written(_mix(chunk_scores(c, c.q, c.key), c.value))


def passing(c):
    """What a state is multiplied by over each chunk, [B, H, N, K or 1, 1], or None."""
    decay = None if c.decay is None else jnp.exp(jnp.sum(c.decay, axis=-2))[..., None]
    return decay if c.kept is None else jnp.where(c.kept, 1.0 if decay is None else decay, 0.0)


def solving(dtype):
    """The precision of products with the inverse, which is float32 for all dtypes: its roundings would be the
    largest of all. Beside 16-bit products, TF32 on GPUs and three passes on TPUs are exact enough.
    """
    return jax.lax.Precision.HIGH if dtype.itemsize < 4 else jax.lax.Precision.HIGHEST


def chunk_system(c):
    """(I + A)^-1, b + E v, and x and rows with c (D' right) S = rows * (x S)."""
    early = c.beta is None  # reads before its own step's decay
    system = chunk_scores(c, c.right, c.left, system=True, early=early)
    right, rows = decayed(c.right, decay_sums(c.decay, early=early), c.entered)
    if early:
        target = _mix(chunk_scores(c, c.right, c.key, early=True), c.value)
        return unit_lower_inverse(-system), target, right, rows
    rows = -times(c.beta, rows)
    return unit_lower_inverse(c.beta * system), c.beta * c.value, right, rows


def chunk_scores(c, x, y, system=False, early=False):
    """x_i . y_j under the decay between j and i, for j <= i, within segments: [B, H, N, C, C]. `system`: for j < i,
    as precise as the inverse. `early`: for j < i, without the decay of step i.
    """
    heads = c.value.shape[1]
    if early:  # row i is row i - 1 of the next token's x
        x = _shift(x, -1)
    if c.decay is not None and c.decay.shape[-1] > 1:
        scores = _channel_scores(per_head(x, heads), per_head(y, heads), c.decay, system)
    else:  # the products of 16-bit operands are exact in float32
        scores = per_head(product("bhnik,bhnjk->bhnij", x, y), heads)
        scores = jnp.tril(scores) if c.decay is None else scores * head_weights(c.decay[..., 0])
    if early:
        scores = _shift(scores, 1)
    elif system:
        scores = jnp.tril(scores, -1)
    return scores if c.same is None else jnp.where(c.same, scores, 0)


def _channel_scores(x, y, decay, system):
    if system and x.dtype != decay.dtype:
        with jax.default_matmul_precision("high"):
            return channel_scores(x.astype(decay.dtype), y.astype(decay.dtype), decay)[0]
    return channel_scores(x, y, decay)[0]


def _shift(x, by):
    """Rows moved down (1) or up (-1) by one, zeros coming in."""
    rows = x[..., :-1, :] if by > 0 else x[..., 1:, :]
    return jnp.pad(rows, [(0, 0)] * (x.ndim - 2) + [(1, 0) if by > 0 else (0, 1), (0, 0)])


def decay_sums(decay, reverse=False, early=False):
    """Log decays from the chunk's start to each token, without its own if `early`; `reverse`: from it to the end."""
    if decay is None:
        return None
    prefix, suffix = (jnp.swapaxes(x, -1, -2) for x in prefix_suffix(jnp.swapaxes(decay, -1, -2)))
    return suffix if reverse else _shift(prefix, 1) if early else prefix


def decayed(x, log, mask):
    """(x', rows or None), together x * exp(log) where `mask`, else 0. What a head does to whole rows is left to
    the rows, so that x stays shared by its group.
    """
    rows = None
    if log is not None and log.shape[-1] > 1:
        x = (per_head(x, log.shape[1]) * jnp.exp(log)).astype(x.dtype)
    elif log is not None:
        rows = jnp.exp(log)
    if mask is not None:
        rows = jnp.where(mask, 1.0 if rows is None else rows, 0.0)
    return x, rows


def per_head(x, heads):
    return x if x.shape[1] == heads else jnp.repeat(x, heads // x.shape[1], axis=1)


def times(x, factor):
    return x if factor is None else x * factor


def _mix(scores, x):
    """scores [..., C, C], rounded to the dtype of x, times x [..., C, X]."""
    return product("bhnij,bhnjx->bhnix", scores.astype(x.dtype), x)


def product(spec, x, y):
    """`contract` in the dtype of x; where one operand has fewer heads h, each serves a group of the other's."""
    y, groups = y.astype(x.dtype), min(x.shape[1], y.shape[1])
    if x.shape[1] == y.shape[1]:
        return contract(spec, x, y)
    left, right, out = spec.replace("->", ",").split(",")
    split = lambda z: z.reshape(z.shape[0], groups, -1, *z.shape[2:])
    if x.shape[1] > groups:
        x, left = split(x), left.replace("h", "hr")
    else:
        y, right = split(y), right.replace("h", "hr")
    product = contract(f"{left},{right}->{out.replace('h', 'hr')}", x, y)
    return product.reshape(product.shape[0], -1, *product.shape[3:])
