"""PowerAttention: the pattern, how far layers reach, dense attention as its limit."""

import numpy as np
import pytest

from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.static_sparse.power_attention import PowerAttention
from seqmix.ops import masks
from tests.mixers.equations import compiled, tokens, weights


def test_the_pattern_is_as_defined():
    size, window, time = 3, 2, 50
    seen = PowerAttention(size=size, window=window).pattern.dense(time)
    for i, j in np.ndindex(time, time):
        d = i // size - j // size
        assert seen[i, j] == (i >= j and (j < size or d < window or d & (d - 1) == 0))


def test_what_layers_reach_doubles_with_each_while_a_row_grows_with_the_logarithm():
    time = 70
    step = masks.Powers().dense(time)
    reach = np.eye(time, dtype=bool)
    for layers in range(1, 6):
        reach = reach.astype(int) @ step > 0
        far = reach[-1, ::-1]  # by distance from the last token
        assert far[: 2 ** (layers + 1) - 1].all() and not far[2 ** (layers + 1) - 1]
    assert step.sum(1).max() <= np.log2(time) + 2
    blocks = PowerAttention(size=64, window=1).pattern.tiles(64, 64, 1 << 14)
    assert (blocks > 0).sum(1).max() <= 8 + 2  # of 256 blocks: powers of two, its own and the sink


def test_a_window_as_long_as_the_sequence_is_dense_attention(x64):
    mixer = PowerAttention(d_model=8, heads=2, size=4, window=5, block=4)
    dense = Attention(d_model=8, heads=2)
    p, x = weights(mixer), tokens(mixer, 18)
    got, want = (compiled(m.forward)(p, x)[0] for m in (mixer, dense))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12)  # sums of 18 terms in float64


BAD = {
    "size: expected a positive integer": {"size": 0},
    "window: expected a positive integer": {"window": 0},
    "rope_base: expected a number above 1": {"rope_base": 1.0},
    "head_dim: expected an even number with rope, got 3": {"head_dim": 3},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_fields_are_refused(message):
    with pytest.raises(ValueError, match=f"PowerAttention.{message}"):
        PowerAttention(**BAD[message])
