"""`delta_rule` and `diagonal_plus_rank_one` beside the naive references of flash-linear-attention."""

import numpy as np

from seqmix import ops
from tests.peers.ops import CHUNK, B, H, K, T, V, decays, fla, heads_first, normal


def _unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _delta(key_heads=H, steps=(), decay=None):
    """Inputs of a delta rule: keys of length one, beta in (0, 1)."""

    def arrays(rng):
        made = normal(q=(B, T, key_heads, K), v=(B, T, *steps, H, V), state=(B, H, K, V))(rng)
        made["k"] = _unit(rng.normal(size=(B, T, *steps, key_heads, K)))
        made["beta"] = rng.uniform(size=(B, T, *steps, H))
        return made if decay is None else made | {"log_decay": decays(rng, *decay)}

    return arrays


def _delta_rule(implementation, q, k, v, beta, state, log_decay=None):
    options = dict(scale=K**-0.5, state=state, chunk=CHUNK, implementation=implementation)
    return ops.delta_rule(q, k, v, beta, log_decay, **options, steps=k.shape[2] if k.ndim == 5 else 1)


def _their_delta_rule(fn, q, k, v, beta, state):
    y, state = fn(*heads_first(q, k, v, beta), initial_state=state)
    return y.transpose(1, 2), state


def _their_delta_product(fn, q, k, v, beta, log_decay, state):
    k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
    options = dict(initial_state=state, output_final_state=True, num_householder=3)
    return fn(q, k, v, log_decay, beta, K**-0.5, **options)


def _rank_one(decay):
    """left right^T takes a part of the state out, as the delta rule does, but along two different directions."""

    def arrays(rng):
        made = normal(q=(B, T, H, K), k=(B, T, H, K), v=(B, T, H, V), state=(B, H, K, V))(rng)
        made |= {name: _unit(rng.normal(size=(B, T, H, K))) for name in ("left", "right")}
        return made | ({"log_decay": decays(rng, B, T, H, K)} if decay else {})

    return arrays


def _diagonal_plus_rank_one(implementation, q, k, v, left, right, state, log_decay=None):
    options = dict(scale=K**-0.5, state=state, chunk=CHUNK, implementation=implementation)
    return ops.diagonal_plus_rank_one(q, k, v, left, right, log_decay, **options)


def _their_rank_one(fn, q, k, v, left, right, state, log_decay=None):
    decay = [] if log_decay is None else [log_decay]
    y, state = fn(*heads_first(q, k, v, right, left, *decay), initial_state=state)
    return y.transpose(1, 2), state


def _their_gated_delta(fn, q, k, v, beta, log_decay, state):
    return fn(q, k, v, beta=beta, g=log_decay, initial_state=state, output_final_state=True)


COMPARISONS = (
    fla("delta_rule", "delta_rule_recurrence", "delta_rule", _delta(), _delta_rule, _their_delta_rule),
    fla(
        "gated_delta_rule",
        "naive_recurrent_gated_delta_rule",
        "delta_rule, a decay per head",
        _delta(decay=(B, T, H)),
        _delta_rule,
        _their_gated_delta,
    ),
    fla(
        "kda",
        "naive_recurrent_kda",
        "delta_rule, a decay per channel, grouped heads",
        _delta(key_heads=2, decay=(B, T, H, K)),
        _delta_rule,
        _their_gated_delta,
    ),
    fla(
        "gated_delta_product",
        "naive_recurrent_gated_delta_product",
        "delta_rule, three steps a token",
        _delta(steps=(3,), decay=(B, T, H)),
        _delta_rule,
        _their_delta_product,
    ),
    fla(
        "generalized_delta_rule/iplr",
        "iplr_recurrence",
        "diagonal_plus_rank_one, no decay",
        _rank_one(decay=False),
        _diagonal_plus_rank_one,
        _their_rank_one,
    ),
    fla(
        "generalized_delta_rule/dplr",
        "dplr_recurrence",
        "diagonal_plus_rank_one (RWKV-7's state)",
        _rank_one(decay=True),
        _diagonal_plus_rank_one,
        _their_rank_one,
    ),
)
