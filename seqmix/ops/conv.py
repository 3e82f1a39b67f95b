"""Short depthwise causal convolution over time, with a state and segments."""

import jax
import jax.numpy as jnp

from seqmix.core import packing
from seqmix.core.shapes import dims
from seqmix.ops import conv_context
from seqmix.ops.mesh import layout


def short_conv(x, weight, bias=None, *, state=None, segment_ids=None):
    """Depthwise causal convolution: each channel is a weighted sum of its last W tokens.

        y_t = bias + sum_{j < W} weight[W-1-j] x_{t-j}        (weight[W-1] multiplies the current token)

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

    Returns:
        y like x, and the state after it: the last W-1 tokens of each row's last segment, in the dtype of
        `state` (x.dtype without one). A row of padding alone keeps its state.

    Without a state, rows that have no padding within a segment (all that a packer makes) take shifts of x.
    Those that do, and prefills with segments, gather each token's predecessors.
    Raises ValueError for shapes or trees that disagree.
    """
    xs, tree = jax.tree.flatten(x)
    weights = _leaves("weight", weight, tree)
    biases = _leaves("bias", bias, tree)
    states = _leaves("state", state, tree)
    for leaves in zip(xs, weights, biases, states, strict=True):
        _check(*leaves)
    run_ids = None
    if segment_ids is not None:
        packing.check(segment_ids, *xs[0].shape[:2])
        run_ids = packing.runs(segment_ids)

    cuts = [layout(*x.shape[:2], *x.shape[2:3]) for x in xs]
    if cuts[0] is not None and cuts[0].time and all(len(w) > 1 for w in weights):
        each = zip(cuts, xs, weights, biases, states, strict=True)
        pairs = [conv_context.run(lay, short_conv, _last_tokens, *leaves, run_ids) for lay, *leaves in each]
        return tree.unflatten([y for y, _ in pairs]), tree.unflatten([last for _, last in pairs])

    def convolve(form):
        return lambda: [form(*leaves, run_ids) for leaves in zip(xs, weights, biases, states, strict=True)]

    if run_ids is None:
        ys = convolve(_shifts)()
    elif state is None:
        ys = jax.lax.cond(_padding_inside(run_ids), convolve(_gathers), convolve(_shifts))
    else:
        ys = convolve(_gathers)()
    lasts = [_last_tokens(x, len(w), s, run_ids) for x, w, s in zip(xs, weights, states, strict=True)]
    lasts = [last if s is None else last.astype(s.dtype) for last, s in zip(lasts, states, strict=True)]
    return tree.unflatten(ys), tree.unflatten(lasts)


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
    if got != tree:
        raise ValueError(f"{name}: expected a tree like x, {tree}, got {got}")
    return leaves


def _check(x, weight, bias, state):
    channels = " ".join(f"C{i}" for i in range(x.ndim - 2))
    spec = {"x": f"B T {channels}", "weight": f"W {channels}", "bias": channels}
    d = dims(spec, x=x, weight=weight, bias=bias)
    if d.W < 1:
        raise ValueError(f"weight: expected at least one tap, got {tuple(weight.shape)}")
    dims(spec | {"state": f"B {d.W - 1} {channels}"}, x=x, state=state)


def _as_rows(mask, x):
    """A mask over the leading dimensions of x, with ones for the rest."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _weigh(taps, weight, bias, run_ids, dtype):
    """bias + sum of weighted taps (an iterable, current token first), 0 at padding, in dtype."""
    acc = jnp.promote_types(dtype, jnp.float32)
    y = sum(w.astype(acc) * tap.astype(acc) for w, tap in zip(weight[::-1], taps, strict=True))
    y = y if bias is None else y + bias.astype(acc)
    y = y if run_ids is None else jnp.where(_as_rows(run_ids != 0, y), y, 0)
    return y.astype(dtype)


# Both forms are recomputed by the backward pass: else every tap would be kept for it, in float32, and a cond
# would keep those of both its branches.


@jax.checkpoint
def _shifts(x, weight, bias, state, run_ids):
    """The convolution where a segment's tokens are contiguous, or without segments."""

    def taps():
        for j in range(len(weight)):
            tap = _delay(x, j, state)
            if run_ids is not None:
                tap = jnp.where(_as_rows(run_ids == _delay(run_ids, j), tap), tap, 0)
            yield tap

    return _weigh(taps(), weight, bias, run_ids, x.dtype)


def _delay(x, steps, state=None):
    """x moved to later times, the state's last tokens or zeros before it."""
    if state is None:
        # One pad that keeps the length: partitioned over time, it is an exchange between neighbours.
        sides = [(0, 0, 0), (steps, -steps, 0)] + [(0, 0, 0)] * (x.ndim - 2)
        return jax.lax.pad(x, jnp.zeros((), x.dtype), sides)
    before = state[:, state.shape[1] - steps :].astype(x.dtype)
    return jnp.concatenate([before, x], axis=1)[:, : x.shape[1]]


# Time as seen below, "full": row 0 is zero, rows 1 to W-1 are the state, row W+t is token t.


@jax.checkpoint
def _gathers(x, weight, bias, state, run_ids):
    """The convolution wherever the padding is: follows each token back through its predecessors."""
    width = len(weight)
    full, before = _prepend(x, width, state), _predecessors(run_ids, width)

    def taps():
        index = jnp.broadcast_to(jnp.arange(width, full.shape[1]), run_ids.shape)
        for _ in range(width):
            yield _rows(full, index)
            index = _rows(before, index)

    return _weigh(taps(), weight, bias, run_ids, x.dtype)


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


def _padding_inside(run_ids):
    """Whether some padding has tokens of one segment on both sides."""
    far = jnp.iinfo(run_ids.dtype).max
    before = jax.lax.cummax(run_ids, axis=1)
    after = jax.lax.cummin(jnp.where(run_ids != 0, run_ids, far), axis=1, reverse=True)
    return jnp.any((run_ids == 0) & (before == after))
