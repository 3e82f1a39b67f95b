"""Weights summed over heads, by the Hopper kernel in the interpreter, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from seqmix.ops.summed_weights import block_weights
from seqmix.ops.topk_blocks import best_in_ranges

needs_mosaic = pytest.mark.skipif(compat.unavailable() is not None, reason=str(compat.unavailable()))


def inputs(time=70, keys=5, heads=2):
    q, k = (jax.random.normal(jax.random.key(n), (1, t, h, 64)) for n, t, h in ((0, time, heads), (1, keys, 1)))
    seen = (jnp.arange(keys) * 16 <= jnp.arange(time)[:, None] - 20)[None]
    return (
        q.astype(jnp.bfloat16),
        k.astype(jnp.bfloat16),
        2 + jax.random.normal(jax.random.key(2), (1, heads, time)),
        seen,
    )


@needs_mosaic
def test_kernel_matches_float64_where_tokens_see_some_keys_or_none():
    q, k, lse, seen = inputs()
    with compat.interpret():
        got = np.asarray(block_weights(q, k, lse, seen, scale=0.1, implementation="gpu"), np.float64)
    wide = (np.asarray(x, np.float64) for x in (q, k, lse))
    scores, lse = (lambda q, k, lse: (0.1 * np.einsum("bthk,bnjk->bhtn", q, k), lse[..., None]))(*wide)
    want = np.where(seen, np.exp(scores - lse).sum(1), 0)[:, None]
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(block_weights(q, k, inputs()[2], seen, scale=0.1), want, rtol=1e-5)


@needs_mosaic
def test_the_kernel_of_the_best_is_a_stable_sort_of_ranges(time=130, blocks=9):
    """Ties, ranges of fewer blocks than places, empty ones, and no numbers outside of them."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 4, (2, 1, blocks, time)).astype(np.float32)
    low, high = np.sort(rng.integers(0, blocks + 1, (2, 2, time)), axis=0).astype(np.int32)
    place = np.arange(blocks)[:, None]
    scores = jnp.where(((place >= low[:, None]) & (place < high[:, None]))[:, None], scores, jnp.nan)
    with compat.interpret():
        got = best_in_ranges(scores, jnp.asarray(low), jnp.asarray(high), 4, implementation="gpu")
    want = best_in_ranges(jnp.nan_to_num(scores), jnp.asarray(low), jnp.asarray(high), 4)
    assert np.array_equal(got, want) and (want >= 0).any() and (want < 0).any()


def test_a_call_that_does_not_fit_is_refused_with_one_line():
    q, k, lse, seen = inputs()
    with pytest.raises(ValueError, match=r"^seen: expected shape \(B=1, T=70, S=5\)"):
        block_weights(q, k, lse, seen[..., :4], scale=0.1)
    with pytest.raises(ValueError, match="^seen: expected a bool dtype, got int32"):
        block_weights(q, k, lse, seen.astype(jnp.int32), scale=0.1)
    with pytest.raises(ValueError, match="^seen: expected an array, got NoneType"):
        block_weights(q, k, lse, None, scale=0.1)
    with pytest.raises(ValueError, match="^scale: expected a finite number, known when tracing, got None"):
        block_weights(q, k, lse, seen, scale=None)
    if compat.unavailable() is None:
        with compat.interpret(), pytest.raises(ValueError, match="cannot run 'gpu': needs bfloat16"):
            block_weights(q.astype(jnp.float32), k, lse, seen, scale=0.1, implementation="gpu")
