"""Recurrent ops on one device: ours by kernel and by chunks, and their PyTorch peers in the same run.

Each op is timed whole, its gates and time steps included, forward and forward + backward. The floor is every input
read once and every output written once, at the copy rate of this run; with gradients, inputs and the output's
gradient are read and the inputs' gradients written besides. Errors are root mean squares of the difference to float64
over those of float64, of the same rounded inputs, at ERROR_SHAPE: of the output, and the worst of the gradients.
"""

import functools
import gc

import jax
import jax.numpy as jnp

from experiments.bench import errors, peers, timing
from experiments.bench.suites import Case, beside_peers, taking
from seqmix import ops

NAME = "recurrent"
COLUMNS = (
    ("op", "op", ""),
    ("batch", "B", ","),
    ("tokens", "T", ","),
    ("implementation", "implementation", ""),
    ("fwd_ms", "forward, ms", ".3f"),
    ("fwd_bwd_ms", "with gradients, ms", ".3f"),
    ("peer_ratio", "peer's time over ours, forward", ".2f"),
    ("peer_ratio_both", "with gradients", ".2f"),
    ("floor_ms", "floor, forward, ms", ".3f"),
    ("floor_share", "share of the floor, forward", ".0%"),
    ("error", "error, output", ".1e"),
    ("gradient_error", "worst of the gradients", ".1e"),
    ("worst_gradient", "of", ""),
)
SHAPES = ((16, 2048), (8, 4096), (1, 32768))  # batch, tokens
HEADS, WIDTH, CHANNELS = 16, 128, 4096
SSD_HEADS, SSD_WIDTH, SSD_STATE = 64, 64, 128
ERROR_SHAPE = (1, 384)
SETS = 3
normal = jax.random.normal


def _tokens(key, b, t):
    return tuple(normal(k, (b, t, HEADS, WIDTH), jnp.bfloat16) for k in jax.random.split(key, 3))


def _gate(key, *shape):
    return jax.nn.log_sigmoid(normal(jax.random.fold_in(key, 1), shape))


def _scan(key, b, t):
    x, gate = (normal(k, (b, t, CHANNELS), jnp.bfloat16) for k in jax.random.split(key))
    return x, jax.nn.log_sigmoid(gate)


def _simple_gla(key, b, t):
    return *_tokens(key, b, t), _gate(key, b, t, HEADS)


def _gla(key, b, t):
    return *_tokens(key, b, t), _gate(key, b, t, HEADS, WIDTH) / 16


def _retnet(key, b, t):
    return _tokens(key, b, t)


def _ssd(key, b, t):
    keys = jax.random.split(key, 5)
    x = normal(keys[0], (b, t, SSD_HEADS, SSD_WIDTH), jnp.bfloat16)
    dt = jax.nn.softplus(normal(keys[1], (b, t, SSD_HEADS)) - 4).astype(jnp.bfloat16)
    b_c = (normal(k, (b, t, 1, SSD_STATE), jnp.bfloat16) for k in keys[3:])
    return x, dt, -jnp.exp(jax.random.uniform(keys[2], (SSD_HEADS,))), *b_c


def _run_ssd(x, dt, a, b, c, **options):
    dt = dt.astype(jnp.promote_types(dt.dtype, jnp.float32))
    return ops.linear_attention(c, b, x, dt * a, write=dt, return_state=False, **options)[0]


def _run_attention(q, k, v, g=None, **options):
    return ops.linear_attention(q, k, v, g, scale=q.shape[-1] ** -0.5, return_state=False, **options)[0]


def _run_retnet(q, k, v, **options):
    decay = jnp.log1p(-(2.0 ** (-5 - jnp.arange(HEADS, dtype=jnp.promote_types(q.dtype, jnp.float32)))))
    return _run_attention(q, k, v, decay, **options)


def _run_scan(x, log_a, **options):
    return ops.linear_scan(x, log_a, **options)[0]


# Inputs, the op, names of the inputs, and the chunk of the chunked form.
OPS = {
    "ssd": (_ssd, _run_ssd, ("x", "dt", "A", "B", "C"), 256),
    "simple_gla": (_simple_gla, _run_attention, ("q", "k", "v", "g"), 256),
    "retnet": (_retnet, _run_retnet, ("q", "k", "v"), 256),
    "gla": (_gla, _run_attention, ("q", "k", "v", "g"), 64),
    "scan": (_scan, _run_scan, ("x", "log_a"), None),
}


def implementations(name):
    """{label: options} of an op."""
    chunk = OPS[name][3]
    chunked = {} if chunk is None else {"chunk": chunk}
    kernels = {label: {"implementation": label} for label in ("gpu", "triton", "tpu")}
    return kernels | {"chunked": {"implementation": "chunked", **chunked}}


def cases(args):
    """Each op at each shape."""
    wrong = {}
    return [
        Case(name, f"{name} B{b} T{t}", functools.partial(_case, name, b, t, wrong)) for name in OPS for b, t in SHAPES
    ]


def _case(name, b, t, wrong, args):
    if name not in wrong:
        wrong[name] = measured_errors(name, args.peers)
    forward, both = (1e3 * count / _rate() for count in bytes_of(name, b, t))

    def row(label, times):
        floors = {"floor_ms": forward, "fwd_bwd_floor_ms": both, "floor_share": forward / times["fwd_ms"]}
        case = {"op": name, "batch": b, "tokens": t, "implementation": label}
        return case | times | wrong[name].get(label, {}) | floors

    for label, times in ours(name, b, t):
        yield row(label, times)
    gc.collect()  # torch has its own memory
    for label, times in peers.times(name, OPS[name][0], b, t).items() if args.peers else ():
        yield row(label, times) | {"peer": True}


def relate(rows):
    """Puts the ratios to the best peer of the same case into our rows."""
    beside_peers(rows, "op", "batch", "tokens")


TIMES = ("fwd_ms", "fwd_bwd_ms")


@functools.cache
def _rate():
    return timing.copy_rate()


def _taking(name):
    """{label: options} of an op's implementations that run at ERROR_SHAPE here."""
    draw, run, *_ = OPS[name]
    given = implementations(name)
    by_label = lambda *inputs, implementation: run(*inputs, **given[implementation])
    labels = taking(by_label, draw(jax.random.key(0), *ERROR_SHAPE), given)
    return {label: given[label] for label in labels}


def ours(name, b, t):
    """(label, times) of each implementation that runs here."""
    draw, run, *_ = OPS[name]
    sets = [jax.jit(draw, static_argnums=(1, 2))(jax.random.key(seed), b, t) for seed in range(SETS)]
    for label, options in _taking(name).items():
        call = functools.partial(run, **options)
        y = jax.eval_shape(call, *sets[0])
        cotangent = normal(jax.random.key(9), y.shape, y.dtype)
        fwd = timing.best_ms(jax.jit(call), sets)
        both = timing.best_ms(jax.jit(timing.with_gradients(call)), [(cotangent, *inputs) for inputs in sets])
        yield label, dict(zip(TIMES, (fwd, both), strict=True))


def measured_errors(name, with_peers):
    """{label: {"error", "gradient_error", "worst_gradient", "errors"}} at ERROR_SHAPE."""
    draw, run, names, _ = OPS[name]
    inputs = draw(jax.random.key(5), *ERROR_SHAPE)
    y = jax.eval_shape(run, *inputs)
    cotangent = normal(jax.random.key(6), y.shape, y.dtype)
    exact, found = errors.exact(run, cotangent, inputs), {}
    for label, options in _taking(name).items():
        both = timing.with_gradients(functools.partial(run, **options))
        found[label] = errors.compared(jax.jit(both)(cotangent, *inputs), exact, names)
    for label, result in peers.results(name, inputs, cotangent).items() if with_peers else ():
        found[label] = errors.compared(result, exact, names)
    return found


def bytes_of(name, b, t):
    """Least bytes of forward, and of forward and backward."""
    draw, run, *_ = OPS[name]
    inputs = jax.eval_shape(lambda: draw(jax.random.key(0), b, t))
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    y = size(jax.eval_shape(run, *inputs))
    return size(inputs) + y, 3 * size(inputs) + 2 * y


def draw(rows, figure):
    """The ratio of the peer's time to ours by op and shape."""
    figure.set_size_inches(8, 3.2)
    shown = [row for row in rows if row.get("peer_ratio") and row["implementation"] in ("gpu", "triton")]
    axes = figure.subplots(1, 2, sharey=True)
    for panel, key, title in zip(axes, ("peer_ratio", "peer_ratio_both"), ("forward", "with gradients"), strict=True):
        labels = [f"{row['op']} B{row['batch']} ({row['implementation']})" for row in shown]
        panel.barh(range(len(shown)), [row[key] for row in shown], color="#08519c")
        panel.axvline(1, color="black", linewidth=0.6)
        panel.set_yticks(range(len(shown)), labels, fontsize=6)
        panel.set(xlabel="peer's time over ours", title=title)
