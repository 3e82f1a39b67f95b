"""What linear attention must cost: bytes through memory and operations.

Bytes are the least any implementation moves: each input read once, each output written once. FLOPs are those of the
chunked form at chunks of `chunk` tokens, two a multiply-add, counting only the causal half of what is quadratic in a
chunk; projections, decays and masks are left out. `decays` counts those of a token and head: 1, or K per channel.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
    bytes: int
    flops: int

    def floor_ms(self, bytes_per_second: float = 3.0e12, flops_per_second: float = 7.9e14) -> float:
        """The least time in ms on a chip of these rates (default: what one H100 was measured to reach)."""
        return 1e3 * max(self.bytes / bytes_per_second, self.flops / flops_per_second)


def forward(batch, time, key_heads, heads, key, value, *, decays=1, chunk=64, states=0, itemsize=2) -> Cost:
    """Cost of (y, state): q, k, v and float32 decays in, y out; `states` counts the states read or written (0 to 2)."""
    tokens = batch * time
    moved = tokens * (itemsize * (2 * key_heads * key + 2 * heads * value) + 4 * heads * decays)
    moved += states * 4 * batch * heads * key * value
    # Scores are shared by the heads of a group; reading and writing the state are a head's own.
    pairs = chunk * (key_heads * key + heads * value)
    return Cost(moved, tokens * (pairs + 4 * heads * key * value))


def backward(batch, time, key_heads, heads, key, value, *, decays=1, chunk=64, states=0, itemsize=2) -> Cost:
    """Cost of (dq, dk, dv, dlog_decay, dstate) from q, k, v, decays and dy, with everything else recomputed."""
    tokens = batch * time
    moved = tokens * (itemsize * (4 * key_heads * key + 3 * heads * value) + 8 * heads * decays)
    moved += states * 4 * batch * heads * key * value
    # Pairs: scores again, dy v^T, then one product each for dq, dk and dv. States: S and its gradient are carried,
    # S is read by dq, its gradient by dk and dv.
    pairs = chunk * (key_heads * key + 2 * heads * value + 2 * heads * key)
    return Cost(moved, tokens * (pairs + 10 * heads * key * value))
