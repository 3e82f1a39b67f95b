"""Decoding a thousand tokens: constant bytes and work a token where the state is constant, and the parallel form's y.

Over the smallest instance of every catalogue row that decodes. Where the state grows, it grows as `state_size` says.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix import catalog
from seqmix.core import param
from seqmix.core.mixer import state_shapes
from tests.mixers.equations import tokens, weights
from tests.quick import QUICK

TOKENS = 1000
LONGER = 4096


def _mixers():
    for row in catalog.ROWS:
        mixer = row.load()(**row.small)
        if hasattr(mixer, "max_len"):
            mixer = dataclasses.replace(mixer, max_len=LONGER)
        # What takes more than x, or only whole blocks of tokens, conformance decodes.
        if mixer.decodes and mixer.align == 1 and not mixer.takes:
            yield row.name, mixer


def _grows(mixer) -> bool:
    return mixer.state_size(TOKENS) != mixer.state_size(LONGER)


MIXERS = dict(_mixers())
CONSTANT = [name for name, mixer in MIXERS.items() if not _grows(mixer)]
GROWING = [name for name, mixer in MIXERS.items() if _grows(mixer)]


def _bytes(state) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _costs(mixer, max_len: int) -> dict:
    """What the compiled step of one row in float32 needs, of memory beside the weights and of FLOPs."""
    params = param.abstract(mixer.params())
    state = state_shapes(mixer, params, 1, max_len)
    x = jax.ShapeDtypeStruct((1, 1, mixer.d_model), jnp.float32)
    compiled = jax.jit(mixer.step, compiler_options=QUICK).lower(params, x, state).compile()
    memory = compiled.memory_analysis()
    return {
        "state": _bytes(state),
        "temporaries": memory.temp_size_in_bytes,
        "results": memory.output_size_in_bytes,
        "flops": compiled.cost_analysis()["flops"],
    }


def test_rows_of_both_kinds_are_decoded():
    assert {"mamba2", "deltanet", "rglru", "mega"} <= set(CONSTANT) and {"attention", "hyena"} <= set(GROWING)


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_state_costs_the_same_whatever_the_length(name):
    """All numbers of a state are of four bytes here: float32, and int32 for a position."""
    mixer = MIXERS[name]
    costs = _costs(mixer, TOKENS)
    assert costs == _costs(mixer, LONGER)
    assert costs["state"] == 4 * mixer.state_size(TOKENS) and costs["flops"] > 0


@pytest.mark.parametrize("name", GROWING)
def test_a_growing_state_grows_as_it_says(name):
    mixer = MIXERS[name]
    short, long = _costs(mixer, TOKENS), _costs(mixer, LONGER)
    grown = 4 * (mixer.state_size(LONGER) - mixer.state_size(TOKENS))
    assert long["state"] - short["state"] == grown > 0
    assert short["state"] == 4 * mixer.state_size(TOKENS)


@pytest.mark.parametrize("name", MIXERS)
def test_a_thousand_steps_equal_the_parallel_form(name, x64):
    """In float64, one compiled step from a state that keeps its bytes. No transition is longer than one, so that the
    rounding of a token stays as small: at most one of each token adds up.
    """
    mixer = MIXERS[name]
    params, x = weights(mixer), tokens(mixer, TOKENS, batch=1)
    want, _ = jax.jit(mixer.forward, compiler_options=QUICK)(params, x)

    def step(state, x):
        y, state = mixer.step(params, x, state)
        return state, y

    start = mixer.init_state(params, 1, TOKENS, jnp.float64)
    decode = jax.jit(lambda state, xs: jax.lax.scan(step, state, xs), compiler_options=QUICK)
    end, got = decode(start, jnp.swapaxes(x, 0, 1)[:, None])
    assert _bytes(end) == _bytes(start)
    error = np.max(np.abs(got[:, 0] - want[0][:, None])) / np.max(np.abs(want))
    assert error < TOKENS * np.finfo(np.float64).eps, error
