"""MoBA (arXiv 2502.13189): each token of each head chooses, beside its own block, those of the best mean key: `moba`.

H16 D128, bfloat16, blocks of 512, 3 of them a token with its own, B rows of T, 32,768 tokens together. Ours from q, k
and v on, the choice included (`topk_block_attention`). Of the peers, torch's cuDNN is dense causal attention, and
flex_attention takes a choice and a block mask made beforehand; fla's parallel_moba needs flash-attn and takes B = 1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import attention_peers, errors, timing
from experiments.bench.suites import Case, drawn, taking
from seqmix import ops
from seqmix.ops.topk_blocks import choose_blocks, pooled_scores

LENGTHS = (2048, 4096, 8192, 16384, 32768)
HEADS, WIDTH, TOKENS, SIZE, COUNT = 16, 128, 32768, 512, 3
FLEX = (8192, 32768)  # lengths of flex_attention, whose mask takes minutes to make
NAMES = ("gpu", "chunked")
CHUNKED = 8192  # longest rows that the chunked form is timed on
DENSE = "dense, default"
ERROR_T, ERROR_SIZE = 1024, 128
SETS = 2


def cases(args):
    """One length each; where sparse begins to win over dense is between them."""
    return [Case("moba", f"moba T={length}", functools.partial(_case, length)) for length in LENGTHS]


def call(q, k, v, implementation=None, *, size=SIZE, scores=None):
    """MoBA of q, k and v [B, T, H, K]; scores that are known are not sorted while compiling."""
    scores = None if scores is None else jax.lax.optimization_barrier(jnp.asarray(scores))
    options = {"count": COUNT, "sizes": (1, size), "scores": scores}
    return ops.topk_block_attention(q, k, v, **options, implementation=implementation)


def dense(q, k, v):
    return ops.attention(q, k, v)


def pairs_left(length, size=SIZE, count=COUNT):
    """Pairs of a head whose tokens see their own block up to themselves, and the count - 1 chosen before it."""
    return sum(t % size + 1 + min(count - 1, t // size) * size for t in range(length))


def _case(length, args):
    shape = TOKENS // length, length, HEADS, WIDTH
    sets, runs = [drawn(4 * seed, [shape] * 4) for seed in range(SETS)], {DENSE: dense}
    for name in taking(call, sets[0][1:], NAMES):
        if name != "chunked" or length <= CHUNKED:
            runs[name] = functools.partial(call, implementation=name)
    wrong = measured_errors() if length == LENGTHS[0] else {}
    pairs = pairs_left(length)
    base = {"pattern": "moba", "batch": shape[0], "tokens": length, "density": pairs / length**2}
    for label, run in runs.items():
        times = timing.both_ms(run, sets)
        row = base | {"implementation": label, **times, **wrong.get(label, {})}
        if label in NAMES:
            row["tflops"] = 4 * WIDTH * HEADS * shape[0] * pairs / times["fwd_ms"] / 1e9
        yield row
    del sets
    for label, times in peers(shape[0], length).items() if args.peers else ():
        yield base | {"implementation": label, **times, "peer": True}


def measured_errors(length=ERROR_T, size=ERROR_SIZE, heads=2):
    """{label: errors to float64} at a short length, of one choice: in float64 a near tie may go the other way."""
    arrays = drawn(40, [(1, length, heads, WIDTH)] * 4)
    run = functools.partial(call, size=size, scores=np.asarray(pooled_scores(*arrays[1:3], (1, size))))
    return errors.measured(run, arrays, {name: name for name in taking(run, arrays[1:], NAMES)})


def chosen(batch, length):
    """A choice of the peers' form, [B, H, T, n] of truth values, from the means of random keys."""
    q, k = (jax.random.normal(jax.random.key(n), (batch, length, HEADS, WIDTH), jnp.bfloat16) for n in range(2))

    def table(q, k):
        index = choose_blocks(pooled_scores(q, k, (1, SIZE)), length, length, count=COUNT, sizes=(1, SIZE))
        return jnp.any(index[..., None] == jnp.arange(length // SIZE), axis=-2)

    return np.asarray(jax.jit(table)(q, k))


def peers(batch, length):
    """{peer: times}."""
    found = {"torch cudnn, dense": attention_peers.times("causal", batch, length)["torch cudnn"]}
    if length in FLEX:
        table = chosen(batch, length)
        found["torch flex_attention, same mask"] = attention_peers.chosen_times(table)
    if batch == 1:
        found |= attention_peers.moba_times(length)
    return found
