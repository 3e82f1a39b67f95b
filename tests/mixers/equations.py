"""What tests of mixers against their equations share: weights without special values, tokens, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np

from seqmix.core import param


def weights(mixer, dtype=np.float64, scale=0.5):
    """Weights of order `scale`, none at its special start (ones, zeros)."""
    rng = np.random.default_rng(0)
    return param.map_params(lambda p: jnp.asarray(scale * rng.standard_normal(p.shape), dtype), mixer.params())


def tokens(mixer, time, batch=2, seed=7):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((batch, time, mixer.d_model)))


def compiled(f):
    """f compiled in little time: what comes out is slower, not other."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0})


def silu(x):
    return x / (1 + jnp.exp(-x))


def sigmoid(x):
    return 1 / (1 + jnp.exp(-x))


def scan(step, state, *arrays):
    """Outputs [B, T, ...] of `step(state, *tokens) -> (state, output)` over arrays [B, T, ...]."""
    _, ys = jax.lax.scan(lambda s, xs: step(s, *xs), state, tuple(jnp.moveaxis(a, 1, 0) for a in arrays))
    return jnp.moveaxis(ys, 0, 1)


def agrees_with(mixer, equations, time=7):
    """forward and every gradient equal those of `equations(p, x)`, in float64."""
    p, x, cotangent = weights(mixer), tokens(mixer, time), tokens(mixer, time, seed=8)

    def run(f):
        def objective(p, x):
            y = f(p, x)
            return jnp.sum(y * cotangent), y

        return compiled(jax.value_and_grad(objective, (0, 1), has_aux=True))(p, x)

    (_, got), got_grads = run(lambda p, x: mixer.forward(p, x)[0])
    (_, want), grads = run(equations)
    assert float(jnp.max(jnp.abs(want))) > 0.1
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got_grads), jax.tree.leaves(grads), strict=True):
        assert float(jnp.max(jnp.abs(b))) > 1e-4, path
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10, err_msg=str(path))
