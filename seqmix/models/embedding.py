"""The embedding's look-up, whose gradient goes to where the table lies."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from seqmix.core import sharding
from seqmix.core.sharding import constrain

TABLE = ("vocab", "table")  # logical axes of a table [V, D]


def lookup(table, tokens, dtype):
    """Rows of table [V, D] at tokens [B, T], clipped to its range: [B, T, D] in `dtype`.

    The table is gathered over the devices that share its columns, like any weight. In the backward pass the rows'
    gradients change places instead, so that a device has all that belong to its columns and adds them up there,
    in the table's dtype: they are few beside the table.
    """
    return constrain(_rows(table, tokens, jnp.dtype(dtype)), "batch", "time", None)


def _take(table, tokens):
    return jnp.take(table, tokens, axis=0, mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _rows(table, tokens, dtype):
    return _take(constrain(table, "vocab", None), tokens).astype(dtype)


def _forward(table, tokens, dtype):
    return _rows(table, tokens, dtype), (table, tokens)


def _backward(dtype, kept, gradient):
    table, tokens = kept
    rows = _by_columns(gradient).astype(table.dtype)
    (d_table,) = jax.linear_transpose(lambda weight: _take(weight, tokens), table)(rows)
    return constrain(d_table, *TABLE), None


def _by_columns(x):
    """x [B, T, D] cut like the table's columns, and over what the batch is cut over besides."""
    held = sharding.active()
    if held is None:
        return x
    mesh, rules = held
    batch, time, _ = sharding.spec(("batch", "time", None), x.shape, mesh, rules, strict=False)
    _, columns = sharding.spec(TABLE, (1, x.shape[2]), mesh, rules | {"vocab": None}, strict=False)
    rest = tuple(axis for axis in sharding.mesh_axes(batch) if axis not in sharding.mesh_axes(columns))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(rest or None, time, columns)))


_rows.defvjp(_forward, _backward)
