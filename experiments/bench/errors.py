"""Errors of values and gradients against float64, of the same rounded inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import timing


def exact(call, cotangent, inputs):
    """(y, gradients) of call(*inputs, implementation="reference") in float64, as numpy."""
    wide = [np.asarray(x, np.float64) for x in (cotangent, *inputs)]
    with jax.enable_x64(True):
        both = timing.with_gradients(functools.partial(call, implementation="reference"))
        return jax.tree.map(np.asarray, jax.jit(both)(*map(jnp.asarray, wide)))


def measured(call, arrays, implementations):
    """{label: errors} of call(q, k, v, implementation=...), by {label: implementation}; arrays: (dy, q, k, v)."""
    wanted, found = exact(call, arrays[0], arrays[1:]), {}
    for label, implementation in implementations.items():
        both = timing.with_gradients(functools.partial(call, implementation=implementation))
        found[label] = compared(jax.jit(both)(*arrays), wanted, "qkv")
    return found


def compared(found, exact, names):
    """Root mean squares of the differences over those of float64: of y, the worst of the gradients, and all by name."""
    errors = {}
    for key, a, b in zip(("y", *names), (found[0], *found[1]), (exact[0], *exact[1]), strict=True):
        a, b = np.asarray(a, np.float64).reshape(b.shape), np.asarray(b)
        errors[key] = float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))
    worst = max(names, key=errors.get)
    return {"error": errors["y"], "gradient_error": errors[worst], "worst_gradient": worst, "errors": errors}
