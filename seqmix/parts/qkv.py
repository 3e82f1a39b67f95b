"""The shell of mixers over a recurrent op: projections into heads, short convolutions, the normed and gated way out.

Weights lie flat in a mixer's tree, under the names that softmax attention gives them: "q", "k", "v" and others
[D, H, K], "conv" with one weight [W, H, K] for each that is convolved, "out" [H, V, D].
"""

import jax
import jax.numpy as jnp

from seqmix.core import packing
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.core.sharding import constrain
from seqmix.ops.conv import short_conv
from seqmix.parts.norms import rms_norm

AXES = ("heads", "head_dim")


def head_size(mixer: Mixer, field: str, ratio: float = 1.0) -> int:
    """Channels of a head: the mixer's `field`, or where that is None its share of ratio * d_model.

    Raises ValueError, naming the field, where d_model is known and `heads` does not divide that.
    """
    size = getattr(mixer, field)
    if size is not None:
        return size
    width = ratio * mixer.d_model
    if width % mixer.heads:
        asked = "d_model" if ratio == 1 else f"{ratio} * d_model"
        name, got = type(mixer).__name__, f"heads={mixer.heads} and d_model={mixer.d_model}"
        raise ValueError(f"{name}.{field}: expected a value, or a number of heads that divides {asked}, got {got}")
    return int(width) // mixer.heads


def check_sizes(mixer: Mixer):
    """Raises ValueError naming one of heads, key_dim, value_dim and chunk that does not fit, or `mixer.sizes`."""
    given = {name: getattr(mixer, name) for name in ("heads", "key_dim", "value_dim", "chunk")}
    mixer.positive(**{name: size for name, size in given.items() if size is not None})
    if mixer.chunk & (mixer.chunk - 1):
        raise ValueError(f"{type(mixer).__name__}.chunk: expected a power of two, got {mixer.chunk}")
    if mixer.d_model:
        _ = mixer.sizes  # which head_size refuses where heads do not divide the width


def head_params(width: int, sizes: dict, *, conv_width: int = 0, convolved=()) -> dict:
    """Weights from `width` channels into heads, {name: (H, K)}; and of `conv_width` taps over those `convolved`."""
    tree = {name: Param((width, *size), ("embed", *AXES)) for name, size in sizes.items()}
    if conv_width:
        tree["conv"] = {name: Param((conv_width, *sizes[name]), (None, *AXES)) for name in convolved}
    return tree


def out_param(heads: int, size: int, width: int) -> Param:
    """The projection back to the stream, [H, V, D]."""
    return Param((heads, size, width), (*AXES, "embed"), fan_in=heads * size)


def project(params, x, names, *, dtype=None):
    """[B, T, H, K] of x [B, T, D] under each of the names; operands in x.dtype, results in `dtype` or x.dtype."""

    def one(name):
        weight = params[name].astype(x.dtype)
        y = jnp.einsum("btd,dhk->bthk", x, weight, preferred_element_type=dtype or x.dtype)
        return constrain(y, "batch", "time", *AXES)

    return tuple(one(name) for name in names)


def convolve(params, heads, *, state=None, segment_ids=None):
    """silu of the short convolution of each array in `heads`, a dict like params["conv"], and the state after it.

    Without "conv" in params the arrays and the state come back as they are.
    """
    if "conv" not in params:
        return heads, state
    heads, state = short_conv(heads, params["conv"], state=state, segment_ids=segment_ids)
    return jax.tree.map(jax.nn.silu, heads), state


def conv_state(params_like, batch: int, dtype):
    """Zeros before the first token, for weights (or declarations) like params["conv"]."""
    shapes = {name: weight.shape for name, weight in params_like.items()}
    return {name: jnp.zeros((batch, taps - 1, *size), dtype) for name, (taps, *size) in shapes.items()}


def way_out(params, mixed, *, gate=None, scale=None, groups=None, activation=jax.nn.silu, eps=1e-5, dtype=None):
    """y = W_out (norm(mixed) * activation(gate)): [B, T, D] of mixed [B, T, H, V], in `dtype` or that of mixed.

    The RMS norm is over each head, or with groups=1 over all channels of a token.
    """
    h = rms_norm(mixed, scale, eps=eps, groups=groups, gate=gate, activation=activation)
    h = h if dtype is None else h.astype(dtype)
    return jnp.einsum("bthv,hvd->btd", h, params["out"].astype(h.dtype))


def places(x, segment_ids=None, positions=None, *, length=None):
    """Where tokens stand: (positions [B, T], or [1, T] for all rows, and the length of each row after them, [B]).

    Positions are those given, else counted within each segment, padding skipped; a row's first segment goes on
    from `length` [B]. Without `length` rows start at 0 and None is returned for it. A row of padding alone keeps
    its length.
    """
    time = x.shape[1]
    if segment_ids is None:
        counted = jnp.arange(time, dtype=jnp.int32)[None] + (0 if length is None else length[:, None])
        after = None if length is None else length + time
    else:
        runs = packing.runs(segment_ids)
        counted, after = packing.positions(runs, start=length), None
        if length is not None:
            last = packing.last_run(runs)
            mine = (runs == last[:, None]) & (runs != 0)
            after = jnp.where(last == 0, length, jnp.max(jnp.where(mine, counted + 1, 0), axis=1))
    return counted if positions is None else positions, after


def phase_features(x, angles):
    """[x cos(angles), x sin(angles)] along the last axis, in x.dtype; angles broadcast against x [..., K].

    Products of two such vectors are sum_k q_k k_k cos(a_k - b_k): the real part of q e^{i a} times the conjugate
    of k e^{i b}, so that a complex decay is a real one of twice the width (LRPE, arXiv 2307.14995; GateLoop's
    surrogate attention, 2311.01927).
    """
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([(x * cos).astype(x.dtype), (x * sin).astype(x.dtype)], axis=-1)
