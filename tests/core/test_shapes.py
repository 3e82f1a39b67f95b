"""Named shapes."""

import jax.numpy as jnp
import pytest

from seqmix.core.shapes import described, dims


def test_sizes_come_back_by_name():
    d = dims({"q": "B T H K", "v": "B T H V"}, q=jnp.ones((2, 3, 4, 5)), v=jnp.ones((2, 3, 4, 6)))
    assert (d.B, d.T, d.H, d.K, d.V) == (2, 3, 4, 5, 6)
    d = dims("B T", tokens=jnp.ones((2, 3)), ids=None)
    assert vars(d) == {"B": 2, "T": 3}


@pytest.mark.parametrize(
    "spec, shapes, message",
    [
        ({"q": "B T", "v": "B T V"}, {"q": (2, 8), "v": (2, 9, 16)}, "v: expected shape (B=2, T=8, V), got (2, 9, 16)"),
        ({"q": "B T"}, {"q": (2, 8, 1)}, "q: expected shape (B, T), got (2, 8, 1)"),
        ({"q": "B 3"}, {"q": (2, 4)}, "q: expected shape (B, 3), got (2, 4)"),
        ({"q": "D D"}, {"q": (2, 4)}, "q: expected one size for D, got (2, 4)"),
        ("B T", {"a": (2, 3), "b": (2, 4)}, "b: expected shape (B=2, T=3), got (2, 4)"),
    ],
)
def test_errors_name_the_argument(spec, shapes, message):
    with pytest.raises(ValueError) as raised:
        dims(spec, **{name: jnp.ones(shape) for name, shape in shapes.items()})
    assert str(raised.value) == message


def test_what_came_is_told_in_one_short_line():
    assert described("x") == "'x'" and described(jnp.ones((2, 3))) == "an array of float32 of shape (2, 3)"
    assert len(described(list(range(999)))) < 120 and "\n" not in described({"a": "\n" * 9})
