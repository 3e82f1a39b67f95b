"""Decays and weights of writes as the Hopper kernels of linear attention read them, prepared by a kernel of their own.

With l the decays and w the weights in log2, a chunk's tokens get g_i = sum of l_t over t <= i and c_j = g_j - log2 w_j.
The sums are products with a triangle of ones on the tensor cores, which also turn [tokens, heads] into [heads, tokens];
what is summed goes in as two bf16 parts, which hold the first 16 of a float32's 24 bits: a decay's logarithm changes by
up to 2^-17 of itself, for all its readers alike.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers
from pallas_kernels.linear_attention.plan import CHUNK, LEAST_LOG2, LOG2_E, Plan

ROWS = 64  # heads, or heads of several chunks, of a thread block
PARTS = 2


def chunk_decays(log_decay, log_write, run_ids, plan: Plan):
    """What the kernels read of decays and writes, float32 [B or 1, 1 or 2, chunks or more, H, 64], in log2.

    First g, then, where tokens write with a weight, c. log_decay: None, [H], or [B, T, H]; log_write: None or
    [B, T, H]. Past the end and at padding nothing decays.
    """
    if log_decay is None:
        log_decay = jnp.zeros((plan.heads,), jnp.float32)
    if log_decay.ndim == 1:
        if log_write is None and run_ids is None:
            return _multiples(log_decay, plan)
        log_decay = jnp.broadcast_to(log_decay, (plan.batch, plan.time, plan.heads))
    if run_ids is not None:
        log_decay = jnp.where(run_ids[..., None] != 0, log_decay, 0.0)
    group = ROWS // math.gcd(ROWS, plan.heads)  # chunks whose heads fill whole thread blocks
    groups = -(-plan.chunks // group)
    given = [_columns(x, group, groups) for x in (log_decay, log_write) if x is not None]
    shape = (log_decay.shape[0], len(given), groups * group, plan.heads, CHUNK)
    return _sums(given, shape, compat.interpreting()).reshape(shape)


def _multiples(log_decay, plan: Plan):
    """The decays of tokens that all decay alike: multiples, which XLA computes again wherever it reads few of them."""
    log_decay = jnp.maximum(log_decay.astype(jnp.float32) * LOG2_E, LEAST_LOG2)
    first = jnp.arange(plan.chunks)[:, None] * CHUNK
    tokens = jnp.clip(jnp.minimum(first + 1 + jnp.arange(CHUNK), plan.time) - first, 0)
    return (tokens.astype(jnp.float32)[:, None] * log_decay[:, None])[None, None]


def _columns(x, group, groups):
    """[B, T, H] as [B, groups, 64, group * H], a token's heads beside those of the tokens 64 further on."""
    batch, time, heads = x.shape
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, groups * group * CHUNK - time), (0, 0)))
    x = x.reshape(batch, groups, group, CHUNK, heads)
    x = x if group == 1 else x.swapaxes(2, 3)
    return x.reshape(batch, groups, CHUNK, group * heads)


@functools.partial(jax.jit, static_argnums=(1, 2))  # so that XLA finds forward's and backward's to be the same
def _sums(given, shape, interpreting):
    batch, groups, _, columns = given[0].shape
    tiles = columns // ROWS

    def body(*refs):
        sources, (out, parts, factors) = refs[: len(given)], refs[len(given) :]
        row, group, tile = (lax.axis_index(name) for name in ("row", "group", "tile"))
        for kind, source in enumerate(sources):
            value = registers.load_tile(source.at[row, group, :, pl.ds(tile * ROWS, ROWS)], shared=False) * LOG2_E
            value = -value if kind else jnp.maximum(value, LEAST_LOG2)
            for part in range(PARTS):
                rounded = value.astype(jnp.bfloat16)
                parts[kind, part] = rounded
                value = value - rounded.astype(jnp.float32)
            time, target = (registers.iota((CHUNK, CHUNK), axis) for axis in (0, 1))
            factors[kind] = jnp.where(time == target if kind else time <= target, 1.0, 0.0).astype(jnp.bfloat16)
        compat.publish()
        pairs = []
        for kind in range(len(sources)):
            pairs += [(registers.transposed(parts.at[kind, part]), factors.at[kind]) for part in reversed(range(PARTS))]
            out[row, kind, group if tiles == 1 else group * tiles + tile] = registers.matmul(*pairs)

    return compat.kernel(
        body,
        grid=(tiles, groups, batch),
        names=("tile", "group", "row"),
        out=jax.ShapeDtypeStruct((batch, len(given), groups * tiles, ROWS, CHUNK), jnp.float32),
        scratch=[compat.tile(len(given), PARTS, CHUNK, ROWS), compat.tile(len(given), CHUNK, CHUNK)],
        warpgroups=1,
        name="linear_attention_gates",
        fetching=False,
    )(*given)


def ends_of_chunks(decays, segments, plan: Plan):
    """Logarithm of what is left of a state after each chunk, [B or 1, splits, steps, H]; -inf where a run ends."""
    ends = decays[:, 0, : plan.chunks, :, -1]
    if segments is not None:
        ends = jnp.where((segments[:, :, CHUNK] == segments[:, :, CHUNK + 1])[..., None], ends, -jnp.inf)
    return ends.reshape(-1, plan.splits, plan.steps, plan.heads)


def split_decays(decays, segments, plan: Plan):
    """log2 of what is left of a state after each split, [B or 1, H, splits]; -inf where another run has begun."""
    return jnp.sum(ends_of_chunks(decays, segments, plan), axis=2).swapaxes(1, 2)


def reaching(decays, segments, plan: Plan, heads: int, reverse=False):
    """How many chunks of a split reach its end (reverse: its start), [B or 1, splits, H // heads] int32, at least 1.

    Counted are those of which more than 2^LEAST_LOG2 is left there in one of `heads` neighbouring heads.
    """
    ends = ends_of_chunks(decays, segments, plan)
    source, target = jnp.arange(plan.steps)[:, None], jnp.arange(plan.steps)[None, :]
    between = source < target if reverse else source > target
    left = jnp.sum(jnp.where(between[:, :, None], ends[:, :, :, None], 0.0), axis=2)
    counts = jnp.sum(left > LEAST_LOG2, axis=2, dtype=jnp.int32)
    return jnp.max(counts.reshape(*counts.shape[:2], -1, heads), axis=3)
