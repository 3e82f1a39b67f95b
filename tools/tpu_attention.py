"""Compiles `attention`, by its automatic choice, for TPUs that are not here, and prints as JSON what became of it.

    TPU_SKIP_MDS_QUERY=1 python -m tools.tpu_attention

It needs libtpu in its Python; tests/pallas_kernels/test_attention_libraries.py runs it in a process of its own. For
each call: on which chips, how many kinds of splash attention's three kernels are in the compiled gradient, and whether
tokens cross devices.
"""

import json
import re

import jax
import jax.numpy as jnp

from seqmix.core import sharding
from seqmix.ops import attention
from tools import needs
from tools.tpu_bundles import TOPOLOGIES

B, T, H, K, V = 8, 256, 4, 128, 64
KERNELS = r"splash_mha_(?:fwd|dq|dkv)\w*"
# call: (chip, mesh, whether segment ids are given, options)
CALLS = {
    "packed": ("v5e", dict(fsdp=2, model=2), True, {}),
    "window": ("v5p", dict(fsdp=4), False, {"window": 100, "soft_cap": 5.0}),
    "heads": ("v6e", dict(context=2, model=2), True, {"context": "heads"}),
    "dense": ("v6e", dict(fsdp=4), False, {"causal": False}),
    "lse": ("v6e", dict(fsdp=4), False, {"return_lse": True}),
}


def hlo(devices, axes, packed, options):
    """The text of the compiled gradient."""
    mesh = sharding.make_mesh(devices=devices, **axes)
    with sharding.use_mesh(mesh):

        def given(shape, dtype, *names):
            place = jax.sharding.NamedSharding(mesh, sharding.spec(names, shape, mesh))
            return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

        def loss(ids, *tokens):
            found = attention(*tokens, segment_ids=ids if packed else None, **options)
            return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(found))

        widths = (K, K, V)
        tokens = [given((B, T, H, width), jnp.bfloat16, "batch", "time", "heads", None) for width in widths]
        ids = given((B, T), jnp.int32, "batch", "time")
        return jax.jit(jax.grad(loss, (1, 2, 3))).lower(ids, *tokens).compile().as_text()


def main():
    needs.libtpu("tools.tpu_attention")
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    for call, (chip, *rest) in CALLS.items():
        devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
        text = hlo(devices, *rest)
        kinds = {name.split("_")[2] for name in re.findall(KERNELS, text)}
        moved = re.search(r"(all-gather|all-to-all|collective-permute)(-start)?\(", text) is not None
        print(json.dumps({"call": call, "chip": chip, "kernels": len(kinds), "moved": moved}))


if __name__ == "__main__":
    main()
