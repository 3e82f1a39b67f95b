"""What forward returns, and that it does not see what it must not."""

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.core import param
from tests.conformance.cases import BATCH, close, documents, mixed_ids, over
from tests.quick import QUICK


@over()
def test_y_has_the_shape_and_dtype_of_x(case, x64):
    want = case.forward(case.params(), case.x(), None, case.inputs())
    assert want.dtype == jnp.float64 and np.all(np.isfinite(want))
    # Rounding of the dtype (2^-24, 2^-9) through some ten operations on entries of order one.
    for dtype, tol in ((jnp.float32, 1e-5), (jnp.bfloat16, 5e-2)):
        y = case.forward(case.params(np.float32), case.x(dtype), None, case.inputs(dtype))
        assert y.shape == (BATCH, case.time, case.mixer.d_model) and y.dtype == dtype
        error = y.astype(np.float64) - want
        assert np.sqrt(np.mean(error**2)) < tol * np.sqrt(np.mean(want**2)), dtype


@over(lambda m: m.causal)
def test_later_tokens_change_nothing(case):
    """To the bit in float32, whatever the later tokens hold; an FFT rounds, there 1e-14 of the largest y in float64."""
    dtype = np.float64 if case.mixer.fft else np.float32
    with jax.enable_x64(case.mixer.fft):
        params, x, other = case.params(dtype), case.x(dtype), 30 * case.x(dtype, seed=1)
        want = case.forward(params, x, None, case.inputs(dtype))
        for t in range(1, case.time):
            mixed = np.concatenate([x[:, :t], other[:, t:]], axis=1)
            got = case.forward(params, mixed, None, case.inputs(dtype))
            # An FFT rounds relative to the largest entries, which here are those of the later tokens.
            bound = 1e-14 * np.max(np.abs(got)) if case.mixer.fft else 0
            assert np.max(np.abs(got[:, :t] - want[:, :t])) <= bound, t
            assert np.any(got[:, t] != want[:, t]), t


@over(lambda m: not m.causal)
def test_mixers_without_order_see_later_tokens(case):
    params, x, inputs = case.params(np.float32), case.x(np.float32), case.inputs(np.float32)
    other = np.concatenate([x[:, :1], -x[:, 1:]], axis=1)
    y, changed = (case.forward(params, x, None, inputs) for x in (x, other))
    assert np.any(y[:, 0] != changed[:, 0])


@over()
def test_aux_keeps_its_contract(case):
    """loss/... are scalars, update/... have the shape of weights that are not trainable."""
    x, inputs = case.x(np.float32), case.inputs(np.float32)
    run = lambda p: case.mixer.forward(p, x, rng=jax.random.key(0), **inputs, **case.static)[1]
    declared = dict(param.entries(case.mixer.params()))
    for key, value in jax.eval_shape(run, case.params(np.float32)).items():
        if key.startswith("loss/"):
            assert value.shape == ()
        if key.startswith("update/"):
            weight = declared[key.removeprefix("update/")]
            assert not weight.trainable and weight.shape == value.shape, key


@over()
def test_only_the_stochastic_use_rng(case):
    params, x, inputs = case.params(np.float32), case.x(np.float32), case.inputs(np.float32)
    run = lambda key: case.mixer.forward(params, x, rng=key, **inputs, **case.static)[0]
    jaxpr = jax.make_jaxpr(run)(jax.random.key(0)).jaxpr
    used = any(jaxpr.invars[0] is v for equation in jaxpr.eqns for v in equation.invars)
    assert used == case.mixer.stochastic


@over()
def test_equal_shapes_trace_once(case, x64):
    case.forward(case.params(), case.x(), None, case.inputs())
    before = case.traces["forward"]
    case.forward(case.params(), case.x(seed=1), None, case.inputs())
    assert case.traces["forward"] == before >= 1


@over(lambda m: m.packable)
def test_positions_may_be_given(case, x64):
    """Those that a mixer would count itself change nothing."""
    params, x, ids, inputs = case.params(), case.x(), mixed_ids(case), case.inputs()
    positions = np.zeros_like(ids)
    for row, times in documents(ids):
        positions[row, times] = np.arange(len(times))
    run = lambda p, x: case.mixer.forward(p, x, segment_ids=ids, positions=positions, **inputs, **case.static)[0]
    got = jax.jit(run, compiler_options=QUICK)(params, x)
    close(got, case.forward(params, x, ids, inputs), tol=1e-12)
