"""The TPU kernels of the elementwise scan against float64, in the interpreter on a CPU.

Tolerances: bfloat16 results are rounded once (relative errors of 1.7e-3 in the mean), and dlog_a reads an h that was,
which makes 2.4e-3; 5e-3 is fla's bound. Float32 results differ by float32 rounding.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.linear_scan import tpu
from tests.pallas_kernels.test_linear_scan_gpu import GATES, draw, error, exact


@pytest.mark.parametrize(
    ("time", "width", "dtype", "gates"),
    [(75, 256, jnp.bfloat16, GATES), (40, 128, jnp.float32, GATES), (1, 128, jnp.bfloat16, (-0.5,))],
    ids=["several_tiles", "float32", "one_token"],
)
def test_values_and_gradients_match_float64(time, width, dtype, gates):
    x, log_a, state, dh, dstate = draw(2, time, width, dtype, gates)
    with compat.interpret():
        h, last = tpu.forward(x, log_a, state, tile=(32, 128))
        got = (h, last, *tpu.backward(log_a, h, state, dh, dstate, tile=(32, 128)))
    real = np.ones((2, time), bool)
    bound = 5e-3 if dtype == jnp.bfloat16 else 1e-6
    for one, want in zip(got, exact(x, log_a, state, real, ~real, dh, dstate), strict=True):
        assert error(one, want) < bound


def test_calls_that_cannot_run_are_refused_with_the_reason():
    shape = lambda *dims, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(dims, dtype)
    x = shape(2, 64, 256)
    assert tpu.supports(x, x) is None
    assert "float16" in tpu.supports(x, shape(2, 64, 256, dtype=jnp.float16))
    assert "D=200" in tpu.supports(shape(2, 64, 200), shape(2, 64, 200))
    assert "one shape" in tpu.supports(x, shape(2, 1, 256))
    assert "state" in tpu.supports(x, x, x)
