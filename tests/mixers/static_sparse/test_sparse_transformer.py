"""Sparse Transformer attention: what its patterns reach and cost, and dense attention as their limit."""

import numpy as np
import pytest

from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.static_sparse.sparse_transformer import SparseTransformer
from tests.mixers.equations import compiled, tokens, weights

SMALL = {"d_model": 8, "heads": 2, "head_dim": 4, "block": 4}


@pytest.mark.parametrize("time, stride, summary", [(64, 8, 1), (50, 7, 2), (16, 16, 3)])
@pytest.mark.parametrize("pattern", ["strided", "fixed"])
def test_the_factors_are_as_defined_and_reach_every_earlier_token_in_two_hops(pattern, time, stride, summary):
    mixer = SparseTransformer(pattern=pattern, stride=stride, summary=summary)
    first, second = (mask.dense(time) for mask in mixer.patterns)
    want = np.zeros((2, time, time), bool)
    for i in range(time):
        for j in range(i + 1):
            if pattern == "strided":
                want[:, i, j] = i - j < stride, (i - j) % stride == 0
            else:
                want[:, i, j] = i // stride == j // stride, j % stride >= stride - summary
    assert np.array_equal(first, want[0]) and np.array_equal(second, want[1])
    # One layer with A1 gathers into columns, the next with A2 brings those to every later token.
    reach = second.astype(int) @ first | first | second
    assert np.array_equal(reach > 0, np.tri(time, dtype=bool))


def test_at_a_stride_of_the_square_root_each_factor_leaves_about_that_many_keys():
    time = 4096
    for mixer in (SparseTransformer(stride=64), SparseTransformer(stride=64, pattern="fixed", summary=1)):
        for mask in mixer.patterns:
            assert mask.keys_per_row(time).max() <= 64
    # so that scores cost 2 n sqrt(n) for n^2 / 2 of dense causal attention
    ((_, merged),) = SparseTransformer(stride=64).groups
    assert merged.pairs(time) < 2 * time * 64


@pytest.mark.parametrize(
    "fields", [{}, {"pattern": "fixed"}, {"factors": "first"}, {"factors": "heads", "pattern": "fixed", "summary": 16}]
)
def test_a_stride_as_long_as_the_sequence_is_dense_attention(x64, fields):
    mixer = SparseTransformer(**SMALL | {"stride": 16} | fields)
    dense = Attention(d_model=8, heads=2, head_dim=4)
    p, x = weights(mixer), tokens(mixer, 16)
    got, want = (compiled(m.forward)(p, x)[0] for m in (mixer, dense))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)  # sums of 16 terms in float64


def test_half_of_the_heads_see_each_factor(x64):
    mixers = [SparseTransformer(**SMALL, stride=3, factors=name) for name in ("heads", "first", "second")]
    p, x = weights(mixers[0]), tokens(mixers[0], 10)
    both, first, second = (compiled(m.mixing_matrix)(p, x) for m in mixers)
    assert np.array_equal(both[:, 0], first[:, 0]) and np.array_equal(both[:, 1], second[:, 1])
    assert not np.array_equal(first[:, 1], second[:, 1])


BAD = {
    "pattern: expected strided or fixed, got 'x'": {"pattern": "x"},
    "factors: expected merged, heads, first or second": {"factors": "both"},
    "summary: expected at most stride=4, got 8": {"pattern": "fixed", "stride": 4},
    "heads: expected an even number": {"factors": "heads", "heads": 3},
    "stride: expected a positive integer": {"stride": 0},
    "rope_base: expected a number above 1": {"rope_base": 1.0},
    "head_dim: expected an even number with rope, got 3": {"head_dim": 3},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_fields_are_refused(message):
    with pytest.raises(ValueError, match=message):
        SparseTransformer(**BAD[message])
