"""Triton kernels of linear attention with one decay per token and head; `triton.py` and `triton_backward.py` call them.

Letters as in `gpu.py`: per chunk of 64 tokens, g are the decays in log2 cumulated in it and c = g - log2 w, with w the
weights of the writes. `states` and `outputs` walk a stretch of STEPS chunks with a state [K, BV] in registers; the
gradients take every chunk by itself.

Constants: T, H, HK, K, V of the call; BK, BV columns of keys and values of a tile; CHUNKS in all, in SPLITS stretches;
KINDS: 1, or 2 where c is given beside g; DECAY_ROWS: 1 where all rows share their decays; SHIFT: log2 of the scale;
SEGMENTS, GIVEN: whether segments and a state are given. What is not given is not read, whatever array stands for it.
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
LANES = tl.constexpr(128)  # plan.SEGMENT_LANES


@triton.jit
def _place(array, row, chunk, place, T: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to a chunk's tile [64, WIDTH] of [B, T, ROW] from column `place` on."""
    first = row.to(tl.int64) * T + chunk * CHUNK
    return array + first * ROW + place + tl.arange(0, CHUNK)[:, None] * ROW + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _there(chunk, T: tl.constexpr):
    """Which of a chunk's tokens there are, [64, 1]."""
    return (chunk * CHUNK + tl.arange(0, CHUNK) < T)[:, None]


@triton.jit
def _tile(array, row, chunk, place, T: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr):
    """The tile at `_place`; zeros past the end."""
    if T % CHUNK == 0:
        return tl.load(_place(array, row, chunk, place, T, ROW, WIDTH))
    return tl.load(_place(array, row, chunk, place, T, ROW, WIDTH), mask=_there(chunk, T), other=0.0)


@triton.jit
def _put(array, values, row, chunk, place, T: tl.constexpr, ROW: tl.constexpr, WIDTH: tl.constexpr):
    """Writes the tile at `_place`."""
    values = values.to(array.dtype.element_ty)
    if T % CHUNK == 0:
        tl.store(_place(array, row, chunk, place, T, ROW, WIDTH), values)
    else:
        tl.store(_place(array, row, chunk, place, T, ROW, WIDTH), values, mask=_there(chunk, T))


@triton.jit
def _decays(
    decays, row, head, chunk, H: tl.constexpr, CHUNKS: tl.constexpr, KINDS: tl.constexpr, DECAY_ROWS: tl.constexpr
):
    """g and c of a chunk's tokens, and g of its last."""
    index = head
    if DECAY_ROWS > 1:
        index = row * H + head
    start = decays + index.to(tl.int64) * (KINDS * CHUNKS * CHUNK) + chunk * CHUNK
    reads = tl.load(start + tl.arange(0, CHUNK))
    writes = reads
    if KINDS == 2:
        writes = tl.load(start + CHUNKS * CHUNK + tl.arange(0, CHUNK))
    return reads, writes, tl.load(start + CHUNK - 1)


@triton.jit
def _runs(segments, row, chunk, CHUNKS: tl.constexpr):
    """Runs of a chunk's tokens, and of the state before it and after it."""
    start = segments + (row * CHUNKS + chunk).to(tl.int64) * LANES
    return tl.load(start + tl.arange(0, CHUNK)), tl.load(start + CHUNK), tl.load(start + CHUNK + 1)


@triton.jit
def _factor(exponent, runs, run, SEGMENTS: tl.constexpr):
    """2^exponent of each token, 0 of those of another run."""
    if SEGMENTS:
        exponent = tl.where(runs == run, exponent, float("-inf"))
    return tl.exp2(exponent)


@triton.jit
def _kept(last, before, after, SEGMENTS: tl.constexpr):
    """What a chunk leaves of the state."""
    left = tl.exp2(last)
    if SEGMENTS:
        left = tl.where(before == after, left, 0.0)
    return left


@triton.jit
def _pairs(down, across, runs, SHIFT: tl.constexpr, SEGMENTS: tl.constexpr, TRANSPOSED: tl.constexpr):
    """2^(g_i - c_j) scale where token i reads what j wrote: [i, j] of g and c, or TRANSPOSED [j, i] of c and g."""
    first, second = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    if TRANSPOSED:
        visible = first <= second
        exponent = across[None, :] - down[:, None]
    else:
        visible = first >= second
        exponent = down[:, None] - across[None, :]
    if SEGMENTS:
        visible = visible & (runs[:, None] == runs[None, :]) & (runs[:, None] != 0)
    return tl.exp2(tl.where(visible, exponent + SHIFT, float("-inf")))


@triton.jit
def _at(row, head, place, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """Offsets of a program's tile of a state in [rows, H, K, V]."""
    return _part(row, head, 0, place, H, K, V, K, BV)


@triton.jit
def _part(
    row, head, part, place, H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """Offsets of a tile [BK, BV] of a state in [rows, H, K, V]."""
    tile = (part + tl.arange(0, BK))[:, None] * V + tl.arange(0, BV)[None, :]
    return (row * H + head).to(tl.int64) * (K * V) + place + tile


@triton.jit
def _carried(
    state, ends, left, row, head, place, split,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    SPLITS: tl.constexpr, DECAY_ROWS: tl.constexpr, GIVEN: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """The state with which a stretch starts: what was given, through the stretches met before it."""
    if GIVEN:
        carry = tl.load(state + _at(row, head, place, H, K, V, BV))
    else:
        carry = tl.full((K, BV), 0.0, tl.float32)
    if SPLITS > 1:
        decay_row = row
        if DECAY_ROWS == 1:
            decay_row = row * 0
        index = 0  # not `range(split)`, which Triton's interpreter cannot do with NumPy >= 2.5
        while index < split:
            stretch = index
            if REVERSE:
                stretch = SPLITS - 1 - index
            kept = tl.load(left + (decay_row * H + head) * SPLITS + stretch)
            carry = carry * kept + tl.load(ends + _at(row * SPLITS + index, head, place, H, K, V, BV))
            index += 1
    return carry


@triton.jit
def states(
    keys, values, decays, segments, state, ends_in, left,
    ends, chunks, last_state,
    T: tl.constexpr, H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    CHUNKS: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr,
    KINDS: tl.constexpr, DECAY_ROWS: tl.constexpr, SHIFT: tl.constexpr, SEGMENTS: tl.constexpr, GIVEN: tl.constexpr,
    REVERSE: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The state carried over each stretch, adding keys^T (factors * values) at every chunk.

    Forward, of k and v, the factors are what is left of a write at the chunk's end. REVERSE, of q and dy, they are what
    a token reads of the incoming state: then it is the state's gradient.

    KEPT: every stretch starts from `state` carried through those before it; written are the states met before each
    chunk (REVERSE: the gradients after it), `chunks` [B, CHUNKS, H, K, V], and the last one. Else: stretches start from
    zeros, and what they make of that is written, `ends` [B, SPLITS, H, K, V]; the last one is left out.
    """
    block, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, place = block // (V // BV), block % (V // BV) * BV
    carry = tl.full((K, BV), 0.0, tl.float32)
    if KEPT:
        carry = _carried(
            state, ends_in, left, row, head, place, split, H, K, V, BV, SPLITS, DECAY_ROWS, GIVEN, REVERSE
        )  # fmt: skip
    for step in range(STEPS):
        chunk = split * STEPS + step
        if REVERSE:
            chunk = CHUNKS - 1 - chunk
        key = _tile(keys, row, chunk, head // (H // HK) * K, T, HK * K, K)
        value = _tile(values, row, chunk, head * V + place, T, H * V, BV)
        reads, writes, last = _decays(decays, row, head, chunk, H, CHUNKS, KINDS, DECAY_ROWS)
        runs, before, after = reads, last, last
        if SEGMENTS:
            runs, before, after = _runs(segments, row, chunk, CHUNKS)
        if KEPT:
            tl.store(chunks + _at(row * CHUNKS + chunk, head, place, H, K, V, BV), carry.to(key.dtype))
        if REVERSE:
            factor = _factor(reads + SHIFT, runs, before, SEGMENTS)
        else:
            factor = _factor(last - writes, runs, after, SEGMENTS)
        weighted = (value.to(tl.float32) * factor[:, None]).to(value.dtype)
        carry = tl.dot(tl.trans(key), weighted, acc=carry * _kept(last, before, after, SEGMENTS))
    if not KEPT:
        tl.store(ends + _at(row * SPLITS + split, head, place, H, K, V, BV), carry)
    elif split == SPLITS - 1:
        tl.store(last_state + _at(row, head, place, H, K, V, BV), carry)


@triton.jit
def outputs(
    q, k, v, decays, segments, state, ends, left,
    y, last_state,
    T: tl.constexpr, H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    CHUNKS: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr,
    KINDS: tl.constexpr, DECAY_ROWS: tl.constexpr, SHIFT: tl.constexpr, SEGMENTS: tl.constexpr, GIVEN: tl.constexpr,
):  # fmt: skip
    """Outputs [B, T, H, V] and the last state; every stretch starts from `state` carried through those before it."""
    block, split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, place = block // (V // BV), block % (V // BV) * BV
    carry = _carried(state, ends, left, row, head, place, split, H, K, V, BV, SPLITS, DECAY_ROWS, GIVEN, False)
    for step in range(STEPS):
        chunk = split * STEPS + step
        query = _tile(q, row, chunk, head // (H // HK) * K, T, HK * K, K)
        key = _tile(k, row, chunk, head // (H // HK) * K, T, HK * K, K)
        value = _tile(v, row, chunk, head * V + place, T, H * V, BV)
        reads, writes, last = _decays(decays, row, head, chunk, H, CHUNKS, KINDS, DECAY_ROWS)
        runs, before, after = reads, last, last
        if SEGMENTS:
            runs, before, after = _runs(segments, row, chunk, CHUNKS)
        scores = tl.dot(query, tl.trans(key)) * _pairs(reads, writes, runs, SHIFT, SEGMENTS, False)
        out = tl.dot(query, carry.to(query.dtype)) * _factor(reads + SHIFT, runs, before, SEGMENTS)[:, None]
        out = tl.dot(scores.to(value.dtype), value, acc=out)
        _put(y, out, row, chunk, head * V + place, T, H * V, BV)
        factor = _factor(last - writes, runs, after, SEGMENTS)
        weighted = (value.to(tl.float32) * factor[:, None]).to(value.dtype)
        carry = tl.dot(tl.trans(key), weighted, acc=carry * _kept(last, before, after, SEGMENTS))
    if split == SPLITS - 1:
        tl.store(last_state + _at(row, head, place, H, K, V, BV), carry)


@triton.jit
def key_gradients(
    q, k, v, dy, decays, segments, before_chunks, after_chunks,
    dq, dk, reads_out, writes_out, kept_out,
    B: tl.constexpr, T: tl.constexpr, H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, CHUNKS: tl.constexpr,
    KINDS: tl.constexpr, DECAY_ROWS: tl.constexpr, SHIFT: tl.constexpr, SEGMENTS: tl.constexpr,
    DECAYING: tl.constexpr,
):  # fmt: skip
    """BK columns of dq and dk of one chunk and key head, from the states before chunks and the gradients after them.

    DECAYING: also, for the decays, reads_out and writes_out [K / BK, B, H, tokens] and kept_out [K / BK, B, H, CHUNKS].
    """
    block, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_head, slot = block // (K // BK), block % (K // BK)
    query = _tile(q, row, chunk, key_head * K + slot * BK, T, HK * K, BK)
    key = _tile(k, row, chunk, key_head * K + slot * BK, T, HK * K, BK)
    query_total = tl.full((CHUNK, BK), 0.0, tl.float32)
    key_total = tl.full((CHUNK, BK), 0.0, tl.float32)
    for index in range(H // HK):
        head = key_head * (H // HK) + index
        reads, writes, last = _decays(decays, row, head, chunk, H, CHUNKS, KINDS, DECAY_ROWS)
        runs, before, after = reads, last, last
        if SEGMENTS:
            runs, before, after = _runs(segments, row, chunk, CHUNKS)
        cross = tl.full((CHUNK, CHUNK), 0.0, tl.float32)
        to_query = tl.full((CHUNK, BK), 0.0, tl.float32)
        to_key = tl.full((CHUNK, BK), 0.0, tl.float32)
        kept = tl.full((BK,), 0.0, tl.float32)
        for place in range(0, V, BV):
            value = _tile(v, row, chunk, head * V + place, T, H * V, BV)
            slope = _tile(dy, row, chunk, head * V + place, T, H * V, BV)
            where = _part(row * CHUNKS + chunk, head, slot * BK, place, H, K, V, BK, BV)
            cross = tl.dot(slope, tl.trans(value), acc=cross)
            state, gradient = tl.load(before_chunks + where), tl.load(after_chunks + where)
            to_query = tl.dot(slope, tl.trans(state), acc=to_query)
            to_key = tl.dot(value, tl.trans(gradient), acc=to_key)
            if DECAYING:
                kept += tl.sum(state.to(tl.float32) * gradient.to(tl.float32), axis=1)
        to_query = to_query * _factor(reads + SHIFT, runs, before, SEGMENTS)[:, None]
        to_key = to_key * _factor(last - writes, runs, after, SEGMENTS)[:, None]
        cross = (cross * _pairs(reads, writes, runs, SHIFT, SEGMENTS, False)).to(key.dtype)
        if DECAYING:
            # Of pairs i > j: what i reads less what is read of i. Summed over the tokens from t on this is what
            # crosses t; both come from the same float32 numbers, so that little is lost where they cancel.
            scores = tl.dot(query, tl.trans(key)) * cross.to(tl.float32)
            scores = tl.where(tl.arange(0, CHUNK)[:, None] > tl.arange(0, CHUNK)[None, :], scores, 0.0)
            read = tl.sum(query.to(tl.float32) * to_query, axis=1)
            written = tl.sum(key.to(tl.float32) * to_key, axis=1)
            sums = ((slot * B + row) * H + head).to(tl.int64) * (CHUNKS * CHUNK) + chunk * CHUNK + tl.arange(0, CHUNK)
            tl.store(reads_out + sums, read + tl.sum(scores, axis=1) - tl.sum(scores, axis=0))
            tl.store(writes_out + sums, written)
            through = tl.sum(kept, axis=0) * _kept(last, before, after, SEGMENTS)
            tl.store(kept_out + ((slot * B + row) * H + head).to(tl.int64) * CHUNKS + chunk, through)
        query_total += tl.dot(cross, key, acc=to_query)
        key_total += tl.dot(tl.trans(cross), query, acc=to_key)
    _put(dq, query_total, row, chunk, key_head * K + slot * BK, T, HK * K, BK)
    _put(dk, key_total, row, chunk, key_head * K + slot * BK, T, HK * K, BK)


@triton.jit
def value_gradients(
    q, k, v, dy, decays, segments, after_chunks,
    dv, weights_out,
    B: tl.constexpr, T: tl.constexpr, H: tl.constexpr, HK: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, CHUNKS: tl.constexpr,
    KINDS: tl.constexpr, DECAY_ROWS: tl.constexpr, SHIFT: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """BV columns of dv of one chunk and head, and with KINDS 2 weights_out [V / BV, B, H, tokens], <v, dv>."""
    block, chunk, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, slot = block // (V // BV), block % (V // BV)
    place, key_place = slot * BV, head // (H // HK) * K
    scores = tl.full((CHUNK, CHUNK), 0.0, tl.float32)
    out = tl.full((CHUNK, BV), 0.0, tl.float32)
    for part in range(0, K, BK):
        query = _tile(q, row, chunk, key_place + part, T, HK * K, BK)
        key = _tile(k, row, chunk, key_place + part, T, HK * K, BK)
        where = _part(row * CHUNKS + chunk, head, part, place, H, K, V, BK, BV)
        scores = tl.dot(key, tl.trans(query), acc=scores)
        out = tl.dot(key, tl.load(after_chunks + where), acc=out)
    slope = _tile(dy, row, chunk, head * V + place, T, H * V, BV)
    reads, writes, last = _decays(decays, row, head, chunk, H, CHUNKS, KINDS, DECAY_ROWS)
    runs, before, after = reads, last, last
    if SEGMENTS:
        runs, before, after = _runs(segments, row, chunk, CHUNKS)
    scores = (scores * _pairs(writes, reads, runs, SHIFT, SEGMENTS, True)).to(slope.dtype)
    out = tl.dot(scores, slope, acc=out * _factor(last - writes, runs, after, SEGMENTS)[:, None])
    if KINDS == 2:
        value = _tile(v, row, chunk, head * V + place, T, H * V, BV)
        sums = ((slot * B + row) * H + head).to(tl.int64) * (CHUNKS * CHUNK) + chunk * CHUNK + tl.arange(0, CHUNK)
        tl.store(weights_out + sums, tl.sum(value.to(tl.float32) * out, axis=1))
    _put(dv, out, row, chunk, head * V + place, T, H * V, BV)
