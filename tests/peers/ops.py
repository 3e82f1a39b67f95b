"""The ops beside the naive references of flash-linear-attention, Mamba, Mamba-2 and others; delta rules: `delta_ops`.

Each runs over 37 tokens in chunks of 16 from a given state, with decays a token between about e^-0.001 and e^-20.
"""

import numpy as np

from seqmix import ops
from seqmix.mixers.recurrent.lightning import Lightning
from seqmix.parts.feature_maps import Taylor2
from tests.peers.compare import LENGTH, Comparison, load_file

B, T, H, K, V, CHUNK = 2, LENGTH, 4, 8, 6, 16


def normal(**shapes):
    """Arrays of these shapes, normally distributed."""
    return lambda rng: {name: rng.normal(size=shape) for name, shape in shapes.items()}


def decays(rng, *shape):
    return -np.exp(2 * rng.normal(size=shape) - 1)


def _with_decay(*shape, **more):
    """q, k, v, a state and decays of this shape."""
    rest = normal(q=(B, T, H, K), k=(B, T, H, K), v=(B, T, H, V), state=(B, H, K, V), **more)
    return lambda rng: rest(rng) | {"log_decay": decays(rng, *shape)}


def heads_first(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def _linear(implementation, q, k, v, state, log_decay=None):
    options = dict(scale=K**-0.5, state=state, chunk=CHUNK, implementation=implementation)
    return ops.linear_attention(q, k, v, log_decay, **options)


def fla(name, function, label, arrays, run_ours, run_theirs, **more):
    return Comparison(label, "fla-core", f"fla/ops/{name}/naive.py", function, arrays, run_ours, run_theirs, **more)


# linear_attention


def _normalised(rng):
    made = {name: rng.uniform(0.1, 1, size=(B, T, H, K)) for name in "qk"}
    made |= normal(v=(B, T, H, V), state=(B, H, K, V))(rng)
    return made | {"state_z": rng.uniform(size=(B, H, K))}


def _linear_normalised(implementation, q, k, v, state, state_z):
    options = dict(normalize=True, eps=1e-10, state=(state, state_z), chunk=CHUNK, implementation=implementation)
    y, (state, state_z) = ops.linear_attention(q, k, v, scale=K**-0.5, **options)
    return y, state, state_z


def _their_normalised(fn, q, k, v, state, state_z):
    options = dict(normalize=True, initial_state=(state, state_z[:, None]), output_final_state=True)
    y, (state, state_z) = fn(q, k, v, **options)
    return y, state, state_z[:, 0]


def _retention(implementation, q, k, v):
    decay = np.log1p(-(2.0 ** (-5 - np.arange(H)))).astype(q.dtype)
    return ops.linear_attention(q, k, v, decay, scale=K**-0.5, chunk=CHUNK, implementation=implementation)[:1]


def _based(implementation, q, k, v):
    q, k = Taylor2().apply({}, q, k)
    return ops.linear_attention(q, k, v, normalize=True, eps=1e-6, chunk=CHUNK, implementation=implementation)[:1]


def _ssd(rng):
    """48 tokens: the peer wants whole blocks."""
    time, groups = 48, 2
    made = normal(q=(B, time, groups, K), k=(B, time, groups, K), v=(B, time, H, V), state=(B, H, K, V))(rng)
    return made | {"log_decay": decays(rng, B, time, H)}


def _linear_unscaled(implementation, q, k, v, log_decay, state):
    return ops.linear_attention(q, k, v, log_decay, state=state, chunk=CHUNK, implementation=implementation)


def _their_ssd(fn, q, k, v, log_decay, state):
    q, k = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (q, k))
    y, state = fn(v, log_decay, k, q, CHUNK, initial_states=state.transpose(2, 3)[:, None])
    return y, state.transpose(2, 3)


def _their_with_state(fn, q, k, v, log_decay, state):
    return fn(q, k, v, log_decay, initial_state=state, output_final_state=True)


LIGHTNING = Lightning(d_model=H * K, heads=H, depth=0.3)


def _lightning(implementation, q, k, v):
    decay = LIGHTNING._log_decay(q.dtype)
    return ops.linear_attention(q, k, v, decay, chunk=CHUNK, implementation=implementation)[:1]


def _their_lightning(fn, q, k, v):
    """With the package's slopes, made weaker by the depth as in its example of a layer."""
    slopes = load_file("lightning-attn", "lightning_attn/utils/utils.py")._build_slope_tensor(H)
    return (fn(*heads_first(q, k, v), slopes * (1 - LIGHTNING.depth + 1e-5)).transpose(1, 2),)


def _log_linear(rng):
    made = normal(q=(B, T, 2, K), k=(B, T, 2, K), v=(B, T, H, V), level_scales=(B, T, H, T.bit_length() + 1))(rng)
    return made | {"log_decay": decays(rng, B, T, H)}


def _our_log_linear(implementation, **arrays):
    return ops.log_linear_attention(**arrays, chunk=CHUNK, implementation=implementation)[:1]


LINEAR = (
    fla(
        "log_linear_attn",
        "naive_log_linear_attn",
        "log_linear_attention, a decay per head",
        _log_linear,
        _our_log_linear,
        lambda fn, q, k, v, log_decay, level_scales: (fn(q, k, v, log_decay, level_scales),),
    ),
    fla(
        "linear_attn",
        "naive_recurrent_linear_attn",
        "linear_attention, no decay",
        normal(q=(B, T, H, K), k=(B, T, H, K), v=(B, T, H, V), state=(B, H, K, V)),
        _linear,
        lambda fn, q, k, v, state: fn(q, k, v, initial_state=state, output_final_state=True),
    ),
    fla(
        "linear_attn",
        "naive_recurrent_linear_attn",
        "linear_attention, normalised",
        _normalised,
        _linear_normalised,
        _their_normalised,
    ),
    fla(
        "retention",
        "naive_retention",
        "linear_attention, RetNet's decays",
        normal(q=(B, T, H, K), k=(B, T, H, K), v=(B, T, H, V)),
        _retention,
        lambda fn, q, k, v: (fn(*heads_first(q, k, v)).transpose(1, 2),),
    ),
    fla(
        "simple_gla",
        "naive_recurrent_simple_gla",
        "linear_attention, a decay per head",
        _with_decay(B, T, H),
        _linear,
        lambda fn, q, k, v, log_decay, state: fn(q, k, v, log_decay, initial_state=state, output_final_state=True),
    ),
    fla(
        "gla",
        "naive_recurrent_gla",
        "linear_attention, a decay per channel",
        _with_decay(B, T, H, K),
        _linear,
        _their_with_state,
    ),
    fla(
        "based",
        "naive_parallel_based",
        "linear_attention, Based's feature map",
        normal(q=(B, T, H, K), k=(B, T, H, K), v=(B, T, H, V)),
        _based,
        lambda fn, q, k, v: (fn(*heads_first(q, k, v)).transpose(1, 2),),
    ),
    Comparison(
        "linear_attention, Lightning's decays",
        "lightning-attn",
        "lightning_attn/ops/torch/linear_attention.py",
        "linear_attn",
        normal(q=(B, T, H, K), k=(B, T, H, K), v=(B, T, H, V)),
        _lightning,
        _their_lightning,
    ),
    Comparison(
        "linear_attention, Mamba-2's SSD with groups",
        "mamba-ssm",
        "mamba_ssm/modules/ssd_minimal.py",
        "ssd_minimal_discrete",
        _ssd,
        _linear_unscaled,
        _their_ssd,
        missing=("mamba_ssm.ops.triton.ssd_combined",),
    ),
)

# Elementwise recurrences, convolution, softmax attention

D, N, W = 6, 5, 4
_IDS = np.array([[1] * 9 + [2] * 20 + [3] * 8, [1] * 30 + [2] * 7], np.int32)


def _scan(rng):
    return normal(x=(B, T, D), state=(B, D))(rng) | {"log_a": decays(rng, B, T, D)}


def _selective(rng):
    made = normal(u=(B, T, D), B=(B, T, 2, N), C=(B, T, 2, N), D=(D,))(rng)
    return made | {"dt": np.exp(rng.normal(size=(B, T, D)) - 1), "A": decays(rng, D, N)}


def _our_selective(implementation, u, dt, A, B, C, D):
    return ops.selective_scan(u, dt, A, B, C, D, chunk=CHUNK, implementation=implementation)


def _their_selective(fn, u, dt, A, B, C, D):
    u, dt = (x.transpose(1, 2) for x in (u, dt))
    y, state = fn(u, dt, A, B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1), D, return_last_state=True)
    return y.transpose(1, 2), state


def _their_conv(fn, x, weight, bias, state):
    options = dict(initial_states=state.transpose(1, 2), return_final_states=True)
    y, state = fn(x.transpose(1, 2), weight.T, bias, **options)
    return y.transpose(1, 2), state.transpose(1, 2)


def _their_packed_conv(fn, x, weight, bias):
    import torch

    return (fn(x.transpose(1, 2), weight.T, bias, seq_idx=torch.tensor(_IDS)).transpose(1, 2),)


def _conv(label, arrays, run_ours, run_theirs):
    return Comparison(
        label,
        "causal-conv1d",
        "causal_conv1d/causal_conv1d_interface.py",
        "causal_conv1d_ref",
        arrays,
        run_ours,
        run_theirs,
        missing=("causal_conv1d.cpp_functions",),
        implementations=(None,),  # it has but one
    )


OTHERS = (
    fla(
        "hgrn",
        "naive_recurrent_hgrn",
        "linear_scan",
        _scan,
        lambda name, x, log_a, state: ops.linear_scan(x, log_a, state=state, chunk=CHUNK, implementation=name),
        lambda fn, x, log_a, state: fn(x, log_a, initial_state=state, output_final_state=True),
    ),
    Comparison(
        "selective_scan, with groups",
        "mamba-ssm",
        "mamba_ssm/ops/selective_scan_interface.py",
        "selective_scan_ref",
        _selective,
        _our_selective,
        _their_selective,
        missing=("mamba_ssm.utils.torch", "mamba_ssm.ops.triton.layer_norm", "selective_scan_cuda"),
    ),
    _conv(
        "short_conv",
        normal(x=(B, T, D), weight=(W, D), bias=(D,), state=(B, W - 1, D)),
        lambda _, x, weight, bias, state: ops.short_conv(x, weight, bias, state=state),
        _their_conv,
    ),
    _conv(
        "short_conv, packed",
        normal(x=(B, T, D), weight=(W, D), bias=(D,)),
        lambda _, x, weight, bias: ops.short_conv(x, weight, bias, segment_ids=_IDS)[:1],
        _their_packed_conv,
    ),
    fla(
        "attn",
        "naive_parallel_attn",
        "attention, grouped heads, window, sink logits",
        normal(q=(B, T, H, K), k=(B, T, 2, K), v=(B, T, 2, V), sink=(H,)),
        lambda name, q, k, v, sink: (
            ops.attention(q, k, v, window=9, sink_logits=sink, block=CHUNK, implementation=name),
        ),
        lambda fn, q, k, v, sink: fn(q, k, v, window_size=9, sink_bias=sink)[:1],
    ),
)

COMPARISONS = (*LINEAR, *OTHERS)
