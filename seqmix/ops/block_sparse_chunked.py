"""Block-sparse attention by lists: memory linear in time, work proportional to the listed blocks.

Blocks of queries are taken in groups, the longest lists first, so that a group's lists are of like length; each step
gathers the next few key blocks of every member and goes on with the online softmax (arXiv 1805.02867). The
backward pass walks the same lists for dq and the transposed ones for dk and dv, with the scores recomputed
(arXiv 2307.08691, algorithm 2):

    p = exp(s - lse),  ds = p * (dy v^T - delta),  delta = sum(dy * y) - dlse

Shapes here are by head, then by block, with J key heads and R query heads to each: q [B, J, nq, bq, R, K],
k [B, J, nk, bk, K], v [B, J, nk, bk, V].
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.ops import block_lists
from seqmix.ops.block_lists import Lists, Walk
from seqmix.ops.mask_algebra import Mask

OWN, OTHER = 512, 128  # tokens of a group, and of what it gathers in a step


class Config(NamedTuple):
    """The static half of a call."""

    scale: float
    soft_cap: float | None
    mask: Mask | None
    time: int
    keys: int
    full: bool = True  # some tile may be full: every pair exists and is visible


def chunked(config: Config, q, k, v, slopes, data: dict, lists: Lists, sizes, first=0):
    """(y [B, T, H, V], lse [B, H, T]) of q [B, T, H, K], k [B, S, J, K], v, slopes [H] or None, data [b, T or S].

    The queries, their data and the lists may be a stretch of config.time: of whole blocks, from block `first` on.
    """
    if isinstance(lists.full, np.ndarray):
        config = config._replace(full=bool(lists.full.any()))
    walks = block_lists.forward(lists), block_lists.transposed(lists, -(-k.shape[1] // sizes[1]))
    return by_token(*_attend(*by_block(config, q, k, v, slopes, data, walks, sizes, (first, 0))), q.shape[1])


def gradients(config: Config, q, k, v, slopes, data: dict, walks, sizes, y, lse, dy, dlse):
    """Those of q, k, v and slopes, from the results of `chunked`, or of another form, and their gradients.

    walks: the lists laid end to end, and transposed.
    """
    rows = lambda x: _rows(x, k.shape[2], sizes[0])
    y, dy = rows(y), rows(dy)
    lse, dlse = (rows(jnp.moveaxis(x, 1, 2)[..., None])[..., 0] for x in (lse, dlse))
    call = by_block(config, q, k, v, slopes, data, walks, sizes)
    dq, dk, dv, dslopes, *_ = _attend_backward(call[0], (*call[1:], y, lse), (dy, dlse))
    dk, dv = (_tokens(x[..., None, :], k.shape[1]) for x in (dk, dv))
    return _tokens(dq, q.shape[1]), dk, dv, None if slopes is None else dslopes.reshape(slopes.shape)


def by_block(config, q, k, v, slopes, data, walks, sizes, first=(0, 0)):
    """The arguments of `_attend`; first: the numbers of the first block of queries and of the first one of keys."""
    heads, groups = q.shape[2], k.shape[2]
    q = _rows(q, groups, sizes[0])
    k, v = (jnp.moveaxis(_blocks(x, sizes[1]), 3, 1) for x in (k, v))
    values = {"queries": {}, "keys": {}}
    for name, x in data.items():
        side = config.mask.inputs[name]
        values[side][name] = _blocks(x, sizes[side == "keys"])[:, None]
    slopes = None if slopes is None else slopes.reshape(groups, heads // groups)
    return config, q, k, v, slopes, values, walks, tuple(jnp.asarray(n, jnp.int32) for n in first)


def by_token(y, lse, time):
    """(y [B, T, H, V], lse [B, H, T]) of those by block."""
    lse = jnp.moveaxis(lse, 4, 2).reshape(lse.shape[0], lse.shape[1] * lse.shape[4], -1)[..., :time]
    return _tokens(y, time), lse


def _blocks(x, size):
    """[B, T, ...] as [B, nq, bq, ...]."""
    width = -x.shape[1] % size
    x = jnp.pad(x, [(0, 0), (0, width)] + [(0, 0)] * (x.ndim - 2)) if width else x
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def _rows(x, groups, size):
    """[B, T, H, K] as [B, J, nq, bq, R, K]."""
    return jnp.moveaxis(_blocks(x.reshape(*x.shape[:2], groups, -1, x.shape[-1]), size), 3, 1)


def _tokens(x, length):
    """[B, J, n, size, R, K] as [B, length, J R, K]."""
    x = jnp.moveaxis(x, 1, 3)
    return x.reshape(x.shape[0], -1, x.shape[3] * x.shape[4], x.shape[5])[:, :length]


def _take(x, index):
    """Blocks of x [B, J, n, ...] at index [b, h, ...]."""
    if index.shape[:2] == (1, 1):
        return jnp.take(x, index[0, 0], axis=2, mode="clip")
    lead = np.broadcast_shapes(x.shape[:2], index.shape[:2])
    x, index = jnp.broadcast_to(x, (*lead, *x.shape[2:])), jnp.broadcast_to(index, (*lead, *index.shape[2:]))
    return jax.vmap(jax.vmap(partial(jnp.take, axis=0, mode="clip")))(x, index)


class _Side(NamedTuple):
    """Blocks of tokens: what they hold, and their indices, -1 for tokens of no block."""

    arrays: tuple  # [B, J, g, tokens, ...]
    data: dict  # {input: [b, h, g, tokens]}
    index: jax.Array  # [b, h, g, tokens]


def _sweep(walk: Walk, own, other, start, step, finish, first=(0, 0)):
    """finish(carry) of every owner, [B, J, owners, ...], where carry = step(mine, theirs, clear, carry) over its list.

    own and other are (arrays, data) by block, whose numbers begin with those of `first`. A group takes as many steps as
    its longest list needs; `clear` says that all pairs of a step are visible.
    """
    sizes = tuple(jax.tree.leaves(x)[0].shape[3] for x in (own, other))
    others = jax.tree.leaves(other)[0].shape[2]
    owners = walk.count.shape[-1]
    groups = -(-owners * sizes[0] // OWN)
    group = -(-owners // min(groups, owners))
    bundle = max(1, min(OTHER // sizes[1], others))
    padding = -owners % group
    begin, count = (jnp.pad(jnp.asarray(x), [(0, 0), (0, 0), (0, padding)]) for x in (walk.begin, walk.count))
    order = jnp.argsort(-jnp.max(count, axis=(0, 1)), stable=True)

    def one(members):
        opens, length = begin[..., members], count[..., members]
        mine = jax.tree.map(lambda x: jnp.take(x, members, axis=2, mode="clip"), own)
        index = (first[0] + members[:, None]) * sizes[0] + jnp.arange(sizes[0])
        mine = _Side(*mine, jnp.where(members[:, None] < owners, index, -1)[None, None])

        def body(n, carry):
            place = n * bundle + jnp.arange(bundle)
            live = place < length[..., None]
            at = jnp.minimum(opens[..., None] + place, walk.other.shape[-1] - 1)
            which, full = (
                jnp.take_along_axis(jnp.asarray(x), at.reshape(*at.shape[:2], -1), axis=-1).reshape(at.shape)
                for x in (walk.other, walk.full)
            )
            theirs = jax.tree.map(lambda x: _flat(_take(x, which)), other)
            index = (first[1] + which[..., None]) * sizes[1] + jnp.arange(sizes[1])
            theirs = _Side(*theirs, _flat(jnp.where(live[..., None], index, -1)))
            return step(mine, theirs, jnp.all(full & live), carry)

        steps = (jnp.max(length) + bundle - 1) // bundle
        return finish(jax.lax.fori_loop(0, steps, body, start(group)))

    out = jax.lax.map(one, order.reshape(-1, group))
    place = jnp.argsort(order)[:owners]
    return jax.tree.map(
        lambda x: jnp.take(jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, *x.shape[4:]), place, axis=2), out
    )


def _flat(x):
    """[B, J, g, bundle, size, ...] to [B, J, g, bundle * size, ...]."""
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])


def _scores(config, q, k, slopes, rows: _Side, columns: _Side, clear, acc):
    """(scores after the soft cap, what the slopes add or 0, which count), [B, J, g, t, R, s]."""
    capped = config.scale * jnp.einsum("bjgtrk,bjgsk->bjgtrs", q, k, preferred_element_type=acc)
    if config.soft_cap is not None:
        capped = config.soft_cap * jnp.tanh(capped / config.soft_cap)
    i, j = rows.index[..., :, None, None], columns.index[..., None, None, :]
    data = {name: x[..., :, None, None] for name, x in rows.data.items()}
    data |= {name: x[..., None, None, :] for name, x in columns.data.items()}

    def look():
        seen = (i >= 0) & (i < config.time) & (j >= 0) & (j < config.keys)
        if config.mask is not None:
            seen = seen & config.mask.visible(i, j, data)
        return seen

    if config.full:
        shape = jax.eval_shape(look).shape
        seen = jax.lax.cond(clear, lambda: jnp.ones(shape, bool), look)
    else:
        seen = look()
    far = 0 if slopes is None else -slopes.astype(acc)[:, None, None, :, None] * jnp.abs(i - j)
    return capped, far, seen


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(config, q, k, v, slopes, values, walks, first):
    return part(config, q, k, v, slopes, values, walks[0], first, v.dtype)


def part(config, q, k, v, slopes, values, walk, first, dtype):
    """(y in `dtype`, lse in acc = promote(dtypes, float32)) over these keys, by block."""
    acc = jnp.promote_types(jnp.result_type(q, k, v), jnp.float32)
    b, heads, _, size, ratio, _ = q.shape

    def start(group):
        rows = (b, heads, group, size, ratio)
        return jnp.zeros((*rows, v.shape[-1]), acc), jnp.full(rows, -jnp.inf, acc), jnp.zeros(rows, acc)

    def step(mine, theirs, clear, carry):
        y, old, total = carry
        k_j, v_j = theirs.arrays
        capped, far, seen = _scores(config, *mine.arrays, k_j, slopes, mine, theirs, clear, acc)
        score = jnp.where(seen, capped + far, -jnp.inf)
        top = jnp.maximum(old, jnp.max(score, axis=-1))
        base = jnp.where(top > -jnp.inf, top, 0)  # rows that have seen nothing yet
        p = jnp.exp(score - base[..., None])
        keep = jnp.exp(old - base)
        mixed = jnp.einsum("bjgtrs,bjgsv->bjgtrv", p.astype(v.dtype), v_j, preferred_element_type=acc)
        return keep[..., None] * y + mixed, top, keep * total + jnp.sum(p, axis=-1)

    def finish(carry):
        y, top, total = carry
        some = total > 0
        total = jnp.where(some, total, 1)
        return (y / total[..., None]).astype(dtype), jnp.where(some, top + jnp.log(total), -jnp.inf)

    sides = ((q,), values["queries"]), ((k, v), values["keys"])
    return _sweep(walk, *sides, start, step, finish, first)


def _attend_forward(config, q, k, v, slopes, values, walks, first):
    y, lse = _attend(config, q, k, v, slopes, values, walks, first)
    return (y, lse), (q, k, v, slopes, values, walks, first, y, lse)


def _attend_backward(config, saved, cotangents):
    q, k, v, slopes, values, walks, first, y, lse = saved
    sums, dtypes = row_sums(y, lse, *cotangents), (q.dtype, k.dtype, v.dtype)
    return *part_gradients(config, q, k, v, slopes, values, walks, first, sums, dtypes), None, None, None


def row_sums(y, lse, dy, dlse):
    """(dy, delta, base): what `part_gradients` reads of results over all keys and of their gradients."""
    acc, some = lse.dtype, lse > -jnp.inf
    delta = jnp.where(some, jnp.sum(dy.astype(acc) * y.astype(acc), axis=-1) - dlse, 0)
    return dy, delta, jnp.where(some, lse, 0)


def part_gradients(config, q, k, v, slopes, values, walks, first, sums, dtypes):
    """Gradients of q, k, v, in these dtypes, and of slopes, from these keys; sums: `row_sums`."""
    dy, delta, base = sums
    acc = base.dtype
    b, heads, _, _, ratio, width = q.shape

    def weights(rows, columns, clear):
        """(p, d score, d of the product q k^T), [B, J, g, t, R, s]."""
        q, dy, delta, base = rows.arrays
        k, v = columns.arrays
        capped, far, seen = _scores(config, q, k, slopes, rows, columns, clear, acc)
        p = jnp.exp(jnp.where(seen, capped + far - base[..., None], -jnp.inf))
        dp = jnp.einsum("bjgtrv,bjgsv->bjgtrs", dy, v, preferred_element_type=acc)
        dscore = p * (dp - delta[..., None])
        dproduct = config.scale * dscore
        if config.soft_cap is not None:
            dproduct *= 1 - jnp.square(capped / config.soft_cap)
        return p, dscore, dproduct

    def start_q(group):
        dslopes = None if slopes is None else jnp.zeros((b, heads, group, 1, ratio), acc)
        return jnp.zeros((b, heads, group, q.shape[3], ratio, width), acc), dslopes

    def step_q(mine, theirs, clear, carry):
        dq, dslopes = carry
        _, dscore, dproduct = weights(mine, theirs, clear)
        k_j = theirs.arrays[0]
        dq += jnp.einsum("bjgtrs,bjgsk->bjgtrk", dproduct.astype(k.dtype), k_j, preferred_element_type=acc)
        if dslopes is not None:
            apart = jnp.abs(mine.index[..., :, None, None] - theirs.index[..., None, None, :])
            dslopes -= jnp.sum(dscore * apart, axis=(3, 5))[:, :, :, None]
        return dq, dslopes

    def start_kv(group):
        return tuple(jnp.zeros((b, heads, group, k.shape[3], x.shape[-1]), acc) for x in (k, v))

    def step_kv(mine, theirs, clear, carry):
        dk, dv = carry
        p, _, dproduct = weights(theirs, mine, clear)
        q_i, dy_i = theirs.arrays[:2]
        dk += jnp.einsum("bjgtrs,bjgtrk->bjgsk", dproduct.astype(q.dtype), q_i, preferred_element_type=acc)
        dv += jnp.einsum("bjgtrs,bjgtrv->bjgsv", p.astype(dy.dtype), dy_i, preferred_element_type=acc)
        return dk, dv

    rows, columns = ((q, dy, delta, base), values["queries"]), ((k, v), values["keys"])
    finish_q = lambda carry: (carry[0].astype(dtypes[0]), carry[1])
    finish_kv = lambda carry: (carry[0].astype(dtypes[1]), carry[1].astype(dtypes[2]))
    dq, dslopes = _sweep(walks[0], rows, columns, start_q, step_q, finish_q, first)
    dk, dv = _sweep(walks[1], columns, rows, start_kv, step_kv, finish_kv, first[::-1])
    if slopes is not None:
        dslopes = jnp.sum(dslopes, axis=(0, 2, 3)).astype(slopes.dtype)
    return dq, dk, dv, dslopes


_attend.defvjp(_attend_forward, _attend_backward)
