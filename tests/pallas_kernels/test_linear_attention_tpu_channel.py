"""The TPU kernels of linear attention with a decay per channel against float64, in the interpreter on a CPU.

Tolerances as in `test_linear_attention_tpu`; the decays' gradient meets the bound of the others.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.linear_attention import tpu_channel, tpu_channel_backward
from seqmix.ops import linear_kernels
from tests.pallas_kernels.test_linear_attention_gpu import packed
from tests.pallas_kernels.test_linear_attention_gpu_channel import BOUND, error, exact, inputs_of


def test_every_kind_of_decay_in_segments_of_grouped_heads_with_weighted_writes_matches_float64():
    """Two turns of two heads a chunk; blocks of 1 to 16 tokens are joined, within registers and whole ones."""
    inputs, cotangents = inputs_of(1, 70, 1, 4, 64, 64)
    run_ids = packed(70)[:1]
    log_write = jnp.log(jax.random.uniform(jax.random.key(7), (1, 70, 4), minval=1e-4))
    options = {"scale": 0.5, "tile": (32, 2)}
    with compat.interpret():
        values = tpu_channel.forward(*inputs, run_ids, log_write, **options)
        gradients = tpu_channel_backward.backward(*inputs, run_ids, log_write, *cotangents, **options)
    wants = exact((*inputs, log_write), run_ids, 0.5, cotangents)
    for one, want in zip((*values, *gradients), wants, strict=True):
        assert np.all(np.isfinite(np.asarray(one, np.float32)))
        assert error(one, want) < BOUND
    for one in (values[0], *gradients[:4], gradients[5]):
        assert not np.any(np.asarray(one)[np.asarray(run_ids) == 0])


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((16, 16, 128, 128), (8, 8, 1)), ((1, 2, 64, 128), (2, 1, 1)), ((2, 64, 128, 64), (16, 1, 2))],
    ids=["gla", "narrow_keys", "grouped"],
)
def test_a_step_takes_heads_whose_columns_and_channels_fill_whole_lanes(shape, wanted):
    key_heads, heads, key, value = shape
    array = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    blocks = tpu_channel.ChannelBlocks.of(array(1, 256, key_heads, key), array(1, 256, heads, value))
    assert (blocks.heads, blocks.key_heads, blocks.turns) == wanted


def test_calls_are_refused_or_left_to_xla_with_the_reason():
    shape = jax.ShapeDtypeStruct
    q, v = shape((2, 256, 1, 128), jnp.bfloat16), shape((2, 256, 2, 128), jnp.bfloat16)
    decays, narrow = shape((2, 256, 2, 128), jnp.float32), shape((2, 256, 2, 64), jnp.bfloat16)

    def reason(implementation, v, decays):
        kind = {"scale": 1.0, "normalize": False, "causal": True}
        with compat.interpret():
            return linear_kernels.reasons(implementation, q, q, v, decays, None, None, None, **kind)["tpu"]

    assert reason(None, v, decays) is None
    assert "half empty" in reason(None, narrow, decays) and reason("tpu", narrow, decays) is None
    assert "channel" in tpu_channel.supports(q, q, v, shape(v.shape[:3], jnp.float32))
    assert "channel" in tpu_channel.supports(q, q, v)
