"""What gradients of attention read of each row of queries, made on Hopper GPUs where no kernel of dq makes it.

    delta_i = sum_v dy_iv y_iv - dlse_i, beside lse_i in log2

A thread block of one warpgroup brings 64 rows of a few heads by TMA, all at once, and adds up each row in registers;
several of them share a multiprocessor. XLA takes five times as long: it makes these sums one thread a row, inside the
concatenation of the two.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers
from pallas_kernels.block_sparse_attention.plan import LOG2_E

ROWS = 64  # of a tile
CHANNELS = 256  # of the heads of a thread block


def rows(y, dy, lse, dlse, *, by_head=False):
    """[B, H, 2, T] float32: lse in log2, infinite for a row that sees nothing, and delta, there 0.

    y, dy: [B, T, H, V] bfloat16 (by_head: [B, H, T, V]), the output and its cotangent, T a multiple of 64, V of 64 or
    128. lse, dlse: [B, H, T] float32, likewise, -inf or inf where a row sees nothing.
    """
    batch, heads, time = lse.shape
    value = y.shape[-1]
    count = math.gcd(heads, max(1, CHANNELS // value))

    def body(y, dy, lse, dlse, out, y_tiles, dy_tiles, staged, there):
        row, tokens = lax.axis_index("row"), pl.ds(lax.axis_index("tile") * ROWS, ROWS)
        head = lambda n: lax.axis_index("heads") * count + n
        for n in range(count):
            at = (row, head(n), tokens) if by_head else (row, tokens, head(n))
            for source, tiles in ((y, y_tiles), (dy, dy_tiles)):
                compat.fetch(source.at[at], tiles.at[n], there.at[n])
        for n in range(count):
            sums, shift = (registers.load_rows_of(x.at[row, head(n), tokens]) for x in (lse, dlse))
            some = jnp.abs(sums) < jnp.inf
            compat.wait(there.at[n])
            y_tile, dy_tile = (registers.load_tile(x.at[n]).astype(jnp.float32) for x in (y_tiles, dy_tiles))
            delta = jnp.sum(y_tile * dy_tile, axis=1) - shift
            staged[n, 0] = jnp.where(some, sums * LOG2_E, jnp.inf)
            staged[n, 1] = jnp.where(some, delta, 0.0)
            compat.publish()
            compat.store(staged.at[n], out.at[row, head(n), :, tokens])
        compat.stores_done()

    return compat.kernel(
        body,
        grid=(batch, time // ROWS, heads // count),  # heads, which lie side by side, in turn
        names=("row", "tile", "heads"),
        out=jax.ShapeDtypeStruct((batch, heads, 2, time), jnp.float32),
        scratch=[
            *[compat.tile(count, ROWS, value)] * 2,
            compat.vector(count, 2, ROWS),
            compat.barriers(count, 2),
        ],
        warpgroups=1,
        fetching=False,
        name="block_sparse_attention_rows",
        sums_columns=False,
    )(y, dy, lse, dlse)
