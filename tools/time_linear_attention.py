"""Times `linear_attention` on this machine's GPU: python tools/time_linear_attention.py

Prints medians over rounds of queued calls that rotate over three random input sets, forward and forward + backward,
for each implementation that runs, at the shapes of docs/benchmarks/h100_linear_attention.json.
"""

import statistics
import time

import jax
import jax.numpy as jnp

from seqmix import ops

# B, T, Hk, H, K, V
SHAPES = {
    "ssd B8 T4096": (8, 4096, 1, 64, 128, 64),
    "ssd B1 T32768": (1, 32768, 1, 64, 128, 64),
    "simple_gla B8 T4096": (8, 4096, 16, 16, 128, 128),
}
FORMS = (("gpu", 64), ("chunked", 64), ("chunked", 256))
ROUNDS = 24


def draw(seed, B, T, Hk, H, K, V):
    """Random bfloat16 q, k, v and float32 decays."""
    keys = jax.random.split(jax.random.key(seed), 4)
    q, k = (jax.random.normal(key, (B, T, Hk, K), jnp.bfloat16) * K**-0.5 for key in keys[:2])
    v = jax.random.normal(keys[2], (B, T, H, V), jnp.bfloat16)
    return q, k, v, -0.1 * jax.nn.softplus(jax.random.normal(keys[3], (B, T, H)))


def median_ms(fn, sets):
    """Milliseconds a call."""
    jax.block_until_ready([fn(*inputs) for inputs in sets])
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        jax.block_until_ready([fn(*inputs) for inputs in sets])
        seconds.append((time.perf_counter() - start) / len(sets))
    return 1e3 * statistics.median(seconds)


def main():
    """Prints a line for each shape and form."""
    print(jax.__version__, jax.devices()[0].device_kind)
    for name, shape in SHAPES.items():
        sets = [draw(seed, *shape) for seed in range(3)]
        for implementation, chunk in FORMS:

            def forward(*inputs, implementation=implementation, chunk=chunk):
                return ops.linear_attention(*inputs, implementation=implementation, chunk=chunk)[0]

            def both(*inputs, forward=forward):
                y, pull = jax.vjp(forward, *inputs)
                return y, pull(inputs[2])

            times = [median_ms(jax.jit(fn), sets) for fn in (forward, both)]
            print(f"{name}  {implementation} (chunk {chunk})  {times[0]:.3f} ms  {times[1]:.3f} ms", flush=True)


if __name__ == "__main__":
    main()
