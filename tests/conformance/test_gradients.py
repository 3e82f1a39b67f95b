"""Gradients by every weight and by x."""

import dataclasses

import jax
import numpy as np

from seqmix.core import param
from tests.conformance.cases import close_trees, mixed_ids, over
from tests.quick import QUICK


@over()
def test_every_trainable_weight_has_a_finite_gradient_that_is_not_zero(case, x64):
    _, by_params, by_x = case.pull(case.params(), case.x(), mixed_ids(case), case.inputs(), case.x(seed=3))
    entries = param.entries(case.mixer.params())
    for (name, declared), grad in zip(entries, jax.tree.leaves(by_params), strict=True):
        assert np.all(np.isfinite(grad)), name
        if declared.trainable:
            assert np.any(grad != 0), name
    assert np.all(np.isfinite(by_x)) and np.any(by_x != 0)


@over()
def test_gradients_stay_finite_for_large_inputs(case, x64):
    """Where the scores, gates and decays of inputs a thousand times too large overflow what is exponentiated."""
    x, w = 1000 * case.x(), case.x(seed=3)
    for leaf in jax.tree.leaves(case.pull(case.params(), x, mixed_ids(case), case.inputs(), w)):
        assert np.all(np.isfinite(leaf))


@over(lambda m: hasattr(m, "implementation"))
def test_reference_equals_the_default_with_gradients(case, x64):
    args = (case.params(), case.x(), mixed_ids(case), case.inputs(), case.x(seed=3))
    reference = dataclasses.replace(case.mixer, implementation="reference")
    close_trees(case.pull(*args), jax.jit(case.pull_of(reference), compiler_options=QUICK)(*args))


@over(lambda m: m.packable)
def test_padding_gets_no_gradient(case, x64):
    ids = mixed_ids(case)
    _, _, by_x = case.pull(case.params(), case.x(), ids, case.inputs(), case.x(seed=3))
    assert np.all(np.asarray(by_x)[ids == 0] == 0)
