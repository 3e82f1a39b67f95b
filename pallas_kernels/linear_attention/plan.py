"""What the kernels of linear attention share: the shape of a call, how it is cut, and its decays prepared by XLA."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp

from pallas_kernels import tuned

TABLE = pathlib.Path(__file__).with_name("tuned.json")
CHUNK = 64  # tokens that are mixed by one matrix product
COLUMNS = 64  # value columns of a warpgroup
SHARED_BYTES = 227 * 2**10  # of shared memory that one thread block can have
SEGMENT_LANES = 128  # per chunk: 64 run ids, the carry's run before and after it, padding
SMS = 132  # multiprocessors of an H100 or H200; only the choice of splits depends on it
LOG2_E = math.log2(math.e)
LEAST_LOG2 = -150.0  # 2^-150 is 0 in float32: a stronger decay changes nothing, and sums of it lose no digits


def wrong_qkv(q, k, v) -> str | None:
    """What of q, k and v no kernel can take, in a few words; None if nothing."""
    if any(x.dtype != jnp.bfloat16 for x in (q, k, v)):
        return f"needs bfloat16 q, k and v, got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape != k.shape or q.ndim != 4 or v.ndim != 4 or q.shape[:2] != v.shape[:2]:
        return f"needs q, k [B, T, Hk, K] and v [B, T, H, V], got {q.shape}, {k.shape}, {v.shape}"
    return None


def wrong_rest(q, v, log_decay, run_ids, scale, state, log_write) -> str | None:
    """What beside q, k and v no kernel can take, in a few words; None if nothing."""
    batch, time, _, key = q.shape
    heads, value = v.shape[2:]
    if log_decay is not None and log_decay.shape not in ((heads,), (batch, time, heads)):
        return f"needs one decay per token and head or per head, got {log_decay.shape}"
    if state is not None and (state.shape != (batch, heads, key, value) or state.dtype != jnp.float32):
        return f"needs a float32 state [B, H, K, V], got {state.dtype} {state.shape}"
    if run_ids is not None and run_ids.shape != (batch, time):
        return f"needs run ids [B, T], got {run_ids.shape}"
    if log_write is not None and log_write.shape != (batch, time, heads):
        return f"needs one weight per token and head, got {log_write.shape}"
    if isinstance(scale, jax.core.Tracer) or not scale > 0:
        return "needs a scale that is a Python number above 0"
    return None


def wrong_channel_decay(q, v, log_decay) -> str | None:
    """What of the decays no kernel for those per channel can take, in a few words; None if nothing."""
    expected, got = (*v.shape[:3], q.shape[3]), None if log_decay is None else log_decay.shape
    if got != expected:
        return f"needs one decay per token, head and channel, {expected}, got {got}"
    return None


@dataclasses.dataclass(frozen=True)
class Config:
    """What is chosen of a Hopper kernel's call, by a table, by a rule or by `tuned.forcing`."""

    units: int  # of 64 value columns in a thread block, 1 or 2
    stages: int  # chunks of inputs that lie in shared memory at once
    splits: int | None = None  # stretches of time that run side by side; None: what `make_plan` reckons to be fastest


def config(kernel: str, q, v, splits: int | None = None) -> Config:
    """The choices for a call of kernel "forward" or "backward"; splits, where given, goes before all others."""
    batch, time, key_heads, key = q.shape
    heads, value = v.shape[2:]
    most = _units(q, v)
    found = {"units": most[-1], "stages": 3 if kernel == "forward" else 2}
    sizes = dict(Hk=key_heads, H=heads, K=key, V=value)
    found |= tuned.choices(TABLE, f"linear_attention.{kernel}", batch, time, **sizes)
    found = Config(**found | ({} if splits is None else {"splits": splits}))
    if found.units not in most:
        raise ValueError(f"units: expected one of {most} for H={heads}, Hk={key_heads}, V={value}, got {found.units}")
    return found


def candidates(kernel: str, q, v) -> list[Config]:
    """Configs worth timing for a call of kernel "forward" or "backward": those whose tiles fit in shared memory."""
    chunks = max(1, -(-q.shape[1] // CHUNK))
    found = []
    for units in _units(q, v):
        for stages in (2, 3, 4):
            if shared_bytes(kernel, q, v, units, stages) > SHARED_BYTES:
                continue
            for splits in (1, 2, 4, 8, 16):
                if splits == 1 or splits <= chunks // 8:
                    found.append(Config(units, stages, splits))
    return found


def shared_bytes(kernel: str, q, v, units: int, stages: int) -> int:
    """Shared memory of a thread block of the largest of a call's kernels, its short vectors left out."""
    key, width = q.shape[3], units * COLUMNS
    if kernel == "forward":
        return 2 * (stages * CHUNK * (2 * key + width) + key * width + 2 * CHUNK * width)
    inputs = stages * CHUNK * 2 * (key + width)
    forward = key * width + CHUNK * (width + units * key + CHUNK)
    backward = 2 * COLUMNS * (key + 2 * CHUNK) + CHUNK * (key + width * (units == 1))
    return 2 * (inputs + max(forward, backward))


def _units(q, v) -> tuple[int, ...]:
    """Units of 64 value columns that a thread block can have: two where they share their keys, else one."""
    shared = v.shape[3] > COLUMNS or (v.shape[2] // q.shape[2]) % 2 == 0
    return (1, 2) if shared else (1,)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shape of a call and its cut: `splits` stretches of `steps` chunks, run side by side."""

    batch: int
    time: int
    key_heads: int
    heads: int
    key: int
    value: int
    splits: int
    steps: int
    chunk: int = CHUNK

    @property
    def padded(self) -> int:
        """Tokens of all chunks."""
        return self.chunks * self.chunk

    @property
    def chunks(self) -> int:
        return self.splits * self.steps

    @property
    def group(self) -> int:
        """Heads that share a key head."""
        return self.heads // self.key_heads


def make_plan(q, v, lanes: int, splits: int | None = None, multiple: int = 1) -> Plan:
    """The cut of a call; `lanes` thread blocks work on one stretch of time (all rows and heads together).

    splits None picks the number that should take the least time on SMS multiprocessors, one block each: more
    stretches fill the chip, but every split call computes its states twice. A stretch is a multiple of `multiple`
    chunks.
    """
    batch, time, key_heads, key = q.shape
    chunks = max(1, -(-time // CHUNK))
    if splits is None:

        def cost(count):
            steps = -(-chunks // count)
            return -(-lanes * count // SMS) * (steps * (1.0 if count == 1 else 1.4) + 4) + count

        most = max(1, min(64, chunks // 8))
        splits = min(range(1, most + 1), key=cost)
    steps = -(-chunks // splits)
    steps = -(-steps // multiple) * multiple
    splits = -(-chunks // steps)
    return Plan(batch, time, key_heads, v.shape[2], key, v.shape[3], splits, steps)


def chunk_decays(log_decay, log_write, run_ids, plan: Plan):
    """What the kernels read of decays and writes, float32 [B or 1, H, 1 or 2, padded], in log2.

    First the decays summed from each chunk's start through the token; then, where tokens write with a weight, that
    sum less the weight's logarithm: the difference of a reader's first and a writer's second is the log of what is
    read. log_decay: None, [H], or [B, T, H]; log_write: None or [B, T, H]. Past the end and at padding nothing decays.
    """
    decays = _chunk_sums(log_decay, run_ids, plan)
    if log_write is None:
        return decays[:, :, None]
    weights = jnp.pad(log_write.astype(jnp.float32) * LOG2_E, ((0, 0), (0, plan.padded - plan.time), (0, 0)))
    weights = weights.swapaxes(1, 2)
    return jnp.stack([jnp.broadcast_to(decays, weights.shape), decays - weights], axis=2)


def _chunk_sums(log_decay, run_ids, plan: Plan):
    padded = plan.padded
    if log_decay is None and run_ids is None:
        return jnp.zeros((1, plan.heads, padded), jnp.float32)
    if log_decay is None:
        log_decay = jnp.zeros((plan.heads,), jnp.float32)
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay, (1, plan.time, plan.heads))
    steps = jnp.maximum(log_decay.astype(jnp.float32) * LOG2_E, LEAST_LOG2)
    if run_ids is not None:
        steps = jnp.where(run_ids[..., None] != 0, steps, 0.0)
    steps = jnp.pad(steps, ((0, 0), (0, padded - plan.time), (0, 0)))
    steps = steps.reshape(steps.shape[0], plan.chunks, plan.chunk, plan.heads)
    return cumulate("bcth,ts->bhcs", steps).reshape(-1, plan.heads, padded)


def cumulate(equation, values, keep=lambda source, target: source <= target):
    """Sums over a chunk's tokens as a product with a triangle of ones, in float32 throughout."""
    size = values.shape[equation.split(",")[0].index(equation.split(",")[1][0])]
    index = jnp.arange(size)
    ones = keep(index[:, None], index[None, :]).astype(jnp.float32)
    return jnp.einsum(equation, values, ones, precision=jax.lax.Precision.HIGHEST)


def carried_runs(run_ids, plan: Plan):
    """The run that the state belongs to before and after each chunk: two [B, chunks] int32, at least 1."""
    padded = jnp.pad(run_ids, ((0, 0), (0, plan.padded - plan.time)))
    latest = jnp.max(padded.reshape(plan.batch, plan.chunks, plan.chunk), axis=2)
    after = jnp.maximum(jax.lax.cummax(latest, axis=1), 1)
    before = jnp.pad(after[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    return before, after


def chunk_segments(run_ids, plan: Plan):
    """What a kernel reads of the segments, [B, chunks, 128] int32: run ids, then the carry's run before and after."""
    if run_ids is None:
        return None
    run_ids = run_ids.astype(jnp.int32)
    padded = jnp.pad(run_ids, ((0, 0), (0, plan.chunks * CHUNK - plan.time)))
    rows = padded.reshape(plan.batch, plan.chunks, CHUNK)
    carried = jnp.stack(carried_runs(run_ids, plan), axis=-1)
    return jnp.pad(jnp.concatenate([rows, carried], axis=-1), ((0, 0), (0, 0), (0, SEGMENT_LANES - CHUNK - 2)))


def split_decays(decays, segments, plan: Plan):
    """What is left of a state after each split, [B or 1, H, splits] float32; 0 where another run has begun."""
    ends = decays[:, :, 0].reshape(-1, plan.heads, plan.splits, plan.steps, CHUNK)[..., -1]
    left = jnp.exp2(jnp.sum(ends, axis=-1))
    if segments is None:
        return left
    before = segments[:, :: plan.steps, CHUNK]
    after = segments[:, plan.steps - 1 :: plan.steps, CHUNK + 1]
    return jnp.where((before == after)[:, None], left, 0.0)
