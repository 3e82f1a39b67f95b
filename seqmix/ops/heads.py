"""Heads of queries, keys and values: each head of keys, and each head of values, is read by a run of query heads."""

import math

import jax.numpy as jnp


def check(d):
    """Raises ValueError unless the key heads, and value heads where there are some, of sizes `d` divide its H heads."""
    if d.H < 1:
        raise ValueError("q: expected at least one head, got H=0")
    for name, letter in {"k": "Hk", "v": "Hv"}.items():
        count = getattr(d, letter, d.H)
        if count < 1 or d.H % count:
            raise ValueError(f"{name}: expected a number of heads that divides H={d.H}, got {letter}={count}")


def alike(k, v, axis=2):
    """(k, v) with as many heads, along `axis`: the fewest that are a multiple of both numbers. Heads are repeated."""
    heads = math.lcm(k.shape[axis], v.shape[axis])
    return tuple(x if x.shape[axis] == heads else jnp.repeat(x, heads // x.shape[axis], axis=axis) for x in (k, v))


def regrouped(x, heads):
    """[B, J, R, ...], R query heads to each of J, as [B, heads, J R / heads, ...]."""
    return x.reshape(x.shape[0], heads, -1, *x.shape[3:])
