"""FLOPs of matrix products in HLO: dots, the convolutions that TPUs make of them, calls of a GPU's library."""

import math
import re

import numpy as np


def flops(one, here) -> float:
    """Of an instruction among those of its computation: 0 unless it is a product by itself."""
    if one.op == "dot":
        sizes = here[one.operands[0]].shape[0].dims
        summed = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.attributes)
        axes = [int(x) for x in summed[1].split(",") if x] if summed else []
        return 2 * math.prod(one.shape[0].dims) * math.prod(sizes[axis] for axis in axes)
    if one.op == "custom-call" and ("$gemm" in one.attributes or "$lt$matmul" in one.attributes):
        return _gemm(one, here)
    return _convolution(one, here) if one.op == "convolution" else 0


def _convolution(one, here) -> float:
    """On a TPU every product is one. Taps that fall on padding do not count."""
    left, right, out = (x.shape[0].dims for x in (here[one.operands[0]], here[one.operands[1]], one))
    names = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    window = dict(re.findall(r"(\w+)=([\d\-x_]+)", (re.search(r"window=\{([^}]*)\}", one.attributes) or [""])[0]))
    spatial = sorted(label for label in names[3] if label.isdigit())
    listed = lambda key, default: window[key].split("x") if key in window else [default] * len(spatial)
    taps = 1
    for i, label in enumerate(spatial):
        pads = [int(x) for x in listed("pad", "0_0")[i].split("_")]
        stride, base, dilation = (int(listed(key, 1)[i]) for key in ("stride", "lhs_dilate", "rhs_dilate"))
        inputs, kernel, outputs = (
            sizes[labels.index(label)] for sizes, labels in ((left, names[1]), (right, names[2]), (out, names[3]))
        )
        at = np.arange(outputs)[:, None] * stride + np.arange(kernel)[None] * dilation - pads[0]
        taps *= int(np.sum((at >= 0) & (at % base == 0) & (at // base < inputs)))
    summed = right[names[2].index("i")]
    return 2.0 * taps * out[names[3].index("b")] * out[names[3].index("f")] * summed


def _gemm(one, here) -> float:
    summed = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', one.attributes)
    sizes = here[one.operands[0]].shape[0].dims
    return 2 * math.prod(one.shape[0].dims) * math.prod(sizes[int(x)] for x in re.findall(r"\d+", summed[1]))
