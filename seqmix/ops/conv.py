"""Short depthwise causal convolution over time, with a state and segments."""

import functools

import jax
import jax.numpy as jnp

from seqmix.core import packing
from seqmix.core.shapes import boolean, check_arrays, dims
from seqmix.ops import conv_context, conv_kernels
from seqmix.ops.mesh import layout


def short_conv(x, weight, bias=None, *, state=None, segment_ids=None, activation=None, twice=False):
    """Depthwise causal convolution: each channel is a weighted sum of its last W tokens.

        y_t = activation(bias + sum_{j < W} weight[W-1-j] x_{t-j})        (weight[W-1] multiplies the current token)

    where x_{t-j} is the j-th token before t in its segment, padding not counted; before a row's first segment
    stand the tokens of `state`, before any other one zeros. y is 0 at padding. Sums are taken in float32
    (float64 for float64 inputs).

    Args:
        x: [B, T, ...], any trailing shape; or a tree of such arrays, each convolved with its own weights
            (as Mamba-2's x, B and C), which costs one look at the segments for all of them.
        weight: [W, ...], W >= 1; for a tree x, a tree like it, and so are bias and state.
        bias: [...] or None.
        state: [B, W-1, ...], the tokens before the first, oldest first; None for zeros. Read in x.dtype.
        segment_ids: [B, T] int, 0 for padding, or None.
        activation: a function of the sums, elementwise, or None for none.
        twice: give the pair (y, y), for two who use it: their gradients are then added where they are used.

    Returns:
        y like x, and the state after it: the last W-1 tokens of each row's last segment, in the dtype of
        `state` (x.dtype without one). A row of padding alone keeps its state.

    Without a state, Hopper GPUs have a kernel for bfloat16 and silu or no activation. Elsewhere taps are shifts of x.
    Where padding stands within a segment of some row (no packer puts it there), or before the first segment of rows
    with a state, it is first moved behind the row's tokens, and back in the end.
    Raises ValueError for shapes or trees that disagree.
    """
    xs, tree = jax.tree.flatten(x)
    if not xs:
        raise ValueError(f"x: expected an array or a tree of them, got {x!r}")
    weights = _leaves("weight", weight, tree)
    biases = _leaves("bias", bias, tree)
    states = _leaves("state", state, tree)
    for leaf in zip(xs, weights, biases, states, strict=True):
        _check(*leaf)
    twice = boolean("twice", twice)
    if activation is not None and not callable(activation):
        raise ValueError(f"activation: expected a function or None, got {activation!r}")
    run_ids = None
    if segment_ids is not None:
        packing.check(segment_ids, *xs[0].shape[:2])
        run_ids = packing.runs(segment_ids)

    leaves = tuple(map(tuple, (xs, weights, biases, states)))
    cuts = [layout(*x.shape[:2], *x.shape[2:3]) for x in xs]
    if cuts[0] is not None and cuts[0].time and all(len(w) > 1 for w in weights):
        op = functools.partial(short_conv, activation=activation)
        if len({len(w) for w in weights}) > 1:
            each = [op(*leaf, state=s, segment_ids=run_ids) for *leaf, s in zip(*leaves, strict=True)]
            ys, lasts = zip(*each, strict=True)
        else:
            ys, lasts = conv_context.run(cuts, op, _last_tokens, *leaves, run_ids)
        y = tree.unflatten(ys)
        return (y, y) if twice else y, tree.unflatten(lasts)

    calls = tuple(zip(*leaves, strict=True))
    if conv_kernels.chosen(cuts, calls, activation):
        ys = conv_kernels.run(cuts, calls, run_ids, activation, twice)
    else:
        run = _convolved if run_ids is None else _around_padding
        ys = [run(*leaves, run_ids, activation)] * (1 + twice)
    ys = tuple(map(tree.unflatten, ys))
    lasts = [_last_tokens(x, len(w), s, run_ids) for x, w, s in zip(xs, weights, states, strict=True)]
    lasts = [last if s is None else last.astype(s.dtype) for last, s in zip(lasts, states, strict=True)]
    return ys if twice else ys[0], tree.unflatten(lasts)


def short_conv_flops(batch: int, seq: int, channels: int, width: int, bias: bool = True) -> int:
    """FLOPs of `short_conv`: W products and W - 1 sums a token and channel, one more with a bias."""
    return batch * seq * channels * (2 * width - 1 + bias)


def short_conv_reference(x, weight, bias=None, *, state=None, segment_ids=None):
    """`short_conv` of one array: a loop over time that carries the last W-1 tokens of each row's segment."""
    _check(x, weight, bias, state)
    acc = jnp.promote_types(x.dtype, jnp.float32)
    batch, time = x.shape[:2]
    ids = jnp.ones((batch, time), jnp.int32) if segment_ids is None else segment_ids
    if state is None:
        state = jnp.zeros((batch, len(weight) - 1, *x.shape[2:]), x.dtype)

    def advance(carry, token):
        window, current = carry
        x_t, id_t = token
        opened = (id_t != 0) & (id_t != current) & (current != 0)
        past = jnp.where(_as_rows(opened, window), 0, window)
        taps = jnp.concatenate([past, x_t[:, None]], axis=1)
        y_t = jnp.sum(weight.astype(acc) * taps.astype(acc), axis=1) + (0 if bias is None else bias)
        real = id_t != 0
        window = jnp.where(_as_rows(real, window), taps[:, 1:], window)
        return (window, jnp.where(real, id_t, current)), jnp.where(_as_rows(real, y_t), y_t, 0)

    carry = (state.astype(x.dtype), jnp.zeros(batch, ids.dtype))
    (window, _), y = jax.lax.scan(advance, carry, (jnp.moveaxis(x, 1, 0), ids.T))
    return jnp.moveaxis(y, 0, 1).astype(x.dtype), window.astype(state.dtype)


def _leaves(name, value, tree):
    if value is None:
        return [None] * tree.num_leaves
    leaves, got = jax.tree.flatten(value)
    if got != tree and tree == jax.tree.structure(0):
        raise ValueError(f"{name}: expected an array, got {type(value).__name__}")
    if got != tree:
        raise ValueError(f"{name}: expected a tree like x, {tree}, got {got}")
    return leaves


def _check(x, weight, bias, state):
    check_arrays(x=x, weight=weight)
    channels = " ".join(f"C{i}" for i in range(x.ndim - 2))
    spec = {"x": f"B T {channels}", "weight": f"W {channels}", "bias": channels}
    d = dims(spec, x=x, weight=weight, bias=bias)
    if d.W < 1:
        raise ValueError(f"weight: expected at least one tap, got {tuple(weight.shape)}")
    dims(spec | {"state": f"B {d.W - 1} {channels}"}, x=x, state=state)


def _as_rows(mask, x):
    """A mask over the leading dimensions of x, with ones for the rest."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _finish(y, bias, run_ids, activation, dtype):
    """activation(y + bias), 0 at padding, in dtype."""
    y = y if bias is None else y + bias.astype(y.dtype)
    y = y if activation is None else activation(y)
    y = y if run_ids is None else jnp.where(_as_rows(run_ids != 0, y), y, 0)
    return y.astype(dtype)


# Recomputed by the backward pass: else every tap would be kept for it, in float32.
@functools.partial(jax.checkpoint, static_argnums=5)
def _convolved(xs, weights, biases, states, run_ids, activation):
    return tuple(_shifts(*leaves, run_ids, activation) for leaves in zip(xs, weights, biases, states, strict=True))


def _shifts(x, weight, bias, state, run_ids, activation):
    """The convolution where a segment's tokens are contiguous, or without segments."""
    acc = jnp.promote_types(x.dtype, jnp.float32)

    def tap(j):
        delayed = _delay(x, j, state)
        if run_ids is not None:
            # The state is of a row's first segment.
            first = None if state is None else jnp.ones((len(run_ids), len(weight) - 1), run_ids.dtype)
            delayed = jnp.where(_as_rows(run_ids == _delay(run_ids, j, first), delayed), delayed, 0)
        return weight[len(weight) - 1 - j].astype(acc) * delayed.astype(acc)

    return _finish(sum(tap(j) for j in range(len(weight))), bias, run_ids, activation, x.dtype)


def _delay(x, steps, state=None):
    """x moved to later times, the state's last tokens or zeros before it."""
    if state is None:
        # One pad that keeps the length: partitioned over time, it is an exchange between neighbours.
        sides = [(0, 0, 0), (steps, -steps, 0)] + [(0, 0, 0)] * (x.ndim - 2)
        return jax.lax.pad(x, jnp.zeros((), x.dtype), sides)
    before = state[:, state.shape[1] - steps :].astype(x.dtype)
    return jnp.concatenate([before, x], axis=1)[:, : x.shape[1]]


# Time as seen below, "full": row 0 is zero, rows 1 to W-1 are the state, row W+t is token t.


@functools.partial(jax.checkpoint, static_argnums=5)
def _around_padding(xs, weights, biases, states, run_ids, activation):
    """The convolutions wherever the padding is: where a shift would take it for a token, it is moved behind the row's
    tokens, and back.
    """
    inside = _padding_inside(run_ids, any(state is not None for state in states))
    xs, ids, order, back = _behind(inside, run_ids, xs)
    return _moved(inside, back, order, _convolved(xs, weights, biases, states, ids, activation))


def _if(wanted, function, *arrays):
    """function(*arrays) if it is wanted, else arrays: a loop of one turn or none, since a cond would copy them."""
    return jax.lax.while_loop(lambda c: c[0], lambda c: (jnp.zeros_like(wanted), function(*c[1])), (wanted, arrays))[1]


@jax.custom_vjp
def _behind(wanted, run_ids, xs):
    """(xs, run_ids, order [B, T], its inverse), with padding moved behind the tokens if it is wanted.

    The gradient takes the inverse permutation: no scatter.
    """
    time = jnp.broadcast_to(jnp.arange(run_ids.shape[1], dtype=jnp.int32), run_ids.shape)

    def move(ids, _order, _back, *xs):
        padding = ids == 0
        order = jnp.argsort(padding, axis=1, stable=True).astype(jnp.int32)
        after = jnp.sum(~padding, 1, keepdims=True) + jnp.cumsum(padding, 1)
        back = jnp.where(padding, after, jnp.cumsum(~padding, 1)) - 1
        return _rows(ids, order), order, back.astype(jnp.int32), *(_rows(x, order) for x in xs)

    ids, order, back, *xs = _if(wanted, move, run_ids, time, time, *xs)
    return tuple(xs), ids, order, back


def _behind_forward(wanted, run_ids, xs):
    found = _behind(wanted, run_ids, xs)
    return found, (wanted, *found[2:])


def _behind_backward(kept, cotangents):
    wanted, order, back = kept
    return None, None, _moved(wanted, back, order, cotangents[0])


_behind.defvjp(_behind_forward, _behind_backward)


@jax.custom_vjp
def _moved(wanted, order, back, xs):
    """x[b, order[b, t]] for each x if it is wanted; back: the inverse permutation, which the gradient takes."""
    return _if(wanted, lambda *xs: tuple(_rows(x, order) for x in xs), *xs)


def _moved_forward(wanted, order, back, xs):
    return _moved(wanted, order, back, xs), (wanted, order, back)


def _moved_backward(kept, dys):
    wanted, order, back = kept
    return None, None, None, _moved(wanted, back, order, dys)


_moved.defvjp(_moved_forward, _moved_backward)


def _last_tokens(x, width, state, run_ids):
    """The state [B, W-1, ...] after the row: its last token and those that come before it, oldest first."""
    full = _prepend(x, width, state)
    if run_ids is None:
        return full[:, x.shape[1] + 1 :]
    before = _predecessors(run_ids, width)
    token = jnp.where(run_ids != 0, jnp.arange(width, full.shape[1]), width - 1)
    chain = [jnp.max(token, axis=1, keepdims=True)]
    for _ in range(width - 1):
        chain.append(_rows(before, chain[-1]))
    return _rows(full, jnp.concatenate(chain[::-1], axis=1)[:, 1:])


def _prepend(x, width, state):
    batch, rest = x.shape[0], x.shape[2:]
    if state is None:
        return jnp.pad(x, [(0, 0), (width, 0)] + [(0, 0)] * len(rest))
    return jnp.concatenate([jnp.zeros((batch, 1, *rest), x.dtype), state.astype(x.dtype), x], axis=1)


def _predecessors(run_ids, width):
    """Row of full [B, W+T] that holds the token before each: its segment's, the state's, or the zero row."""
    time = run_ids.shape[1]
    row = jnp.where(run_ids != 0, jnp.arange(width, width + time), width - 1)
    latest = jnp.pad(jax.lax.cummax(row, axis=1)[:, :-1], ((0, 0), (1, 0)), constant_values=width - 1)
    # What comes before a later segment's first token belongs to another segment.
    tokens = jnp.where(packing.starts(run_ids), 0, latest)
    state = jnp.maximum(jnp.arange(width) - 1, 0)
    return jnp.concatenate([jnp.broadcast_to(state, (len(run_ids), width)), tokens], axis=1)


def _rows(x, index):
    """x[b, index[b, i]]: [B, I, ...]."""
    return jax.vmap(lambda one, i: one[i])(x, index)


def _padding_inside(run_ids, state):
    """Whether some padding has tokens of one segment on both sides; with a state, which is of the first, before them
    too.
    """
    far = jnp.iinfo(run_ids.dtype).max
    before = jax.lax.cummax(run_ids, axis=1)
    before = jnp.maximum(before, 1) if state else before
    after = jax.lax.cummin(jnp.where(run_ids != 0, run_ids, far), axis=1, reverse=True)
    return jnp.any((run_ids == 0) & (before == after))
