"""Linear attention with time cut over a mesh: states pass from one stretch to the next (`seqmix.ops.context`).

The Hopper kernels cut a stretch further, so that it fills the chip, and need what each part adds to the state before
they begin. Summed, that is what the stretch adds: it is handed on, and nothing is gone through twice. The backward pass
does the same, where the states' gradients come the other way.
"""

from functools import partial

import jax
import jax.numpy as jnp

from seqmix.core import packing, sharding
from seqmix.ops import linear_kernels, targets
from seqmix.ops.context import enter
from seqmix.ops.mesh import on_shares


def kernel(lay, implementation, q, k, v, log_decay, state, runs, write, **kind) -> str | None:
    """The kernels through which each device can run its share, of those asked for; None if there are none.

    Raises ValueError where time is cut and what was asked for cannot run: a device's own call could not say so.
    """
    whole = ("batch", "heads", None, None)
    names = (*_names(log_decay)[:4], whole, ("batch", "time"), ("batch", "time", "heads"))
    given = (q, k, v, log_decay, None if isinstance(state, tuple | list) else state, runs, write)
    with sharding.shares(lay.mesh):
        local = [None if x is None else lay.share(x, *name) for x, name in zip(given, names, strict=True)]
        reasons = linear_kernels.reasons(implementation, *local, **kind, causal=True)
    return targets.chosen(reasons, implementation, "linear_attention" if lay.time else None)


def run(lay, op, d, acc, q, k, v, log_decay, state, runs, write, *, normalize, return_state, **options):
    """`linear_attention`'s result, with `op`, itself, on each device's share.

    The arguments are the op's, `d` its sizes, `acc` the states' dtype. Where time is cut, a stretch is gone through
    twice, the first time for its state alone, but by the Hopper kernels.
    """
    keys, _, tokens, decays = _names(log_decay)
    whole = ("batch", "heads", None, None)
    states = (whole, whole[:3]) if normalize else whole
    if state is None:
        zeros = lambda *shape: jnp.zeros((d.B, d.H, d.K, *shape), acc)
        state = (zeros(d.V), zeros()) if normalize else zeros(d.V)
    state = jax.tree.map(lambda s: s.astype(acc), state)
    fixed = dict(normalize=normalize, **options)

    def local(q, k, v, log_decay, write, state, runs):
        q, k = (lay.local_key_heads(x, d.Hk) for x in (q, k))

        def call(state, need=return_state):
            return op(q, k, v, log_decay, write=write, state=state, segment_ids=runs, return_state=need, **fixed)

        if not lay.time:
            return call(state)
        if options["implementation"] == "gpu" and getattr(log_decay, "ndim", 0) < 4:
            log_write = linear_kernels.log_writes(write)
            y, state = _stretch(lay.time, options["scale"], q, k, v, log_decay, state, runs, log_write)
            return y, state if return_state else None
        end = call(None, True)[1]
        entering, state = enter(lay.time, end, total_decay(log_decay, q.shape[1], runs, acc), _decayed, state, runs)
        return call(entering, False)[0], state if return_state else None

    names = (keys, keys, tokens, decays, tokens[:3], states, ("batch", "time"))
    results = (tokens, states if return_state else None)
    return on_shares(lay, local, (q, k, v, log_decay, write, state, runs), names, results)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _stretch(axis, scale, q, k, v, log_decay, state, runs, log_write):
    """(y, state after all stretches) of this device's stretch, by the Hopper kernels."""
    return _forward(axis, scale, q, k, v, log_decay, state, runs, log_write)[0]


def _forward(axis, scale, q, k, v, log_decay, state, runs, log_write):
    from pallas_kernels.linear_attention import gpu

    local = None if runs is None else packing.runs(runs)
    begun = gpu.begun(q, k, v, log_decay, local, log_write, scale=scale, need_end=True)
    entering, last = enter(axis, begun.end, None if log_decay is None else begun.left, _left, state, runs)
    y, _ = begun.finish(entering, need_last=False)
    return (y, last), (q, k, v, log_decay, state, runs, log_write, entering)


def _backward(axis, scale, saved, cotangents):
    from pallas_kernels.linear_attention import gpu_backward

    q, k, v, log_decay, state, runs, log_write, entering = saved
    dy, dlast = cotangents
    local = None if runs is None else packing.runs(runs)
    begun = gpu_backward.begun(q, k, v, log_decay, local, log_write, dy, scale=scale, need_start=True)
    left = None if log_decay is None else begun.whole
    # The chain is linear in ends and state. Its gradient by the decays is within that of the stretch, whose final
    # state, of the entering one, has the gradient of its end.
    _, back = jax.vjp(lambda end, state: enter(axis, end, left, _left, state, runs), entering, state)
    # The kernels fill the chip but for a few multiprocessors. One that starts while states are on their way gets in
    # that exchange's way, and waits for it with part of its thread blocks: it begins when they are there.
    entering, dend, dstate = jax.lax.optimization_barrier((entering, *back((begun.start, dlast))))
    dq, dk, dv, dlog, _, dwrite = begun.finish(entering, dend)
    return dq, dk, dv, dlog if dlog is None else dlog.astype(log_decay.dtype), dstate, None, dwrite


_stretch.defvjp(_forward, _backward)


def _names(log_decay):
    """The names of the dimensions of q, k, v and log_decay."""
    keys, tokens = ("batch", "time", "key_heads", None), ("batch", "time", "heads", None)
    decays = None if log_decay is None else ("heads",) if log_decay.ndim == 1 else tokens[: log_decay.ndim]
    return keys, keys, tokens, decays


def total_decay(log_decay, time, runs, acc):
    """The log decay of a whole stretch, [B or 1, H, 1 or K], padding not counted; None where nothing decays."""
    if log_decay is None:
        return None
    log_decay = log_decay.astype(acc)
    if log_decay.ndim == 1:
        count = jnp.full((1,), time) if runs is None else jnp.sum(runs != 0, 1)
        return (count[:, None] * log_decay)[..., None]
    if runs is not None:
        log_decay = jnp.where((runs != 0).reshape(*runs.shape, *[1] * (log_decay.ndim - 2)), log_decay, 0)
    total = jnp.sum(log_decay, 1)
    return total if total.ndim == 3 else total[..., None]


def _left(left, state):
    """A state after log2 decays [B or 1, H], as the kernels know them: -inf where segments have opened."""
    return state * jnp.exp2(left)[..., None, None]


def _decayed(total, state):
    """A state, or the pair of one and its normaliser, after log decays [B or 1, H, 1 or K]."""
    factor = jnp.exp(total)
    return jax.tree.map(lambda s: s * (factor if s.ndim == 3 else factor[..., None]), state)
