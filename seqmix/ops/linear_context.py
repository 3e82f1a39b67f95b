"""Linear attention with time cut over a mesh: states pass from one stretch to the next (`seqmix.ops.context`)."""

import jax
import jax.numpy as jnp

from seqmix.ops.context import enter
from seqmix.ops.mesh import on_shares


def run(lay, op, d, acc, q, k, v, log_decay, state, runs, *, normalize, **options):
    """`linear_attention`'s result, with `op`, itself, on each device's stretch of time.

    The arguments are the op's, `d` its sizes, `acc` the states' dtype. A stretch is gone through twice, the first
    time for its state alone.
    """
    tokens, decays = ("batch", "time", "heads", None), None
    if log_decay is not None:
        decays = ("heads",) if log_decay.ndim == 1 else tokens[: log_decay.ndim]
    whole = ("batch", "heads", None, None)
    states = (whole, whole[:3]) if normalize else whole
    if state is None:
        zeros = lambda *shape: jnp.zeros((d.B, d.H, d.K, *shape), acc)
        state = (zeros(d.V), zeros()) if normalize else zeros(d.V)
    state = jax.tree.map(lambda s: s.astype(acc), state)

    def local(q, k, v, log_decay, state, runs):
        q, k = (lay.local_key_heads(x, d.Hk) for x in (q, k))
        call = lambda state: op(q, k, v, log_decay, state=state, segment_ids=runs, normalize=normalize, **options)
        end = call(None)[1]
        entering, state = enter(lay.time, end, _total(log_decay, q.shape[1], runs, acc), _decayed, state, runs)
        return call(entering)[0], state

    keys = ("batch", "time", "key_heads", None)
    names = (keys, keys, tokens, decays, states, ("batch", "time"))
    return on_shares(lay, local, (q, k, v, log_decay, state, runs), names, (tokens, states))


def _total(log_decay, time, runs, acc):
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


def _decayed(total, state):
    """A state, or the pair of one and its normaliser, after log decays [B or 1, H, 1 or K]."""
    factor = jnp.exp(total)
    return jax.tree.map(lambda s: s * (factor if s.ndim == 3 else factor[..., None]), state)
