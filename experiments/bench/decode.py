"""One token at a time: the ops that decode, each in a loop over TOKENS tokens in one program, as generation runs them.

The floor of a token is the state read and written once (keys and values of attention read), and the token's inputs and
output, at the copy rate of this run. At small batches the cost of a launch is what is measured, and a
state that stays in the card's cache can be below the floor.
Ops with a matrix for a state are timed as XLA makes their step ("chunked") and, where it runs, by the kernel of
`pallas_kernels.state_step` ("gpu"), which they take by themselves from 256 heads and rows together on, linear attention
and SSD from 1,024; the others have XLA's alone. A kernel pays where the large batches take more than 1.3 times the
floor.
"""

import functools

import jax
import jax.numpy as jnp

from experiments.bench import timing
from experiments.bench.suites import Case, taking
from seqmix import ops

NAME = "decode"
COLUMNS = (
    ("op", "op", ""),
    ("implementation", "implementation", ""),
    ("batch", "B", ","),
    ("token_us", "a token, us", ".1f"),
    ("floor_us", "floor, us", ".1f"),
    ("ratio", "over the floor", ".2f"),
)
BATCHES = (1, 16, 64, 256)
ONE_FORM = ("scan", "selective_scan", "attention")
TOKENS, SETS = 32, 2
HEADS, WIDTH = 16, 128
SSD_HEADS, SSD_WIDTH, SSD_STATE = 64, 64, 128
CHANNELS, STATES = 4096, 16
CONTEXT = 4096  # keys in the cache of attention
normal = jax.random.normal


def _keys(key, count):
    return jax.random.split(key, count)


def _linear(gate):
    """draw(key, B) -> (state, cache, tokens) of linear attention, with log decays of this shape a token or none."""

    def draw(key, b):
        keys = _keys(key, 5)
        q, k, v = (normal(one, (TOKENS, b, 1, HEADS, WIDTH), jnp.bfloat16) for one in keys[:3])
        k = k / WIDTH**0.5
        gates = () if gate is None else (jax.nn.log_sigmoid(normal(keys[3], (TOKENS, b, 1, *gate))),)
        return normal(keys[4], (b, HEADS, WIDTH, WIDTH)), (), (q, k, v, *gates)

    return draw


def _delta(gate, per_channel=False):
    linear = _linear((HEADS, WIDTH) if per_channel else gate)

    def draw(key, b):
        state, cache, (q, k, v, *gates) = linear(key, b)
        beta = jax.nn.sigmoid(normal(jax.random.fold_in(key, 1), (TOKENS, b, 1, HEADS)))
        return state, cache, (q, k, v, beta, *gates)

    return draw


def _rank_one(key, b):
    state, cache, (q, k, v, gates) = _linear((HEADS, WIDTH))(key, b)
    return state, cache, (q, k, v, -k, k, gates)


def _ssd(key, b):
    keys = _keys(key, 5)
    x = normal(keys[0], (TOKENS, b, 1, SSD_HEADS, SSD_WIDTH), jnp.bfloat16)
    dt = jax.nn.softplus(normal(keys[1], (TOKENS, b, 1, SSD_HEADS)) - 4)
    b_c = (normal(one, (TOKENS, b, 1, 1, SSD_STATE), jnp.bfloat16) for one in keys[2:4])
    return normal(keys[4], (b, SSD_HEADS, SSD_STATE, SSD_WIDTH)), (), (*b_c, x, -dt, dt)


def _scan(key, b):
    keys = _keys(key, 3)
    x, gate = (normal(one, (TOKENS, b, 1, CHANNELS), jnp.bfloat16) for one in keys[:2])
    return normal(keys[2], (b, CHANNELS)), (), (x, jax.nn.log_sigmoid(gate))


def _selective(key, b):
    keys = _keys(key, 6)
    u = normal(keys[0], (TOKENS, b, 1, CHANNELS), jnp.bfloat16)
    dt = jax.nn.softplus(normal(keys[1], (TOKENS, b, 1, CHANNELS)) - 4)
    b_c = (normal(one, (TOKENS, b, 1, STATES), jnp.bfloat16) for one in keys[2:4])
    a = -jnp.exp(normal(keys[4], (CHANNELS, STATES)))
    return normal(keys[5], (b, CHANNELS, STATES)), (a,), (u, dt, *b_c)


def _attention(key, b):
    keys = _keys(key, 3)
    k, v = (normal(one, (b, CONTEXT, HEADS, WIDTH), jnp.bfloat16) for one in keys[:2])
    return None, (k, v), (normal(keys[2], (TOKENS, b, 1, HEADS, WIDTH), jnp.bfloat16),)


def _step(op, state, cache, token, implementation):
    """(y, state) of a token. implementation: of ops with a matrix for a state."""
    if op == "attention":
        return ops.attention(*token, *cache, causal=False), None
    if op == "ssd":
        *token, write = token
        return ops.linear_attention(*token, write=write, state=state, implementation=implementation)
    if op == "scan":
        return ops.linear_scan(*token, state=state)
    if op == "selective_scan":
        u, dt, b, c = token
        return ops.selective_scan(u, dt, *cache, b, c, state=state)
    if op == "diagonal_plus_rank_one":
        return ops.diagonal_plus_rank_one(*token, state=state, implementation=implementation)
    run = ops.delta_rule if op.startswith("delta_rule") else ops.linear_attention
    return run(*token, state=state, implementation=implementation)


OPS = {
    "linear_attention": _linear(None),
    "linear_attention, decay a token": _linear((HEADS,)),
    "linear_attention, decay a channel": _linear((HEADS, WIDTH)),
    "ssd": _ssd,
    "scan": _scan,
    "selective_scan": _selective,
    "delta_rule": _delta(None),
    "delta_rule, decay a token": _delta((HEADS,)),
    "delta_rule, decay a channel": _delta(None, per_channel=True),
    "diagonal_plus_rank_one": _rank_one,
    "attention": _attention,
}


def cases(args):
    """Each op at each batch."""
    return [Case(op.split(",")[0], f"{op} B{b}", functools.partial(_case, op, b)) for op in OPS for b in BATCHES]


def generate(op, state, cache, tokens, implementation=None):
    """(outputs of all tokens, last state) of a loop over tokens [TOKENS, B, 1, ...]."""

    def step(state, token):
        y, state = _step(op, state, cache, token, implementation)
        return state, y

    state, y = jax.lax.scan(step, state, tokens)
    return y, state


def bytes_of(op, b):
    """Least bytes of a token: state read and written, cache read, inputs read, the output written."""
    inputs = jax.eval_shape(lambda: OPS[op](jax.random.key(0), b))
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    state, cache, tokens = inputs
    y, _ = jax.eval_shape(functools.partial(generate, op), *inputs)
    return 2 * size(state) + size(cache) + (size(tokens) + size(y)) / TOKENS


@functools.cache
def _rate():
    return timing.copy_rate()


def _case(op, b, args):
    sets = [jax.jit(OPS[op], static_argnums=1)(jax.random.key(seed), b) for seed in range(SETS)]
    run = functools.partial(generate, op)
    floor = 1e6 * bytes_of(op, b) / _rate()
    for name in [None] if op in ONE_FORM else taking(run, sets[0], ("chunked", "gpu")):
        token = 1e3 * timing.median_ms(jax.jit(functools.partial(run, implementation=name)), sets) / TOKENS
        row = {"op": op, "implementation": name or "XLA's", "batch": b}
        yield row | {"token_us": token, "floor_us": floor, "ratio": token / floor}
