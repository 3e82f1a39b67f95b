"""What every op asks before it takes a Hopper kernel of `pallas_kernels`."""

import jax

from seqmix.core import sharding

LEAST = 64  # tokens; below it (decoding) the plain forms read no more than they must


def unsupported(length: int) -> str | None:
    """Why no Hopper kernel runs over `length` tokens here, in a few words; None if one may."""
    from pallas_kernels import compat

    if not compat.interpreting() and jax.default_backend() != "gpu":
        return f"needs a Hopper GPU, the default device is a {jax.default_backend()}"
    if length < LEAST:
        return f"needs at least {LEAST} tokens, got T={length}"
    held = sharding.active()
    devices = jax.device_count() if held is None else held[0].size
    if devices > 1 and not compat.interpreting():
        return f"is not yet cut over a mesh, and this one has {devices} devices"
    return compat.unavailable()
