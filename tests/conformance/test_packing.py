"""Several documents in a row, and padding wherever it may stand."""

import numpy as np

from tests.conformance.cases import BATCH, close, mixed_ids, over, separate

PACKABLE = over(lambda m: m.packable)


@PACKABLE
def test_no_ids_mean_one_segment(case, x64):
    params, x, inputs = case.params(), case.x(), case.inputs()
    one = np.ones((BATCH, case.time), np.int32)
    close(case.forward(params, x, None, inputs), case.forward(params, x, one, inputs), tol=1e-12)


@PACKABLE
def test_packed_equals_separate(case, x64):
    """With ids that come back after another, padding between and within documents, single tokens."""
    params, x = case.params(), case.x()
    packed = case.stretch(
        [5, 5, 5, 5, 5, 5, 2, 2, 2, 5, 5, 3, 3, 5],
        [0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 2, 3, 1, 2],
        [2, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 0, 2],
        [1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 5, 5, 0],
    )
    y = case.forward(params, x, packed, case.inputs())
    assert np.all(y[packed == 0] == 0)
    seen = 0
    for found, alone, ids, rows in separate(case, x, packed):
        want = case.forward(params, alone, ids, case.inputs(rows=rows))
        for i, (row, times) in enumerate(found):
            close(y[row, times], want[i, : len(times)])
            seen += len(times)
    assert seen == np.sum(packed != 0)


@PACKABLE
def test_padding_on_any_side_equals_none(case, x64):
    """A prompt alone at its own length, and in a longer row with padding right, left and inside of it."""
    u, n, params, rows = case.unit, case.part, case.params(), np.zeros(BATCH, int)
    prompt = case.x(time=n)[:1]
    alone, inputs = np.tile(prompt, (BATCH, 1, 1)), case.inputs(rows=rows)
    want = case.forward(params, alone, None, inputs)
    ids = np.zeros((BATCH, case.time), np.int32)
    ids[0, :n] = 1
    ids[1, -n:] = 1
    ids[2, :u] = ids[2, case.time - n + u :] = 1
    x = case.x(seed=2)
    for row in range(3):
        x[row, ids[row] == 1] = prompt[0]
    y = case.forward(params, x, ids, inputs)
    for row in range(3):
        close(y[row, ids[row] == 1], want[0])
    assert np.all(y[ids == 0] == 0)


@PACKABLE
def test_what_stands_in_padding_does_not_matter(case, x64):
    params, x, ids = case.params(), case.x(), mixed_ids(case)
    other = np.where(ids[..., None] == 0, 1e3 * case.x(seed=4), x)
    y, same = (case.forward(params, x, ids, case.inputs()) for x in (x, other))
    np.testing.assert_array_equal(y, same)
