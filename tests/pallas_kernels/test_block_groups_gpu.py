"""Attention to blocks that each token chooses, with its gradients, through ptxas without a GPU."""

import jax
import jax.numpy as jnp

from seqmix import ops
from seqmix.core import sharding

PASSES = "forward", "rows", "dq", "dkv"


def test_it_compiles_for_an_h100_without_spills(spilled, h100s, monkeypatch):
    def run(q, k, v, dy, index):
        call = lambda *x: ops.block_sparse_attention(*x, blocks=index, sizes=(1, 512), implementation="gpu")
        return jax.vjp(call, q, k, v)[1](dy)

    array = jax.ShapeDtypeStruct((1, 2048, 2, 128), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((1, 2, 2048, 2), jnp.int32)
    monkeypatch.setattr(sharding, "device", lambda: h100s(1)[0])
    monkeypatch.setattr(sharding, "on_one_device", lambda: True)
    assert spilled(run, *[array] * 4, index) == {f"block_sparse_attention_{name}": 0 for name in PASSES}
