"""Declared weights: what is derived from a declaration."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmix.core import param, sharding
from seqmix.core.param import Param


def tree():
    return {
        "in": {
            "kernel": Param((64, 4, 8), ("embed", "heads", "head_dim")),
            "bias": Param((4,), ("heads",), param.zeros, decay=False, lr_scale=0.5),
        },
        "out": Param((4, 8, 64), ("heads", "head_dim", "embed"), fan_in=32),
        "count": Param((), (), param.constant(3.0), dtype=jnp.float16, trainable=False),
    }


def test_weights_are_as_declared():
    values = param.materialise(tree(), jax.random.key(0))
    assert values["in"]["kernel"].shape == (64, 4, 8) and values["count"].dtype == jnp.float16
    assert values["count"] == 3 and not values["in"]["bias"].any()
    # 2048 draws: the standard deviation is known to some 2%.
    assert np.std(values["in"]["kernel"]) == pytest.approx(64**-0.5, rel=0.08)
    assert np.std(values["out"]) == pytest.approx(32**-0.5, rel=0.08)
    assert param.count(tree()) == 64 * 32 + 4 + 32 * 64 + 1
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
    assert jax.tree.all(jax.tree.map(same, values, param.abstract(tree())))


def test_a_weight_depends_on_its_path_and_the_key_alone():
    more = {"other": Param((3,), (None,), param.normal(1.0)), **tree()}
    a, b = param.materialise(tree(), jax.random.key(0)), param.materialise(more, jax.random.key(0))
    np.testing.assert_array_equal(a["out"], b["out"])
    twins = {name: Param((8,), (None,), param.normal(1.0)) for name in ("a", "b")}
    values = param.materialise(twins, jax.random.key(0))
    assert not np.array_equal(values["a"], values["b"])
    assert not np.array_equal(values["a"], param.materialise(twins, jax.random.key(1))["a"])


def test_masks_and_names():
    assert [name for name, _ in param.entries(tree())] == ["count", "in/bias", "in/kernel", "out"]
    assert param.trainable_mask(tree())["count"] is False
    assert param.decay_mask(tree())["in"] == {"kernel": True, "bias": False}
    assert param.lr_scales(tree())["in"] == {"kernel": 1.0, "bias": 0.5}


def test_a_stack_is_that_many_independent_copies():
    stacked = param.stack(tree(), 3)
    assert stacked["out"].shape == (3, 4, 8, 64) and stacked["out"].axes[0] == "layers"
    assert stacked["in"]["bias"].lr_scale == 0.5 and not stacked["count"].trainable
    values = param.materialise(stacked, jax.random.key(0))
    assert np.std(values["in"]["kernel"]) == pytest.approx(64**-0.5, rel=0.05)  # not by the stack's own fan-in
    assert not np.array_equal(values["out"][0], values["out"][1])
    assert values["count"].tolist() == [3, 3, 3]
    twice = param.stack(stacked, 2)
    assert twice["out"].shape == (2, 3, 4, 8, 64)
    again = param.materialise(twice, jax.random.key(0))["in"]["kernel"]
    assert np.std(again) == pytest.approx(64**-0.5, rel=0.05)


def test_cast_leaves_what_is_kept_and_what_is_not_floating():
    values = {"a": {"w": jnp.ones(2), "log": jnp.ones(2)}, "n": jnp.ones(2, jnp.int32)}
    cast = param.cast(values, jnp.bfloat16, keep=("log",))
    assert [leaf.dtype for leaf in jax.tree.leaves(cast)] == [jnp.float32, jnp.bfloat16, jnp.int32]


def test_shardings_name_the_weight_that_cannot_be_divided():
    mesh = sharding.make_mesh(data=2, fsdp=2, model=2)
    laid = param.shardings(tree(), mesh)
    assert tuple(laid["in"]["kernel"].spec) == ("fsdp", "model", None)
    assert tuple(laid["count"].spec) == ()
    with pytest.raises(ValueError, match=r"in/kernel: embed: expected a multiple of 2 .*got 3"):
        param.shardings({"in": {"kernel": Param((3, 4), ("embed", "heads"))}}, mesh)


def test_declarations_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="axes: expected 2 names"):
        Param((2, 3), ("embed",))
    with pytest.raises(ValueError, match="shape: .*0"):
        Param((2, 0), ("embed", "heads"))


def test_weights_of_another_tree_are_refused_by_name():
    declared = {"a": Param((2,), (None,)), "in": {"b": Param((2,), (None,))}}
    held = {"a": np.ones(2), "in": {"b": np.ones(2)}}
    param.check(declared, held, "Toy")
    for given, message in (
        (held | {"in": {}}, "found no in/b"),
        (held | {"a": [1.0, 1.0]}, "arrays, got list as a"),
        (held | {"a": np.ones(3)}, r"a of shape \(2,\), got \(3,\)"),
        (held | {"c": np.ones(2)}, "and no others, got c"),
        (held | {"in": held["in"] | {"d": np.ones(2)}}, "and no others, got in/d"),
    ):
        with pytest.raises(ValueError, match=f"^params: expected the weights of Toy.*{message}$"):
            param.check(declared, given, "Toy")
