"""How the suites time: medians of queued calls over rotating inputs, after a warm-up."""

import statistics
import time

import jax
import jax.numpy as jnp

from experiments.bench.turns import turn

FILLED = 1 << 28  # bytes that empty L2, as many as do_bench writes
LONG = 20  # milliseconds of a call, of which a fill is too little for the chip to rest


def median_ms(call, sets, seconds=0.4, rounds=5, most=100):
    """Milliseconds a call: the median over rounds of queued calls, with the argument sets in turn.

    Calls are queued so that a round takes about `seconds` / rounds, at most `most`, so that waiting for the last adds
    little; where one call takes longer than `seconds`, it is timed twice, and the faster counts.
    """
    return _median_ms(_queue(call, sets), seconds, rounds, most)


def best_ms(call, sets, seconds=0.4, rounds=5, most=100):
    """Milliseconds a call beside those of `torch_ms`: of queued calls or, if less, with L2 emptied before each.

    The latter is the time of a queue in which an array is filled before each call less that of one of fills alone. As
    in triton's do_bench the chip's arithmetic rests meanwhile and its clock may be higher afterwards.
    """
    queued = median_ms(call, sets, seconds, rounds, most)
    if jax.default_backend() != "gpu" or queued > LONG:
        return queued
    fill = jax.jit(lambda: jnp.zeros(FILLED // 4, jnp.int32))
    filled, fills = _queue(call, sets, fill), _queue(fill)
    jax.block_until_ready(fill())
    with turn():
        count = max(1, min(most, int(1e3 * seconds / rounds / queued)))
        rested = statistics.median(_seconds(filled, count) - _seconds(fills, count) for _ in range(rounds))
    return min(queued, 1e3 * rested)


def _queue(call, sets=((),), before=lambda: None):
    """A function of a count that queues so many calls, the argument sets in turn, each after before(), and waits."""

    def queue(count):
        last = None
        for index in range(count):
            last = before(), call(*sets[index % len(sets)])
        jax.block_until_ready(last)

    return queue


def torch_ms(call, seconds=0.4, rounds=5, most=100):
    """Milliseconds of a call of PyTorch's, inputs larger than L2: as `median_ms` times ours, or, if less, by do_bench.

    triton's do_bench empties L2 before each call, which lets the chip rest: on an H100 causal attention of 2,048 tokens
    by cuDNN took 0.51 ms so, and 0.58 in queued calls. Of short calls the queue is the host's time instead. Ours are
    timed both ways too, by `best_ms`.
    """
    import torch
    from triton.testing import do_bench

    def queue(count):
        for _ in range(count):
            call()
        torch.cuda.synchronize()

    queued = _median_ms(queue, seconds, rounds, most)
    with turn():
        return min(queued, do_bench(call, warmup=50, rep=200, return_mode="median"))


def _median_ms(queue, seconds, rounds, most):
    queue(1)
    with turn():
        first = min(_seconds(queue, 1) for _ in range(2))  # the device may still have had others' calls
        if first > seconds:
            return 1e3 * first
        count = max(1, min(most, int(seconds / rounds / first)))
        return 1e3 * statistics.median(_seconds(queue, count) for _ in range(rounds))


def _seconds(queue, count):
    start = time.perf_counter()
    queue(count)
    return (time.perf_counter() - start) / count


def copy_rate():
    """Bytes read and written a second by a copy of 1 GiB on the first device."""
    sets = [(jax.random.bits(jax.random.key(seed), (2**28,), jnp.uint32),) for seed in range(2)]
    return 2 * 2**30 / (1e-3 * median_ms(jax.jit(lambda x: x ^ 1), sets))


def both_ms(forward, sets):
    """{"fwd_ms", "fwd_bwd_ms"}: `best_ms` of a function, and with its gradients; sets of (cotangent, *inputs)."""
    fwd = best_ms(jax.jit(forward), [inputs[1:] for inputs in sets])
    return {"fwd_ms": fwd, "fwd_bwd_ms": best_ms(jax.jit(with_gradients(forward)), sets)}


def with_gradients(forward):
    """(cotangent, *inputs) -> (y, gradients of the inputs), of a function of the inputs."""

    def both(cotangent, *inputs):
        y, pull = jax.vjp(forward, *inputs)
        return y, pull(cotangent)

    return both
