"""Native sparse attention (arXiv 2502.11089) at the shape of its paper, beside fla's parallel_nsa: part `nsa`.

HQ64 HK4 D128, B1, bfloat16, blocks of 64, 16 of them a token with its own, compressed blocks their means, as fla has
them; beside two branches stands dense causal attention. The selected branch alone takes lists made beforehand: the
first block, the last two with the own, others at random, of the past. All by the mixer's own functions, from q, k and
v on, with gates of 1.
"""

import functools

import jax
import jax.numpy as jnp

from experiments.bench import attention_peers, errors, timing
from experiments.bench.attention_moba import DENSE, dense, pairs_left
from experiments.bench.suites import Case, drawn, taking
from seqmix.mixers.dynamic_sparse.native_sparse_attention import BRANCHES, NativeSparseAttention
from seqmix.parts import chosen_blocks
from seqmix.parts.chunks import token_places

LENGTHS = (8192, 32768, 65536)
HEADS, KEY_HEADS, WIDTH, SIZE, COUNT = 64, 4, 128, 64, 16
SELECTED, TWO, THREE = "nsa, selected", "nsa, compressed and selected", "nsa, three branches"
ERROR_T = 1024
NAMES = ("gpu", "chunked")
CHUNKED = 8192  # longest rows that the chunked form is timed on
STRETCH = 8192  # tokens whose lists are made at once


def cases(args):
    """The three patterns at each length."""
    return [
        Case("nsa", f"{name} T={length}", functools.partial(_case, name, length))
        for length in LENGTHS
        for name in (SELECTED, TWO, THREE)
    ]


def mixer(**fields):
    """The mixer of fla's call; by its `branches` alone."""
    fields = {"heads": HEADS, "kv_heads": KEY_HEADS, "head_dim": WIDTH, "size": SIZE, "count": COUNT} | fields
    return NativeSparseAttention(compress=SIZE, stride=SIZE, pool="mean", branch_kv=False, rope=False, **fields)


def lists(length, count=COUNT, stretch=STRETCH):
    """What each token and key head chooses beside its own block, [1, HK, T, count - 1] int32."""
    number = jnp.arange(length // SIZE)[None]

    def chosen(seed, runs, place):
        draw = lambda seed: jax.random.uniform(jax.random.wrap_key_data(seed), (KEY_HEADS, number.shape[1]))
        seen = chosen_blocks.past(runs, place, jnp.ones_like(number), number, SIZE)
        forced = (number < 1) | (number > place[..., None] // SIZE - 2)
        return chosen_blocks.choose(jnp.moveaxis(jax.vmap(draw)(seed[0]), 0, 1)[None], seen, count - 1, forced)

    seeds = jax.random.key_data(jax.random.split(jax.random.key(7), length))[None]
    runs, place, _ = token_places(jnp.zeros((1, length, 1)), None, None)
    # As arguments: XLA would make all lists of known arrays while it compiles.
    return jax.jit(lambda *x: chosen_blocks.by_stretches(chosen, stretch, *x))(seeds, runs, place)


def call(name, index=None, **fields):
    """The function of q, k, v of a pattern; index: lists of the selected branch, not sorted while compiling."""

    def run(q, k, v, implementation=None):
        runs, place, _ = token_places(q, None, None)
        module = mixer(implementation=implementation, **fields)
        if name != SELECTED:
            mixed, _ = module.branches({}, q, dict.fromkeys(BRANCHES, (k, v)), runs, place)
            return sum(mixed[: 2 if name == TWO else 3])
        tokens = chosen_blocks.after(None, 0, k, v, runs, place)
        blocks = chosen_blocks.whole(tokens, SIZE, SIZE)
        chosen, options = jax.lax.optimization_barrier(index), {"block": module.block, "implementation": implementation}
        return chosen_blocks.attend(q, tokens, blocks, chosen, SIZE, **options)

    return run


def _case(name, length, args):
    index = lists(length)
    run = call(name, index)
    shape = (1, length, HEADS, WIDTH), (1, length, KEY_HEADS, WIDTH), (1, length, KEY_HEADS, WIDTH)
    draw = lambda key, shape: jax.random.normal(jax.random.key(key), shape, jnp.bfloat16)
    inputs = [draw(n, one) for n, one in enumerate(shape)]
    sets = [(draw(9, shape[0]), *inputs)]  # of one set, as four of q at T = 65536 are 4 GiB
    pairs = pairs_left(length, SIZE, COUNT)  # of the selected branch
    wrong = measured_errors(ERROR_T) if (name, length) == (SELECTED, LENGTHS[0]) else {}
    base = {"pattern": name, "batch": 1, "tokens": length, "density": pairs / length**2}
    rate = lambda times: 4 * WIDTH * HEADS * pairs / times["fwd_ms"] / 1e9 if name == SELECTED else None
    found = taking(run, [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in shape], NAMES)
    for label in [DENSE] * (name == TWO) + [*found]:
        if label == "chunked" and length > CHUNKED:
            continue
        one = dense if label == DENSE else functools.partial(run, implementation=label)
        times = timing.both_ms(one, sets)
        yield base | {"implementation": label, **times, "tflops": rate(times), **wrong.get(label, {})}
    beside = args.peers and name != THREE
    for label, times in attention_peers.nsa_times(name, length, index).items() if beside else ():
        yield base | {"implementation": label, **times, "tflops": rate(times), "peer": True}


def measured_errors(length, heads=HEADS // KEY_HEADS):
    """{label: errors to float64} of the selected branch, with one key head and fewer blocks."""
    index = lists(length, 6)[:, :1]
    run = call(SELECTED, index, heads=heads, kv_heads=1)
    shape = (1, length, heads, WIDTH), (1, length, 1, WIDTH), (1, length, 1, WIDTH)
    arrays = drawn(40, (shape[0], *shape))
    return errors.measured(run, arrays, {name: name for name in taking(run, arrays[1:], NAMES)})
