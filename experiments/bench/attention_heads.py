"""Causal attention whose query heads share key heads, or of 64 channels, and of single rows: part `heads`.

Beside torch's cuDNN and flash where there is no window. In single rows few thread blocks walk for dk and dv, which the
kernels of `gpu` cut. bfloat16.
"""

import dataclasses
import functools

from experiments.bench import attention_peers, errors, timing
from experiments.bench.suites import Case, drawn, supported
from seqmix import ops
from seqmix.ops import masks


@dataclasses.dataclass(frozen=True)
class Shape:
    """B rows of T tokens, H query heads to `key_heads`, of K = V channels."""

    batch: int
    tokens: int
    heads: int
    key_heads: int
    width: int = 128
    window: int | None = None

    def __str__(self):
        near = f", window {self.window}" if self.window else ""
        return f"{self.heads} heads to {self.key_heads} of {self.width}{near}"

    def arrays(self, batch, tokens):
        """The shapes of the cotangent, q, k and v."""
        every = (self.heads,) * 2 + (self.key_heads,) * 2
        return [(batch, tokens, heads, self.width) for heads in every]


SHAPES = (
    Shape(16, 2048, 16, 4),
    Shape(8, 4096, 16, 4),
    Shape(4, 8192, 16, 4),
    Shape(2, 16384, 16, 4),
    Shape(8, 4096, 16, 4, window=512),
    Shape(16, 2048, 16, 16, 64),
    Shape(8, 4096, 16, 4, 64),
    Shape(8, 4096, 16, 16, 64, window=512),
    Shape(1, 4096, 16, 1),
    Shape(1, 8192, 16, 2),
)
NAMES = ("gpu", "cudnn", "tokamax", "chunked")
SETS = 2
ERROR_T = 512
CHUNKED = 4096  # longest rows that the chunked form is timed on


def cases(args):
    """One of each shape."""
    return [
        Case("heads", f"{shape} B{shape.batch} T={shape.tokens}", functools.partial(_case, shape)) for shape in SHAPES
    ]


def _case(shape, args):
    call = functools.partial(_call, shape.window)
    sizes = shape.arrays(shape.batch, shape.tokens)
    mask = masks.Causal() & masks.Window(shape.window) if shape.window else masks.Causal()
    pairs = mask.pairs(shape.tokens)
    rate = lambda times: 4 * shape.width * shape.heads * shape.batch * pairs / times["fwd_ms"] / 1e9
    base = {"pattern": str(shape), "batch": shape.batch, "tokens": shape.tokens, "density": pairs / shape.tokens**2}
    wrong, sets = measured_errors(shape), [drawn(4 * seed, sizes) for seed in range(SETS)]
    for label, implementation in supported(call, sets[0][1:], NAMES).items():
        if label != "chunked" or shape.tokens <= CHUNKED:
            times = timing.both_ms(functools.partial(call, implementation=implementation), sets)
            yield base | {"implementation": label, **times, "tflops": rate(times), **wrong.get(label, {})}
    del sets
    if args.peers and not shape.window:
        sizes = shape.batch, shape.tokens, shape.heads, shape.key_heads, shape.width
        for label, times in attention_peers.heads_times(*sizes).items():
            yield base | {"implementation": label, **times, "tflops": rate(times), "peer": True}


def measured_errors(shape):
    """{label: errors to float64} at a short length."""
    call, arrays = functools.partial(_call, shape.window), drawn(40, shape.arrays(1, min(shape.tokens, ERROR_T)))
    return errors.measured(call, arrays, supported(call, arrays[1:], NAMES))


def _call(window, q, k, v, implementation=None):
    return ops.attention(q, k, v, window=window, implementation=implementation)
