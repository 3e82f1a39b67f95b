"""Weights, declared before they exist. Trees of `Param` are nested dicts; everything else is derived from them."""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from seqmix.core import sharding
from seqmix.core.shapes import is_array


def normal(stddev: float):
    """Initialiser: normal with this standard deviation."""
    return lambda key, shape, dtype: stddev * jax.random.normal(key, shape, dtype)


def constant(value: float):
    """Initialiser: `value` everywhere."""
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


ones, zeros = constant(1.0), constant(0.0)


@dataclasses.dataclass(frozen=True)
class Param:
    """One weight: its shape, the logical name of each dimension, and how it starts and learns.

    Raises ValueError when shape and axes disagree in length or a size is not positive.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical names: embed heads kv_heads head_dim state mlp vocab table layers
    init: Callable | None = None  # (key, shape, dtype) -> array; None: normal with variance 1 / fan_in
    dtype: Any = jnp.float32
    decay: bool = True  # whether weight decay applies
    lr_scale: float = 1.0  # factor on the learning rate
    trainable: bool = True  # False: no gradient step; written by "update/..." or not at all
    fan_in: int | None = None  # summed inputs per output; None: shape[0]

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"axes: expected {len(self.shape)} names for shape {self.shape}, got {self.axes}")
        if any(size < 1 for size in self.shape):
            raise ValueError(f"shape: expected positive sizes, got {self.shape} for axes {self.axes}")

    @property
    def initializer(self) -> Callable:
        """`init`, or the default."""
        if self.init is not None:
            return self.init
        return normal((self.fan_in or (self.shape[0] if self.shape else 1)) ** -0.5)


def is_param(leaf) -> bool:
    """Whether a node of a tree is a declaration (for `is_leaf`)."""
    return isinstance(leaf, Param)


def map_params(fn, tree, *rest):
    """jax.tree.map over declarations."""
    return jax.tree.map(fn, tree, *rest, is_leaf=is_param)


def entries(tree):
    """(name, Param) of each weight, name being its path joined by "/"."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_param):
        yield path_name(path), leaf


def path_name(path) -> str:
    """A key path as "layers/0/mixer/out"."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def entry(tree, path):
    """What stands at a key path, or None."""
    for key in path:
        try:
            tree = tree[key.key if hasattr(key, "key") else key.idx]
        except (KeyError, TypeError, IndexError):
            return None
    return tree


def check(tree, params, owner: str):
    """Raises ValueError that names the first declared weight which `params`, nested like the tree, has no array of
    that shape of, or else the first of `params` that is not declared.
    """
    declared = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_param):
        held = entry(params, path)
        if held is None:
            raise ValueError(f"params: expected the weights of {owner}, found no {path_name(path)}")
        if is_param(held):
            got = f"the declaration of {path_name(path)} (param.materialise makes arrays of them)"
            raise ValueError(f"params: expected the weights of {owner}, got {got}")
        if not is_array(held):
            name, got = path_name(path), type(held).__name__
            raise ValueError(f"params: expected the weights of {owner}, arrays, got {got} as {name}")
        if tuple(held.shape) != tuple(leaf.shape):
            expected = f"the weights of {owner}, {path_name(path)} of shape {tuple(leaf.shape)}"
            raise ValueError(f"params: expected {expected}, got {tuple(held.shape)}")
        declared.add(path_name(path))
    for path, _ in jax.tree_util.tree_leaves_with_path(params):
        if path_name(path) not in declared:
            raise ValueError(f"params: expected the weights of {owner} and no others, got {path_name(path)}")


def materialise(tree, key):
    """Arrays of the declared weights. A weight's randomness depends on `key` and its own path alone."""

    def make(path, p):
        seed = zlib.crc32(path_name(path).encode()) & 0x7FFFFFFF
        return p.initializer(jax.random.fold_in(key, seed), p.shape, p.dtype).astype(p.dtype)

    return jax.tree_util.tree_map_with_path(make, tree, is_leaf=is_param)


def abstract(tree):
    """ShapeDtypeStructs of the declared weights."""
    return map_params(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), tree)


def shardings(tree, mesh, rules=None):
    """NamedShardings of the declared weights; raises ValueError naming a weight that cannot be divided."""

    def place(path, p):
        try:
            return NamedSharding(mesh, sharding.spec(p.axes, p.shape, mesh, rules))
        except ValueError as error:
            raise ValueError(f"{path_name(path)}: {error}") from None

    return jax.tree_util.tree_map_with_path(place, tree, is_leaf=is_param)


def count(tree) -> int:
    """Number of weights."""
    return sum(math.prod(p.shape) for p in jax.tree.leaves(tree, is_leaf=is_param))


def trainable_mask(tree):
    """Whether each weight takes gradient steps."""
    return map_params(lambda p: p.trainable, tree)


def decay_mask(tree):
    """Whether weight decay applies to each weight."""
    return map_params(lambda p: p.decay, tree)


def lr_scales(tree):
    """The factor on each weight's learning rate."""
    return map_params(lambda p: p.lr_scale, tree)


def cast(params, dtype, keep=()):
    """The arrays of a flat or nested dict in `dtype`, but for those under a name in `keep`."""

    def one(path, x):
        kept = any(str(getattr(k, "key", k)) in keep for k in path)
        return x if kept or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def stack(tree, n: int):
    """The declarations with a leading axis "layers" of n independent copies."""

    def one(p):
        base = p.initializer

        def init(key, shape, dtype):
            return jax.vmap(lambda k: base(k, shape[1:], dtype))(jax.random.split(key, shape[0]))

        fan_in = p.fan_in or (p.shape[0] if p.shape else 1)
        return dataclasses.replace(p, shape=(n, *p.shape), axes=("layers", *p.axes), init=init, fan_in=fan_in)

    return map_params(one, tree)
