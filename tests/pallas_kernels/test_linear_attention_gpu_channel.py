"""The Hopper kernels of linear attention with a decay per channel, without a GPU: in the interpreter, through ptxas.

Tolerances as in `test_linear_attention_gpu`; the decays' gradient meets the bound of the others here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.linear_attention import cost, gpu_channel, gpu_channel_backward
from seqmix.ops import linear_kernels
from seqmix.ops.linear import linear_attention
from tests.pallas_kernels.test_linear_attention_gpu import draw, error, needs_mosaic, packed

BOUND = 5e-3
STEPS = (0.0, -1e-4, -1 / 16, -5.0, -20.0, -100.0)


def inputs_of(batch, time, key_heads, heads, key, value, steps=STEPS):
    """Inputs and cotangents whose log decays are drawn from `steps` for each token, head and channel.

    In the second chunk of 64 tokens they are those of gates, at most 1/16, so that all its channels are mild.
    """
    q, k, v, _, state, dy, dstate = draw(batch, time, key_heads, heads, key, value)
    random = np.random.default_rng(time)
    log_decay = random.choice(steps, size=(batch, time, heads, key))
    log_decay[:, 64:128] = random.uniform(-1 / 16, 0, size=log_decay[:, 64:128].shape)
    return (q, k, v, jnp.asarray(log_decay, jnp.float32), state), (dy, dstate)


def exact(inputs, run_ids, scale, cotangents):
    """Values and gradients of the op's reference in float64; a sixth input is the logarithm of the writes' weights."""
    with jax.enable_x64(True):
        wide = lambda xs: tuple(jnp.asarray(np.asarray(x, np.float64)) for x in xs)

        def run(q, k, v, log_decay, state, log_write=None):
            write = None if log_write is None else jnp.exp(log_write)
            options = {"scale": scale, "segment_ids": run_ids, "write": write, "implementation": "reference"}
            return linear_attention(q, k, v, log_decay, state=state, **options)

        def both(inputs, cotangents):
            values, pull = jax.vjp(run, *inputs)
            return *values, *pull(cotangents)

        return [np.asarray(x) for x in jax.jit(both)(wide(inputs), wide(cotangents))]


def check(inputs, run_ids, cotangents, splits):
    with compat.interpret():
        values = gpu_channel.forward(*inputs, run_ids, scale=0.5, splits=splits)
        gradients = gpu_channel_backward.backward(*inputs, run_ids, None, *cotangents, scale=0.5, splits=splits)
    assert gradients[-1] is None
    for one, want in zip((*values, *gradients[:-1]), exact(inputs, run_ids, 0.5, cotangents), strict=True):
        assert np.all(np.isfinite(np.asarray(one, np.float32)))
        assert error(one, want) < BOUND
    if run_ids is not None:
        for one in (values[0], gradients[3]):
            assert not np.any(np.asarray(one)[np.asarray(run_ids) == 0])


@needs_mosaic
def test_every_kind_of_decay_in_segments_of_an_odd_length_and_a_split_matches_float64():
    inputs, cotangents = inputs_of(1, 133, 1, 2, 64, 64)
    check(inputs, packed(133)[:1], cotangents, 2)


@needs_mosaic
def test_calls_that_cannot_run_are_refused_with_the_reason():
    shape = jax.ShapeDtypeStruct
    q, v = shape((2, 64, 1, 128), jnp.bfloat16), shape((2, 64, 2, 64), jnp.bfloat16)
    decays, write = shape((2, 64, 2, 128), jnp.float32), shape((2, 64, 2), jnp.float32)
    hopper = {"capability": (9, 0)}
    assert gpu_channel.supports(q, q, v, decays, **hopper) is None
    assert "8.0" in gpu_channel.supports(q, q, v, decays, capability=(8, 0))
    assert "channel" in gpu_channel.supports(q, q, v, write, **hopper)
    assert "write" in gpu_channel.supports(q, q, v, decays, None, None, write, **hopper)


@needs_mosaic
def test_the_op_sends_decays_per_channel_to_these_kernels():
    (q, k, v, log_decay, _), _ = inputs_of(1, 64, 1, 1, 64, 64)
    call, kind = (q, k, v, log_decay, None, None), {"scale": 1.0, "normalize": False, "causal": True}
    with compat.interpret():
        for named in ("gpu", None):
            assert linear_kernels.reasons(named, *call, None, **kind)["gpu"] is None
        with pytest.raises(ValueError, match="no form for write with a decay per channel"):
            linear_attention(q, k, v, log_decay, write=jnp.ones((1, 64, 1)), implementation="gpu")


def test_floor_of_gla_at_32768_tokens_is_the_bytes_of_its_arrays():
    least = cost.forward(16, 2048, 16, 16, 128, 128, decays=128)
    assert least.bytes == 32768 * 16 * 128 * (4 * 2 + 4)
    assert 0.26 < least.floor_ms() < 0.28


@pytest.mark.parametrize(
    ("batch", "time", "key", "packed"), [(16, 2048, 128, False), (1, 32768, 128, True), (16, 2048, 64, True)]
)
def test_all_kernels_compile_for_an_h100_without_spills(spilled, batch, time, key, packed):
    array = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    q, v = array(batch, time, 16, key), array(batch, time, 16, 128)
    rest = [array(*q.shape, dtype=jnp.float32), None, None]
    if packed:
        rest[1:] = array(batch, 16, key, 128, dtype=jnp.float32), array(batch, time, dtype=jnp.int32)

    def run(inputs, dy):
        dstate = inputs[4]
        return gpu_channel.forward(*inputs), gpu_channel_backward.backward(*inputs, None, dy, dstate)

    found = spilled(run, [q, q, v, *rest], v)
    assert found == {f"linear_attention_channel_{name}": 0 for name in ("states", "forward", "gradients")}
