"""Which implementation of an op runs: the best that can, or the named one or an error with the reason."""

import logging

from seqmix.core.shapes import did_you_mean

_KERNELS = "gpu", "tpu", "triton"
_PLAIN = "chunked", "reference"
NAMES = {  # what `implementation` can be, of ops that mixers are built on, best first
    "linear_attention": _KERNELS + _PLAIN,
    "linear_scan": _KERNELS + _PLAIN,
    "attention": ("cudnn", "tokamax", "splash", "gpu", "tpu", *_PLAIN),
    "block_sparse_attention": ("gpu", "tpu", *_PLAIN),
    "delta_rule": ("gpu", *_PLAIN),
    "diagonal_plus_rank_one": ("gpu", *_PLAIN),
    "log_linear_attention": _PLAIN,
    "log_linear_delta_rule": _PLAIN,
    "selective_scan": _PLAIN,
}

_log = logging.getLogger("seqmix.ops")
_chosen: dict[str, set[str]] = {}


def pick(op: str, implementation: str | None, reasons: dict[str, str | None]) -> str:
    """The implementation of `op` to run.

    `reasons` maps each implementation that exists for the op, best first, to None where it supports this call on
    this device, else to why not. implementation None takes the first that does. Each choice is logged once.
    Raises ValueError for a name that does not exist for the op or cannot run, with the reason.
    """
    if implementation is None:
        implementation = next((name for name, reason in reasons.items() if reason is None), None)
        if implementation is None:
            raise ValueError(f"implementation: {op} has none for this call: {reasons}")
    elif not isinstance(implementation, str) or implementation not in reasons:
        expected = f"one of {', '.join(reasons)} for {op}"
        got = f"{implementation!r}{did_you_mean(implementation, reasons)}"
        raise ValueError(f"implementation: expected {expected}, got {got}")
    elif reasons[implementation] is not None:
        raise ValueError(f"implementation: {op} cannot run {implementation!r}: {reasons[implementation]}")
    record(op, implementation)
    return implementation


def record(op: str, implementation: str):
    """Keeps for `chosen` that `op` runs as this, wholly or in part, and logs it once."""
    seen = _chosen.setdefault(op, set())
    if implementation not in seen:
        seen.add(implementation)
        _log.info("%s runs as %r", op, implementation)


def chosen(op: str) -> tuple[str, ...]:
    """The implementations that `op` has run as in this process, sorted."""
    return tuple(sorted(_chosen.get(op, ())))
