"""Measures every comparison of tests/peers and writes docs/peer_checks.md. Run by `make peers`, from the root."""

import importlib.metadata
import platform
from pathlib import Path

import pytest

from tests.peers.compare import LENGTH, measure
from tests.peers.test_peers import COMPARISONS
from tools import needs

PAGE = Path(__file__).parents[1] / "docs/peer_checks.md"
HEAD = f"""# Compared with public code

`make peers` installs the packages named here, runs `tests/peers` and writes this page: torch {{torch}} and jax {{jax}}
on a CPU ({{machine}}). Both sides get two rows of {LENGTH} tokens (48 for SSD), and weights and states of no special
value; ours goes in chunks of 16, and once more by the reference. Ops also compare their final states and, where the
peer takes one, start from a given state; their decays lie between about e^-0.001 and e^-20 a token.

An error is the largest one, relative to the largest entry of its array: over all outputs, and over the gradients by
every input, state and weight. Most peers cast to float32; while they run here, that name stands for float64.

| ours | peer | function | dtype | values | gradients |
|---|---|---|---|---|---|
"""
FOOT = """
Of each package one file is run, without the package around it. What the layers get from the test:

* `MultiScaleRetention`: our rotary angles (its own are others) with the pairs that it rotates, and no eps in its norm,
  which it adds after dividing scores by their sum.
* `GateLoopedAttention`: the whole gradient into its transition (it takes 0.9 of it), no bias there.
* `RGLRU`: the convolution, the gate and the projections around it, and positions from 1; position 0 it treats apart.
* `Mamba`: the package's `selective_scan_ref` in place of the CUDA kernel.
* `GatedLinearRNN`: no bias of the output. It is a Flax module.
* `RWKV_x070_TMix_one`: goes token by token; it has e^-1/2 rounded to six digits, hence float32.
* The layers of flash-linear-attention: its own naive functions in place of its kernels, and torch's norms and
  convolutions in place of its fused ones. `HGRN2Attention` also sigmoid(q) and silu(v), as in the paper's code;
  `NativeSparseAttention` its means, its window and its rotation by torch.
"""


def main():
    lines = []
    for c in COMPARISONS:
        try:
            values, gradients = measure(c)
        except pytest.skip.Exception as missing:
            needs.refuse(f"tools.peer_checks needs what make peers installs: {missing}")
        lines.append(
            f"| {c.ours} | {c.package} {c.version()} | `{c.function}` | {c.dtype} | {values:.1e} | {gradients:.1e} |"
        )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "jax")}
    PAGE.write_text(HEAD.format(machine=platform.machine(), **versions) + "\n".join(lines) + "\n" + FOOT)
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
