"""The delta rule's mixers as their papers write them, a token at a time."""

import jax.numpy as jnp

from tests.mixers.equations import scan, sigmoid, silu


def before(x, steps):
    """x [B, T, ...] so many tokens earlier, with zeros before the first."""
    return jnp.pad(x, [(0, 0), (steps, 0)] + [(0, 0)] * (x.ndim - 2))[:, : x.shape[1]]


def heads(p, x, beta_max=1.0):
    """q, k, v and beta of each token."""
    out = {}
    for name in "qkv":
        u, taps = jnp.einsum("btd,dhk->bthk", x, p[name]), p["conv"][name]
        out[name] = silu(sum(w * before(u, len(taps) - 1 - i) for i, w in enumerate(taps)))
    q, k = (out[name] / jnp.sqrt(jnp.sum(out[name] ** 2, -1, keepdims=True) + 1e-6) for name in "qk")
    return q, k, out["v"], beta_max * sigmoid(x @ p["beta"])


def recurrence(q, k, v, beta, decay):
    """S_t = (I - beta k k^T) diag(decay) S_{t-1} + beta k v^T, K^-1/2 S_t^T q_t; decay [B, T, H, 1 or K]."""

    def step(state, q, k, v, beta, decay):
        state = decay[..., None] * state
        predicted = jnp.einsum("bhk,bhkv->bhv", k, state)
        state = state + jnp.einsum("bhk,bhv->bhkv", k, beta[..., None] * (v - predicted))
        return state, jnp.einsum("bhk,bhkv->bhv", q, state) * q.shape[-1] ** -0.5

    return scan(step, jnp.zeros((*k[:, 0].shape, v.shape[-1])), q, k, v, beta, decay)


def normed(p, mixed, eps=1e-5):
    return mixed / jnp.sqrt(jnp.mean(mixed**2, -1, keepdims=True) + eps) * p["norm"]["scale"]
