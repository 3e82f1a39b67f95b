"""Logical names of dimensions, and where a mesh puts them. Rules are data: {logical name: mesh axis or axes}.

Mesh axes are Auto: XLA propagates shardings from the annotated weights and activations. Rules are read while
tracing, so one jitted function must not be used under two sets of rules.
"""

import contextlib
import contextvars
import functools
import math

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "context", "model")

RULES = {
    "batch": ("data", "fsdp"),
    "time": "context",
    "embed": "fsdp",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "vocab": "model",
    "table": "fsdp",
    "head_dim": None,
    "state": None,
    "layers": None,
}

# Replicated where they cannot be divided: a few key heads serve all shares of the queries; a byte vocabulary
# need not be a multiple of anything.
OPTIONAL = ("kv_heads", "vocab")

_active = contextvars.ContextVar("seqmix_sharding", default=None)


def make_mesh(*, data=1, fsdp=1, context=1, model=1, devices=None):
    """A mesh with axes data, fsdp, context, model (Auto) over `devices` (default: all of them)."""
    shape = (data, fsdp, context, model)
    devices = jax.devices() if devices is None else list(devices)
    if math.prod(shape) != len(devices):
        laid = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, shape, strict=True))
        raise ValueError(f"mesh: expected a product of {len(devices)} devices, got {laid}")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices)


@contextlib.contextmanager
def use_mesh(mesh, rules=None):
    """Within it, `constrain` and ops place their arrays on `mesh` by `rules` (default: RULES).

    A host with its own mesh passes rules that name its own axes: {"batch": "dp", "heads": "tp"}.
    """
    if not hasattr(mesh, "axis_names"):
        raise ValueError(f"mesh: expected a jax.sharding.Mesh, as make_mesh makes it, got {mesh!r}")
    token = _active.set((mesh, RULES if rules is None else dict(rules)))
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _active.reset(token)


def active():
    """(mesh, rules) in force, or None; within `shares` too."""
    held = _active.get()
    return None if held is None or held[1] is None else held


@contextlib.contextmanager
def shares(mesh):
    """Within it, arrays are one device's shares of those on `mesh` (inside `shard_map`): no rules are in force."""
    token = _active.set((mesh, None))
    try:
        yield
    finally:
        _active.reset(token)


def on_one_device() -> bool:
    """Whether an op's arrays lie on one device: shares of a mesh, a mesh of one, or a machine of one."""
    held = _active.get()
    if held is None:
        return jax.device_count() == 1
    mesh, rules = held
    return rules is None or mesh.size == 1


def device():
    """A device that an op's arrays lie on: of the mesh (which may be another machine's), or the default one."""
    held = _active.get()
    devices = () if held is None else getattr(held[0], "devices", np.empty(0)).flat
    return next(iter(devices), None) or jax.devices()[0]


def mesh_axes(entry) -> tuple[str, ...]:
    """The mesh axes that a rule names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def spec(axes, shape, mesh, rules=None, *, strict=True) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes and shape.

    Axes of size one are left out; a name without a rule is replicated. A dimension that the mesh axes do not
    divide is replicated when its name is in OPTIONAL or `strict` is False, else ValueError, with the numbers.
    Raises ValueError too when two dimensions want the same mesh axis.
    """
    rules = RULES if rules is None else rules
    used, parts = set(), []
    for name, size in zip(axes, shape, strict=True):
        wanted = tuple(a for a in mesh_axes(rules.get(name)) if a in mesh.shape and mesh.shape[a] > 1)
        ways = math.prod(mesh.shape[a] for a in wanted)
        if size % ways:
            if strict and name not in OPTIONAL:
                over = ", ".join(f"{a}={mesh.shape[a]}" for a in wanted)
                raise ValueError(f"{name}: expected a multiple of {ways} (mesh {over}), got {size}")
            wanted = ()
        if used & set(wanted):
            raise ValueError(f"axes {tuple(axes)}: two of them lie on mesh axis {sorted(used & set(wanted))[0]}")
        used |= set(wanted)
        parts.append(wanted if len(wanted) > 1 else wanted[0] if wanted else None)
    return PartitionSpec(*parts)


def constrain(x, *axes):
    """Hints where an activation lies, by the logical names of its dimensions; nothing happens without rules."""
    held = active()
    if held is None:
        return x
    mesh, rules = held
    if len(axes) != x.ndim:
        raise ValueError(f"axes: expected {x.ndim} names for shape {x.shape}, got {axes}")
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec(axes, x.shape, mesh, rules, strict=False)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def gathered(weight, held, used):
    """A weight that lies by the logical names `held`, where those of `used` put it; its gradient lies by `held` again.

    Between the devices that share it a gradient is then reduced and scattered. The transpose of `constrain` would ask
    for all of it on each of them first, which sends twice as much.
    """
    return constrain(weight, *used)


def _gathered_forward(weight, held, used):
    return constrain(weight, *used), None


def _gathered_backward(held, used, _, gradient):
    return (constrain(gradient, *held),)


gathered.defvjp(_gathered_forward, _gathered_backward)
