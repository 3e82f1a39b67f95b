"""Elementwise linear recurrences with real decays on Hopper GPUs, forward and backward.

    h_t = a_t h_{t-1} + x_t,   a_t = exp(log_a_t)

A thread block walks one stretch of time for up to 256 channels, two in each thread, whose states stay in registers as
float32; tiles of ROWS tokens arrive by TMA while earlier ones are worked on. The gradient is the same walk from the
right, with carry c_t = a_t (dh_t + c_{t+1}):

    dx_t = dh_t + c_{t+1} ;   dlog_a_t = c_t h_{t-1}

h is read again rather than recomputed: it is rounded to the dtype of x, dlog_a by as much. Where rows and channels are
too few to fill the chip, time is cut in stretches: a first kernel computes what each makes of a zero carry and what it
leaves of an incoming one, the second starts every stretch from those before it.

Decays come from the approximate exp2, 2^-22 relative each. Over a long memory this adds up: float32 values were 1e-5
off after 3000 tokens that keep all but 1e-4 of the state.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers

LOG2_E = math.log2(math.e)
CHANNELS = 256  # of a thread block; 128 where these do not divide the width, or are all of it
LEAST_WIDTH = 256
UNROLL = 8  # tokens whose tiles are read before the recurrence goes through them
BLOCKS = 264  # thread blocks that an H100 or H200 holds at once, two to a multiprocessor
ENOUGH = 100  # thread blocks with which time is not cut: cutting reads the inputs twice
OPENS, PADDING, PADDING_NEXT = 1, 2, 4  # bits of a token's mark
MARK_LANES = 32  # marks of a tile, padded: TMA writes to multiples of 128 bytes


def supports(x, log_a, state=None, *, capability=None) -> str | None:
    """Why `forward` and `backward` cannot run this call, in a few words; None if they can.

    Takes arrays or shapes with dtypes. capability: (major, minor) of the GPU that will run it; None asks the default
    device.
    """
    reason = compat.no_hopper(capability)
    if reason is not None:
        return reason
    for name, array in (("x", x), ("log_a", log_a)):
        if array.dtype not in (jnp.bfloat16, jnp.float32):
            return f"needs bfloat16 or float32, got {name} of {array.dtype}"
    if x.ndim != 3 or x.shape != log_a.shape or 0 in x.shape:
        return f"needs x and log_a of one shape [B, T, D], got {x.shape}, {log_a.shape}"
    if x.shape[2] % 128 or x.shape[2] < LEAST_WIDTH:
        return f"needs a width that is a multiple of 128 and at least {LEAST_WIDTH}, got D={x.shape[2]}"
    if state is not None and (state.shape != (x.shape[0], x.shape[2]) or state.dtype != jnp.float32):
        return f"needs a float32 state [B, D], got {state.dtype} {state.shape}"
    return None


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shape of a call and its cut: `splits` stretches of `steps` tiles of `rows` tokens."""

    batch: int
    time: int
    width: int
    rows: int
    splits: int
    steps: int

    @property
    def channels(self) -> int:
        """Channels of a thread block, always fewer than all.

        Rows of all channels would be one piece of memory. Such a piece is copied as it is, not cut at the end of time:
        the last tile would run into the next row of the batch.
        """
        return CHANNELS if self.width % CHANNELS == 0 and self.width > CHANNELS else 128

    @property
    def tiles(self) -> int:
        return self.splits * self.steps


def make_plan(x, log_a, splits: int | None = None) -> Plan:
    """The cut of a call; splits None fills the chip where rows and channels do not."""
    batch, time, width = x.shape
    rows = 16 if max(x.dtype.itemsize, log_a.dtype.itemsize) == 2 else 8
    tiles = -(-time // rows)
    plan = Plan(batch, time, width, rows, 1, tiles)
    if splits is None:
        lanes = batch * width // plan.channels
        splits = 1 if lanes >= ENOUGH else max(1, min(BLOCKS // lanes, tiles // 16))
    steps = -(-tiles // splits)
    return dataclasses.replace(plan, splits=-(-tiles // steps), steps=steps)


def token_marks(real, opened, plan: Plan):
    """Marks of tokens, [B, tiles, 32] int32 of which the first `rows` count, from masks [B, T]; None without masks."""
    if real is None and opened is None:
        return None
    shape = (plan.batch, plan.time)
    real = jnp.ones(shape, bool) if real is None else real
    opened = jnp.zeros(shape, bool) if opened is None else opened
    after = jnp.pad(~real[:, 1:], ((0, 0), (0, 1)))
    marks = OPENS * opened + PADDING * ~real + PADDING_NEXT * after
    marks = jnp.pad(marks.astype(jnp.int32), ((0, 0), (0, plan.tiles * plan.rows - plan.time)))
    marks = marks.reshape(plan.batch, plan.tiles, plan.rows)
    return jnp.pad(marks, ((0, 0), (0, 0), (0, MARK_LANES - plan.rows)))


def forward(x, log_a, state=None, real=None, opened=None, *, splits=None):
    """(h [B, T, D] in the dtype of x, final state [B, D] float32) of the recurrence.

    x, log_a: [B, T, D], bfloat16 or float32 each; log_a <= 0, of any size, -inf too. state: [B, D] float32 or None for
    zeros. real, opened: [B, T] bool or None; a token that is not real is passed over, whatever stands there (h there
    is the state carried past it), one that opens a segment forgets what came before. splits: into how many stretches
    to cut time, None to choose. The call must be one that `supports` accepts.
    """
    return begun(x, log_a, real, opened, splits=splits).finish(state)


@dataclasses.dataclass(frozen=True)
class Begun:
    """A call of `forward` or `backward` of which all is known but the carry that comes into its walk, and h."""

    plan: Plan
    given: dict
    end: jax.Array | None  # what the walk makes of a zero carry, [B, D], where it was asked for
    left: jax.Array | None  # what it leaves of a carry, a factor

    def finish(self, *more):
        """The results of `forward` from its state; of `backward` from h, state and dstate."""
        return (_forward if len(more) == 1 else _backward)(self.plan, self.given, *more)


def begun(x, log_a, real=None, opened=None, *, splits=None, need_end=False) -> Begun:
    """What `forward` does before it needs the state; need_end: also `Begun.end` and `left`."""
    return _begun(make_plan(x, log_a, splits), log_a, x, real, opened, need_end)


def backward_begun(log_a, real, opened, dh, *, splits=None, need_start=False) -> Begun:
    """What `backward` does before it needs h and states; `Begun.end` is then the initial state's gradient of dh."""
    return _begun(make_plan(dh, log_a, splits), log_a, dh, real, opened, need_start, reverse=True)


def _begun(plan, log_a, x, real, opened, need_end, reverse=False):
    given = {"log_a": log_a, "x": x, "marks": token_marks(real, opened, plan), "ends": None, "left": None}
    end = whole = None
    if plan.splits > 1 or need_end:
        ends, left = _ends(plan, given, reverse, every=need_end)
        if need_end:
            end, whole = _joined(ends, left, reverse)
        if plan.splits > 1:
            given |= {"ends": ends, "left": left}
    return Begun(plan, given, end, whole)


def _joined(ends, left, reverse):
    """The ends and factors of all splits [B, splits, D] as those of one, [B, D]: neighbours join, pair by pair."""
    if reverse:
        ends, left = jnp.flip(ends, 1), jnp.flip(left, 1)
    while ends.shape[1] > 1:
        odd = ((0, 0), (0, ends.shape[1] % 2), (0, 0))
        ends, left = jnp.pad(ends, odd), jnp.pad(left, odd, constant_values=1)
        ends = left[:, 1::2] * ends[:, ::2] + ends[:, 1::2]
        left = left[:, ::2] * left[:, 1::2]
    return ends[:, 0], left[:, 0]


def _forward(plan, given, state):
    given = given | {"state": state}
    names = [name for name, array in given.items() if array is not None]
    x = given["x"]

    def body(*args):
        refs = dict.fromkeys(given) | dict(zip(names, args))
        h_ref, last_ref, outputs = args[len(names) :]
        place = _Place(plan)

        def tile(indices, *tiles):
            decays, inputs, *marks, carry = tiles
            out = outputs.at[lax.rem(indices[0], 2)]
            compat.stores_read(1)

            def emit(row, decay, x, mark, h):
                h = decay * h + x
                out[row] = h.astype(out.dtype)
                return h

            carry = _walk(plan, decays, inputs, marks, carry, emit)
            compat.publish()
            compat.store(out, h_ref.at[place.row, pl.ds(place.tile(indices[0]) * plan.rows, plan.rows), place.columns])
            return carry

        carry = place.carry(refs, (0, place.split, 1))
        carry = place.stream(tile, refs, ("log_a", "x"), carry, stages=4)

        @pl.when(place.split == plan.splits - 1)
        def _():
            last_ref[place.row, place.columns] = carry

        compat.stores_done()

    return compat.kernel(
        body,
        grid=(plan.width // plan.channels, plan.splits, plan.batch),
        names=("block", "split", "row"),
        out=(jax.ShapeDtypeStruct(x.shape, x.dtype), jax.ShapeDtypeStruct((plan.batch, plan.width), jnp.float32)),
        scratch=[compat.vector(2, plan.rows, plan.channels, dtype=x.dtype)],
        warpgroups=1,
        fetching=False,
        name="linear_scan_forward",
    )(*[given[name] for name in names])


def backward(log_a, h, state, real, opened, dh, dstate=None, *, splits=None):
    """Gradients (dx, dlog_a, dstate) of `forward` from its arguments but x, its h and the cotangents of its results.

    dx has the dtype of dh, dlog_a that of log_a; the initial state's gradient [B, D] float32 is given also where state
    is None. dstate: the final state's cotangent, float32, or None for zeros. At tokens that are not real dx and dlog_a
    are 0, and dh is not read. Every result is the same in every run.
    """
    return backward_begun(log_a, real, opened, dh, splits=splits).finish(h, state, dstate)


def _backward(plan, given, h, state, dstate):
    given = given | {"h": h, "state": dstate, "first": state}
    names = [name for name, array in given.items() if array is not None]
    dh, log_a = given["x"], given["log_a"]

    def body(*args):
        refs = dict.fromkeys(given) | dict(zip(names, args))
        dx_ref, dlog_ref, start_ref, gains, slopes = args[len(names) :]
        place = _Place(plan, reverse=True)

        def tile(indices, *tiles):
            decays, inputs, states, *marks, carry = tiles
            slot = lax.rem(indices[0], 2)
            compat.stores_read(2)

            def emit(row, decay, dh, mark, c):
                slope = c * registers.load_lanes(states.at[row])
                gain = dh + c
                slopes[slot, row] = _unless(mark, PADDING_NEXT, slope).astype(slopes.dtype)
                gains[slot, row] = _unless(mark, PADDING, gain).astype(gains.dtype)
                return decay * gain

            carry = _walk(plan, decays, inputs, marks, carry, emit, reverse=True)
            compat.publish()
            first = place.tile(indices[0]) * plan.rows
            compat.store(gains.at[slot], dx_ref.at[place.row, pl.ds(first, plan.rows), place.columns])
            # What a token's carry makes of the h before it is that token's slope: one row further.
            compat.store(slopes.at[slot], dlog_ref.at[place.row, pl.ds(first + 1, plan.rows), place.columns])
            return carry

        last = plan.splits - 1
        carry = place.carry(refs, (last, last - place.split, -1))
        carry = place.stream(tile, refs, ("log_a", "x", "h"), carry, stages=3)

        @pl.when(place.split == 0)
        def _():
            start_ref[place.row, place.columns] = carry
            slope = registers.lanes(plan.channels, 0.0)
            if refs["first"] is not None:
                slope = carry * registers.load_lanes(refs["first"].at[place.row, place.columns])
                if refs["marks"] is not None:
                    slope = _unless(refs["marks"][place.row, 0, 0], PADDING, slope)
            dlog_ref[place.row, 0, place.columns] = slope.astype(dlog_ref.dtype)

        compat.stores_done()

    shape = (2, plan.rows, plan.channels)
    return compat.kernel(
        body,
        grid=(plan.width // plan.channels, plan.splits, plan.batch),
        names=("block", "split", "row"),
        out=(
            jax.ShapeDtypeStruct(dh.shape, dh.dtype),
            jax.ShapeDtypeStruct(log_a.shape, log_a.dtype),
            jax.ShapeDtypeStruct((plan.batch, plan.width), jnp.float32),
        ),
        scratch=[compat.vector(*shape, dtype=dh.dtype), compat.vector(*shape, dtype=log_a.dtype)],
        warpgroups=1,
        fetching=False,
        name="linear_scan_backward",
    )(*[given[name] for name in names])


class _Place:
    """Which channels, stretch and row a thread block walks, and in which direction."""

    def __init__(self, plan: Plan, reverse=False, skip=0):
        self.plan, self.reverse = plan, reverse
        self.row, self.split = lax.axis_index("row"), lax.axis_index("split") + skip
        self.block = lax.axis_index("block")
        self.columns = pl.ds(self.block * plan.channels, plan.channels)

    def tile(self, step):
        """Index of the tile met at a step."""
        return self.split * self.plan.steps + (self.plan.steps - 1 - step if self.reverse else step)

    def stream(self, tile, refs, names, carry, stages):
        """Walks the stretch: `tile` gets decays, inputs, ..., then marks where there are any, then the carry."""
        shape = (None, self.plan.rows, self.plan.channels)
        specs = [compat.vector_spec(shape, lambda i: (self.row, self.tile(i), self.block))] * len(names)
        if refs["marks"] is not None:
            names = (*names, "marks")
            specs.append(compat.vector_spec((None, None, MARK_LANES), lambda i: (self.row, self.tile(i), 0)))
        run = compat.stream(tile, steps=self.plan.steps, specs=specs, stages=stages, carry=carry)
        return run(*[refs[name] for name in names])

    def carry(self, refs, beyond):
        """What comes into the stretch: the given state through the stretches (first, count, step) `beyond` it."""
        carry = registers.lanes(self.plan.channels, 0.0)
        if refs["state"] is not None:
            carry = registers.load_lanes(refs["state"].at[self.row, self.columns])
        if refs["ends"] is None:
            return carry
        first, count, step = beyond

        def through(index, carry):
            where = (self.row, first + index * step, self.columns)
            left, end = (registers.load_lanes(refs[name].at[where]) for name in ("left", "ends"))
            return left * carry + end

        return lax.fori_loop(0, count, through, carry)


def _walk(plan: Plan, decays, inputs, marks, carry, emit, reverse=False):
    """carry = emit(row, decay, input, mark or None, carry) over the rows of a tile."""
    unroll = min(UNROLL, plan.rows)

    def some(index, carry):
        start = (plan.rows // unroll - 1 - index if reverse else index) * unroll
        rows = [start + offset for offset in (reversed(range(unroll)) if reverse else range(unroll))]
        tokens = [_token(decays, inputs, marks, row) for row in rows]
        for row, token in zip(rows, tokens):
            carry = emit(row, *token, carry)
        return carry

    return lax.fori_loop(0, plan.rows // unroll, some, carry)


def _token(decays, inputs, marks, row):
    """(decay, input, mark) of a token."""
    decay = jnp.exp2(registers.load_lanes(decays.at[row]) * LOG2_E)
    value = registers.load_lanes(inputs.at[row])
    if not marks:
        return decay, value, None
    mark = marks[0][row]
    return _unless(mark, OPENS, _unless(mark, PADDING, decay, 1.0)), _unless(mark, PADDING, value), mark


def _unless(mark, bit, values, instead=0.0):
    """A row of values, or of `instead` where a token's mark has the bit."""
    if mark is None:
        return values
    width = values.shape[0]
    return jnp.where(registers.lanes(width, mark & bit) != 0, registers.lanes(width, instead), values)


def _ends(plan: Plan, given, reverse=False, every=False):
    """What each stretch makes of a zero carry, and what it leaves of one: two float32 [B, splits, D].

    The last stretch in the direction of the walk is left out, unless `every`: its slots are not written.
    """
    names = [name for name in ("log_a", "x", "marks") if given[name] is not None]

    def body(*args):
        refs = {"marks": None} | dict(zip(names, args))
        end_ref, left_ref = args[len(names) :]
        place = _Place(plan, reverse, skip=int(reverse and not every))

        def tile(_, *tiles):
            decays, inputs, *marks, carry = tiles

            def emit(row, decay, value, mark, carry):
                end, left = carry
                return (decay * (end + value) if reverse else decay * end + value), decay * left

            carry = _walk(plan, decays, inputs, marks, carry, emit, reverse)
            compat.publish()
            return carry

        start = (registers.lanes(plan.channels, 0.0), registers.lanes(plan.channels, 1.0))
        end, left = place.stream(tile, refs, ("log_a", "x"), start, stages=5)
        end_ref[place.row, place.split, place.columns] = end
        left_ref[place.row, place.split, place.columns] = left

    shape = jax.ShapeDtypeStruct((plan.batch, plan.splits, plan.width), jnp.float32)
    return compat.kernel(
        body,
        grid=(plan.width // plan.channels, plan.splits - (not every), plan.batch),
        names=("block", "split", "row"),
        out=(shape, shape),
        scratch=[],
        warpgroups=1,
        fetching=False,
        name="linear_scan_ends",
    )(*[given[name] for name in names])
