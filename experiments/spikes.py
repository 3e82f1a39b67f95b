"""Which step's loss is a spike: one that lies sigma standard deviations above the mean of the losses before it."""

import jax.numpy as jnp


def init(optim):
    """The state before the first step: {"losses" [spike_window] float32, "seen" int32, "skipped" int32}."""
    counts = {name: jnp.zeros((), jnp.int32) for name in ("seen", "skipped")}
    return {"losses": jnp.zeros((optim.spike_window,), jnp.float32), **counts}


def judge(state, loss, sigma):
    """(whether `loss` is a spike, the next state).

    Nothing is one until the window has been filled. The window takes a spike's loss cut to the limit, so that a
    loss which stays high raises the limit step by step and is accepted in the end, and one outlier does not hide
    the next.
    """
    losses, seen = state["losses"], state["seen"]
    size = losses.shape[0]
    limit = jnp.mean(losses) + sigma * jnp.std(losses)
    spiked = (seen >= size) & (loss > limit)
    taken = jnp.where(spiked, limit, loss).astype(jnp.float32)
    return spiked, {
        "losses": losses.at[seen % size].set(taken),
        "seen": seen + 1,
        "skipped": state["skipped"] + spiked,
    }
