"""The FLOPs that a mixer claims, against what XLA counts."""

import jax
import jax.numpy as jnp

from seqmix.core import param
from tests.conformance.cases import CASES, over

MEDIUM = [c for c in CASES if c.row.medium and c.mixer == c.row.load()(**c.row.small)]


@over(lambda m: any(m is c.mixer for c in MEDIUM))
def test_flops_are_within_5_percent_of_xla(case):
    """At one chunk, where no loop hides work from XLA, and a width at which elementwise terms are small."""
    mixer, batch, seq = case.row.load()(**case.row.medium), 2, case.row.medium_seq
    x = jax.ShapeDtypeStruct((batch, seq, mixer.d_model), jnp.float32)
    run = jax.jit(lambda p, x: mixer.forward(p, x)[0])
    counted = run.lower(param.abstract(mixer.params()), x).compile().cost_analysis()["flops"]
    assert abs(mixer.flops(batch, seq) / counted - 1) < 0.05, (mixer.flops(batch, seq), counted)


@over()
def test_flops_grow_as_batch_and_at_least_as_time(case):
    flops = lambda batch, seq: case.mixer.flops(batch, seq, **case.sizes)
    if case.mixer.fft:  # filters are made once for the whole batch
        assert flops(6, 512) - flops(4, 512) == flops(4, 512) - flops(2, 512) > 0
    else:
        assert flops(6, 512) == 3 * flops(2, 512) > 0
    assert flops(2, 1024) >= 1.9 * flops(2, 512) or case.sizes
