"""Measures every comparison of tests/peers and writes docs/peer_checks.md. Run by `make peers`, from the root."""

import importlib.metadata
import platform
from pathlib import Path

from tests.peers.compare import LENGTH, measure
from tests.peers.test_peers import COMPARISONS

PAGE = Path(__file__).parents[1] / "docs/peer_checks.md"
HEAD = f"""# Compared with public PyTorch code

`make peers` installs the packages named here, runs `tests/peers` and writes this page: torch {{torch}} and jax {{jax}}
on a CPU ({{machine}}). Both sides get the same {LENGTH} tokens (48 for SSD), in chunks of 16 of ours, with weights and
states of no special value, once in the chunked form and once in the reference. Ops also compare their final states and,
where the peer takes one, start from a given state; their decays lie between about e^-0.001 and e^-20 a token.

An error is the largest one, relative to the largest entry of its array: over all outputs, and over the gradients by
every input, state and weight. The tests accept {LENGTH} roundings (4.4e-6 in float32, 8.2e-15 in float64). Where the
dtype is float32, the peer casts to it.

| ours | peer | function | dtype | values | gradients |
|---|---|---|---|---|---|
"""
FOOT = """
Of each package the one file is run, without the package around it. What the mixers' peers get from the test:
torchscale's layer the angles of our rotary positions (its own are others), with the pairs that it rotates, and no eps
in its norm; GateLoopedAttention no reduced gradient; recurrentgemma's RG-LRU the convolution, the gate and the
projections around it, and positions from 1 (it treats position 0 apart); Mamba the package's `selective_scan_ref` in
place of the CUDA kernel. The `rwkv` package has e^-1/2 rounded to six digits.
"""


def main():
    lines = []
    for c in COMPARISONS:
        values, gradients = measure(c)
        lines.append(
            f"| {c.ours} | {c.package} {c.version()} | `{c.function}` | {c.dtype} | {values:.1e} | {gradients:.1e} |"
        )
    versions = {name: importlib.metadata.version(name) for name in ("torch", "jax")}
    PAGE.write_text(HEAD.format(machine=platform.machine(), **versions) + "\n".join(lines) + "\n" + FOOT)
    print(PAGE.read_text())


if __name__ == "__main__":
    main()
