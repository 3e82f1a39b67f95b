"""Errors about shapes and options that name the argument, what was expected and what came."""

import difflib
import math
import numbers
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

LARGEST = float(np.finfo(np.float32).max)
NEEDED = "q", "k", "v", "x"  # arguments that no op goes without


def is_array(value) -> bool:
    """Whether a value has a shape and a dtype, as an array of jax or numpy, and as a tracer."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def check_arrays(**given):
    """Raises ValueError that names the first argument that is no array."""
    for name, value in given.items():
        if not is_array(value):
            raise ValueError(f"{name}: expected an array, got {type(value).__name__}")


def dims(spec, **arrays) -> SimpleNamespace:
    """Sizes of named dimensions, after checking that every array agrees on them.

    `spec` is "B T D", for all arrays, or {argument: "B T H K"}. A letter (or word) is bound by its first
    appearance; an integer must match itself. Arrays that are None are passed over, but q, k, v and x.

        d = dims({"q": "B T H K", "v": "B T H V"}, q=q, v=v);  d.B, d.V

    Raises ValueError: `v: expected shape (B=2, T=8, H=4, V), got (2, 9, 4, 16)`.
    """
    bound = {}
    for name, array in arrays.items():
        if array is None and name not in NEEDED:
            continue
        check_arrays(**{name: array})
        letters = (spec if isinstance(spec, str) else spec[name]).split()
        shape = tuple(array.shape)
        sizes = [int(letter) if letter.isdigit() else bound.get(letter) for letter in letters]
        if len(shape) != len(letters) or any(
            want is not None and want != got for want, got in zip(sizes, shape, strict=False)
        ):
            shown = [
                letter if size is None or letter.isdigit() else f"{letter}={size}"
                for letter, size in zip(letters, sizes, strict=True)
            ]
            raise ValueError(f"{name}: expected shape ({', '.join(shown)}), got {shape}")
        for letter, size in zip(letters, shape, strict=True):
            if not letter.isdigit() and bound.setdefault(letter, size) != size:
                raise ValueError(f"{name}: expected one size for {letter}, got {shape}")
    return SimpleNamespace(**bound)


def described(value) -> str:
    """A value in one line, cut where it is long; an array by its dtype and shape."""
    if is_array(value) and tuple(value.shape):
        return f"an array of {value.dtype} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:100]}..."


def did_you_mean(value, known) -> str:
    """ "; did you mean 'NAME'?" of the known name that is nearest to a value, if one is near."""
    near = difflib.get_close_matches(str(value), known, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def finite(name: str, value) -> float:
    """The number that an option is. Raises ValueError where it is not finite in float32, or not known while tracing."""
    try:
        number = math.nan if getattr(value, "dtype", None) == np.bool_ else float(value)
    except (TypeError, ValueError, OverflowError, jax.errors.ConcretizationTypeError):
        number = math.nan
    if isinstance(value, str | bool) or not abs(number) <= LARGEST:
        raise ValueError(f"{name}: expected a finite number, known when tracing, got {described(value)}")
    return number


def factor(name: str, value):
    """A number that an op multiplies by, as it came: it may be a traced scalar. Raises ValueError for another value."""
    if isinstance(value, jax.core.Tracer):
        if value.shape or not jnp.issubdtype(value.dtype, jnp.number):
            raise ValueError(f"{name}: expected one number, got a traced {value.dtype} of shape {tuple(value.shape)}")
        return value
    number = value.item() if is_array(value) and not value.shape else value
    if not isinstance(number, numbers.Real) or isinstance(number, bool) or not abs(number) <= LARGEST:
        raise ValueError(f"{name}: expected a finite number, got {described(value)}")
    return value


def boolean(name: str, value, expected: str = "True or False") -> bool:
    """The bool that an option is. Raises ValueError for what is none: words and numbers would be read as True."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: expected {expected}, got {described(value)}")
    return bool(value)


def positive(name: str, value, least: int = 1, most: int | None = None):
    """Raises ValueError unless `value` is an integer >= `least`, and at most `most`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {described(value)}")
    if most is not None and value > most:
        raise ValueError(f"{name}: expected an integer <= {most}, got {described(value)}")


def power_of_two(name: str, value):
    """Raises ValueError unless `value` is a power of two, as a chunk is."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1 or value & (value - 1):
        raise ValueError(f"{name}: expected a power of two, got {described(value)}")


def floating(**given):
    """Raises ValueError that names the first array, not None, whose dtype is not floating, of 16 bits or more."""
    for name, array in given.items():
        if array is not None and not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name}: expected a floating dtype, got {array.dtype}")
        if array is not None and array.dtype.itemsize < 2:
            raise ValueError(f"{name}: expected a floating dtype of 16 bits or more, got {array.dtype}")


def filled(**given):
    """Raises ValueError that names the first array with a dimension of size 0."""
    for name, array in given.items():
        if 0 in array.shape:
            raise ValueError(f"{name}: expected at least one of every dimension, got shape {tuple(array.shape)}")
