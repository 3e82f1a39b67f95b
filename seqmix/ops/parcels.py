"""Arrays that go to another device as one array: XLA runs one exchange beside a kernel and waits for others."""

import jax
import jax.numpy as jnp
import numpy as np


def together(arrays):
    """Arrays of a dtype as one, [n]."""
    return jnp.concatenate([x.reshape(-1) for x in arrays])


def apart(flat, like):
    """Arrays of the shapes of others, from what `together` made of such."""
    ends = np.cumsum([x.size for x in like])
    return [flat[end - x.size : end].reshape(x.shape) for x, end in zip(like, ends, strict=True)]


def packed(arrays):
    """The bits of arrays as one array of words [n]."""
    return together([_words(x) for x in arrays])


def unpacked(flat, like):
    """Arrays of the shapes and dtypes of others, from what `packed` made of such."""
    words = [jax.eval_shape(_words, x) for x in like]
    return [_numbers(piece, x) for piece, x in zip(apart(flat, words), like, strict=True)]


def _words(x):
    """The bits of x, [n] uint32: two numbers of 16 bits a word, or two words a number of 64."""
    each = max(1, 4 // x.dtype.itemsize)  # numbers a word
    x = x.reshape(-1)
    if each > 1:
        x = jnp.pad(x, (0, -x.size % each)).reshape(-1, each)
    return jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)


def _numbers(words, like):
    """What `_words` made words of."""
    parts = max(1, like.dtype.itemsize // 4)  # words a number
    words = words.reshape(-1, parts) if parts > 1 else words
    return jax.lax.bitcast_convert_type(words, like.dtype).reshape(-1)[: like.size].reshape(like.shape)
