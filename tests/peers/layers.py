"""Whole mixers beside the layers of public packages that run without compiled kernels, weight for weight.

Ours and theirs get the same weights, with values of no special kind, brought into the layout of each here.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.core import param
from seqmix.mixers.recurrent.gateloop import GateLoop
from seqmix.mixers.recurrent.glru import GLRU
from seqmix.mixers.recurrent.mamba import Mamba
from seqmix.mixers.recurrent.retnet import RetNet
from seqmix.mixers.recurrent.rg_lru import RGLRU
from seqmix.mixers.recurrent.rwkv7 import RWKV7
from tests.peers.compare import LENGTH, Comparison
from tests.peers.ops import OTHERS

B, T = 2, LENGTH


def layer(mixer, package, file, function, run_theirs, **more):
    """`run_theirs(layer, x, weights)`: y, from the weights by their names in our tree."""
    leaves, tree = jax.tree.flatten(mixer.params(), is_leaf=lambda leaf: isinstance(leaf, param.Param))
    names = [param.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(param.abstract(mixer.params()))]

    def arrays(rng):
        weights = {name: 0.5 * rng.normal(size=leaf.shape) for name, leaf in zip(names, leaves, strict=True)}
        return {"tokens": rng.normal(size=(B, T, mixer.d_model)), **weights}

    def ours(implementation, tokens, **weights):
        params = jax.tree.unflatten(tree, [weights[name] for name in names])
        return dataclasses.replace(mixer, implementation=implementation).forward(params, tokens)[:1]

    def theirs(their_layer, tokens, **weights):
        return (run_theirs(their_layer, tokens, weights),)

    return Comparison(f"{type(mixer).__name__}, the mixer", package, file, function, arrays, ours, theirs, **more)


def linear(weight):
    """Our [D, ...], from the stream into heads, as torch's [out, in]."""
    return weight.reshape(weight.shape[0], -1).T


def linear_out(weight):
    """Our [..., D], back to the stream."""
    return weight.reshape(-1, weight.shape[-1]).T


def call(layer, weights, *args, **options):
    """The layer with these weights in place of its own."""
    import torch

    return torch.func.functional_call(layer, weights, args, options)


# RetNet beside torchscale's MultiScaleRetention

RETNET = RetNet(d_model=16, heads=2, value_dim=16, norm="rms", norm_eps=0.0, chunk=16)


def _retention(layer, x, p):
    """The angles are ours, the pairs that are turned theirs (neighbours). eps is 0, as theirs is added after a row of
    scores was divided by its sum.
    """
    import torch

    heads, (key_dim, value_dim) = RETNET.heads, RETNET.sizes
    place = torch.arange(T, dtype=torch.float32)
    angles = place[:, None] * torch.tensor(10000.0 ** -(np.arange(0, key_dim, 2) / key_dim), dtype=torch.float32)
    angles = angles.repeat_interleave(2, dim=1)
    decay = torch.log1p(-(2.0 ** (-5 - torch.arange(heads, dtype=torch.float32))))
    mask = torch.exp(decay[:, None, None] * (place[:, None] - place)).tril()
    mask = mask / mask.sum(-1, keepdim=True).sqrt()
    args = SimpleNamespace(layernorm_eps=0.0, multiway=False)
    made = layer(args, x.shape[-1], heads * value_dim, heads)
    neighbours = lambda w: linear(w.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2))
    weights = {"q_proj.weight": neighbours(p["q"]), "k_proj.weight": neighbours(p["k"])}
    weights |= {"v_proj.weight": linear(p["v"]), "g_proj.weight": linear(p["gate"])}
    weights["out_proj.weight"] = linear_out(p["out"])
    return call(made, weights, x, ((torch.sin(angles), torch.cos(angles)), mask))


# GateLoop beside lucidrains' GateLoopedAttention

GATELOOP = GateLoop(d_model=8, transition="complex", chunk=16)


def _gate_loop(layer, x, p):
    import torch

    made = layer(x.shape[-1], checkpoint_gate_looped_attn=False, frac_gradient_state_transition=1.0)
    both = torch.stack([p["mag"][..., 0], p["phase"][..., 0]], dim=-1)  # [D, H, 2]
    weights = {
        "to_qkv.weight": torch.cat([linear(p[name]) for name in ("q", "k", "v")]),
        "to_a.0.weight": linear(both),
        "to_a.0.bias": torch.zeros(2 * x.shape[-1], dtype=x.dtype),
        "to_gates.0.weight": linear(p["gate"]),
        "to_out.weight": linear_out(p["out"]),
    }
    return call(made, weights, x)


# RG-LRU beside recurrentgemma's: the recurrence and the gates are theirs, what is around them stands here

RG_LRU = RGLRU(d_model=8, width=12, heads=3, conv_width=3, chunk=16)


def _rg_lru(layer, x, p):
    """Positions begin at 1: at 0 the peer feeds the token in unscaled, as a document's first."""
    import torch
    import torch.nn.functional as F

    width, taps = RG_LRU._width, RG_LRU.conv_width
    u, gate = (x @ p[name].flatten(1) for name in ("x", "gate"))
    conv = p["conv"].reshape(taps, 1, width).permute(2, 1, 0)
    u = F.conv1d(F.pad(u.transpose(1, 2), (taps - 1, 0)), conv, p["conv_bias"].flatten(), groups=width).transpose(1, 2)
    log_a = F.logsigmoid(p["Lambda"]).flatten()
    weights = {"a_param": torch.log(torch.expm1(-log_a))}  # softplus of theirs is minus our log_sigmoid
    for name, gate_name in (("a", "a_gate"), ("i", "input_gate")):
        weights |= {f"{gate_name}.w": p[f"{name}/weight"], f"{gate_name}.b": p[f"{name}/bias"]}
    h, _ = call(layer(width, RG_LRU.heads), weights, u, torch.arange(1, T + 1).expand(B, T))
    return (h * F.gelu(gate, approximate="tanh")) @ p["out"].flatten(0, 1)


# Mamba beside mamba_ssm's, with its reference scan in place of the CUDA kernel

MAMBA = Mamba(d_model=8, d_state=5, dt_rank=3, conv_width=3, chunk=16)


def _mamba(layer, x, p):
    import torch

    made = layer(MAMBA.d_model, MAMBA.d_state, MAMBA.conv_width, dt_rank=3, use_fast_path=False)
    names = layer.forward.__globals__
    names["selective_scan_fn"], names["causal_conv1d_fn"] = (
        next(c for c in OTHERS if c.function == "selective_scan_ref").load(),
        None,
    )
    weights = {
        "in_proj.weight": torch.cat([p["u"], p["z"]], dim=1).T,
        "conv1d.weight": p["conv"].T[:, None],
        "conv1d.bias": p["conv_bias"],
        "x_proj.weight": torch.cat([p["dt/down"], p["B"], p["C"]], dim=1).T,
        "dt_proj.weight": p["dt/up"].T,
        "dt_proj.bias": p["dt/bias"],
        "A_log": p["A_log"],
        "D": p["D"],
        "out_proj.weight": p["out"].T,
    }
    return call(made, weights, x)


# RWKV-7 beside the time mixing of the rwkv package, which goes token by token

RWKV = RWKV7(d_model=16, head_dim=8, decay_rank=3, rate_rank=2, gate_rank=5, norm_eps=64e-5 / 8, chunk=16)


def _rwkv7(step, x, p):
    import torch

    (heads, size), nothing = RWKV.sizes, torch.zeros(())
    low_rank = lambda name: [p[f"{name}/down"], p[f"{name}/up"].flatten(1)]
    bias = lambda name: p[f"{name}/bias"].flatten()
    weights = [p[f"mix/{name}"] for name in ("r", "w", "k", "v", "a", "g")]
    weights += [bias("w"), *low_rank("w"), bias("a"), *low_rank("a"), nothing, nothing, nothing, *low_rank("g")]
    weights += [p["k_k"].flatten(), p["k_a"].flatten(), p["r_k"].flatten()]
    weights += [p[name].flatten(1) for name in ("r", "k", "v")] + [p["out"].flatten(0, 1)]
    weights += [p["norm/scale"].flatten(), p["norm/bias"].flatten()]
    rows = []
    for row in x:
        before, state, ys = torch.zeros_like(row[0]), torch.zeros(heads, size, size), []
        for token in row:
            y, before, state, _ = step(0, heads, size, token, before, nothing, state, *weights)
            ys.append(y)
        rows.append(torch.stack(ys))
    return torch.stack(rows)


# GLRU beside its author's Flax module

UNIT = GLRU(d_model=8, width=12, chunk=16)


def _glru(their_layer, x, p):
    side_by_side = lambda ys: jnp.concatenate([y.reshape(*y.shape[:-2], -1) for y in ys], axis=-1)
    proj = {
        "kernel": side_by_side([p[name] for name in ("z", "i", "o")]),
        "bias": side_by_side([p[f"bias/{name}"] for name in ("z", "i", "o")]),
    }
    out = {"kernel": p["out"][:, 0], "bias": jnp.zeros(x.shape[-1], x.dtype)}
    made = their_layer(d_model=UNIT.d_model, d_h=UNIT.width)
    return made.apply({"params": {"proj": proj, "out_proj": out}}, x)[1]


COMPARISONS = (
    layer(RETNET, "torchscale", "torchscale/component/multiscale_retention.py", "MultiScaleRetention", _retention),
    layer(
        GATELOOP,
        "gateloop-transformer",
        "gateloop_transformer/gateloop_transformer.py",
        "GateLoopedAttention",
        _gate_loop,
        missing=("rotary_embedding_torch",),
    ),
    layer(
        RG_LRU,
        "recurrentgemma",
        "recurrentgemma/torch/layers.py",
        "RGLRU",
        _rg_lru,
        missing=("recurrentgemma.torch", "recurrentgemma.torch.array_typing"),
    ),
    layer(
        MAMBA,
        "mamba-ssm",
        "mamba_ssm/modules/mamba_simple.py",
        "Mamba",
        _mamba,
        missing=("mamba_ssm.ops.selective_scan_interface",),
    ),
    layer(
        UNIT,
        "flax-gated-linear-rnn",
        "flax_gated_linear_rnn/gated_linear_rnn.py",
        "GatedLinearRNN",
        _glru,
        framework="jax",
    ),
    layer(
        RWKV,
        "rwkv",
        "rwkv/model.py",
        "RWKV_x070_TMix_one",
        _rwkv7,
        dtype="float32",
        environment=(("RWKV_V7_ON", "1"), ("RWKV_JIT_ON", "0")),
    ),
)
