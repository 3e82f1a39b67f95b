"""The instances that conformance runs, and what the properties share: data, compiled calls, an oracle for segments.

Cases are the catalogue's rows, their variants, and the toys, which exercise the traits that no row has yet. A
property asks for the cases with its traits, so none is ever skipped. Compiled functions are kept on the case and
called at the same shapes by all properties: compiling is what costs.
"""

import functools
from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix import catalog
from seqmix.core import param
from seqmix.core.mixer import Mixer
from tests.quick import QUICK

BATCH, MEMORY = 4, 6
TOYS = (
    catalog.Row(
        name="leaky",
        target="tests.toys:Leaky",
        title="",
        paper="",
        small=dict(d_model=8, noise=0.1),
        variants=(dict(block=4),),
        medium=dict(d_model=128),
    ),
    catalog.Row(name="cross", target="tests.toys:Cross", title="", paper="", small=dict(d_model=8)),
    catalog.Row(name="grid", target="tests.toys:Grid", title="", paper="", small=dict(d_model=8)),
)
KEPT = ("memory", "memory_segment_ids")  # inputs that a decoding state keeps


@dataclass(frozen=True)
class Case:
    """One instance of a mixer. Arrays are made and passed in the dtype asked for; ids may be None."""

    label: str
    mixer: Mixer
    row: catalog.Row

    def __str__(self):
        return self.label

    # Sizes. Where a mixer works in blocks of `align` tokens, all lengths are multiples of it.

    @property
    def unit(self) -> int:
        return self.mixer.align

    @property
    def time(self) -> int:
        return 14 if self.unit == 1 else 3 * self.unit

    @property
    def part(self) -> int:
        """A length shorter than `time`, of documents and prompts."""
        return 5 if self.unit == 1 else 2 * self.unit

    def stretch(self, *ids) -> np.ndarray:
        """Rows of 14 segment ids, or for blocks the last three of each row, each over a block."""
        ids = np.array(ids, np.int32)
        return ids if self.unit == 1 else np.repeat(ids[:, -3:], self.unit, axis=1)

    # Data, as numpy arrays: slicing them compiles nothing

    def params(self, dtype=np.float64) -> dict:
        """Every weight with noise added, so that none sits where its gradient is accidentally zero."""
        return jax.tree.map(lambda w: w.astype(dtype), self._noisy)

    @functools.cached_property
    def _noisy(self):
        rng = np.random.default_rng(1)
        make = jax.jit(lambda key: param.materialise(self.mixer.params(), key), compiler_options=QUICK)
        start = make(jax.random.key(0, impl="unsafe_rbg"))  # whose draws compile quickly
        return jax.tree.map(lambda w: np.asarray(w) + 0.3 * rng.normal(size=w.shape), start)

    def x(self, dtype=np.float64, time=None, seed=0):
        shape = (BATCH, time or self.time, self.mixer.d_model)
        return np.random.default_rng(seed).normal(size=shape).astype(dtype)

    def inputs(self, dtype=np.float64, rows=None) -> dict:
        """The arrays among what the mixer takes, for these rows of the batch (default: all)."""
        rng = np.random.default_rng(7)
        memory = rng.normal(size=(BATCH, MEMORY, self.mixer.d_model)).astype(dtype)
        ids = rng.permuted(np.tile(np.array([0, 1, 1, 2, 3, 5], np.int32), (BATCH, 1)), axis=1)
        made = {"memory": memory, "memory_segment_ids": ids}
        rows = np.arange(BATCH) if rows is None else rows
        return {name: value[rows] for name, value in made.items() if name in self.mixer.takes}

    @property
    def static(self) -> dict:
        """The static inputs among what the mixer takes."""
        return {name: value for name, value in {"grid": (2, 7)}.items() if name in self.mixer.takes}

    @property
    def sizes(self) -> dict:
        return {"memory": MEMORY} if "memory" in self.mixer.takes else {}

    # Compiled once per dtype and shape; `traces` counts how often

    @functools.cached_property
    def traces(self) -> Counter:
        return Counter()

    def _jit(self, name, fn, options=QUICK):
        def counted(*args):
            self.traces[name] += 1
            return fn(*args)

        return jax.jit(counted, compiler_options=options)

    def forward(self, params, x, ids, inputs):
        """y. With ids it comes from `pull`, which all properties that pack need compiled anyway."""
        if ids is None:
            return np.asarray(self._plain[x.dtype.name](params, x, inputs))
        return np.asarray(self.pull(params, x, ids, inputs, np.zeros_like(x))[0])

    @functools.cached_property
    def _plain(self):
        run = lambda p, x, inputs: self.mixer.forward(p, x, **inputs, **self.static)[0]
        # Causality to the bit must hold in code as it is optimised for users: float32 is not compiled quickly.
        options = {"float32": None, "float64": QUICK, "bfloat16": QUICK}
        return {dtype: self._jit("forward", run, option) for dtype, option in options.items()}

    @functools.cached_property
    def pull(self):
        """(params, x, ids, inputs, w) -> y and the gradients of sum(w y) by params and by x."""
        return self._jit("pull", self.pull_of(self.mixer))

    def pull_of(self, mixer):
        """The uncompiled `pull` of another instance."""

        def pull(params, x, ids, inputs, w):
            def objective(params, x):
                y = mixer.forward(params, x, segment_ids=ids, **inputs, **self.static)[0]
                return jnp.sum(w * y), y

            (_, y), grads = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, x)
            return y, *grads

        return pull

    def prefill(self, params, x, state, ids):
        """(y, state)."""
        if ids is None:
            y, state = self._plain_prefill(params, x, state)
        else:
            floats = lambda leaf: np.zeros(leaf.shape, leaf.dtype) if is_float(leaf) else None
            y, state, *_ = self.prefill_pull(params, x, state, ids, np.zeros_like(x), jax.tree.map(floats, state))
        return np.asarray(y), state

    @functools.cached_property
    def _plain_prefill(self):
        return self._jit("prefill", self.mixer.prefill)

    @functools.cached_property
    def prefill_pull(self):
        """(params, x, state, ids, w, v) -> y, state and the gradients of sum(w y) + sum(v state).

        By params, x and the old state; v and the last gradient have None for leaves that are integers.
        """

        def pull(params, x, state, ids, w, v):
            def objective(params, x, floats):
                old = jax.tree.map(lambda f, s: s if f is None else f, floats, state, is_leaf=is_none)
                y, new = self.mixer.prefill(params, x, old, segment_ids=ids)
                terms = jax.tree.map(lambda c, s: 0.0 if c is None else jnp.sum(c * s), v, new, is_leaf=is_none)
                return jnp.sum(w * y) + sum(jax.tree.leaves(terms)), (y, new)

            floats = jax.tree.map(lambda s: s if is_float(s) else None, state)
            grad = jax.value_and_grad(objective, argnums=(0, 1, 2), has_aux=True)
            (_, (y, new)), grads = grad(params, x, floats)
            return y, new, *grads

        return self._jit("prefill", pull)

    @functools.cached_property
    def step(self):
        """(params, x, state) -> (y, state)."""
        return self._jit("step", self.mixer.step)

    def init_state(self, params, max_len, dtype=np.float64):
        state = self.mixer.init_state(params, BATCH, max_len, dtype, **self.inputs(dtype), **self.static)
        return jax.tree.map(np.asarray, state)


def is_none(leaf):
    return leaf is None


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _cases():
    for row in (*catalog.ROWS, *TOYS):
        mixer_class = row.load()
        for i, variant in enumerate(({}, *row.variants)):
            label = row.name if not i else f"{row.name}-{'-'.join(variant)}"
            yield Case(label, mixer_class(**row.small | variant), row)


CASES = tuple(_cases())


def over(condition=lambda mixer: True):
    """Parametrises a test by the cases whose mixer meets the condition."""
    return pytest.mark.parametrize("case", [c for c in CASES if condition(c.mixer)], ids=str)


# Documents of a batch, found token by token: the oracle for everything in core/packing


def documents(ids: np.ndarray) -> list[tuple[int, list[int]]]:
    """(row, times of its tokens) of each segment: ids in a row, padding skipped, until another id comes."""
    found = []
    for row, line in enumerate(ids):
        last = 0
        for t, i in enumerate(line):
            if i != 0:
                if i != last:
                    found.append((row, []))
                found[-1][1].append(t)
                last = i
    return found


def separate(case, x, ids):
    """Yields (documents, x, ids, rows): each document left-aligned in a row of its own, BATCH rows at a time."""
    found = documents(ids)
    for first in range(0, len(found), BATCH):
        some = found[first : first + BATCH]
        rows = np.array([row for row, _ in some] + [0] * (BATCH - len(some)))
        alone = np.zeros(x.shape, x.dtype)
        alone_ids = np.zeros(ids.shape, np.int32)
        for i, (row, times) in enumerate(some):
            alone[i, : len(times)] = x[row, times]
            alone_ids[i, : len(times)] = ids[row, times]
        yield some, alone, alone_ids, rows


def close(got, want, *, tol=1e-9):
    """Equal up to rounding: `tol` relative to the largest entry, for float64 that went through other sums."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    scale = np.max(np.abs(want), initial=1e-3)
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * scale)


def close_trees(got, want, *, tol=1e-9):
    """`close`, leaf by leaf, naming the leaf that is not."""
    want_leaves = dict(jax.tree_util.tree_leaves_with_path(want))
    got_leaves = dict(jax.tree_util.tree_leaves_with_path(got))
    assert got_leaves.keys() == want_leaves.keys()
    for path, leaf in want_leaves.items():
        try:
            close(got_leaves[path], leaf, tol=tol)
        except AssertionError as error:
            raise AssertionError(f"{param.path_name(path)}: {error}") from None


def mixed_ids(case):
    """One document, several with padding between and inside, one with padding before, nothing but padding."""
    if not case.mixer.packable:
        return None
    packed = [0, 3, 3, 3, 0, 3, 3, 3, 2, 2, 0, 5, 5, 5]
    return case.stretch([1] * 14, packed, [0] * 4 + [1] * 6 + [0, 0, 1, 1], [0] * 14)
