"""Whole mixers beside flash-linear-attention's layers, whose kernels, norms and convolutions want a GPU.

The layer is theirs: projections, order, gates, scales. In place of its kernels stand the package's own naive
functions, in place of its norms and convolutions torch's.
"""

import functools
import importlib

from seqmix.mixers.recurrent.delta_net import DeltaNet
from seqmix.mixers.recurrent.gated_delta_net import GatedDeltaNet
from seqmix.mixers.recurrent.gla import GLA
from seqmix.mixers.recurrent.hgrn2 import HGRN2
from seqmix.mixers.recurrent.kimi_delta import KimiDeltaAttention
from tests.peers.compare import load_file
from tests.peers.layers import call, layer, linear, linear_out

FLA = "fla-core"
TRITON = ("triton", "triton.language", "fla.backends", "fla.utils", "fla.ops.utils.cache", "fla.ops.utils.index")
TRITON += ("fla.ops.utils.logcumsumexp", "fla.ops.utils.op", "fla.ops.utils.softplus")


def _naive(name, function):
    importlib.import_module("torch._dynamo")  # which torch would import later, and then mistake the stand-in for triton
    return getattr(load_file(FLA, f"fla/ops/{name}.py", TRITON), function)


def _parts():
    """Norms and convolutions by the names that the layers import."""
    import torch
    import torch.nn.functional as F

    class RMSNorm(torch.nn.Module):
        def __init__(self, hidden_size, elementwise_affine=True, eps=1e-5, activation="swish", dtype=None):
            super().__init__()
            self.weight, self.bias, self.eps = torch.nn.Parameter(torch.ones(hidden_size)), None, eps
            self.gate = {"swish": F.silu, "sigmoid": torch.sigmoid}[activation]

        def forward(self, x, gate=None):
            y = F.rms_norm(x, self.weight.shape, self.weight, self.eps)
            return y if gate is None else y * self.gate(gate)

    class ShortConvolution(torch.nn.Module):
        backend, activation = "torch", "silu"

        def __init__(self, hidden_size, kernel_size, bias, activation):
            super().__init__()
            assert (bias, activation) == (False, "silu")
            self.weight, self.kernel_size = torch.nn.Parameter(torch.ones(hidden_size, 1, kernel_size)), kernel_size

        def forward(self, x, **options):
            return convolve(x, self.weight[:, 0])

    def convolve(x, weight, bias=None, **options):
        x = F.pad(x.transpose(1, 2), (weight.shape[1] - 1, 0))
        return F.silu(F.conv1d(x, weight[:, None], bias, groups=len(weight))).transpose(1, 2), None

    return {
        "RMSNorm": RMSNorm,
        "FusedRMSNormGated": RMSNorm,
        "ShortConvolution": ShortConvolution,
        "causal_conv1d": convolve,
        "get_layer_cache": lambda *args, **options: None,
        "update_layer_cache": lambda *args, **options: None,
        "unpad_hidden_states": lambda hidden_states, cu_seqlens, attention_mask, q_len: (hidden_states, None, None),
        "repad_hidden_states": lambda hidden_states, indices, batch_size, q_len: hidden_states,
    }


def _make(their_layer, kernels, **fields):
    """An instance of their layer, with these functions for the kernels that it imports."""
    their_layer.forward.__globals__.update(_parts() | kernels)
    return their_layer(**fields)


def _common(p):
    weights = {f"{name}_proj.weight": linear(p[name]) for name in "qkv"}
    weights |= {f"{name}_conv1d.weight": p[f"conv/{name}"].flatten(1).T[:, None] for name in "qkv"}
    return weights | {"o_proj.weight": linear_out(p["out"])}


def _unit(x):
    """As the package's kernel does it."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


# GLA


def _gla(their_layer, x, p):
    def kernel(q, k, v, gk, **options):
        return _naive("gla/naive", "naive_recurrent_gla")(q, k, v, gk)

    m = GLA_HERE
    fields = dict(hidden_size=m.d_model, num_heads=m.heads, use_short_conv=True, conv_size=m.conv_width)
    made = _make(their_layer, {"fused_recurrent_gla": kernel}, gate_low_rank_dim=m.gate_rank, **fields)
    weights = _common(p) | {"g_proj.weight": linear(p["gate"]), "g_norm_swish_gate.weight": p["norm/scale"]}
    weights |= {"gk_proj.0.weight": p["decay/down"].T, "gk_proj.1.weight": linear(p["decay/up"])}
    return call(made, weights | {"gk_proj.1.bias": p["decay/bias"].flatten()}, x)[0]


GLA_HERE = GLA(d_model=16, heads=2, gate_rank=3, conv_width=3, chunk=16)

# HGRN2, which the package gives another activation of q, and none of v: here the paper's


def _hgrn2(their_layer, x, p):
    import torch
    import torch.nn.functional as F

    def kernel(q, k, v, gk, **options):
        return _naive("gla/naive", "naive_recurrent_gla")(q * q.shape[-1] ** 0.5, k, F.silu(v), gk)

    def norm_out(x, scale, bias, weight, out_bias):
        return F.rms_norm(x, scale.shape, scale, eps=1e-5) @ weight.T

    kernels = {"fused_recurrent_gla": kernel, "rms_norm_linear": norm_out, "swish": torch.sigmoid}
    m = HGRN2_HERE
    fields = dict(hidden_size=m.d_model, num_heads=m.heads, expand_ratio=m.sizes[0])
    made = _make(their_layer, kernels, layer_idx=1, **fields)
    weights = {f"{theirs}_proj.weight": linear(p[ours]) for theirs, ours in (("q", "q"), ("f", "f"), ("i", "v"))}
    weights |= {"g_norm.weight": p["norm/scale"].flatten(), "o_proj.weight": linear_out(p["out"])}
    return call(made, weights, x, lower_bound=torch.sigmoid(p["bound"]).flatten())[0]


HGRN2_HERE = HGRN2(d_model=16, heads=2, chunk=16, lower_bound=0.5, learned_bound=True)

# DeltaNet


def _delta_net(their_layer, x, p):
    def kernel(q, k, v, beta, use_qk_l2norm_in_kernel, **options):
        assert use_qk_l2norm_in_kernel
        heads_first = [y.transpose(1, 2) for y in (_unit(q), _unit(k), v, beta)]
        y, state = _naive("delta_rule/naive", "delta_rule_recurrence")(*heads_first)
        return y.transpose(1, 2), state

    m = DELTA_NET
    fields = dict(hidden_size=m.d_model, num_heads=m.heads, conv_size=m.conv_width, use_gate=True)
    made = _make(their_layer, {"fused_recurrent_delta_rule": kernel}, allow_neg_eigval=True, **fields)
    weights = _common(p) | {"b_proj.weight": p["beta"].T, "g_proj.weight": linear(p["gate"])}
    return call(made, weights | {"o_norm.weight": p["norm/scale"]}, x)[0]


DELTA_NET = DeltaNet(d_model=16, heads=2, conv_width=3, beta_max=2.0, gate=True, chunk=16)

# Gated DeltaNet and KDA: the gates belong to what the layer leaves to its kernel, which the package has naively too


def _gated_kernel(gate, rule):
    def kernel(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval, **options):
        assert all(options[f"use_{name}_in_kernel"] for name in ("qk_l2norm", "gate", "beta_sigmoid"))
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
        return rule()(_unit(q), _unit(k), v, g=gate()(g, A_log, dt_bias), beta=beta)

    return kernel


def _gated_delta_net(their_layer, x, p):
    gate = functools.partial(_naive, "gated_delta_rule/gate", "naive_gdn_gate")
    rule = functools.partial(_naive, "gated_delta_rule/naive", "naive_recurrent_gated_delta_rule")
    m = GATED_DELTA_NET
    key_dim, value_dim = m.sizes
    fields = dict(hidden_size=m.d_model, num_heads=m.heads, head_dim=key_dim, expand_v=value_dim / key_dim)
    kernels = {"chunk_gated_delta_rule": _gated_kernel(gate, rule)}
    made = _make(their_layer, kernels, conv_size=m.conv_width, **fields)
    made.training = False
    weights = _common(p) | {"b_proj.weight": p["beta"].T, "g_proj.weight": linear(p["gate"])}
    weights |= {"a_proj.weight": p["decay/weight"].T, "o_norm.weight": p["norm/scale"]}
    return call(made, weights | {name: p[f"decay/{name}"] for name in ("A_log", "dt_bias")}, x)[0]


GATED_DELTA_NET = GatedDeltaNet(d_model=16, heads=2, conv_width=3, chunk=16)


def _kda(their_layer, x, p):
    gate = functools.partial(_naive, "kda/gate", "naive_kda_gate")
    rule = functools.partial(_naive, "kda/naive", "naive_recurrent_kda")
    m = KDA
    fields = dict(hidden_size=m.d_model, num_heads=m.heads, head_dim=m.sizes[0], allow_neg_eigval=True)
    made = _make(their_layer, {"chunk_kda": _gated_kernel(gate, rule)}, conv_size=m.conv_width, **fields)
    weights = _common(p) | {"b_proj.weight": p["beta"].T, "o_norm.weight": p["norm/scale"]}
    for theirs, ours in (("f_proj", "decay"), ("g_proj", "gate")):
        weights |= {f"{theirs}.0.weight": p[f"{ours}/down"].T, f"{theirs}.1.weight": linear(p[f"{ours}/up"])}
    weights |= {"g_proj.1.bias": p["gate/bias"].flatten(), "A_log": p["decay/A_log"]}
    return call(made, weights | {"dt_bias": p["decay/dt_bias"].flatten()}, x)[0]


KDA = KimiDeltaAttention(d_model=16, heads=2, gate_rank=8, conv_width=3, beta_max=2.0, chunk=16)


def _fla_layer(mixer, file, function, run_theirs):
    missing = (
        "fla.layers.utils",
        "fla.modules",
        "fla.modules.activations",
        "fla.modules.convolution",
        "fla.modules.layernorm",
    )
    missing += ("fla.ops.gla", "fla.ops.delta_rule", "fla.ops.gated_delta_rule", "fla.ops.kda")
    file = f"fla/layers/{file}.py"
    return layer(mixer, "flash-linear-attention", file, function, run_theirs, missing=missing)


COMPARISONS = (
    _fla_layer(GLA_HERE, "gla", "GatedLinearAttention", _gla),
    _fla_layer(HGRN2_HERE, "hgrn2", "HGRN2Attention", _hgrn2),
    _fla_layer(DELTA_NET, "delta_net", "DeltaNet", _delta_net),
    _fla_layer(GATED_DELTA_NET, "gated_deltanet", "GatedDeltaNet", _gated_delta_net),
    _fla_layer(KDA, "kda", "KimiDeltaAttention", _kda),
)
