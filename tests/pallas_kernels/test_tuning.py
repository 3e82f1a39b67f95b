"""Candidates of the kernels' tables are compiled for an absent H100, and those that spill are seen."""

import jax
import jax.numpy as jnp

from experiments.bench import tune
from pallas_kernels.linear_attention import gpu, plan


def test_candidates_compile_for_an_absent_h100_and_say_what_they_spill(h100s):
    where = jax.sharding.SingleDeviceSharding(h100s(1)[0])
    q = jax.ShapeDtypeStruct((1, 1024, 1, 64), jnp.bfloat16, sharding=where)
    found = plan.candidates("forward", q, q)
    assert {config.splits for config in found} == {1, 2}
    assert all(plan.shared_bytes("forward", q, q, c.units, c.stages) <= plan.SHARED_BYTES for c in found)
    choices = {"units": found[0].units, "stages": found[0].stages, "splits": 2}
    program, spilled = tune.compiled(gpu.forward, [q] * 3, "linear_attention.forward", choices)
    assert program is not None
    # Two splits, as was asked, have states.
    assert spilled == dict.fromkeys(("linear_attention_states", "linear_attention_forward"), 0)
