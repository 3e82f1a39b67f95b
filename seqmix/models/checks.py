"""What the language model refuses: ValueError in one line that names the field or argument."""

import dataclasses
import numbers

import jax.numpy as jnp

from seqmix.core import param
from seqmix.core.mixer import Mixer
from seqmix.core.shapes import dims

REMAT = ("none", "full", "dots")


def fields(model):
    """Raises for fields of an `LM` that make no causal stack."""
    for name in ("vocab", "d_model", "n_layers", "loss_chunk", "vocab_pad_to"):
        value = getattr(model, name)
        if not isinstance(value, numbers.Integral) or value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    if model.remat not in REMAT:
        raise ValueError(f"remat: expected one of {', '.join(REMAT)}, got {model.remat!r}")
    if not _is_floating(model.compute_dtype):
        raise ValueError(f"compute_dtype: expected a floating dtype, got {model.compute_dtype!r}")
    _period(model)
    _mlp(model.mlp_hidden, len(model.mixers))
    for index, mixer in enumerate(model.mixers):
        _mixer(mixer, model.d_model)
        try:
            dataclasses.replace(mixer, d_model=model.d_model)
        except ValueError as error:
            raise ValueError(f"mixers.{index}: {error}") from None


def _period(model):
    mixers = model.mixers
    wrong = [m for m in mixers if not isinstance(m, Mixer)] if isinstance(mixers, tuple) else [mixers]
    if wrong:
        raise ValueError(f"mixers: expected a tuple of mixers, got {type(wrong[0]).__name__}")
    if not mixers:
        raise ValueError("mixers: expected at least one mixer, got none")
    if model.n_layers % len(mixers):
        raise ValueError(f"n_layers: expected a multiple of the period, {len(mixers)}, got {model.n_layers}")


def _mlp(hidden, period):
    widths = hidden if isinstance(hidden, tuple) else (hidden,)
    if not all(isinstance(width, numbers.Integral) and width >= 0 for width in widths):
        raise ValueError(f"mlp_hidden: expected an integer of at least 0, or a tuple of them, got {hidden!r}")
    if isinstance(hidden, tuple) and len(hidden) != period:
        raise ValueError(f"mlp_hidden: expected {period} widths, got {len(hidden)}")


def _mixer(mixer, width):
    name = type(mixer).__name__
    if not mixer.causal:
        raise ValueError(f"mixers: expected causal mixers, got {name}, which sees later tokens")
    if mixer.selects_over_time:
        raise ValueError(f"mixers: expected causal selection, got {name}, which selects over time")
    if mixer.d_model not in (0, width):
        raise ValueError(f"mixers: expected {name} with d_model 0 or {width}, got {mixer.d_model}")


def _is_floating(name) -> bool:
    try:
        return jnp.issubdtype(jnp.dtype(name), jnp.floating)
    except TypeError:
        return False


def weights(model, params):
    """Raises for `params` without one of the weights that the model declares."""
    param.check(model.params(), params, type(model).__name__)


def state(model, given):
    """Raises unless `given` has a state for each mixer of the period; each mixer looks into its own."""
    layers = given.get("layers") if isinstance(given, dict) else None
    if not isinstance(layers, tuple | list) or len(layers) != len(model.mixers):
        got = type(given).__name__ if layers is None else f"layers of {len(layers)}"
        raise ValueError(f"state: expected what LM.init_state gives, layers of {len(model.mixers)} mixers, got {got}")


def tokens(ids, segment_ids=None, positions=None):
    """Raises unless all that are given are [B, T], and `ids` integers."""
    given = {"tokens": ids, "segment_ids": segment_ids, "positions": positions}
    given = {name: value for name, value in given.items() if value is not None}
    dims(dict.fromkeys(given, "B T"), **given)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"tokens: expected integers, got {ids.dtype}")
