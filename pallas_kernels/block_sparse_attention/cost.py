"""What block-sparse attention must cost: operations of the listed tiles, and bytes of its arrays."""

from pallas_kernels.linear_attention.cost import Cost


def forward(batch, time, keys, key_heads, heads, key, value, *, pairs, itemsize=2) -> Cost:
    """Cost of (y, lse); `pairs` counts the pairs of the listed tiles of one head, summed over the batch."""
    moved = (
        itemsize * batch * (time * heads * (key + value) + keys * key_heads * (key + value)) + 4 * batch * heads * time
    )
    return Cost(moved, 2 * heads * pairs * (key + value))


def backward(batch, time, keys, key_heads, heads, key, value, *, pairs, itemsize=2) -> Cost:
    """Cost of (dq, dk, dv) from q, k, v, dy, lse and delta, with the scores made once more."""
    moved = itemsize * batch * (time * heads * (2 * key + value) + 2 * keys * key_heads * (key + value))
    return Cost(moved + 8 * batch * heads * time, 2 * heads * pairs * (3 * key + 2 * value))
