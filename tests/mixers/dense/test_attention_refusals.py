"""What the attention mixer refuses."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from seqmix.core import param
from seqmix.mixers.dense.attention import Attention
from seqmix.parts.rotary import RotaryScaling

NTK = RotaryScaling(kind="ntk", factor=2.0)
REFUSALS = [
    (dict(heads=4, kv_heads=3), "Attention.kv_heads: expected a divisor of heads=4, got 3"),
    (dict(heads=0), "Attention.heads: expected a positive integer, got 0"),
    (dict(block=0), "Attention.block: expected a positive integer, got 0"),
    (dict(window=0), "Attention.window: expected a positive integer, got 0"),
    (dict(sinks=2), "Attention.sinks: expected 0 without a causal window, got 2"),
    (dict(sinks=2, window=3, causal=False), "Attention.sinks: expected 0 without a causal window, got 2"),
    (dict(sinks=-1, window=3), "Attention.sinks: expected an integer >= 0, got -1"),
    (dict(soft_cap=0.0), "Attention.soft_cap: expected a positive number, got 0.0"),
    (dict(context="rings"), "Attention.context: expected None or one of ring, zigzag, heads, gather, got 'rings'"),
    (dict(norm_eps=0.0), "Attention.norm_eps: expected a positive number, got 0.0"),
    (dict(head_dim=7), "Attention.rope_fraction: expected one in (0, 1] that rotates an even number of K=7"),
    (dict(head_dim=8, rope_base=0.5), "Attention.rope_base: expected a number above 1, got 0.5"),
    (dict(head_dim=2, rope_scaling=NTK), "Attention.rope_scaling: expected at least 4 rotated dimensions"),
    (dict(d_model=10, heads=4), "Attention.d_model: expected a positive multiple of heads=4, got 10"),
    (dict(d_model=12, heads=4), "Attention.rope_fraction: expected one in (0, 1] that rotates an even"),
]


@pytest.mark.parametrize("fields, message", REFUSALS)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        Attention(**fields)


def test_calls_that_do_not_fit_are_refused():
    bare, x = Attention(heads=4), np.ones((1, 3, 16), np.float32)
    with pytest.raises(ValueError, match="Attention.d_model: expected a positive"):
        bare.params()
    mixer = dataclasses.replace(bare, d_model=16)
    params = param.materialise(mixer.params(), jax.random.key(0))
    with pytest.raises(ValueError, match="memory: Attention does not take this input"):
        mixer.forward(params, x, memory=x)
    with pytest.raises(ValueError, match="implementation: expected one of cudnn, tokamax, splash, gpu, tpu, chunked"):
        dataclasses.replace(mixer, implementation="gpux").forward(params, x)
    encoder = dataclasses.replace(mixer, causal=False)
    assert mixer.decodes and not encoder.decodes and not encoder.causal
    for call in (
        lambda: encoder.init_state(params, 1, 8),
        lambda: encoder.prefill(params, x, {}),
        lambda: encoder.step(params, x[:, :1], {}),
        lambda: encoder.state_size(8),
        encoder.state_axes,
    ):
        with pytest.raises(ValueError, match="Attention does not decode"):
            call()
