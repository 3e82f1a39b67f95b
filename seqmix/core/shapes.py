"""Shape errors that name the argument, what was expected and what came."""

import math
from types import SimpleNamespace

import jax

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


def finite(name: str, value) -> float:
    """The number that an option is. Raises ValueError where it is not finite, or not known while tracing."""
    try:
        number = float(value)
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        number = math.nan
    if isinstance(value, str) or not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, known when tracing, got {value!r}")
    return number
