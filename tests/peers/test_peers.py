"""Ops and mixers agree with public code: `make peers` installs it, runs this, writes docs/peer_checks.md."""

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from tests.peers import delta_ops, kernel_layers, layers, ops, sparse_layers
from tests.peers.compare import LENGTH, measure

COMPARISONS = (
    *ops.COMPARISONS,
    *delta_ops.COMPARISONS,
    *layers.COMPARISONS,
    *kernel_layers.COMPARISONS,
    *sparse_layers.COMPARISONS,
)
PAGE = Path(__file__).parents[2] / "docs/peer_checks.md"


@pytest.mark.parametrize("comparison", COMPARISONS, ids=str)
def test_values_and_gradients_agree(comparison):
    """To 1e-12 of the largest entry in float64: roundings of 2e-16 add up over 74 tokens, and some sums cancel by a
    digit or two. In float32, where a peer's constants have six digits, to 74 roundings.
    """
    values, gradients = measure(comparison)
    bound = {"float64": 1e-12, "float32": 2 * LENGTH * np.finfo(np.float32).eps}[comparison.dtype]
    assert values < bound and gradients < bound, (values, gradients)


def test_a_difference_is_seen():
    """What the others assert fails where a factor, or the order of decay and read, is another."""
    comparison = next(c for c in ops.LINEAR if c.function == "naive_recurrent_gla")
    scaled = lambda name, **arrays: (1.001 * comparison.run_ours(name, **arrays)[0], arrays["state"])
    values, gradients = measure(dataclasses.replace(comparison, run_ours=scaled))
    assert values > 1e-3 and gradients > 1e-3


def test_the_page_has_every_comparison():
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| `([^`]+)` \|", PAGE.read_text(), re.M)
    assert rows == [(c.ours, c.function) for c in COMPARISONS]
