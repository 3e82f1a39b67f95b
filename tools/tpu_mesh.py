"""Compiles the ops with their kernels for eight TPU v5e chips and prints what moves between them, as JSON.

    TPU_SKIP_MDS_QUERY=1 python -m tools.tpu_mesh

It needs libtpu in its Python; tests/pallas_kernels/test_tpu_compiled.py runs it in a process of its own. For each op
and two meshes: which of its kernels are missing in the compiled gradient, and the shapes that collectives move.
"""

import json
import re

import jax
import jax.numpy as jnp

from seqmix import ops
from seqmix.core import sharding
from seqmix.ops import masks
from tools import needs

B, T, H, K, V = 8, 1024, 8, 128, 64
TOPOLOGY = "v5e:2x4"
MESHES = {"fsdp": dict(data=2, fsdp=2, model=2), "context": dict(data=2, context=2, model=2)}
MOVES = r"= (.*?) (all-gather|all-to-all|collective-permute)(?:-start)?\("
KERNELS = {
    "linear_attention": ("linear_attention_forward", "linear_attention_states", "linear_attention_backward"),
    "linear_scan": ("linear_scan_forward", "linear_scan_backward"),
    "attention": tuple(f"block_sparse_attention_{kernel}" for kernel in ("forward", "dq", "dkv")),
}


def calls():
    """{op: (function, *arguments as (shape, dtype, *names of dimensions))}."""
    keys = ((B, T, 1, K), jnp.bfloat16, "batch", "time", None, None)
    tokens = ((B, T, 8, 256), jnp.bfloat16, "batch", "time", "heads", None)
    return {
        "linear_attention": (
            lambda q, k, v, d: ops.linear_attention(q, k, v, -jnp.exp(d), write=jnp.exp(d))[0],
            keys,
            keys,
            ((B, T, H, V), jnp.bfloat16, "batch", "time", "heads", None),
            ((B, T, H), jnp.float32, "batch", "time", "heads"),
        ),
        "linear_scan": (lambda x, a: ops.linear_scan(x, -jnp.exp(a))[0], tokens, tokens),
        "attention": (_window, *(((B, T, H, K), jnp.bfloat16, "batch", "time", "heads", None),) * 3),
    }


def _window(q, k, v):
    """Its kernels have not run on a chip and are named."""
    return ops.attention(q, k, v, mask=masks.Causal() & masks.Window(300), implementation="tpu")


def hlo(mesh, function, *arguments):
    """The text of the compiled gradient."""
    with sharding.use_mesh(mesh):
        laid = []
        for shape, dtype, *names in arguments:
            place = jax.sharding.NamedSharding(mesh, sharding.spec(names, shape, mesh))
            laid.append(jax.ShapeDtypeStruct(shape, dtype, sharding=place))

        def loss(*args):
            return jnp.sum(function(*args).astype(jnp.float32) ** 2)

        return jax.jit(jax.grad(loss, tuple(range(len(laid))))).lower(*laid).compile().as_text()


def main():
    needs.libtpu("tools.tpu_mesh")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    for name, axes in MESHES.items():
        mesh = sharding.make_mesh(**axes, devices=devices)
        for op, call in calls().items():
            if op == "attention" and name == "context":
                continue  # has no form for time cut over a mesh
            text = hlo(mesh, *call)
            found = [kernel for kernel in KERNELS[op] if kernel in text]
            moved = [shape for shape, _ in re.findall(MOVES, text)]
            print(
                json.dumps({"op": op, "mesh": name, "missing": sorted(set(KERNELS[op]) - set(found)), "moved": moved})
            )


if __name__ == "__main__":
    main()
