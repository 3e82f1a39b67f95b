"""Mixers as Flax Linen modules: `from seqmix.interop import linen as smx; smx.Mamba2(d_state=64)(x)`.

Any class of the catalogue can be asked for by its name, and `wrap` makes a module class of a mixer of your own.
Such a class has the mixer's fields; the width comes from the input. The collection "params" holds the weights,
nested and named as in `Mixer.params()`, and "buffers" those that take no gradient steps. Works without a mesh,
on a host's own mesh, and within `nn.scan`, `nn.remat` and `nn.vmap`. Under a mesh of Explicit axes, call through
`jax.sharding.auto_axes`.
"""

import dataclasses
import functools

import jax.numpy as jnp
from flax import linen as nn

from seqmix import catalog
from seqmix.core import param
from seqmix.core.mixer import Mixer
from seqmix.core.shapes import dims


class MixerModule(nn.Module):
    """What all wrapped mixers share; `wrap` adds the mixer's fields.

    With `annotate`, weights are boxed with their logical axis names (`nn.LogicallyPartitioned`), for hosts that
    set `nn.logical_axis_rules`; such boxes need a `PARTITION_NAME` in `nn.scan`'s metadata.
    """

    annotate: bool = False

    @nn.nowrap
    def make(self, width: int) -> Mixer:
        """The mixer with its width filled in."""
        raise NotImplementedError(f"{type(self).__name__}: make one with wrap(MixerClass)")

    def __call__(self, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """y [B, T, D] in the dtype of x; rng None means deterministic. The mixer's losses are in `forward`."""
        return self.forward(x, segment_ids=segment_ids, positions=positions, rng=rng, **inputs)[0]

    def forward(self, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y, aux) of `Mixer.forward`: add the "loss/..." entries to your objective.

        The "update/..." entries go into "buffers" where that collection is mutable.
        """
        mixer = self._fitting(x)
        y, aux = mixer.forward(self._weights(mixer), x, segment_ids=segment_ids, positions=positions, rng=rng, **inputs)
        if self.is_mutable_collection("buffers") and not self.is_initializing():
            self._write(aux)
        return y, aux

    def init_state(self, batch: int, max_len: int, dtype=jnp.float32, **inputs):
        """The decoding state of `Mixer.init_state`; as there is no x, the field d_model must be given."""
        if self.d_model < 1:
            raise ValueError(f"d_model: {type(self).__name__}.init_state needs the width, a field of the module")
        mixer = self.make(self.d_model)
        return mixer.init_state(self._weights(mixer), batch, max_len, dtype, **inputs)

    def prefill(self, x, state, *, segment_ids=None, positions=None, **inputs):
        """(y, state) of `Mixer.prefill`."""
        mixer = self._fitting(x)
        return mixer.prefill(self._weights(mixer), x, state, segment_ids=segment_ids, positions=positions, **inputs)

    def step(self, x, state, **inputs):
        """(y, state) of `Mixer.step`, x [B, 1, D]."""
        mixer = self._fitting(x)
        return mixer.step(self._weights(mixer), x, state, **inputs)

    @nn.nowrap
    def _fitting(self, x):
        """The mixer of x's width; raises ValueError naming x where the weights were made for another one."""
        dims("B T D", x=x)
        made = self.variables.get("params", {}) | self.variables.get("buffers", {})
        width = f"x: expected the width that the weights were made for, got {x.shape[-1]}"
        try:
            mixer = self.make(x.shape[-1])
        except ValueError as error:
            if made and not str(error).startswith("x: "):
                raise ValueError(f"{width} ({error})") from None
            raise
        held = nn.meta.unbox(dict(made))
        for name, declared in param.entries(mixer.params() if made else {}):
            *path, last = name.split("/")
            value = functools.reduce(lambda tree, key: tree.get(key, {}), path, held).get(last)
            if value is not None and value.shape != declared.shape:
                raise ValueError(f"{width} ({name} is {value.shape}, not {declared.shape})")
        return mixer

    @nn.compact
    def _weights(self, mixer):
        """The mixer's weights; a variable is one entry of its top level, a dict where that is nested."""
        weights = {}
        for name, declared in mixer.params().items():
            trained, fixed = (_part(declared, trainable) for trainable in (True, False))
            if trained is not None:
                trained = self.param(name, lambda key, tree=trained: self._init(tree, key))
            if fixed is not None:
                init = lambda tree=fixed: self._init(tree, self.make_rng("params"))
                fixed = self.variable("buffers", name, init).value
            weights[name] = _join(trained, fixed)
        return weights

    def _init(self, declared, key):
        values = param.materialise(declared, key)
        if not self.annotate:
            return values
        return param.map_params(lambda p, v: nn.LogicallyPartitioned(v, p.axes), declared, values)

    def _write(self, aux):
        for key, value in aux.items():
            if key.startswith("update/"):
                name, *path = key.split("/")[1:]
                self.put_variable("buffers", name, _replace(self.get_variable("buffers", name), path, value))


def _part(declared, trainable: bool):
    """The declarations with this `trainable`, or None if there is none."""
    if param.is_param(declared):
        return declared if declared.trainable == trainable else None
    kept = {name: _part(child, trainable) for name, child in declared.items()}
    return {name: child for name, child in kept.items() if child is not None} or None


def _join(a, b):
    """Two such parts together."""
    if a is None or b is None:
        return b if a is None else a
    return {name: _join(a.get(name), b.get(name)) for name in {**a, **b}}


def _replace(tree, path, value):
    """The tree with the leaf at `path` replaced, in its own dtype and box."""
    if path:
        return {**tree, path[0]: _replace(tree[path[0]], path[1:], value)}
    if isinstance(tree, nn.meta.AxisMetadata):
        return tree.replace_boxed(value.astype(tree.unbox().dtype))
    return value.astype(tree.dtype)


@functools.cache
def wrap(mixer_class: type[Mixer]) -> type[MixerModule]:
    """The Linen module class of a mixer class, with its fields and `annotate`, all by keyword."""
    fields = [field for field in dataclasses.fields(mixer_class) if field.init]

    def make(self, width):
        values = {field.name: getattr(self, field.name) for field in fields}
        if values["d_model"] not in (0, width):
            raise ValueError(f"x: expected width {values['d_model']}, the field d_model, got {width}")
        return mixer_class(**{**values, "d_model": width})

    body = {
        "__module__": __name__,
        "__qualname__": mixer_class.__name__,
        "__doc__": mixer_class.__doc__,
        "__annotations__": {field.name: field.type for field in fields},
        "make": nn.nowrap(make),
    }
    return type(mixer_class.__name__, (MixerModule,), body | {f.name: _default(f) for f in fields})


def _default(field):
    """The field's default as a class body declares it."""
    given = {"default": field.default, "default_factory": field.default_factory}
    return dataclasses.field(**{k: v for k, v in given.items() if v is not dataclasses.MISSING})


def __getattr__(name: str):
    """The module class of a mixer's class name."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return wrap(catalog.load(name))
    except ValueError as error:
        raise AttributeError(str(error)) from None


def __dir__():
    return sorted([*globals(), *(row.class_name for row in catalog.ROWS)])
