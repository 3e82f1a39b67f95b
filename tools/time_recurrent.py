"""Times the recurrent ops on this machine's GPU, and their PyTorch peers in the same run.

    python tools/time_recurrent.py --out=rows.json --ops=scan,gla,simple_gla,ssd --peers

Each op is timed whole, forward and forward + backward, through each implementation that is named: medians over rounds
of queued calls that rotate over three random input sets. Peers (fla, mamba_ssm), where they can be imported, are timed
with triton's do_bench. The floor is every input read once and every output written once at the copy rate of this run.
Rows have op, shape, implementation, fwd_ms, fwd_bwd_ms, floor_ms, fwd_bwd_floor_ms, versions, card and command.
"""

import argparse
import functools
import gc
import json
import os
import statistics
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.55")
import jax
import jax.numpy as jnp

from seqmix import ops

SHAPES = ((16, 2048), (8, 4096), (1, 32768))  # batch, tokens
SETS, ROUNDS, QUEUED = 3, 7, 20
normal = jax.random.normal


def scan(key, b, t):
    x, gate = (normal(k, (b, t, 4096), jnp.bfloat16) for k in jax.random.split(key))
    return x, jax.nn.log_sigmoid(gate)


def heads(key, b, t):
    return tuple(normal(k, (b, t, 16, 128), jnp.bfloat16) for k in jax.random.split(key, 3))


def simple_gla(key, b, t):
    return *heads(key, b, t), jax.nn.log_sigmoid(normal(jax.random.fold_in(key, 1), (b, t, 16)))


def gla(key, b, t):
    return *heads(key, b, t), jax.nn.log_sigmoid(normal(jax.random.fold_in(key, 1), (b, t, 16, 128))) / 16


def ssd(key, b, t):
    """x, dt, A, B, C."""
    keys = jax.random.split(key, 5)
    x = normal(keys[0], (b, t, 64, 64), jnp.bfloat16)
    dt = jax.nn.softplus(normal(keys[1], (b, t, 64)) - 4).astype(jnp.bfloat16)
    b_c = (normal(k, (b, t, 1, 128), jnp.bfloat16) for k in keys[3:])
    return x, dt, -jnp.exp(jax.random.uniform(keys[2], (64,))), *b_c


def run_ssd(x, dt, a, b, c, **options):
    dt = dt.astype(jnp.float32)
    return ops.linear_attention(c, b, x, dt * a, write=dt, **options)[0]


def run_attention(q, k, v, g, **options):
    return ops.linear_attention(q, k, v, g, scale=q.shape[-1] ** -0.5, **options)[0]


def run_scan(x, log_a, **options):
    return ops.linear_scan(x, log_a, **options)[0]


# Inputs, the op, and options of each implementation.
CHUNKED = (("chunked, chunk 64", {"implementation": "chunked", "chunk": 64}),)
WIDER = (("chunked, chunk 256", {"implementation": "chunked", "chunk": 256}),)
GPU = (("gpu", {"implementation": "gpu"}),)
OPS = {
    "scan": (scan, run_scan, (*GPU, ("chunked, chunk 32", {"implementation": "chunked"}))),
    "gla": (gla, run_attention, (*GPU, *CHUNKED)),
    "simple_gla": (simple_gla, run_attention, (*GPU, *WIDER)),
    "ssd": (ssd, run_ssd, (*GPU, *WIDER)),
}


def median_ms(fn, sets, queued=QUEUED):
    """Milliseconds a call."""
    jax.block_until_ready([fn(*inputs) for inputs in sets])
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for i in range(queued):
            last = fn(*sets[i % SETS])
        jax.block_until_ready(last)
        seconds.append((time.perf_counter() - start) / queued)
    return 1e3 * statistics.median(seconds)


def ours(name, b, t, only):
    """{implementation: times} of an op."""
    draw, run, implementations = OPS[name]
    sets = [jax.jit(draw, static_argnums=(1, 2))(jax.random.key(seed), b, t) for seed in range(SETS)]
    y = jax.eval_shape(run, *sets[0])
    cotangents = [normal(jax.random.key(9), y.shape, y.dtype)]
    for label, options in implementations:
        if only and label.split(",")[0] not in only:
            continue

        def forward(*inputs, options=options):
            return run(*inputs, **options)

        def both(cotangent, *inputs, forward=forward):
            y, pull = jax.vjp(forward, *inputs)
            return y, pull(cotangent)

        queued = QUEUED if label == "gpu" else 3
        try:
            fwd = median_ms(jax.jit(forward), sets, queued)
            fwd_bwd = median_ms(jax.jit(both), [(cotangents[0], *inputs) for inputs in sets], queued)
        except Exception as error:  # what cannot run is a finding, not the end of the table
            yield label, {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        yield label, {"fwd_ms": fwd, "fwd_bwd_ms": fwd_bwd}


def peers(name, b, t):
    """{peer: times} of an op."""
    import torch
    import torch.nn.functional as F
    from triton.testing import do_bench

    randn = lambda *shape, dtype=torch.bfloat16: torch.randn(*shape, device="cuda", dtype=dtype)
    float32 = torch.float32
    if name == "scan":
        from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn

        inputs = [randn(b, t, 4096), F.logsigmoid(randn(b, t, 4096, dtype=float32)).bfloat16()]
        calls = {"fla chunk_hgrn": chunk_hgrn, "fla fused_recurrent_hgrn": fused_recurrent_hgrn}
    elif name == "ssd":
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        dt = F.softplus(randn(b, t, 64, dtype=float32) - 4).bfloat16()
        a = -torch.exp(torch.rand(64, device="cuda"))
        inputs = [randn(b, t, 64, 64), dt, a, randn(b, t, 1, 128), randn(b, t, 1, 128)]
        calls = {"mamba_ssm, chunk 256": lambda *z: (mamba_chunk_scan_combined(*z, 256),)}
    else:
        import fla.ops.common.chunk_o
        from fla.ops.gla import chunk_gla
        from fla.ops.simple_gla import chunk_simple_gla

        # fla refuses this backward pass on Hopper with this Triton, which compiles it wrong; its time is asked for.
        fla.ops.common.chunk_o.TRITON_ABOVE_3_7_1 = True
        g = randn(b, t, 16, *((128,) if name == "gla" else ()), dtype=float32)
        g = F.logsigmoid(g) / (16 if name == "gla" else 1)
        inputs = [*(randn(b, t, 16, 128) for _ in range(3)), g]
        calls = {"fla chunk_gla": chunk_gla} if name == "gla" else {"fla chunk_simple_gla": chunk_simple_gla}
    inputs = [x.requires_grad_() for x in inputs]
    for label, call in calls.items():
        run = functools.partial(lambda call: call(*inputs)[0], call)
        cotangent = torch.randn_like(run())
        both = functools.partial(lambda run, cotangent: torch.autograd.grad(run(), inputs, cotangent), run, cotangent)
        with torch.no_grad():
            fwd = do_bench(run, warmup=50, rep=200, return_mode="median")
        yield label, {"fwd_ms": fwd, "fwd_bwd_ms": do_bench(both, warmup=50, rep=200, return_mode="median")}
    torch.cuda.empty_cache()


def bytes_of(name, b, t):
    """Least bytes of forward, and of forward and backward."""
    draw, run, _ = OPS[name]
    inputs = jax.eval_shape(lambda: draw(jax.random.key(0), b, t))
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    y = jax.eval_shape(run, *inputs)
    forward = size(inputs) + size(y)
    return forward, forward + 2 * size(inputs) + size(y)


def copy_rate():
    """Bytes read and written a second by a copy of 1 GiB."""
    x = jax.random.bits(jax.random.key(0), (2**28,), jnp.uint32)
    return 2 * 2**30 / (1e-3 * median_ms(jax.jit(lambda x: x ^ 1), [(x,)] * SETS))


def main():
    """Prints a line for each op, shape and implementation, and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out")
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--only", default="", help="implementations of ours, such as gpu; default all")
    parser.add_argument("--peers", action="store_true")
    args = parser.parse_args()
    card, rate, rows = jax.devices()[0].device_kind, copy_rate(), []
    print(f"jax {jax.__version__}, {card}, copy {rate / 1e9:.0f} GB/s", flush=True)
    for name in args.ops.split(","):
        for b, t in SHAPES:
            floors = [1e3 * count / rate for count in bytes_of(name, b, t)]
            found = list(ours(name, b, t, [x for x in args.only.split(",") if x]))
            gc.collect()
            found += list(peers(name, b, t)) if args.peers else []
            for label, times in found:
                row = {"op": name, "shape": {"B": b, "T": t}, "implementation": label, **times}
                row |= dict(zip(("floor_ms", "fwd_bwd_floor_ms"), floors)) | {"card": card}
                rows.append(row | {"versions": versions(args.peers), "command": " ".join(["python", *sys.argv])})
                shown = times.get("failed") or "  ".join(f"{k} {v:.3f}" for k, v in times.items())
                print(f"{name} B{b} T{t}  {label:24s} {shown}  (floors {floors[0]:.3f}, {floors[1]:.3f})", flush=True)
                if args.out:
                    with open(args.out, "w") as file:
                        json.dump(rows, file, indent=1)


def versions(with_peers):
    found = {"jax": jax.__version__}
    if with_peers:
        import torch
        import triton

        found |= {"torch": torch.__version__, "triton": triton.__version__}
        if "fla" in sys.modules:
            found["fla"] = sys.modules["fla"].__version__
    return found


if __name__ == "__main__":
    main()
