"""Softmax weights summed over the query heads that share a key head, on Hopper GPUs: what a choice of blocks goes by.

    w_tj = sum_g exp(scale q_tg . k_j - lse_tg)

A warpgroup owns 64 tokens, and makes their scores to 128 keys one query head after the other: the sum over heads stays
in registers, where XLA would write all scores to memory. One more warpgroup fetches queries and keys by TMA.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers
from pallas_kernels.block_sparse_attention.plan import WIDTHS
from pallas_kernels.block_sparse_attention.token_gpu import LOG2_E

ROWS, UNITS = 64, 2  # tokens of a warpgroup; warpgroups that compute
TOKENS, KEYS = UNITS * ROWS, 128  # of a tile
STAGES = 4  # tiles of queries in shared memory
HELD = 2  # tiles of keys
FETCHING, COMPUTING = 24, 240  # registers of a thread


def supports(q, k, *, scale=1.0, capability=None) -> str | None:
    """Why the kernel cannot run this call, in a few words; None if it can. Takes arrays or shapes with dtypes."""
    reason = compat.no_hopper(capability)
    if reason is not None:
        return reason
    if any(x.dtype != jnp.bfloat16 for x in (q, k)):
        return f"needs bfloat16 q and k, got {q.dtype}, {k.dtype}"
    if q.shape[-1] not in WIDTHS:
        return f"needs K in {WIDTHS}, got K={q.shape[-1]}"
    if isinstance(scale, jax.core.Tracer) or not scale > 0:
        return "needs a scale that is a Python number above 0"
    return None


def weights(q, k, lse, tiles, *, scale):
    """w [B, Hk, S, T] float32 of q [B, T, H, K], k [B, S, Hk, K] bfloat16 and lse [B, H, T] float32.

    T is a multiple of 128, S of 128. tiles [B, T / 128] int32: how many tiles of 128 keys are looked at for each 128
    tokens; what w holds of the others is anything. The call must be one that `supports` accepts.
    """
    (batch, time, heads, width), (_, keys, key_heads, _) = q.shape, k.shape
    call = Call(heads // key_heads, width, float(scale))
    names = "q", "k", "lse", "tiles"

    def body(*refs):
        given, (w, shared) = dict(zip(names, refs)), refs[len(names) :]
        block = Block(call, given, w, shared)
        fetches = compat.fetching_warpgroup(UNITS)
        pl.when(fetches)(block.fetch)
        pl.when(jnp.logical_not(fetches))(block.compute)

    scratch = {
        "q": compat.tile(STAGES, TOKENS, width),
        "lse": compat.vector(STAGES, TOKENS),
        "k": compat.tile(HELD, KEYS, width),
        "q_there": compat.barriers(STAGES, 2),
        "q_free": compat.barriers(STAGES, UNITS),
        "k_there": compat.barriers(HELD),
        "k_free": compat.barriers(HELD, UNITS),
    }
    return compat.kernel(
        body,
        grid=(batch, key_heads, time // TOKENS),
        names=("row", "head", "tile"),
        out=jax.ShapeDtypeStruct((batch, key_heads, keys, time), jnp.float32),
        scratch=[scratch],
        warpgroups=UNITS,
        name="block_weights",
        sums_columns=False,
    )(q, k, lse * LOG2_E, tiles)


@dataclasses.dataclass(frozen=True)
class Call:
    """The static half of a call."""

    heads: int  # G, query heads to a key head
    width: int  # K
    scale: float


class Block:
    """A thread block: 128 tokens of a key head, and the tiles of keys that they look at."""

    def __init__(self, call: Call, given, w, shared):
        self.call, self.given, self.w, self.shared = call, given, w, shared

    # Read wherever they are needed: what is known before the warpgroups' ways part would be spilled.
    row = property(lambda self: lax.axis_index("row"))
    head = property(lambda self: lax.axis_index("head"))

    @property
    def tile(self):
        """With causal keys the last tokens have the most."""
        return self.given["tiles"].shape[1] - 1 - lax.axis_index("tile")

    @property
    def count(self):
        return self.given["tiles"][self.row, self.tile]

    def fetch(self):
        call, given, shared = self.call, self.given, self.shared
        compat.registers(FETCHING, more=False)
        tokens, count = pl.ds(self.tile * TOKENS, TOKENS), self.count

        def await_free(name, n, room):
            """Until what lay where the nth tile goes has been used."""
            pl.when(n >= room)(lambda: compat.wait(shared[f"{name}_free"].at[lax.rem(n, room)]))

        def keys(n, _):
            slot = lax.rem(n, HELD)
            await_free("k", n, HELD)
            source = given["k"].at[self.row, pl.ds(n * KEYS, KEYS), self.head]
            compat.fetch(source, shared["k"].at[slot], shared["k_there"].at[slot])

            def queries(g, _):
                place, head = n * call.heads + g, self.head * call.heads + g
                slot = lax.rem(place, STAGES)
                there = shared["q_there"].at[slot]
                await_free("q", place, STAGES)
                compat.fetch(given["q"].at[self.row, tokens, head], shared["q"].at[slot], there)
                compat.fetch(given["lse"].at[self.row, head, tokens], shared["lse"].at[slot], there)

            lax.fori_loop(0, call.heads, queries, None)

        lax.fori_loop(0, count, keys, None)
        for name, total, room in (("k", count, HELD), ("q", count * call.heads, STAGES)):
            for left in range(room):  # no barrier is left with an arrival that nobody has seen
                await_free(name, total + left, room)

    def compute(self):
        call, shared = self.call, self.shared
        compat.registers(COMPUTING, more=True)
        unit = compat.warpgroup(UNITS)
        rows, shape = pl.ds(pl.multiple_of(unit * ROWS, ROWS), ROWS), (ROWS, KEYS)

        def keys(n, _):
            held = lax.rem(n, HELD)
            compat.wait(shared["k_there"].at[held])

            def head(g, total):
                slot = lax.rem(n * call.heads + g, STAGES)
                compat.wait(shared["q_there"].at[slot])
                lse = registers.load_rows(shared["lse"].at[slot, rows])
                scores = registers.matmul((shared["q"].at[slot, rows], registers.transposed(shared["k"].at[held])))
                total += jnp.exp2(scores * (call.scale * LOG2_E) - registers.spread_rows(lse, shape))
                compat.publish()  # lse has been read: TMA may write there
                compat.arrive(shared["q_free"].at[slot])
                return total

            total = lax.fori_loop(0, call.heads, head, registers.zeros(shape))
            compat.arrive(shared["k_free"].at[held])
            tokens = pl.ds(self.tile * TOKENS + unit * ROWS, ROWS)
            registers.store_transposed(total, self.w.at[self.row, self.head, pl.ds(n * KEYS, KEYS), tokens])

        lax.fori_loop(0, self.count, keys, None)
