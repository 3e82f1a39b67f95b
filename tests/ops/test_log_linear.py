"""Log-linear attention: the loop against the paper's merged states, chunks against the loop, states, packing, cost."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.ops import delta_rule, linear_attention, linear_chunked, log_linear_attention, log_linear_delta_rule
from seqmix.ops.delta_matrix import delta_mixing_matrix
from seqmix.ops.linear_reference import linear_mixing_matrix
from seqmix.ops.log_linear import log_linear_flops
from seqmix.ops.log_linear_reference import level_matrix
from tests.conformance.cases import documents
from tests.ops.delta_cases import GATES, HK, SMALL, B, H, K, V, assert_close, draw, jit, relative

OPS = {"linear": log_linear_attention, "delta": log_linear_delta_rule}
PLAIN = {"linear": linear_attention, "delta": delta_rule}
NL = 9  # positions below 256


def arguments(op, time, kind="head", seed=0, size=(B, HK, H, K, V), gates=GATES):
    """Float64; level scales of both signs, and the state of rows that have `start` tokens behind them."""
    arrays = draw(kind, time, seed, size=size, gates=gates)
    b, _, h, k, v = size
    rng = np.random.default_rng(seed + 9)
    arrays |= dict(level_scales=rng.normal(size=(b, time, h, NL)), state=rng.normal(size=(b, h, NL - 1, k, v)))
    return arrays if op == "delta" else {name: x for name, x in arrays.items() if name != "beta"}


def call(op, arrays, length=None, ids=None, **options):
    arrays = dict(arrays)
    state = arrays.pop("state", None)
    state = None if length is None else (state, length)
    return OPS[op](**arrays, state=state, segment_ids=ids, **options)


@functools.cache
def forward(op, **options):
    return jit(lambda arrays, length=None, ids=None: call(op, arrays, length, ids, **options))


@functools.cache
def pullback(op, **options):
    """(arrays, weights of y and the levels' states, length, ids) -> (y and state, gradients of all arrays)."""

    def run(arrays, weights, length=None, ids=None):
        def outputs(arrays):
            y, (levels, length_after) = call(op, arrays, length, ids, **options)
            return (y, levels), length_after

        out, vjp, length_after = jax.vjp(outputs, arrays, has_aux=True)
        return (*out, length_after), vjp(weights)[0]

    return jit(run)


def cotangents(arrays, seed=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=arrays["v"].shape), rng.normal(size=arrays["state"].shape)


def merged_states(q, k, v, level_scales, log_decay=None, beta=None):
    """y of one row and head as the paper decodes: states of levels 0 .. NL - 1, merged where a block ends."""
    states, ys = np.zeros((level_scales.shape[-1], k.shape[-1], v.shape[-1])), []
    for t in range(len(q)):
        if t > 0:
            carry = (t & -t).bit_length()  # trailing zeros of t, and one
            states[carry] = states[:carry].sum(0)
            states[:carry] = 0
        erase = np.eye(k.shape[-1]) - (0 if beta is None else beta[t]) * np.outer(k[t], k[t])
        states = erase @ (np.exp(0 if log_decay is None else log_decay[t]) * states)
        states[0] = (1 if beta is None else beta[t]) * np.outer(k[t], v[t])
        ys.append(np.einsum("l,k,lkv->v", level_scales[t], q[t], states))
    return np.array(ys)


@pytest.mark.parametrize("op", OPS)
def test_the_loop_and_the_matrix_are_the_papers_decoding(op, x64):
    arrays = arguments(op, 21)
    del arrays["state"]
    y, _ = forward(op, implementation="reference")(arrays)
    for b, h in np.ndindex(B, H):
        heads = {name: x[b, :, h if x.shape[2] == H else h // (H // HK)] for name, x in arrays.items()}
        np.testing.assert_allclose(y[b, :, h], merged_states(**heads), rtol=0, atol=1e-13)
    rest = {name: x for name, x in arrays.items() if name not in ("v", "level_scales")}
    matrix = (delta_mixing_matrix if op == "delta" else linear_mixing_matrix)(**rest)
    weighted = matrix * level_matrix(jnp.asarray(arrays["level_scales"]))
    np.testing.assert_allclose(jnp.einsum("bhts,bshv->bthv", weighted, arrays["v"]), y, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "op, kind, times",
    [
        ("linear", "head", (1, 65, 200)),
        ("delta", "head", (63, 200)),
        ("linear", "none", (64,)),
        ("delta", "channel", (65,)),
    ],
)
def test_chunks_equal_the_loop_in_values_and_all_gradients(op, kind, times, x64):
    """Rows that start at 0 (positions aligned with chunks) and rows that go on, with a cotangent on the state."""
    arrays = arguments(op, 200, kind)
    weights = cotangents(arrays)
    loop, chunks = pullback(op, implementation="reference", scale=0.7), pullback(op, scale=0.7)
    zeros = np.zeros(B, np.int32)
    for time in times:
        cut = lambda tree, time=time: {n: x if n == "state" else x[:, :time] for n, x in tree.items()}
        ids = np.broadcast_to(np.arange(200) < time, (B, 200)).astype(np.int32)
        padded = (weights[0] * ids[..., None, None], weights[1])
        for length in (None, np.array([3, 40], np.int32)):
            used = arrays | (dict(state=0 * arrays["state"]) if length is None else {})
            (y, levels, after), grads = loop(used, padded, zeros if length is None else length, ids)
            got, got_grads = chunks(cut(used), (weights[0][:, :time], weights[1]), length)
            if length is None:
                grads |= dict(state=0 * grads["state"])
            np.testing.assert_array_equal(got[2], after)
            assert_close(got[:2], (y[:, :time], levels), 1e-11, f"T={time}, from {length}")
            assert_close(got_grads, cut(grads), 1e-11, f"T={time}, from {length}")
