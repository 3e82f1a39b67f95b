"""What an elementwise linear recurrence must cost: each input read once, each output written once."""

FLOPS = 2  # an element of the recurrence


def forward_bytes(batch, time, width, *, itemsize=2, decay_itemsize=2, states=0) -> int:
    """Bytes of h from x and log decays; `states` counts the float32 states read or written (0 to 2)."""
    return batch * time * width * (2 * itemsize + decay_itemsize) + 4 * states * batch * width


def backward_bytes(batch, time, width, *, itemsize=2, decay_itemsize=2, states=0) -> int:
    """Bytes of (dx, dlog_a) from log decays, h and dh; `states` as in `forward_bytes`."""
    return batch * time * width * (3 * itemsize + 2 * decay_itemsize) + 4 * states * batch * width


def floor_ms(count: int, bytes_per_second: float = 3.0e12) -> float:
    """The least time in ms of moving `count` bytes (default: the copy rate that one H100 was measured to reach)."""
    return 1e3 * count / bytes_per_second
