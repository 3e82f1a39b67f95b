"""`python -m experiments.bench tune`: refills the kernels' tables of choices for this machine's GPU.

For each op and shape of the suite `recurrent` whose kernels read such a table: every candidate is compiled, those that
spill registers are dropped, the others are timed in turn, forward or with gradients, and the fastest goes into the
table, in the place of what it held for this card and call. Nothing is tuned while a model is traced or trained.
"""

import contextlib
import dataclasses
import json
import os
import re
import tempfile
from pathlib import Path

import jax

from experiments import files, progress
from experiments.bench import recurrent, timing
from pallas_kernels import compat, tuned

OPS = ("ssd", "simple_gla", "retnet")
KERNELS = ("forward", "backward")
DUMP = "MOSAIC_GPU_DUMP_PTXAS"
SPILL = re.compile(r"Compiling entry function '(\w+?)(?:_mosaic_gpu_kernel)?'.*?(\d+) bytes spill stores", re.DOTALL)


def run(args) -> int:
    """Tunes what args.only names, all if none; returns the exit code."""
    from pallas_kernels.linear_attention import plan

    for name in args.only:
        if name not in OPS:
            raise ValueError(f"--only: expected some of {', '.join(OPS)}, got {name!r}")
    wanted = [name for name in OPS if not args.only or name in args.only]
    device = jax.devices()[0]
    if (compat.capability(device) or (0, 0))[0] != 9:
        raise ValueError(f"tune: expected a Hopper GPU, the device is {device.device_kind}")
    cases = [(name, kernel, *shape) for name in wanted for kernel in KERNELS for shape in recurrent.SHAPES]
    work = progress.Work("tune", "calls", len(cases), seconds=0)
    for index, (name, kernel, b, t) in enumerate(cases):
        found = best(name, kernel, b, t)
        if found is not None:
            key, entry = found
            write(plan.TABLE, device.device_kind, key, entry)
            progress.say(f"{key}: {entry}")
        work.update(index + 1, f"{name} {kernel} B{b} T{t}", last=index + 1 == len(cases))
    print(plan.TABLE)
    return 0


def best(name, kernel, b, t):
    """(key, choices with "ms") of the fastest candidate for a call of an op, or None if none runs."""
    from pallas_kernels.linear_attention import plan

    draw, call, *_ = recurrent.OPS[name]
    sets = [jax.jit(draw, static_argnums=(1, 2))(jax.random.key(seed), b, t) for seed in range(2)]
    q, v = _query_and_value(name, sets[0])
    run = lambda *inputs: call(*inputs, implementation="gpu")
    if kernel == "backward":
        cotangent = jax.random.normal(jax.random.key(9), v.shape, v.dtype)
        run, sets = timing.with_gradients(run), [(cotangent, *inputs) for inputs in sets]
    times = []
    for config in plan.candidates(kernel, q, v):
        choices = {key: value for key, value in dataclasses.asdict(config).items() if value is not None}
        program, spilled = compiled(run, sets[0], f"linear_attention.{kernel}", choices)
        if program is None or any(spilled.values()):
            progress.say(f"{choices}: " + (f"spills {spilled}" if program else "does not compile"))
            continue
        times.append((timing.median_ms(program, sets), choices))
    if not times:
        return None
    ms, choices = min(times, key=lambda pair: pair[0])
    sizes = dict(Hk=q.shape[2], H=v.shape[2], K=q.shape[3], V=v.shape[3])
    return tuned.key(f"linear_attention.{kernel}", b, t, **sizes), choices | {"ms": round(ms, 4)}


def _query_and_value(name, inputs):
    return (inputs[4], inputs[0]) if name == "ssd" else (inputs[0], inputs[2])


def compiled(run, inputs, kernel, choices):
    """(the program with these choices of a kernel, {kernel: bytes that it spills}); None where it does not compile.

    inputs may be shapes on devices that are not here.
    """
    with tuned.forcing(kernel, **choices), _dumped() as said:
        try:
            program = jax.jit(lambda *x: run(*x)).lower(*inputs).compile()
        except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError):
            return None, {}
    return program, {name: int(stores) for name, stores in SPILL.findall(said())}


@contextlib.contextmanager
def _dumped():
    """Within it, ptxas says what each kernel needs; afterwards the yielded function gives its words."""
    kept, held = tempfile.TemporaryFile(), os.environ.get(DUMP)  # noqa: SIM115
    saved = os.dup(1), os.dup(2)
    text = []
    os.environ[DUMP] = "1"
    try:
        for number in (1, 2):
            os.dup2(kept.fileno(), number)
        yield lambda: text[0]
    finally:
        for number, old in zip((1, 2), saved, strict=True):
            os.dup2(old, number)
            os.close(old)
        if held is None:
            del os.environ[DUMP]
        kept.seek(0)
        text.append(kept.read().decode(errors="replace"))
        kept.close()


def write(path: Path, card: str, key: str, entry: dict):
    """Puts an entry into a table, a line each, whole or not at all."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table.setdefault(card, {})[key] = entry
    lines = []
    for name, entries in table.items():
        rows = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in entries.items())
        lines.append(f"  {json.dumps(name)}: {{\n{rows}\n  }}")
    files.replace(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
