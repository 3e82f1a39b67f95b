"""Log-linear attention as its definition says it: one state for each source token, weighed by the level it has."""

import jax
import jax.numpy as jnp
import numpy as np


def by_sources(q, k, v, decay, scales, beta=None):
    """y_t = sum over s of scales[t, lev(t, s)] q_t^T S_s, each S_s written at s and then carried on: [B, T, H, V].

    q, k [B, T, H, K], v [B, T, H, V], decay [B, T, H] as a factor, scales [B, T, H, NL], beta [B, T, H] or None.
    """
    batch, time, heads, _ = q.shape
    level = np.array([[(t ^ s).bit_length() for s in range(time)] for t in range(time)])
    erased = jnp.zeros(decay.shape) if beta is None else beta
    beta = jnp.ones(decay.shape) if beta is None else beta

    def step(states, token):
        t, q, k, v, decay, scales, beta, erased = token
        states = decay[..., None, None] * states
        states = states - jnp.einsum("bhk,bhl,sbhlv->sbhkv", erased[..., None] * k, k, states)
        states = states.at[t].set(beta[..., None, None] * k[..., :, None] * v[..., None, :])
        weights = jnp.moveaxis(scales[..., jnp.asarray(level)[t]], -1, 0)  # [T, B, H]; later sources are still zero
        return states, jnp.einsum("sbh,bhk,sbhkv->bhv", weights, q, states)

    tokens = [jnp.moveaxis(x, 1, 0) for x in (q, k, v, decay, scales, beta, erased)]
    _, y = jax.lax.scan(step, jnp.zeros((time, batch, heads, k.shape[-1], v.shape[-1])), (jnp.arange(time), *tokens))
    return jnp.moveaxis(y, 0, 1)


def scales(p, x):
    """softplus(scale * (x W))."""
    return jnp.log1p(jnp.exp(p["level"]["scale"] * jnp.einsum("btd,dhl->bthl", x, p["level"]["weight"])))


def unit_scales(p, x):
    """The weights and inputs by which all scales are 1: the first channel of x is 1 and alone looked at."""
    weight = jnp.zeros_like(p["level"]["weight"]).at[0].set(jnp.log(jnp.e - 1))
    level = {"weight": weight, "scale": jnp.ones_like(p["level"]["scale"])}
    return p | {"level": level}, x.at[..., 0].set(1)
