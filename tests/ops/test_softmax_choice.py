"""Of what can run a call of attention the fastest is taken, as it was measured on an H100."""

from functools import partial

import jax
import jax.numpy as jnp

from seqmix.ops import softmax_choice
from seqmix.ops.softmax_reference import Rules


def test_own_kernels_come_first_where_they_were_measured_to_be_faster():
    """Short causal rows, longer ones where heads share keys, and windows of a quarter of them."""

    def asked(rule, time=4096, key_heads=4, width=128, value_heads=None, **rules):
        every = (4, key_heads, value_heads or key_heads)
        arrays = (jax.ShapeDtypeStruct((1, time, heads, width), jnp.bfloat16) for heads in every)
        return rule(Rules(1.0, **{"causal": True, "window": None, "sinks": 0, "soft_cap": None} | rules), *arrays)

    first = partial(asked, softmax_choice.yields)

    assert first(2048) and first(4096) and first(window=1024) and first(32768, window=512)
    assert not first(1024) and not first(8192) and not first(window=1025) and not first(1024, window=64)
    assert first(key_heads=1) and first(8192, key_heads=2) and first(width=64) and first(key_heads=1, window=512)
    assert not first(8193, key_heads=2) and not first(8192, width=64) and not first(8192, width=64, key_heads=2)
    assert not first(causal=False) and not first(width=96) and not first(soft_cap=5.0)
    assert not first(key_heads=2, value_heads=4)
    values = partial(asked, partial(softmax_choice.for_values, {"tokamax": None, "gpu": None}))
    assert values(8192) == values(16384, window=16384) == "tokamax" and values(32768) == "gpu"
    assert values(4096) is values(8192, window=4096) is values(8192, causal=False) is None
    assert values(8192, key_heads=1) is values(8192, width=64) is values(8192, soft_cap=5.0) is None
    assert asked(partial(softmax_choice.for_values, {"tokamax": "absent", "gpu": None}), 8192) == "gpu"


def test_values_alone_come_from_one_function_and_those_with_gradients_from_the_other():
    either = partial(softmax_choice.either, lambda x, y: 2 * x * y, lambda x, y: 3 * x * y)
    assert either(1.0, 5.0) == 10 and jax.jit(either)(1.0, 5.0) == 10
    assert jax.value_and_grad(either, (0, 1))(1.0, 5.0) == (15, (15, 3))
