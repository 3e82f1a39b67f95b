"""Arguments, definition and compiled calls that the tests of the delta rule share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.ops.delta import delta_rule

B, HK, H, K, V = 2, 2, 4, 4, 3
GATES = (0.0, -1e-4, -0.1, -0.5, -5.0, -20.0, -1e4)

# Compiling is most of what these tests cost, and LLVM's optimisation nearly half of that.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def draw(kind, time, seed=0, steps=(), erase=None, size=(B, HK, H, K, V), beta=2.0, gates=GATES):
    """Arguments in float64: keys of length one, beta in (0, `beta`), log decays of mixed gates, a state."""
    rng = np.random.default_rng(seed)
    b, hk, h, k, v = size
    units = lambda *shape: (lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True))(rng.normal(size=shape))
    shape = {"none": None, "constant": (h,), "head": (b, time, h), "channel": (b, time, h, k)}[kind]
    arrays = dict(
        q=units(b, time, hk, k),
        k=units(b, time, *steps, hk, k),
        v=rng.normal(size=(b, time, *steps, h, v)),
        beta=beta * rng.uniform(size=(b, time, *steps, h)),
        state=rng.normal(size=(b, h, k, v)),
    )
    if erase:
        arrays["erase"] = units(b, time, *steps, erase, k)
    return arrays if shape is None else arrays | dict(log_decay=rng.choice(gates, shape))


def definition(q, k, v, beta, log_decay=None, erase=None, state=None, ids=None):
    """y and the last state, token by token, with the transition as a matrix."""
    if k.ndim == 4:
        k, v, beta, erase = (None if x is None else x[:, :, None] for x in (k, v, beta, erase))
    batch, time, steps, heads, _ = v.shape
    decay = np.zeros((1, 1, 1, 1)) if log_decay is None else np.asarray(log_decay)
    decay = decay[..., None] if decay.ndim == 3 else decay[None, None, :, None] if decay.ndim == 1 else decay
    decay = np.broadcast_to(decay, (batch, time, heads, q.shape[-1]))
    ids = np.ones((batch, time), int) if ids is None else ids
    y, state = (
        np.zeros(v[:, :, 0].shape),
        np.zeros((batch, heads, q.shape[-1], v.shape[-1])) + (0 if state is None else state),
    )
    key = lambda x, b, t, h: x[b, t, ..., h * x.shape[-2] // heads, :]
    for b, h in np.ndindex(batch, heads):
        current, s = 0, state[b, h]
        for t in np.flatnonzero(ids[b]):
            s = np.zeros_like(s) if current not in (0, ids[b, t]) else s
            current = ids[b, t]
            s = np.diag(np.exp(decay[b, t, h])) @ s
            for i in range(steps):
                write = beta[b, t, i, h] * key(k, b, t, h)[i]
                read = key(k if erase is None else erase, b, t, h)[i]
                s = (np.eye(len(s)) - np.outer(write, read)) @ s + np.outer(write, v[b, t, i, h])
            y[b, t, h] = s.T @ key(q, b, t, h)
        state[b, h] = s
    return y, state


@functools.cache
def forward(**options):
    return jit(lambda arrays, ids=None: delta_rule(**arrays, segment_ids=ids, **options))


@functools.cache
def pullback(op=delta_rule, **options):
    """(arrays, cotangents of y and the state, ids) -> (y and state, gradients of all arrays)."""

    def run(arrays, cotangents, ids=None):
        out, vjp = jax.vjp(lambda arrays: op(**arrays, segment_ids=ids, **options), arrays)
        return out, vjp(cotangents)[0]

    return jit(run)


def cotangents(arrays, seed=1):
    rng = np.random.default_rng(seed)
    batch, time = arrays["q"].shape[:2]
    heads, width = arrays["v"].shape[-2:]
    return rng.normal(size=(batch, time, heads, width)), rng.normal(size=arrays["state"].shape)


def to_time(tree, time):
    """The first tokens of a tree of arrays: all with time on axis 1 but `state` and a constant decay."""
    cut = lambda name, x: x[:, :time] if x.ndim > 2 and name != "state" else x
    return {name: cut(name, x) for name, x in tree.items()}


def assert_close(got, expected, tolerance, what=""):
    """Every leaf within `tolerance` of the largest entry of its counterpart."""
    for (path, x), (_, y) in zip(*map(jax.tree_util.tree_leaves_with_path, (got, expected)), strict=True):
        bound = tolerance * max(1, np.abs(y).max(initial=0))
        np.testing.assert_allclose(x, y, rtol=0, atol=bound, err_msg=f"{what} {path}")


def relative(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    scale = np.sqrt(np.mean(expected**2))
    return np.sqrt(np.mean((got - expected) ** 2)) / scale if scale else np.abs(got).max()


def against_float64(run, loop, arrays, weights):
    """RMS errors of `run` relative to `loop` in float64 on the same rounded arrays: y, state, gradients by name."""
    got = run(arrays, weights)
    with jax.enable_x64(True):
        exact = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), tree)
        expected = loop(exact(arrays), exact(weights))
    names = lambda out: dict(zip(("y", "last state"), out[0], strict=True)) | out[1]
    return {name: relative(x, names(expected)[name]) for name, x in names(got).items()}


SMALL = (1, 1, 2, 32, 32)  # B, Hk, H, K, V

# Of the published delta rule kernels for 16 bits; 0.008 for all others.
BOUNDS = {"y": 0.006, "last state": 0.006, "beta": 0.02, "log_decay": 0.02}


def in_bfloat16(arrays):
    """The arrays and cotangents for them, in bfloat16 but for gates and states, in float32."""
    kept = ("beta", "log_decay", "state")
    y, state = cotangents(arrays)
    arrays = {name: jnp.asarray(x, jnp.float32 if name in kept else jnp.bfloat16) for name, x in arrays.items()}
    return arrays, (jnp.asarray(y, jnp.bfloat16), jnp.asarray(state, jnp.float32))
