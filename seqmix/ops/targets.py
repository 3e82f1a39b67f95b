"""What every op asks before it takes a kernel of `pallas_kernels`.

The targets are "gpu", for Hopper through Mosaic GPU, "tpu", and "triton", for NVIDIA GPUs through jax-triton, which is
optional. By themselves the ops take the last where Mosaic GPU does not run.
"""

from seqmix.core import sharding
from seqmix.ops.dispatch import pick

TARGETS = ("gpu", "tpu", "triton")  # best first
SCATTERED = "needs one device, or rules that cut its arrays over a mesh (core/sharding.use_mesh)"
LEAST = 64  # tokens; below it the plain forms read no more than they must; for one token, see step_kernels


def unsupported(target: str, length: int, least: int = LEAST) -> str | None:
    """Why no kernel of a target runs over `length` tokens here, in a few words; None if one may, from `least` on."""
    from pallas_kernels import compat

    if not compat.interpreting():
        platform = sharding.device().platform
        if target == "gpu" and capability() is None:
            return f"needs a Hopper GPU, the device is a {platform}"
        if target == "triton" and capability() is None:
            return f"needs an NVIDIA GPU, the device is a {platform}"
        if target == "tpu" and platform != "tpu":
            return f"needs a TPU, the device is a {platform}"
    if length < least:
        return f"needs at least {least} tokens, got T={length}"
    if not sharding.on_one_device() and not compat.interpreting():
        return SCATTERED
    return compat.unavailable() if target == "gpu" else None


def chosen(reasons: dict, implementation: str | None, op: str | None = None) -> str | None:
    """The first target with no reason against it, of those that `implementation` allows; None if there is none.

    op: its name, where nothing asks again what can run. Raises ValueError then for a named target that cannot.
    """
    found = next((name for name, reason in reasons.items() if reason is None and implementation in (None, name)), None)
    if found is None and op is not None:
        pick(op, implementation, reasons | {"chunked": None, "reference": None})
    return found


def capability() -> tuple[int, int] | None:
    """(major, minor) of the device that a call's arrays lie on; None if that is no NVIDIA GPU."""
    from pallas_kernels import compat

    return compat.capability(sharding.device())
