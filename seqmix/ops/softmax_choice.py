"""Which of what can run a call of `attention` was measured to be the fastest, where none is named.

Libraries come first, in the order of `softmax_library.NAMES`, but where `yields` says that our kernels do; values alone
may go elsewhere (`for_values`), and gradients of keys that travel to cuDNN (`for_ring`). docs/attention.md has what was
measured.
"""

import functools

import jax

from seqmix.core import sharding
from seqmix.ops import softmax_library

SHORT, NARROW = (1025, 4096), 4  # tokens, and times the window: where our own kernels were measured to be faster
SHORT_GROUPED = 8192  # the same of the longest row where several query heads share a key head, of 128 channels
STRETCH = 4096  # tokens of a device, beyond which cuDNN makes the gradients of keys that travel
MIDDLE = 16384  # tokens, up to which tokamax's values were the fastest


def yields(rules, q, k, v) -> bool:
    """Whether our own kernels come before the libraries: in short rows, and where a window is short beside them.

    As measured on an H100 with gradients, with 64 or 128 channels and no soft cap.
    """
    time, window = q.shape[1], softmax_library.window_of(rules, q.shape[1], k.shape[1])
    if not _timed(rules, q, k, v) or time < SHORT[0]:
        return False
    grouped = k.shape[2] < q.shape[2] and q.shape[3] == 128
    return time <= (SHORT_GROUPED if grouped else SHORT[1]) if window is None else time >= NARROW * window


def for_values(forms, rules, q, k, v) -> str | None:
    """What of `forms` makes values alone, where cuDNN makes those that have gradients; None: cuDNN too.

    forms: what can run (None), or why it cannot. As measured on an H100 in long causal rows: there cuDNN has the
    fastest backward kernel, tokamax or we the fastest forward one. Not with fewer key heads or 64 channels, untimed so.
    """
    same = q.shape[2:] == k.shape[2:] and q.shape[3] == 128
    timed = same and _timed(rules, q, k, v) and softmax_library.window_of(rules, q.shape[1], k.shape[1]) is None
    if q.shape[1] <= SHORT[1] or not timed:
        return None
    names = ("tokamax", "gpu") if q.shape[1] <= MIDDLE else ("gpu",)
    return next((name for name in names if forms[name] is None), None)


def for_ring(lay, form, rules, q, k, v) -> bool:
    """Whether cuDNN makes the gradients of keys that travel to queries, where our kernels make the values.

    It does where places are indices and stretches so long that it is the fastest on one device too: five products
    are done there where our kernels do seven.
    """
    from pallas_kernels import cudnn

    window = softmax_library.window_of(rules, q.shape[1], k.shape[1])
    if form != ("zigzag" if rules.causal else "ring") or window is not None or q.shape[3] != v.shape[3]:
        return False
    dims = ("batch", "time", "heads", None), *(("batch", "time", "key_heads", None),) * 2
    local = [lay.share(x, *dim) for x, dim in zip((q, k, v), dims, strict=True)]
    chunk = local[0].shape[1] // (2 if form == "zigzag" else 1)
    if local[0].shape[1] <= STRETCH or chunk % 2 or q.shape[3] % 8 or cudnn.unavailable() is not None:
        return False
    with sharding.shares(lay.mesh):
        return softmax_library.unsupported("cudnn", rules, *local, None, "index", False) is None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def either(values, graded, *arrays):
    """values(*arrays); where a gradient is asked for, graded(*arrays) with its own."""
    return values(*arrays)


either.defvjp(lambda values, graded, *arrays: jax.vjp(graded, *arrays), lambda values, graded, pull, dy: pull(dy))


def _timed(rules, q, k, v):
    """Whether our kernels were timed beside the libraries for such heads."""
    width = q.shape[3]
    return rules.causal and rules.soft_cap is None and k.shape[2] == v.shape[2] and width == v.shape[3] in (64, 128)
