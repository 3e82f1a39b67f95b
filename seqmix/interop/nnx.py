"""Mixers as Flax NNX modules: `from seqmix.interop import nnx as smx; smx.Mamba2(256, d_state=64, rngs=rngs)`.

Any class of the catalogue can be asked for by its name; `MixerModule` wraps an instance that you made yourself.
Modules make plain arrays, so they can be built without a mesh, on a host's own mesh whatever its axes are called,
and within `nnx.jit`, `nnx.vmap` and `nnx.remat`. Under a mesh of Explicit axes, call through `jax.sharding.auto_axes`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from seqmix import catalog
from seqmix.core import param
from seqmix.core.mixer import Mixer


class Buffer(nnx.Variable):
    """A weight that takes no gradient steps: optimisers over `nnx.Param` pass it by. See `MixerModule.write`."""


class MixerModule(nnx.Module):
    """A mixer and its weights, which `weights` holds nested and named as in `mixer.params()`.

    With `annotate`, each variable carries its logical axis names as `out_sharding`; flax then shards it when it
    is made, which takes a mesh and `nnx.logical_axis_rules` that know the names embed, heads, kv_heads, head_dim,
    state and mlp. Without, it makes no demands; `param.shardings(module.mixer.params(), mesh, rules)` says where
    the weights belong.
    """

    def __init__(self, mixer: Mixer, *, rngs: nnx.Rngs, annotate: bool = False):
        def variable(declared, value):
            kind = nnx.Param if declared.trainable else Buffer
            return kind(value, out_sharding=declared.axes) if annotate else kind(value)

        if mixer.d_model < 1:
            raise ValueError(f"d_model: expected a positive width for {type(mixer).__name__}, got {mixer.d_model}")
        declared = mixer.params()
        self.mixer = mixer
        self.weights = nnx.data(param.map_params(variable, declared, param.materialise(declared, rngs.params())))

    def params(self) -> dict:
        """The weights as the plain dict of arrays that the mixer's own methods take."""
        return jax.tree.map(lambda v: v.get_value(), self.weights, is_leaf=_is_variable)

    def __call__(self, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """y [B, T, D] in the dtype of x; rng None means deterministic. The mixer's losses are in `forward`."""
        return self.forward(x, segment_ids=segment_ids, positions=positions, rng=rng, **inputs)[0]

    def forward(self, x, *, segment_ids=None, positions=None, rng=None, **inputs):
        """(y, aux) of `Mixer.forward`: add the "loss/..." entries to your objective, and `write` the aux."""
        return self.mixer.forward(self.params(), x, segment_ids=segment_ids, positions=positions, rng=rng, **inputs)

    def write(self, aux: dict):
        """Puts the "update/..." entries of an aux into the buffers that they name."""
        for key, value in aux.items():
            if key.startswith("update/"):
                variable = functools.reduce(lambda tree, name: tree[name], key.split("/")[1:], self.weights)
                variable[...] = value.astype(variable.dtype)

    def init_state(self, batch: int, max_len: int, dtype=jnp.float32, **inputs):
        """The decoding state of `Mixer.init_state`."""
        return self.mixer.init_state(self.params(), batch, max_len, dtype, **inputs)

    def prefill(self, x, state, *, segment_ids=None, positions=None, **inputs):
        """(y, state) of `Mixer.prefill`."""
        return self.mixer.prefill(self.params(), x, state, segment_ids=segment_ids, positions=positions, **inputs)

    def step(self, x, state, **inputs):
        """(y, state) of `Mixer.step`, x [B, 1, D]."""
        return self.mixer.step(self.params(), x, state, **inputs)


def _is_variable(leaf) -> bool:
    return isinstance(leaf, nnx.Variable)


def __getattr__(name: str):
    """A function (d_model, *, rngs, annotate=False, **fields) -> MixerModule for a mixer's class name."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        mixer_class = catalog.load(name)
    except ValueError as error:
        raise AttributeError(str(error)) from None

    def build(d_model: int, *, rngs: nnx.Rngs, annotate: bool = False, **fields) -> MixerModule:
        return MixerModule(mixer_class(d_model=d_model, **fields), rngs=rngs, annotate=annotate)

    return functools.update_wrapper(build, mixer_class, updated=())


def __dir__():
    return sorted([*globals(), *(row.class_name for row in catalog.ROWS)])
