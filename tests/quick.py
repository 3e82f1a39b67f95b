"""Compile options for tests, which compile much and compute little: `jax.jit(f, compiler_options=QUICK)`."""

import jax


def _supported(*candidates: dict) -> dict:
    """The first of these options that this version of XLA knows."""
    for options in candidates:
        try:
            jax.jit(lambda: 0, compiler_options=options)()
        except jax.errors.JaxRuntimeError:
            continue
        return options
    return {}


# Several times faster to compile (the emitters can be chosen up to jax 0.10), slower to run, nothing else.
_PLAIN = {"xla_backend_optimization_level": 0}
QUICK = _supported(_PLAIN | {"xla_cpu_use_fusion_emitters": False}, _PLAIN)
