"""The protocol of a sequence mixer: a frozen dataclass of hyperparameters with pure methods over dicts of arrays.

Shapes: B batch, T time, D = d_model. The table in WORKSPACE.md gives the whole contract.
"""

import dataclasses
import functools
import numbers
import types
import typing
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from seqmix.core import packing, param
from seqmix.core.shapes import boolean, described, did_you_mean, factor, is_array

NEED_WEIGHTS = ("forward", "prefill", "step", "project", "mixing_matrix")  # methods that are given all of them


def _with_weights(method):
    @functools.wraps(method)
    def call(self, params, *args, **kwargs):
        self.check_params(params)
        if method.__name__ in ("prefill", "step"):
            given = dict(zip(("x", "state"), args, strict=False)) | kwargs
            self.check_state(given.get("x"), given.get("state"))
        return method(self, params, *args, **kwargs)

    return call


def _check_field(name, kind, value):
    """Raises ValueError for a value that a field declared as this kind cannot have, whatever the mixer."""
    if value is None and types.NoneType in typing.get_args(kind):
        return
    if kind in (float, float | None):
        factor(name, value)
    elif kind in (bool, bool | None):
        boolean(name, value)
    elif kind in (int, int | None):
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ValueError(f"{name}: expected an integer, got {described(value)}")
    elif _is_foreign(value, typing.get_args(kind) or (kind,)):
        raise ValueError(f"{name}: expected {getattr(kind, '__name__', kind)}, got {described(value)}")
    elif not isinstance(value, typing.Hashable):
        raise ValueError(f"{name}: expected a value that can be hashed, such as a tuple, got {type(value).__name__}")


def _is_foreign(value, kinds) -> bool:
    """Whether a value is of none of these kinds, all of them classes, integers apart."""
    plain = all(isinstance(kind, type) and kind not in (int, typing.Any) for kind in kinds)
    return plain and not isinstance(value, kinds)


def _is_axes(node) -> bool:
    return isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """Base of all mixers. A subclass declares its traits as class attributes, or as properties of its fields."""

    d_model: int = 0  # width of the residual stream; 0: filled in by the model that owns it

    takes: ClassVar[tuple[str, ...]] = ()  # names of the inputs that forward accepts beside x
    causal: ClassVar[bool] = True  # y[t] depends on x[<= t] alone
    packable: ClassVar[bool] = True  # accepts segment_ids
    decodes: ClassVar[bool] = True  # has init_state, prefill and step
    linear_in_v: ClassVar[bool] = False  # has project, mixing_matrix and merge
    stochastic: ClassVar[bool] = False  # uses rng in training
    selects_over_time: ClassVar[bool] = False  # the published selection sees the future
    align: ClassVar[int] = 1  # packing and splits are exact at multiples of it
    context_form: ClassVar[str] = "none"  # over a context axis: state, ring, heads, gather or none
    implementations: ClassVar[tuple[str, ...]] = ()  # what the field `implementation` may name; (): its op refuses
    fft: ClassVar[bool] = False  # causal up to rounding only: mixes by an FFT

    def __new__(cls, *args, **fields):
        for field in dataclasses.fields(cls):
            if field.name in fields:
                _check_field(f"{cls.__name__}.{field.name}", field.type, fields[field.name])
        if fields.get("d_model", 0) < 0:
            raise ValueError(
                f"{cls.__name__}.d_model: expected a width, or 0 until a model fills it in, got {fields['d_model']}"
            )
        name, known = fields.get("implementation"), cls.implementations
        if name is not None and known and name not in known:
            expected = f"{cls.__name__}.implementation: expected one of {', '.join(known)}"
            raise ValueError(f"{expected}, got {name!r}{did_you_mean(name, known)}")
        return super().__new__(cls)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in set(NEED_WEIGHTS) & set(vars(cls)):
            setattr(cls, name, _with_weights(vars(cls)[name]))

    # Weights and training

    def params(self) -> dict:
        """Tree of `Param`: the only place where the weights are described."""
        raise NotImplementedError(f"{type(self).__name__}.params")

    def forward(self, params, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y [B, T, D] in the dtype of x, aux). aux: "loss/..." joins the objective, "update/..." is written
        into weights that are not trainable, "shared" into the dict that travels along the stack, the rest is
        logged. rng None means deterministic.
        """
        raise NotImplementedError(f"{type(self).__name__}.forward")

    # Decoding

    def init_state(self, params, batch: int, max_len: int, dtype=jnp.float32, **inputs) -> Any:
        """The state before the first token, for `max_len` tokens a row; buffers of tokens are in `dtype`.

        It is given the inputs that `forward` takes, and keeps what it needs of those that do not go along with
        x, such as `memory`: `prefill` and `step` are not given them again.
        """
        raise ValueError(self.denial("decode"))

    def prefill(self, params, x, state, *, segment_ids=None, positions=None, **inputs):
        """(y [B, T, D], state) of T more tokens a row. Any split of a sequence over calls equals `forward`.

        There is no aux here: what a mixer that takes `shared` writes for later layers, it returns as an entry
        "shared" of the new state, a dict, and the stack takes it out and passes it on.
        """
        raise ValueError(self.denial("decode"))

    def step(self, params, x, state, **inputs):
        """(y [B, 1, D], state) of one more token a row. Raises ValueError for more: those are for `prefill`."""
        if is_array(x) and x.ndim == 3 and x.shape[1] != 1:
            expected = f"shape (B, 1, D={self.d_model}) for a step of {type(self).__name__}"
            raise ValueError(f"x: expected {expected}, got {tuple(x.shape)}; prefill takes more tokens")
        return self.prefill(params, x, state, **inputs)

    def state_axes(self) -> Any:
        """A tree like the state's, with a tuple of logical axis names for each array."""
        raise ValueError(self.denial("decode"))

    def state_size(self, context: int, **sizes: int) -> int:
        """Elements of the state per sequence with room for `context` tokens; `sizes` as for `flops`."""
        raise ValueError(self.denial("decode"))

    # Costs

    def flops(self, batch: int, seq: int, **sizes: int) -> float:
        """FLOPs of `forward`, a multiply-add being two.

        `sizes` are lengths of the inputs in `takes` that have one (memory=S), and passed to such mixers alone.
        """
        raise NotImplementedError(f"{type(self).__name__}.flops")

    def chunkless_flops(self, batch: int, seq: int, **sizes: int) -> float:
        """FLOPs of `forward` that do not depend on a chunk, by which utilisation is counted: where the state does not
        grow with the context those of `seq` steps of decoding, else those of `flops`.
        """
        grows = not self.decodes or self.state_size(2, **sizes) != self.state_size(1, **sizes)
        return self.flops(batch, seq, **sizes) if grows else self.flops(batch * seq, 1, **sizes)

    # The mixing matrix: mixed[b, t, g] = sum_s M[b, g, t, s] values[b, s, g]

    def project(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """(values [B, S, G, V], context): what is mixed, and what `merge` needs beside it."""
        raise ValueError(self.denial("mix linearly in its values"))

    def merge(self, params, context, mixed):
        """y [B, T, D] from mixed values [B, T, G, V]."""
        raise ValueError(self.denial("mix linearly in its values"))

    def mixing_matrix(self, params, x, *, segment_ids=None, positions=None, **inputs):
        """M [B, G, T, S] from its closed form, never through the op: an independent oracle."""
        raise ValueError(self.denial("mix linearly in its values"))

    # At the door

    def denial(self, what: str) -> str:
        """The message for a call that the traits deny."""
        return f"{type(self).__name__} does not {what}"

    def check(self, x, *, segment_ids=None, positions=None, inputs=None, need=()):
        """Raises ValueError in one line for what this mixer cannot take; every public method calls it first.

        `inputs` are the call's extra keyword arguments, of which those named in `need` must be there.
        """
        name = type(self).__name__
        self._check_width()
        for argument, value in {"x": x, "segment_ids": segment_ids, "positions": positions}.items():
            if (value is not None or argument == "x") and not is_array(value):
                raise ValueError(f"{argument}: expected an array for {name}, got {type(value).__name__}")
        if x.ndim != 3 or x.shape[-1] != self.d_model:
            raise ValueError(f"x: expected shape (B, T, D={self.d_model}) for {name}, got {tuple(x.shape)}")
        if 0 in x.shape:
            raise ValueError(f"x: expected at least one row and one token for {name}, got shape {tuple(x.shape)}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x: expected a floating dtype for {name}, got {x.dtype}")
        self.check_inputs(inputs, need)
        if segment_ids is not None:
            if not self.packable:
                raise ValueError(f"segment_ids: {self.denial('pack')}; give it whole windows")
            packing.check(segment_ids, *x.shape[:2])
        if positions is not None and positions.shape != x.shape[:2]:
            expected = f"(B={x.shape[0]}, T={x.shape[1]})"
            raise ValueError(f"positions: expected shape {expected}, got {tuple(positions.shape)}")

    def _check_width(self):
        if self.d_model < 1:
            raise ValueError(f"{type(self).__name__}.d_model: expected a positive width, got {self.d_model}")

    def check_params(self, params):
        """Raises ValueError that names the first declared weight that is not in `params`. Called before every method
        in NEED_WEIGHTS, as a weight that an option brings would be passed over in silence.
        """
        self._check_width()
        param.check(self.params(), params, type(self).__name__)

    def check_state(self, x, state):
        """Raises ValueError that names the first entry of the state, by `state_axes`, that is not there or not of x's
        rows. Called before `prefill` and `step`; a mixer that does not say its axes is trusted.
        """
        if not self.decodes or type(self).state_axes is Mixer.state_axes:
            return
        rows = x.shape[0] if is_array(x) and x.ndim == 3 else None
        for path, axes in jax.tree_util.tree_leaves_with_path(self.state_axes(), is_leaf=_is_axes):
            held, name = param.entry(state, path), "/".join(("state", param.path_name(path))).rstrip("/")
            expected = f"({', '.join(str(axis) for axis in axes)}) of {type(self).__name__}.init_state"
            if not is_array(held) or len(held.shape) != len(axes):
                got = tuple(held.shape) if is_array(held) else "none" if held is None else type(held).__name__
                raise ValueError(f"{name}: expected an array {expected}, got {got}")
            if rows is not None and "batch" in axes and held.shape[axes.index("batch")] != rows:
                raise ValueError(f"{name}: expected {rows} rows, as x has, in {expected}, got {tuple(held.shape)}")

    def check_inputs(self, inputs, need=()):
        """Raises ValueError for an input that is not in `takes`, and for one named in `need` that is not there.

        For `init_state`, which has no x to check.
        """
        name = type(self).__name__
        given = {k for k, v in (inputs or {}).items() if v is not None}
        for key in sorted(given - set(self.takes)):
            allowed = ", ".join(self.takes) or "none"
            raise ValueError(f"{key}: {name} does not take this input (it takes: {allowed})")
        for key in need:
            if key not in given:
                raise ValueError(f"{key}: {name} needs this input, got none")

    def positive(self, **fields):
        """Raises ValueError naming the first of these fields that is not a positive integer."""
        for key, value in fields.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{type(self).__name__}.{key}: expected a positive integer, got {value!r}")


def state_shapes(mixer: Mixer, params, batch: int, max_len: int, dtype=jnp.float32, **inputs):
    """The shapes and dtypes of a state, without allocating it."""
    return jax.eval_shape(lambda p: mixer.init_state(p, batch, max_len, dtype, **inputs), params)
