"""Elementwise linear recurrences with real decays on TPUs, forward and backward.

    h_t = a_t h_{t-1} + x_t,   a_t = exp(log_a_t)

A grid step takes a tile of tokens and channels. A vector register holds 8 tokens of 128 channels: these are combined
in three rounds of rolls, each token with the one 1, 2 and 4 before it, and then meet the state that comes from the 8
before them, so that only that last step is serial. Tiles are walked in order with the state on the chip, in float32.

The gradient is the same walk from the right, with carry c_t = a_t (dh_t + c_{t+1}):

    dx_t = dh_t + c_{t+1} ;   dlog_a_t = c_t h_{t-1}

h is read again rather than recomputed: it is rounded to the dtype of x, dlog_a by as much.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat
from pallas_kernels.linear_scan import cost

ROWS = 8  # tokens in a register
GROUP = 16  # tokens of one pass of the loop, a packed register of bfloat16
TOKENS, CHANNELS = 256, 512  # of a tile, by the bundle counts of tools/tpu_bundles.py
LANES = 128


def supports(x, log_a, state=None) -> str | None:
    """Why `forward` and `backward` cannot run this call, in a few words; None if they can.

    Takes arrays or shapes with dtypes. It does not look at the device.
    """
    for name, array in (("x", x), ("log_a", log_a)):
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            return f"needs bfloat16 or float32, got {name} of {array.dtype}"
    if x.ndim != 3 or x.shape != log_a.shape or 0 in x.shape:
        return f"needs x and log_a of one shape [B, T, D], got {x.shape}, {log_a.shape}"
    if x.shape[2] % LANES:
        return f"needs a width that is a multiple of {LANES}, got D={x.shape[2]}"
    if state is not None and (state.shape != (x.shape[0], x.shape[2]) or state.dtype != jnp.float32):
        return f"needs a float32 state [B, D], got {state.dtype} {state.shape}"
    return None


def forward(x, log_a, state=None, *, tile=None):
    """(h [B, T, D] in the dtype of x, final state [B, D] float32) of the recurrence.

    x, log_a: [B, T, D], bfloat16 or float32 each; log_a <= 0, of any size, -inf too. state: [B, D] float32 or None for
    zeros. tile: (tokens, channels) of a grid step, multiples of 16 and 128, None to choose. The call must be one that
    `supports` accepts.
    """
    cut = _Cut(x, tile)
    state = jnp.zeros((x.shape[0], x.shape[2]), jnp.float32) if state is None else state

    def body(x_ref, log_ref, state_ref, h_ref, carry):
        _start(carry, state_ref)

        def group(index, before):
            rows = pl.ds(index * GROUP, GROUP)
            found = []
            for inputs, decays in zip(_halves(x_ref, rows), _halves(log_ref, rows)):
                h = _scan(jnp.exp(decays), inputs, before)
                before = _spread(h, ROWS - 1)
                found.append(h)
            h_ref[rows] = jnp.concatenate(found).astype(h_ref.dtype)
            return before

        carry[...] = lax.fori_loop(0, cut.tokens // GROUP, group, carry[...])

    h, last = cut.run(
        body,
        "linear_scan_forward",
        [cut.tile_of(cut.pad(x)), cut.tile_of(cut.pad(log_a)), cut.state_of(_rows(state))],
        [cut.tile_of(cut.padded(x.dtype)), cut.state_of(cut.carried())],
    )
    return h[:, : x.shape[1]], last[:, 0]


def backward(log_a, h, state, dh, dstate, *, tile=None):
    """(dx, dlog_a, dstate) of `forward`: of its decays, its h and state, and the cotangents of its results."""
    cut = _Cut(h, tile)
    last = cut.steps - 1
    at = lambda step: last - step
    before_tile = (cut.pad(h), (None, GROUP, cut.channels), cut.before)

    def body(log_ref, h_ref, before_ref, state_ref, dh_ref, dstate_ref, dx_ref, dlog_ref, carry):
        _start(carry, dstate_ref)
        groups = cut.tokens // GROUP
        earlier = before_ref[...].astype(jnp.float32)[ROWS:]
        earlier = jnp.where(pl.program_id(2) == last, state_ref[...], _spread(earlier, ROWS - 1))

        def group(step, after):
            index = groups - 1 - step
            rows = pl.ds(index * GROUP, GROUP)
            previous = h_ref[pl.ds(jnp.maximum(index - 1, 0) * GROUP, GROUP)].astype(jnp.float32)[ROWS:]
            previous = jnp.where(index == 0, earlier, _spread(previous, ROWS - 1))
            low, high = _halves(h_ref, rows)
            befores = (previous, _spread(low, ROWS - 1))
            slopes, outputs, found = _halves(dh_ref, rows), (low, high), {}
            for half in (1, 0):
                decays = jnp.exp(_halves(log_ref, rows)[half])
                c = _scan(decays, decays * slopes[half], after, reverse=True)
                found[half] = (slopes[half] + _shift(c, after, -1), c * _shift(outputs[half], befores[half], 1))
                after = _spread(c, 0)
            for out, low, high in zip((dx_ref, dlog_ref), found[0], found[1]):
                out[rows] = jnp.concatenate([low, high]).astype(out.dtype)
            return after

        carry[...] = lax.fori_loop(0, groups, group, carry[...])

    dx, dlog_a, dstate = cut.run(
        body,
        "linear_scan_backward",
        [
            cut.tile_of(cut.pad(log_a), at),
            cut.tile_of(cut.pad(h), at),
            before_tile,
            cut.state_of(_rows(state)),
            cut.tile_of(cut.pad(dh), at),
            cut.state_of(_rows(dstate)),
        ],
        [cut.tile_of(cut.padded(h.dtype), at), cut.tile_of(cut.padded(log_a.dtype), at), cut.state_of(cut.carried())],
    )
    time = h.shape[1]
    return dx[:, :time], dlog_a[:, :time], dstate[:, 0]


class _Cut:
    """How [B, T, D] is cut into tiles, walked over time by each row and column of channels."""

    def __init__(self, x, tile=None):
        self.batch, self.time, self.width = x.shape
        tokens, channels = tile or (TOKENS, CHANNELS)
        self.tokens = min(tokens, self.time + -self.time % GROUP)
        self.channels = max(c for c in range(LANES, min(channels, self.width) + 1, LANES) if self.width % c == 0)
        self.steps = -(-self.time // self.tokens)

    def pad(self, x):
        """x up to whole tiles: zeros, which neither add nor decay."""
        missing = self.steps * self.tokens - self.time
        return jnp.pad(x, ((0, 0), (0, missing), (0, 0))) if missing else x

    def padded(self, dtype):
        return jax.ShapeDtypeStruct((self.batch, self.steps * self.tokens, self.width), dtype)

    def carried(self):
        return jax.ShapeDtypeStruct((self.batch, ROWS, self.width), jnp.float32)

    def tile_of(self, x, at=lambda step: step):
        return x, (None, self.tokens, self.channels), lambda b, d, t: (b, at(t), d)

    def state_of(self, state):
        return state, (None, ROWS, self.channels), lambda b, d, t: (b, 0, d)

    def before(self, b, d, t):
        """Index of the group of tokens before a tile, walking from the right."""
        return b, jnp.maximum((self.steps - 1 - t) * (self.tokens // GROUP) - 1, 0), d

    def run(self, body, name, inputs, outputs):
        return compat.tpu_kernel(
            body,
            grid=(self.batch, self.width // self.channels, self.steps),
            parallel=2,
            inputs=inputs,
            outputs=outputs,
            scratch=[],
            name=name,
            flops=cost.FLOPS * self.batch * self.steps * self.tokens * self.width,
            exponentials=self.batch * self.steps * self.tokens * self.width,
        )


def _rows(state):
    """[B, D] as [B, 8, D], each row the same."""
    return jnp.broadcast_to(state[:, None], (state.shape[0], ROWS, state.shape[1]))


def _start(carry, given):
    @pl.when(pl.program_id(2) == 0)
    def _():
        carry[...] = given[...]


def _halves(ref, rows):
    """16 tokens of a tile as two float32 pieces of 8."""
    both = ref[rows].astype(jnp.float32)
    return both[:ROWS], both[ROWS:]


def _spread(rows, row):
    """One of 8 rows in place of all."""
    return jnp.broadcast_to(rows[row : row + 1], rows.shape)


def _shift(rows, other, by):
    """Rows moved on by 1 or -1; `other`, 8 equal rows, fills the gap."""
    row = lax.broadcasted_iota(jnp.int32, rows.shape, 0)
    return jnp.where(row == (0 if by == 1 else ROWS - 1), other, compat.tpu_roll(rows, by % ROWS))


def _scan(decays, inputs, before, reverse=False):
    """h of 8 tokens from the state before them (8 equal rows); reverse: from the last to the first."""
    row = lax.broadcasted_iota(jnp.int32, inputs.shape, 0)
    for distance in (1, 2, 4):
        by = ROWS - distance if reverse else distance
        has = row < ROWS - distance if reverse else row >= distance
        inputs = inputs + decays * jnp.where(has, compat.tpu_roll(inputs, by), 0.0)
        decays = decays * jnp.where(has, compat.tpu_roll(decays, by), 1.0)
    return inputs + decays * before
