"""Where the arrays of an op lie on the mesh in force, and ops run on each device's share (`shard_map`).

XLA partitions most of an op by itself. Two things it can't cut: a kernel, and a recurrence over a sharded time axis.
"""

import dataclasses
import math

import jax
from jax.sharding import PartitionSpec

from seqmix.core import sharding


@dataclasses.dataclass(frozen=True)
class Layout:
    """Mesh axes over which a call's batch, time and heads are cut, () where they are whole."""

    mesh: jax.sharding.Mesh
    batch: tuple[str, ...]
    time: tuple[str, ...]
    heads: tuple[str, ...]
    key_heads: str = "cut"  # of Hk key heads: "cut" like the heads, "whole", or "one", each device the one it reads

    def ways(self, name: str) -> int:
        """Into how many parts "batch", "time" or "heads" are cut."""
        return math.prod(self.mesh.shape[axis] for axis in getattr(self, name))

    def spec(self, *names) -> PartitionSpec:
        """Of an array whose dimensions are "batch", "time", "heads", "key_heads" or None."""
        parts = []
        for name in names:
            if name == "key_heads":
                name = "heads" if self.key_heads == "cut" else None
            axes = () if name is None else getattr(self, name)
            parts.append(axes or None)
        return PartitionSpec(*parts)

    def share(self, x, *names):
        """The shape and dtype of what a device works on of x, or None of None."""
        if x is None:
            return None
        ways = {None: 1, "key_heads": self.ways("heads") if self.key_heads == "cut" else 1}
        ways |= {name: self.ways(name) for name in ("batch", "time", "heads")}
        one = self.key_heads == "one"
        sizes = [1 if one and n == "key_heads" else size // ways[n] for size, n in zip(x.shape, names, strict=True)]
        return jax.ShapeDtypeStruct(sizes, x.dtype)

    def count_key_heads(self, key_heads: int) -> int:
        """Of how many key heads a device's heads read."""
        return {"cut": key_heads // self.ways("heads"), "whole": key_heads, "one": 1}[self.key_heads]

    def local_key_heads(self, x, key_heads: int, axis: int = 2):
        """The key heads (of x along `axis`) that this device's heads read, from what `spec` left it of them."""
        if self.key_heads != "one":
            return x
        index = jax.lax.axis_index(self.heads) * key_heads // self.ways("heads")
        return jax.lax.dynamic_slice_in_dim(x, index, 1, axis)


def layout(batch: int, time: int, heads: int = 1, key_heads: int | None = None) -> Layout | None:
    """The layout of a call by the rules in force, or None without rules, on one device and within `on_shares`.

    What the mesh does not divide is whole. Key heads that are fewer than the ways are not cut; where they neither
    divide those nor are divided by them, heads are whole.
    """
    held = sharding.active()
    if held is None or held[0].size == 1:
        return None
    mesh, rules = held
    sizes = {"batch": batch, "time": time, "heads": heads}
    cut = {}
    for name, size in sizes.items():
        axes = sharding.mesh_axes(rules.get(name))
        axes = tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)
        cut[name] = axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()
    ways = math.prod(mesh.shape[axis] for axis in cut["heads"])
    keys = heads if key_heads is None else key_heads
    how = "cut" if keys % ways == 0 else "whole" if keys == 1 else "one"
    if how == "one" and ways % keys:
        cut["heads"], how = (), "cut"
    return Layout(mesh, **cut, key_heads=how)


def on_shares(lay: Layout, function, arrays, names, out_names):
    """function(*arrays) on each device's share of the arrays.

    `names` and `out_names` are trees like the arguments and the results with a tuple of `Layout.spec` names in place
    of each array; None stays None. A result whose names leave out an axis that the arguments are cut over must be
    equal along it.
    """
    is_names = lambda node: isinstance(node, tuple) and all(name is None or isinstance(name, str) for name in node)
    to_specs = lambda tree: jax.tree.map(lambda node: lay.spec(*node), tree, is_leaf=is_names)
    kept = [None if array is None else spec for array, spec in zip(arrays, names, strict=True)]

    def local(*given):
        with sharding.shares(lay.mesh):
            return function(*given)

    mapped = jax.shard_map(
        local, mesh=lay.mesh, in_specs=tuple(to_specs(kept)), out_specs=to_specs(out_names), check_vma=False
    )
    return mapped(*arrays)
