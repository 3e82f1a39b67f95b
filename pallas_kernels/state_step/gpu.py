"""One token of a recurrence with a matrix for a state, on Hopper GPUs.

    D = exp(log_decay)            of a head, of a channel of K, or 1
    S' = D S + k (write v)^T                                    without `read`
    S' = D S + k (write (v - u))^T,    u = (D S)^T read         with `read`: the delta rule
    S' = D S + left u^T + k (write v)^T,    u = S^T read        with `left` too: a diagonal plus a product of vectors
    y  = scale S'^T q

What is to be done is to read and write S, so the kernel is one pass: a thread block of one warpgroup holds COLUMNS
columns of a head's S, all its rows, in registers. Columns do not see each other. As sums go over rows, a thread holds
16 bytes of a row (`registers.load_streamed`), 8 threads 128 of it, and of a vector over rows K / 16 numbers; the sums
go over 4 lanes and the 4 warps.

With K = 128 a thread holds 64 numbers of S. ptxas gives it 95 to 143 registers, and nothing spills, so 3 to 5 blocks
are on a multiprocessor: 96 KiB and more of states on their way, where 16 would hide the latency of memory at 3 TB/s. A
warp of the delta rule issues some 600 instructions, a block 2,400: 600 cycles of the four schedulers. The block's
64 KiB take 5,000 cycles of the multiprocessor's share of 3 TB/s. On an H200 the delta
rule took 1.2 to 1.5 times what copying those bytes takes, 1.5 to 2.0 times as fast as by XLA.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers

# Rows and heads together from which on it was faster than XLA's form on an H100, also of states that are read before
# they are written, of which XLA's form is the slower; below, launches take most of the time of any form.
LEAST_HEADS, LEAST_READ = 1024, 256
COLUMNS = 64  # of a state that a thread block holds


def supports(state, q, k, v, log_decay=None, write=None, read=None, left=None, *, scale=1.0, capability=None):
    """Why `step` cannot run this call, in a few words; None if it can.

    Takes arrays or shapes with dtypes. capability: (major, minor) of the GPU that will run it; None asks the default
    device.
    """
    reason = compat.no_hopper(capability)
    if reason is not None:
        return reason
    if not isinstance(scale, int | float):
        return "needs a number for scale, got an array"
    if state.dtype != jnp.float32:
        return f"needs a float32 state, got {state.dtype}"
    key, value = state.shape[2:]
    if key not in (64, 128) or value % COLUMNS or 0 in state.shape:
        return f"needs K of 64 or 128 and V a multiple of 64, got K={key} V={value}"
    given = dict(q=q, k=k, v=v, log_decay=log_decay, write=write, read=read, left=left)
    for name, array in given.items():
        if array is not None and array.dtype not in (jnp.bfloat16, jnp.float32):
            return f"needs bfloat16 or float32, got {name} of {array.dtype}"
    return None


def worthwhile(state, read=None) -> bool:
    """Whether a state has so many heads that the kernel should be faster than XLA's form; read: as `step` takes it."""
    return state.shape[0] * state.shape[1] >= (LEAST_HEADS if read is None else LEAST_READ)


def step(state, q, k, v, log_decay=None, write=None, read=None, left=None, *, scale=1.0):
    """(y [B, H, V] in the dtype of v, the state after it) of a state [B, H, K, V] float32.

    q, k: [B, Hk, K], v: [B, H, V]; log_decay: [H], [B, H] or [B, H, K]; write: [B, H]; read, left: [B, Hk or H, K];
    each bfloat16 or float32, or None where that is a default. Head h takes key head h // (H / Hk). In a program the
    new state takes the memory of the old one, or, in a loop over stacked states, goes from one stack to the other
    (`compat.updating`); where the old one is read afterwards, XLA copies it before.
    """
    batch, heads, key, value = state.shape
    given = dict(q=q, k=k, v=v, log_decay=log_decay, write=write, read=read, left=left)
    given = {name: array for name, array in given.items() if array is not None}

    def body(state_ref, *refs):
        *refs, y_ref, new_ref = refs
        refs = dict(zip(given, refs, strict=True))
        b, h, column = (lax.axis_index(name) for name in ("batch", "head", "column"))
        here = pl.ds(column * COLUMNS, COLUMNS)
        down = lambda vector: registers.spread_rows(vector, (key, COLUMNS))
        along = lambda vector: registers.spread_columns(vector, (key, COLUMNS))

        def rows(name):
            ref = refs[name]
            at = ref.at[b, h // (heads // ref.shape[1])]
            return down(registers.load_streamed(at, 1).astype(jnp.float32))

        def decayed(tile):
            if log_decay is None:
                return tile
            if log_decay.ndim == 3:
                return tile * down(jnp.exp(registers.load_streamed(refs["log_decay"].at[b, h], 1).astype(jnp.float32)))
            place = (h,) if log_decay.ndim == 1 else (b, h)
            return tile * jnp.exp(refs["log_decay"][place].astype(jnp.float32))

        tile = registers.load_streamed(state_ref.at[b, h, :, here])
        written = registers.load_streamed(refs["v"].at[b, h, here], 0).astype(jnp.float32)
        if left is not None:
            found = jnp.sum(tile * rows("read"), 0)
            tile = decayed(tile) + rows("left") * along(found)
        else:
            tile = decayed(tile)
            if read is not None:
                written = written - jnp.sum(tile * rows("read"), 0)
        if write is not None:
            written = written * refs["write"][b, h].astype(jnp.float32)
        tile = tile + rows("k") * along(written)
        new_ref[b, h, :, here] = tile
        y_ref[b, h, here] = (scale * jnp.sum(tile * rows("q"), 0)).astype(y_ref.dtype)

    return compat.updating(
        body,
        state,
        *given.values(),
        grid=(batch, heads, value // COLUMNS),
        names=("batch", "head", "column"),
        out=jax.ShapeDtypeStruct(v.shape, v.dtype),
        name="state_step",
    )
