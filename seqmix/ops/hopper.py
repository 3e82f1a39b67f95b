"""What every op asks before it takes a Hopper kernel of `pallas_kernels`."""

from seqmix.core import sharding

LEAST = 64  # tokens; below it (decoding) the plain forms read no more than they must


def unsupported(length: int) -> str | None:
    """Why no Hopper kernel runs over `length` tokens here, in a few words; None if one may."""
    from pallas_kernels import compat

    if not compat.interpreting() and capability() is None:
        return f"needs a Hopper GPU, the device is a {sharding.device().platform}"
    if length < LEAST:
        return f"needs at least {LEAST} tokens, got T={length}"
    if not sharding.on_one_device() and not compat.interpreting():
        return "needs one device, or rules that cut its arrays over a mesh (core/sharding.use_mesh)"
    return compat.unavailable()


def capability() -> tuple[int, int] | None:
    """(major, minor) of the device that a call's arrays lie on; None if that is no NVIDIA GPU."""
    from pallas_kernels import compat

    return compat.capability(sharding.device())
