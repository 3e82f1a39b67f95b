"""Where time is cut over a mesh, states alone cross devices, and each holds what its stretch needs."""

import jax
import jax.numpy as jnp
import pytest

from seqmix import ops
from seqmix.core import sharding
from tests.quick import QUICK


def test_nothing_as_long_as_the_sequence_crosses_devices():
    mesh, length = sharding.make_mesh(context=8), 512
    with sharding.use_mesh(mesh):
        lay = lambda *s: jax.ShapeDtypeStruct(
            s, jnp.float32, sharding=jax.NamedSharding(mesh, jax.P(*[None, "context"][: len(s)]))
        )
        op = jax.jit(lambda q, k, v, d: ops.linear_attention(q, k, v, d, chunk=16)[0])
        text = op.lower(*[lay(1, length, 2, 4)] * 3, lay(1, length, 2)).compile(QUICK).as_text()
    moved = [line for line in text.splitlines() if "all-gather(" in line or "all-to-all(" in line or "permute(" in line]
    assert moved and all(str(length) not in line.split("=")[1].split("(")[0] for line in moved), moved


FLAT = {
    "linear attention": lambda q, k, v, d: ops.linear_attention(q, k, v, -jnp.exp(d), chunk=16)[0],
    "delta rule": lambda q, k, v, d: ops.delta_rule(q, k, v, jnp.exp(d), -jnp.exp(d), chunk=16)[0],
    "log-linear attention": lambda q, k, v, d: ops.log_linear_attention(q, k, v, jnp.tile(d[..., None], 12))[0],
    "selective scan": lambda q, k, v, d: ops.selective_scan(q[..., 0], jnp.exp(d), -jnp.ones((4, 16)), k, v, chunk=16)[
        0
    ],
    "short convolution": lambda q, k, v, d: ops.short_conv(q + k + v + d[..., None], jnp.ones((4, 4, 16)))[0],
}


@pytest.mark.parametrize("name", FLAT)
def test_memory_is_flat_as_time_and_devices_grow_together(name):
    """Forward and backward, 256 tokens a device; but for the states of all stretches, some per cent at this length."""

    def temporaries(ways):
        mesh = sharding.make_mesh(context=ways, devices=jax.devices()[:ways])
        cut = jax.NamedSharding(mesh, jax.P(None, "context"))
        shape = lambda *s: jax.ShapeDtypeStruct((1, 256 * ways, *s), jnp.float32, sharding=cut)
        with sharding.use_mesh(mesh):
            loss = lambda *args: jnp.sum(FLAT[name](*args) ** 2)
            grad = jax.jit(jax.grad(loss, (0, 1, 2, 3)))
            program = grad.lower(*[shape(4, 16)] * 3, shape(4)).compile(QUICK)
        return program.memory_analysis().temp_size_in_bytes

    assert temporaries(8) <= 1.05 * temporaries(4)
