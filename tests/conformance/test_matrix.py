"""Mixers linear in their values: the mixing matrix, from its closed form, is what forward applies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.conformance.cases import close, documents, mixed_ids, over
from tests.quick import QUICK


@over(lambda m: m.linear_in_v)
def test_merging_what_the_matrix_mixes_is_forward(case, x64):
    params, x, inputs, ids = case.params(), case.x(), case.inputs(), mixed_ids(case)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def by_matrix(params, x):
        kwargs = {"segment_ids": ids, **inputs, **case.static}
        values, context = case.mixer.project(params, x, **kwargs)
        matrix = case.mixer.mixing_matrix(params, x, **kwargs)
        assert matrix.shape == (x.shape[0], values.shape[2], x.shape[1], values.shape[1])
        mixed = jnp.einsum("bgts,bsgv->btgv", matrix, values)
        return matrix, case.mixer.merge(params, context, mixed)

    matrix, y = by_matrix(params, x)
    close(y, case.forward(params, x, ids, inputs))
    if ids is None or "memory" in case.mixer.takes:
        return
    allowed = np.zeros((*ids.shape, ids.shape[1]), bool)
    for row, times in documents(ids):
        allowed[row, np.array(times)[:, None], times] = True
    if case.mixer.causal:
        allowed &= np.tril(np.ones(allowed.shape[1:], bool))
    assert np.all(np.moveaxis(np.asarray(matrix), 1, -1)[~allowed] == 0)
