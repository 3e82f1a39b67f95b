"""Floating-point operations: what a device can do, and the counts that mixers' cost formulas share.

A multiply-add counts as two. Costs are those of matmul-like terms and of elementwise terms that are a visible
share; `tests/conformance` holds every mixer's formula against what XLA counts.
"""

# Dense bfloat16 peaks in FLOP/s, from the vendors' data sheets; matched against the start of the device kind.
_PEAKS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA GH200": 989.4e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of `jax.Device.device_kind`; None where it is not known (every CPU)."""
    kind = device_kind.lower()
    for name, peak in _PEAKS.items():
        if kind.startswith(name.lower()):
            return peak
    return None


def matmul(*sizes: int) -> int:
    """2 * the product of the sizes: FLOPs of a contraction over indices of these sizes."""
    total = 2
    for size in sizes:
        total *= size
    return total


def causal_pairs(seq: int, window: int | None = None) -> int:
    """Number of (query, key) pairs with 0 <= i - j < window."""
    if window is None or window >= seq:
        return seq * (seq + 1) // 2
    return window * (window + 1) // 2 + (seq - window) * window
