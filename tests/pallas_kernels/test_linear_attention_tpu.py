"""The TPU kernels of linear attention against float64, in the interpreter on a CPU.

Tolerances: operands are rounded to bfloat16 (2^-9 relative) once before each product and once at the output, so
relative errors of 2 to 4 in a thousand are what exact arithmetic on these operands gives; 5e-3 is fla's bound too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import compat
from pallas_kernels.linear_attention import tpu, tpu_backward
from tests.pallas_kernels.test_linear_attention_gpu import draw, error, exact, packed

BOUND = 5e-3
GATES = (0.0, -1e-4, -5.0, -20.0)


def check(inputs, run_ids, log_write, cotangents, tile):
    """Values and all gradients within BOUND, and y 0 at padding."""
    with compat.interpret():
        values = tpu.forward(*inputs, run_ids, log_write, scale=0.5, tile=tile)
        got = tpu_backward.backward(*inputs, run_ids, log_write, *cotangents, scale=0.5, tile=tile)
    plain = inputs[3] is None
    given = (*inputs[:3], jnp.zeros(inputs[2].shape[2]), inputs[4]) if plain else inputs
    given = given if log_write is None else (*given, log_write)
    wants = exact(given, run_ids, 0.5), exact(given, run_ids, 0.5, cotangents)
    assert (got[3] is None) == plain and (got[5] is None) == (log_write is None)
    pairs = [*zip(values, wants[0], strict=True), *zip(got, wants[1])]
    for one, want in pairs:
        if one is not None:
            assert np.all(np.isfinite(np.asarray(one, np.float32)))
            assert error(one, want) < BOUND
    if run_ids is not None:
        assert not np.any(np.asarray(values[0])[np.asarray(run_ids) == 0])


def test_grouped_heads_in_several_turns_match_float64():
    *inputs, dy, dstate = draw(1, 136, 1, 4, 64, 64)
    check(inputs, None, None, (dy, dstate), (64, 2))


@pytest.mark.slow
def test_weighted_writes_with_segments_and_an_odd_length_match_float64():
    *inputs, dy, dstate = draw(2, 133, 1, 2, 64, 64)
    log_write = jnp.log(jax.random.uniform(jax.random.key(7), (2, 133, 2), minval=1e-4))
    check(inputs, packed(133), log_write, (dy, dstate), (64, 2))


@pytest.mark.slow
@pytest.mark.parametrize("decay", ["none", "constant", "gates"])
def test_heads_with_their_own_keys_match_float64_under_every_kind_of_decay(decay):
    q, k, v, log_decay, state, dy, dstate = draw(1, 70, 2, 2, 128, 128)
    if decay == "none":
        log_decay = None
    elif decay == "constant":
        log_decay = jnp.asarray([-0.5, -1e-3])
    else:  # drawn per token, so that each chunk holds all of them
        log_decay = jnp.asarray(np.random.default_rng(0).choice(GATES, size=v.shape[:3]), jnp.float32)
    check((q, k, v, log_decay, state), None, None, (dy, dstate), (64, 2))


def test_a_single_token_and_segments_without_decay_match_float64():
    q, k, v, _, state, dy, dstate = draw(2, 20, 1, 1, 64, 64)
    run_ids = jnp.asarray([[0, *range(1, 20)], [1] * 20])
    check((q, k, v, None, state), run_ids, None, (dy, dstate), (16, 1))
    one = [x[:, :1] for x in (q, k, v)]
    check((*one, None, state), None, None, (dy[:, :1], dstate), (16, 1))


@pytest.mark.parametrize(
    ("shape", "tile", "wanted"),
    [
        ((1, 64, 128, 64), None, (16, 1, 4, 8)),
        ((16, 16, 128, 128), None, (8, 8, 1, 8)),
        ((8, 8, 256, 512), None, (2, 2, 1, 2)),
        ((3, 3, 64, 64), None, (3, 3, 1, 3)),
        ((2, 12, 64, 64), (64, 4), (12, 2, 1, 6)),
    ],
    ids=["ssd", "gla", "retnet", "odd", "narrow_keys"],
)
def test_a_step_takes_heads_whose_columns_fill_whole_lanes(shape, tile, wanted):
    key_heads, heads, key, value = shape
    array = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16)
    blocks = tpu.Blocks.of(array(1, 256, key_heads, key), array(1, 256, heads, value), tile)
    assert (blocks.heads, blocks.key_heads, blocks.turns, blocks.tiles) == wanted


def test_calls_that_cannot_run_are_refused_with_the_reason():
    shape = jax.ShapeDtypeStruct
    q, v = shape((2, 64, 1, 128), jnp.bfloat16), shape((2, 64, 2, 64), jnp.bfloat16)
    assert tpu.supports(q, q, v) is None
    assert "float32" in tpu.supports(q, q, shape(v.shape, jnp.float32))
    assert "K=96" in tpu.supports(*[shape((2, 64, 1, 96), jnp.bfloat16)] * 2, v)
    assert "decay" in tpu.supports(q, q, v, shape((2, 64, 2, 128), jnp.float32))
    assert "scale" in tpu.supports(q, q, v, scale=0.0)
    assert "MiB" in tpu.supports(q, q, shape((2, 64, 256, 64), jnp.bfloat16))
    assert "tokens" in tpu.wasteful(q, v)
