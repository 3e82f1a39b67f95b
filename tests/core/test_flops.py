"""What costs are counted with."""

import numpy as np

from seqmix.core import flops


def test_pairs_are_those_of_the_mask():
    behind = np.arange(9)[:, None] - np.arange(9)
    assert flops.causal_pairs(9) == np.sum(behind >= 0)
    for window in (1, 4, 9, 20):
        assert flops.causal_pairs(9, window) == np.sum((behind >= 0) & (behind < window))


def test_a_matmul_is_two_operations_an_element_triple():
    assert flops.matmul(2, 3, 5) == 60


def test_peaks_go_by_the_longest_name():
    assert flops.peak_flops("NVIDIA H100 80GB HBM3") == 989.4e12
    assert flops.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert flops.peak_flops("TPU v5 lite") == 197e12 and flops.peak_flops("TPU v5") == 459e12
    assert flops.peak_flops("cpu") is None
