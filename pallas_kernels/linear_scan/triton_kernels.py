"""Triton kernels of elementwise linear recurrences; `triton.py` calls them.

A program walks a stretch of `STEPS` tiles of ROWS tokens for CHANNELS channels, a few in each thread, with their states
in registers as float32. The loop over a tile's tokens is unrolled, so that many loads are under way at once.

Constants: T and D of the call; STEPS tiles of each of SPLITS stretches; MARKED: whether tokens have marks, bits OPENS
and PADDING of an int32; GIVEN: whether a state comes in; REVERSE: the walk goes from right to left.
"""

import triton
import triton.language as tl

OPENS = tl.constexpr(1)
PADDING = tl.constexpr(2)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _token(log_a, values, marks, at, row, t, T: tl.constexpr, MARKED: tl.constexpr, WHOLE: tl.constexpr):
    """(decay, value, mark) of a token; past the end one that changes nothing."""
    there = t < T
    if WHOLE:
        decay = tl.exp2(tl.load(log_a + at).to(tl.float32) * LOG2_E)
        value = tl.load(values + at).to(tl.float32)
    else:
        decay = tl.exp2(tl.load(log_a + at, mask=there, other=0.0).to(tl.float32) * LOG2_E)
        value = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
    mark = 0
    if MARKED:
        mark = tl.load(marks + row * T + t, mask=there, other=0)
        decay = tl.where((mark & PADDING) != 0, 1.0, tl.where((mark & OPENS) != 0, 0.0, decay))
        value = tl.where((mark & PADDING) != 0, 0.0, value)
    return decay, value, mark


@triton.jit
def _carried(
    state, ends, left, row, columns, split,
    D: tl.constexpr, CHANNELS: tl.constexpr, SPLITS: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """The state with which a stretch starts: what was given, through the stretches met before it."""
    carry = tl.full((CHANNELS,), 0.0, tl.float32)
    if GIVEN:
        carry = tl.load(state + row * D + columns)
    if SPLITS > 1:
        index = 0  # not `range(split)`, which Triton's interpreter cannot do with NumPy >= 2.5
        while index < split:
            where = (row * SPLITS + index) * D + columns
            carry = carry * tl.load(left + where) + tl.load(ends + where)
            index += 1
    return carry


@triton.jit
def stretches(
    log_a, values, marks,
    ends, left,
    T: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, MARKED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What each stretch makes of a zero carry, and what it leaves of one: [B, SPLITS, D] in the order of the walk."""
    block, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = block * CHANNELS + tl.arange(0, CHANNELS)
    base = row.to(tl.int64) * (T * D) + columns
    end = tl.full((CHANNELS,), 0.0, tl.float32)
    kept = tl.full((CHANNELS,), 1.0, tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        first = (split.to(tl.int64) * STEPS + step) * ROWS
        for index in tl.static_range(ROWS):
            t = first + index
            if REVERSE:
                t = SPLITS * STEPS * ROWS - 1 - t
            decay, value, _ = _token(log_a, values, marks, base + t * D, row, t, T, MARKED, SPLITS * STEPS * ROWS == T)
            if REVERSE:
                end = decay * (end + value)
            else:
                end = decay * end + value
            kept = decay * kept
    where = (row * SPLITS + split) * D + columns
    tl.store(ends + where, end)
    tl.store(left + where, kept)


@triton.jit
def forward(
    log_a, x, marks, state, ends, left,
    h, last_state,
    T: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, MARKED: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """h [B, T, D] and the last state [B, D]."""
    block, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = block * CHANNELS + tl.arange(0, CHANNELS)
    base = row.to(tl.int64) * (T * D) + columns
    carry = _carried(state, ends, left, row, columns, split, D, CHANNELS, SPLITS, GIVEN)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        first = (split.to(tl.int64) * STEPS + step) * ROWS
        for index in tl.static_range(ROWS):
            t = first + index
            decay, value, _ = _token(log_a, x, marks, base + t * D, row, t, T, MARKED, SPLITS * STEPS * ROWS == T)
            carry = decay * carry + value
            if SPLITS * STEPS * ROWS == T:
                tl.store(h + base + t * D, carry.to(h.dtype.element_ty))
            else:
                tl.store(h + base + t * D, carry.to(h.dtype.element_ty), mask=t < T)
    if split == SPLITS - 1:
        tl.store(last_state + row * D + columns, carry)


@triton.jit
def backward(
    log_a, dh, h, marks, dstate, state, ends, left,
    dx, dlog_a, first_state,
    T: tl.constexpr, D: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
    SPLITS: tl.constexpr, STAGES: tl.constexpr, MARKED: tl.constexpr, GIVEN: tl.constexpr, FROM: tl.constexpr,
):  # fmt: skip
    """dx, dlog_a [B, T, D] and the first state's gradient [B, D]; FROM: whether there is a first state."""
    block, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = block * CHANNELS + tl.arange(0, CHANNELS)
    base = row.to(tl.int64) * (T * D) + columns
    carry = _carried(dstate, ends, left, row, columns, split, D, CHANNELS, SPLITS, GIVEN)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        last = (SPLITS - split.to(tl.int64)) * STEPS * ROWS - 1 - step * ROWS
        for index in tl.static_range(ROWS):
            t = last - index
            decay, slope, mark = _token(log_a, dh, marks, base + t * D, row, t, T, MARKED, SPLITS * STEPS * ROWS == T)
            gain = slope + carry
            carry = decay * gain
            before = tl.load(h + base + (t - 1) * D, mask=(t > 0) & (t < T), other=0.0).to(tl.float32)
            change = carry * before
            if MARKED:
                change = tl.where((mark & PADDING) != 0, 0.0, change)
                gain = tl.where((mark & PADDING) != 0, 0.0, gain)
            tl.store(dx + base + t * D, gain.to(dx.dtype.element_ty), mask=t < T)
            tl.store(dlog_a + base + t * D, change.to(dlog_a.dtype.element_ty), mask=t < T)
    if split == SPLITS - 1:
        tl.store(first_state + row * D + columns, carry)
        if FROM:
            change = carry * tl.load(state + row * D + columns)
            if MARKED:
                change = tl.where((tl.load(marks + row * T) & PADDING) != 0, 0.0, change)
            tl.store(dlog_a + base, change.to(dlog_a.dtype.element_ty))
