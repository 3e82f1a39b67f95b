"""What stacks put around mixers: the gated MLP, the depth scaling of output projections, the layers' aux."""

import dataclasses

import jax
import jax.numpy as jnp

from seqmix.core import param
from seqmix.core.param import Param


def mlp_params(width: int, hidden: int) -> dict:
    """gate and up [width, hidden], out [hidden, width]."""
    return {
        "gate": Param((width, hidden), ("embed", "mlp")),
        "up": Param((width, hidden), ("embed", "mlp")),
        "out": Param((hidden, width), ("mlp", "embed")),
    }


def gated_mlp(p, x):
    """(silu(x W_gate) * x W_up) W_out, computed in the dtype of x (SwiGLU, arXiv 2002.05202)."""
    gate, up, out = (p[name].astype(x.dtype) for name in ("gate", "up", "out"))
    return (jax.nn.silu(x @ gate) * (x @ up)) @ out


def scale_out(tree: dict, factor: float) -> dict:
    """The tree with the init of its projection "out", if it has one, multiplied by factor."""
    out = tree.get("out")
    if not isinstance(out, Param) or factor == 1.0:
        return tree
    base = out.init or param.normal((out.fan_in or out.shape[0]) ** -0.5)

    def scaled(key, shape, dtype):
        return base(key, shape, dtype) * jnp.asarray(factor, dtype)

    return tree | {"out": dataclasses.replace(out, init=scaled)}


def merged_aux(auxes) -> dict:
    """The aux of a stack from those of its period's positions, stacked over periods: means of what is not updates."""
    out, values = {}, {}
    for i, aux in enumerate(auxes):
        for key, value in aux.items():
            if key.startswith("update/"):
                out[f"update/layers/{i}/mixer/{key.removeprefix('update/')}"] = value
            else:
                values.setdefault(key, []).append(value)
    means = {key: [jnp.mean(v, axis=0) for v in vs] for key, vs in values.items()}
    return out | {key: jnp.stack(vs).mean(axis=0) for key, vs in means.items()}
