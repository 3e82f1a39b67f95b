"""What the chunked softmax attention costs: memory, the blocks that it skips, FLOPs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.ops.softmax import attention, attention_flops


def intermediates(jaxpr):
    """Sizes of everything computed in a jaxpr and in those inside it."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.size for v in eqn.outvars if hasattr(v.aval, "size"))
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from intermediates(inner)


def largest(time, implementation="chunked", **options):
    def loss(q, k, v):
        y, lse = attention(q, k, v, block=64, return_lse=True, implementation=implementation, **options)
        return jnp.sum(y) + jnp.sum(lse)

    shapes = [jax.ShapeDtypeStruct((1, time, heads, 8), jnp.float32) for heads in (2, 1, 1)]
    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, (0, 1, 2)))(*shapes)
    return max(intermediates(jaxpr.jaxpr)), sum(1 for _ in intermediates(jaxpr.jaxpr))


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"segment_ids": 1}])
def test_memory_is_linear_in_time_and_the_program_does_not_grow(options):
    """Nothing is larger than q or one block of scores, forward and backward."""
    count = {}
    for time in (1024, 4096):
        kwargs = {k: np.ones((1, time), np.int32) if k == "segment_ids" else v for k, v in options.items()}
        size, count[time] = largest(time, **kwargs)
        assert size <= max(2 * time * 8, 2 * 64 * 64)
        assert largest(time, "reference", **kwargs)[0] >= time * time  # the probe sees what it looks for
    assert count[1024] == count[4096]


def test_blocks_that_nobody_sees_are_not_computed():
    """Poisoned keys: NaN * 0 would show if a hidden block entered a product."""
    time, block = 256, 32
    draw = np.random.default_rng(0)
    q, k, v = (draw.normal(size=(2, time, heads, 4)).astype(np.float32) for heads in (4, 2, 2))
    at = np.tile(np.arange(time), (2, 1))
    ids = np.repeat([[1, 2], [1, 2]], time // 2, axis=1)
    calls = [
        ({"window": 32}, slice(200, 256), slice(0, 160)),
        ({}, slice(0, 96), slice(96, 256)),
        ({"segment_ids": ids[:, ::-1], "window": 20, "sinks": 5}, slice(224, 256), slice(0, 128)),
        ({"q_positions": at, "kv_positions": at, "window": 32}, slice(200, 256), slice(0, 160)),
    ]
    for options, rows, hidden in calls:
        bad_k, bad_v = k.copy(), v.copy()
        bad_k[:, hidden] = bad_v[:, hidden] = np.nan
        run = jax.jit(functools.partial(attention, block=block, **options))
        want, got = run(q, k, v)[:, rows], run(q, bad_k, bad_v)[:, rows]
        assert np.all(np.isfinite(got))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "shape, options",
    [
        ((2, 64, 4, 32, 16), {}),
        ((1, 99, 2, 64, 32), {"window": 16}),
        ((2, 96, 2, 32, 32), {"soft_cap": True}),
    ],
)
def test_flops_of_one_block_are_what_xla_counts(shape, options):
    """Within 3%, before and after XLA's fusions, which move the count of elementwise operations."""
    batch, time, heads, key_dim, value_dim = shape
    q, k = np.ones((2, batch, time, heads, key_dim), np.float32)
    v = np.ones((batch, time, heads, value_dim), np.float32)
    kwargs = options | ({"soft_cap": 3.0} if "soft_cap" in options else {})
    lowered = jax.jit(functools.partial(attention, **kwargs)).lower(q, k, v)
    for stage in (lowered, lowered.compile()):
        counted = stage.cost_analysis()["flops"]
        assert attention_flops(*shape, **options) == pytest.approx(counted, rel=0.03)


def test_flops_count_the_blocks_that_are_computed():
    """Of the 16 pairs of four blocks."""

    def count(seq, **options):
        return attention_flops(1, seq, 2, 8, 8, block=64, **options)

    one = count(64)
    assert [count(256) / one, count(256, causal=False) / one] == [10, 16]
    assert [count(256, window=w) / one for w in (64, 65, 66)] == [7, 7, 9]
    assert count(256, window=64, sinks=1) / one == 9
