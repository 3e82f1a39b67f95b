"""Short depthwise causal convolutions on Hopper GPUs, forward and backward.

    c_t = bias + sum_{j < W} weight[W-1-j] x_{t-j} ;  y_t = silu(c_t), or c_t

where t - j steps over padding and stays in t's segment. A thread block of one warpgroup walks a stretch of time for up
to 512 channels, with the last W - 1 tokens in registers: x is read once. Segments and padding, wherever it is, are two
bits of a token; what a stretch has to know of its neighbours is the places of the W - 1 tokens before and after it.

The backward pass is the same walk. With dc_t = dy_t silu'(c_t), each token adds weight[W-1-j] dc_t to the gradient of
the token j before it, which is written when it leaves the window; the W - 1 tokens after the stretch are walked too,
for that alone. The gradients of weight and bias are left as one row for each block. dy may come in two parts, which
are added here.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels import compat, registers

OPENS, PADDING = 1, 2  # bits of a token's mark
MOST_TAPS = 4
GROUP = 4  # tokens whose rows are read before the walk goes through those of the group before
CHANNELS = 512  # of a thread block


@dataclasses.dataclass(frozen=True)
class Plan:
    """A call's sizes, and the stretches of `rows` tokens and `channels` channels of a thread block."""

    batch: int
    time: int
    width: int
    taps: int
    rows: int

    @property
    def channels(self) -> int:
        return math.gcd(self.width, CHANNELS)

    @property
    def groups(self) -> int:
        """Groups of a stretch."""
        return self.rows // GROUP

    @property
    def stretches(self) -> int:
        return -(-self.time // self.rows)

    @property
    def grid(self):
        return (self.width // self.channels, self.stretches, self.batch)

    @property
    def whole(self) -> bool:
        """Whether every stretch has all its tokens."""
        return self.time % self.rows == 0


def make_plan(x, weight, rows) -> Plan:
    """The cut of a call."""
    return Plan(*x.shape, len(weight), rows)


def supports(x, weight, bias, *, capability=None) -> str | None:
    """Why `forward` and `backward` cannot run this call, in a few words; None if they can.

    Takes arrays or shapes with dtypes. capability: (major, minor) of the GPU that will run it; None asks the default
    device.
    """
    reason = compat.no_hopper(capability)
    if reason is not None:
        return reason
    if x.dtype != jnp.bfloat16 or x.ndim != 3 or 0 in x.shape or x.shape[2] % 128:
        return f"needs bfloat16 x [B, T, D], D a multiple of 128, got {x.dtype} {x.shape}"
    for name, array, shape in (("weight", weight, (len(weight), x.shape[2])), ("bias", bias, x.shape[2:])):
        if array.dtype != jnp.float32 or array.shape != shape:
            return f"needs a float32 {name} {shape}, got {array.dtype} {array.shape}"
    return None if 2 <= len(weight) <= MOST_TAPS else f"needs 2 to {MOST_TAPS} taps, got {len(weight)}"


def places(run_ids, plan: Plan):
    """(marks, before, after [B, stretches, W-1]) of segments [B, T], numbers 1, 2, ... and 0 for padding.

    marks: [B, groups, GROUP + 1], the tokens' and whether any of the group is not 0; after the last token is padding.
    before: the last tokens before each stretch that are of one segment with the latest of them, latest first; after:
    the first tokens after it. -1: there is none. All int32; three times None of None.
    """
    if run_ids is None:
        return None, None, None
    time = plan.time
    real, index = run_ids != 0, jnp.arange(time)
    # The ids only grow, so a token opens its segment if no earlier one is of it. The first does too: nothing is before.
    top = jnp.pad(lax.cummax(run_ids, axis=1)[:, :-1], ((0, 0), (1, 0)))
    marks = (OPENS * (run_ids > top) + PADDING * ~real).astype(jnp.int32)
    marks = jnp.pad(marks, ((0, 0), (0, plan.stretches * plan.rows - time)), constant_values=PADDING)
    marks = marks.reshape(plan.batch, -1, GROUP)
    marks = jnp.concatenate([marks, jnp.max(marks, 2, keepdims=True)], 2)
    latest = lax.cummax(jnp.where(real, index, -1), axis=1)
    coming = lax.cummin(jnp.where(real, index, time), axis=1, reverse=True)
    at = lambda table, i, low, high: jnp.where(
        (i >= 0) & (i < time), jnp.take_along_axis(table, jnp.clip(i, 0, time - 1), 1), jnp.where(i < 0, low, high)
    )
    starts = jnp.broadcast_to(jnp.arange(plan.stretches) * plan.rows, (plan.batch, plan.stretches))
    before, after = [], []
    back, ahead = starts, starts + plan.rows - 1
    for _ in range(plan.taps - 1):
        back = at(latest, back - 1, -1, -1)
        ahead = at(coming, ahead + 1, time, time)
        before.append(back)
        after.append(jnp.where(ahead < time, ahead, -1))
    of = lambda i: at(run_ids, i, 0, 0)
    before = [jnp.where(of(i) == of(before[0]), i, -1) for i in before]
    return marks, *(jnp.stack(places, -1).astype(jnp.int32) for places in (before, after))


def forward(x, weight, bias, run_ids=None, *, silu=True):
    """y [B, T, D] bfloat16 of x [B, T, D] bfloat16, weight [W, D] and bias [D] float32; 0 at padding.

    run_ids: [B, T] int32, numbers 1, 2, ... of a row's segments and 0 for padding, as `seqmix.core.packing.runs` gives
    them, or None.
    """
    plan = make_plan(x, weight, 64)
    marks, before, _ = places(run_ids, plan)
    given = {"x": x, "weight": weight, "bias": bias, "marks": marks, "before": before}
    names = [name for name, array in given.items() if array is not None]

    def body(*args):
        *inputs, y_ref = args
        walk = _Walk(plan, dict.fromkeys(given) | dict(zip(names, inputs)))

        def token(time, rows, mark, window):
            (x,) = rows
            window = _unless(mark, OPENS, window)
            c = walk.sum(x, window)
            walk.write(y_ref, time, _unless(mark, PADDING, c * _sigmoid(c) if silu else c))
            return _chosen(mark, window, [x, *window[:-1]])

        walk.run(("x",), token, walk.window())

    return _kernel(body, plan, "forward", jax.ShapeDtypeStruct(x.shape, x.dtype))(*[given[name] for name in names])


def backward(x, weight, bias, run_ids, dy, more=None, *, silu=True):
    """(dx [B, T, D] bfloat16, dweight [W, D], dbias [D] float32) from `forward`'s arguments and dy [B, T, D].

    more: what is added to dy, like it, or None. Neither is read at padding, where dx is 0.
    """
    plan = make_plan(x, weight, 128)
    marks, before, after = places(run_ids, plan)
    given = {"x": x, "weight": weight, "bias": bias, "marks": marks, "before": before, "after": after}
    given |= {"dy": dy, "more": more}
    names = [name for name, array in given.items() if array is not None]
    reads = [name for name in ("x", "dy", "more") if given[name] is not None]

    def body(*args):
        *inputs, dx_ref, sums_ref = args
        walk = _Walk(plan, dict.fromkeys(given) | dict(zip(names, inputs)))

        def arrived(x, dys, mark, window, pending, at):
            """The carry with what a token adds to the gradients of those before it, and its own dc."""
            window = _unless(mark, OPENS, window)
            if mark is not None:  # those of a segment that ends are written, and stand nowhere from now on
                opens = (mark & OPENS) != 0
                for place, values in zip(at, pending):
                    walk.write(dx_ref, place, values, opens)
                at = [jnp.where(opens, -1, place) for place in at]
            dc = sum(dys[1:], dys[0])
            if silu:
                c = walk.sum(x, window)
                s = _sigmoid(c)
                dc = dc * (s * (1 + c * (1 - s)))
            dc = _unless(mark, PADDING, dc)
            return window, [p + w * dc for p, w in zip(pending, walk.weights[1:])], at, dc

        def token(time, rows, mark, carry):
            (x, *dys), (*carry, sums) = rows, carry
            window, pending, at, dc = arrived(x, dys, mark, *carry)
            taps = [_unless(mark, PADDING, x), *window]
            sums = [*[total + dc * tap for total, tap in zip(sums, taps)], sums[-1] + dc]
            moved = [time, *at[:-1]]
            if mark is None:
                walk.write(dx_ref, at[-1], pending[-1])
            else:
                padding = (mark & PADDING) != 0
                last = _unless(mark, PADDING, pending[-1])
                walk.write(dx_ref, jnp.where(padding, time, at[-1]), last)
                moved = [jnp.where(padding, old, new) for old, new in zip(at, moved)]
            pending = _chosen(mark, pending, [walk.weights[0] * dc, *pending[:-1]])
            return _chosen(mark, window, [x, *window[:-1]]), pending, moved, sums

        zeros = lambda count: [registers.lanes(plan.channels, 0.0) for _ in range(count)]
        nowhere = [jnp.int32(-1)] * (plan.taps - 1)
        start = walk.window(), zeros(plan.taps - 1), nowhere, zeros(plan.taps + 1)
        window, pending, at, sums = walk.run(reads, token, start)
        for index in range(plan.taps - 1):
            time, mark = walk.next(index)
            x, *dys = [walk.load(name, time).astype(jnp.float32) for name in reads]
            window, pending, at, _ = arrived(x, dys, mark, window, pending, at)
            walk.write(dx_ref, at[-1], pending[-1])
            pending, at = [*zeros(1), *pending[:-1]], [jnp.int32(-1), *at[:-1]]
            window = [x, *window[:-1]]
        place = walk.batch * plan.stretches + walk.stretch
        for tap, total in enumerate(sums):
            sums_ref[place, tap, walk.columns] = total

    sums = jax.ShapeDtypeStruct((plan.batch * plan.stretches, plan.taps + 1, plan.width), jnp.float32)
    out = jax.ShapeDtypeStruct(x.shape, x.dtype), sums
    dx, sums = _kernel(body, plan, "backward", out)(*[given[name] for name in names])
    sums = jnp.sum(sums, 0)
    return dx, sums[:-1][::-1], sums[-1]


def _kernel(body, plan, name, out):
    return compat.kernel(
        body,
        grid=(plan.width // plan.channels, plan.stretches, plan.batch),
        names=("block", "stretch", "batch"),
        out=out,
        scratch=[],
        warpgroups=1,
        fetching=False,
        name=f"short_conv_{name}",
    )


class _Walk:
    """A thread block's stretch and channels, and its weights, the current token's first."""

    def __init__(self, plan, refs):
        self.plan, self.refs, self.batch = plan, refs, lax.axis_index("batch")
        self.stretch = lax.axis_index("stretch")
        self.start = self.stretch * plan.rows
        self.columns = pl.ds(lax.axis_index("block") * plan.channels, plan.channels)
        taps = [registers.load_lanes(refs["weight"].at[tap, self.columns]) for tap in range(plan.taps)]
        self.weights, self.bias = taps[::-1], registers.load_lanes(refs["bias"].at[self.columns])

    def run(self, names, token, carry):
        """carry = token(time, float32 rows of the arrays in `names`, mark or None, carry) over the stretch."""
        plan, marks = self.plan, self.refs["marks"]

        def fetch(group):
            first = self.start + group * GROUP
            rows = [[self.load(name, first + offset) for name in names] for offset in range(GROUP)]
            return rows, None if marks is None else marks[self.batch, self.stretch * plan.groups + group, GROUP]

        def through(group, rows, marked, carry):
            for offset, row in enumerate(rows):
                mark = self.mark(group, offset) if marked else None
                row = [one.astype(jnp.float32) for one in row]
                carry = token(self.start + group * GROUP + offset, row, mark, carry)
            return carry

        def some(group, state):
            (rows, marked), carry = state
            coming = fetch(jnp.minimum(group + 1, plan.groups - 1))
            if marks is None:
                return coming, through(group, rows, not plan.whole, carry)
            # Most groups have neither padding nor a new segment.
            with_marks, without = (functools.partial(through, group, rows, flag) for flag in (True, False))
            return coming, lax.cond(marked != 0, with_marks, without, carry)

        return lax.fori_loop(0, plan.groups, some, (fetch(0), carry))[1]

    def load(self, name, time):
        """The row of a token, or of one that is there."""
        time = jnp.clip(time, 0, self.plan.time - 1)
        return registers.load_raw_lanes(self.refs[name].at[self.batch, time, self.columns])

    def mark(self, group, offset):
        """The mark of a token; after the last one there is padding."""
        if self.refs["marks"] is None:
            return jnp.where(self.start + group * GROUP + offset < self.plan.time, 0, PADDING)
        return self.refs["marks"][self.batch, self.stretch * self.plan.groups + group, offset]

    def window(self):
        """The W - 1 tokens before the stretch, latest first, zeros where there are none."""
        rows = []
        for index in range(self.plan.taps - 1):
            time = self.start - 1 - index
            if self.refs["before"] is not None:
                time = self.refs["before"][self.batch, self.stretch, index]
            row = self.load("x", time).astype(jnp.float32)
            rows.append(_unless(jnp.where(time < 0, PADDING, 0), PADDING, row))
        return rows

    def next(self, index):
        """(time, mark) of a token after the stretch; one that is not there opens a segment: it adds nothing before."""
        time = self.start + self.plan.rows + index
        if self.refs["after"] is None:
            return time, jnp.where(time < self.plan.time, 0, OPENS)
        time = self.refs["after"][self.batch, self.stretch, index]
        there = jnp.maximum(time, 0)
        mark = self.refs["marks"][self.batch, there // GROUP, lax.rem(there, GROUP)]
        return time, jnp.where(time >= 0, mark, OPENS)

    def sum(self, x, window):
        """bias + the sum of weighted taps."""
        return sum((w * tap for w, tap in zip(self.weights, [x, *window])), self.bias)

    def write(self, ref, time, values, when=True):
        """ref[time] = values, if there is such a token, and `when`."""

        @pl.when((time >= 0) & (time < self.plan.time) & when)
        def _():
            ref[self.batch, time, self.columns] = values.astype(ref.dtype)


def _sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def _unless(mark, bit, values):
    """A row of values (or a list of them), or zeros where a token's mark has the bit."""
    if mark is None:
        return values
    if isinstance(values, list):
        return [_unless(mark, bit, one) for one in values]
    width = values.shape[0]
    return jnp.where(registers.lanes(width, mark & bit) != 0, registers.lanes(width, 0.0), values)


def _chosen(mark, old, new):
    """The rows `new`, or at padding `old`."""
    if mark is None:
        return new
    padding = registers.lanes(old[0].shape[0], mark & PADDING) != 0
    return [jnp.where(padding, before, after) for before, after in zip(old, new)]
