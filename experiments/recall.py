"""The table of associative recall: `python -m experiments.recall [--mixers=a,b] [--jobs=N] [--out=DIR]`.

For each mixer and width, --config=mqar with every learning rate and seed, all at once (`experiments.lanes`). The
learning rate is chosen on validation rows by the mean over seeds at the most pairs, the accuracy reported is on
others. DIR gets one JSON file a cell as it is done, then recall.json, recall.md and (with matplotlib) recall.png and
recall.svg of these cells and those that DIR had. Cells of DIR that were computed with the same settings are skipped.

Exit codes: 0 done, 1 a cell failed (the others are kept), 2 a mistake in the command.
"""

import concurrent.futures
import hashlib
import json
import os
import queue
import subprocess
import sys
import time
from pathlib import Path

from experiments import cli, flags, progress, recall_table, serialize, signals
from experiments.sweep.local import CHILD
from seqmix import catalog

EVERY = 100  # steps between points of the curves
SLOW = (
    "no NVIDIA GPU: {cells} cells of {runs} runs each; a cell of the kept table (docs/benchmarks/recall: 9 runs of "
    "4000 steps) took 5 minutes of an H100, a CPU takes far longer; --mixers, --widths, --rates, --seeds, --steps: less"
)


def main(argv=None):
    """Parses, computes what is missing, writes the table; returns the exit code."""
    args = parse(argv)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return cli.refuse(f"--out: expected a folder that can be written, got {args.out!r} ({error.strerror})")
    cells = [(mixer, width) for mixer in args.mixers for width in args.widths]
    missing = [cell for cell in cells if read(out, args, *cell) is None]
    if args.cell:  # the table is its parent's
        for cell in missing:
            one(out, args, *cell)
        return 0
    try:
        others = kept(out, args, cells)
    except ValueError as error:
        return cli.refuse(error)
    progress.say(f"{len(cells)} cells, {len(cells) - len(missing)} already done, {args.jobs} at a time")
    if missing and not visible_gpus():
        progress.say(SLOW.format(cells=len(missing), runs=len(args.rates) * len(args.seeds)))
    with signals.last_words(lambda: f"recall stopped; the cells that are done are in {out}, the same command goes on"):
        failed = compute(out, args, missing)
    rows = others + [row for cell in cells if (row := read(out, args, *cell))]
    if rows:
        recall_table.write(out, rows)
    for cell in failed:
        print(f"failed: {cell[0]} at width {cell[1]}: {log(out, *cell)}", file=sys.stderr)
    return 1 if failed else 0


def parse(argv):
    """The command's arguments; a mistake ends the process with one line and exit code 2."""
    parser = cli.Parser(prog="python -m experiments.recall", description=__doc__.splitlines()[0])
    names = [row.name for row in catalog.ROWS if suits(row)]
    add = lambda flag, kind, default, text: parser.add_argument(flag, type=kind, default=default, help=text)
    add("--out", str, "runs/recall", "folder of the results")
    add("--mixers", _listed(str), names, "names of the catalogue, joined by commas (all causal ones)")
    add("--widths", _listed(int), [64, 128], "widths of the models, multiples of 64")
    add("--rates", _listed(float), [1e-3, 3e-3, 1e-2], "peak learning rates")
    add("--seeds", _listed(int), [0, 1, 2], "seeds of weights and batches")
    add("--steps", int, None, f"updates of a run, a multiple of {EVERY} (the config's)")
    add("--batch-size", int, None, "rows of an update (the config's)")
    add("--jobs", int, 1, "cells computed at once, each in a process; the GPUs are shared out")
    parser.add_argument("--cell", action="store_true", help="compute here, in this process; one mixer and one width")
    try:
        args = parser.parse(sys.argv[1:] if argv is None else argv)
        for name in args.mixers:
            config(args, name, args.widths[0])
        for width in args.widths:
            config(args, args.mixers[0], width)
        for rate in args.rates:
            if not 0 < rate < float("inf"):
                raise ValueError(f"--rates: expected positive numbers, got {rate}")
        for seed in args.seeds:
            if not 0 <= seed < 2**31:
                raise ValueError(f"--seeds: expected integers in [0, 2**31), got {seed}")
        if args.jobs < 1:
            raise ValueError(f"--jobs: expected at least 1, got {args.jobs}")
        if args.steps is not None and (args.steps < 1 or args.steps % EVERY):
            raise ValueError(f"--steps: expected a multiple of {EVERY}, got {args.steps}")
    except ValueError as error:
        own = {"--mixer:": "--mixers:", "--width:": "--widths:", "--data.batch-size:": "--batch-size:"}
        flag, _, rest = str(error).partition(" ")
        known = not rest.startswith("unknown flag")
        sys.exit(cli.refuse(f"{own.get(flag, flag) if known else flag} {rest}"))
    return args


def _listed(kind):
    """Reads distinct values joined by commas."""

    def read(text):
        values = list(dict.fromkeys(kind(item) for item in text.split(",") if item))
        if not values:
            raise ValueError
        return values

    read.__name__ = f"list of {kind.__name__}"  # argparse names it: "invalid list of float value: 'abc'"
    return read


def suits(row):
    """Whether a row's mixer makes a causal language model by itself."""
    mixer = row.load()(**row.small)
    return mixer.causal and not mixer.takes and not mixer.selects_over_time


def config(args, mixer, width):
    """The config of a cell."""
    given = [f"--steps={args.steps}"] if args.steps is not None else []
    given += [f"--data.batch-size={args.batch_size}"] if args.batch_size is not None else []
    return flags.parse(["--config=mqar", f"--mixer={mixer}", f"--width={width}", *given])[0]


def digest(args, mixer, width):
    """What a cell's result depends on, as a short hash."""
    what = [serialize.essence(config(args, mixer, width)), args.rates, args.seeds]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]


def read(out, args, mixer, width):
    """The stored result of a cell, in its file or in recall.json; None: there is none, or it was computed otherwise."""
    alone = out / f"{mixer}_{width}.json"
    rows = tabled(out) + ([json.loads(alone.read_text())] if alone.exists() else [])
    wanted = mixer, width, digest(args, mixer, width)
    return next((row for row in rows if (row["mixer"], row["width"], row["digest"]) == wanted), None)


def tabled(out):
    """The rows of recall.json."""
    path = out / "recall.json"
    return json.loads(path.read_text()) if path.exists() else []


def kept(out, args, cells):
    """The rows of recall.json of cells that are not asked for and were computed with the same settings.

    Raises ValueError for rows of other settings that are in recall.json alone, and would be gone.
    """
    rows = []
    for row in tabled(out):
        cell = row["mixer"], row["width"]
        if row["digest"] != digest(args, *cell):
            if not (out / "{}_{}.json".format(*cell)).exists():
                raise ValueError(f"--out: {out} holds a table of other settings ({cell[0]} at width {cell[1]})")
        elif cell not in cells:
            rows.append(row)
    return rows


# Computing


def compute(out, args, cells):
    """Computes cells, each in a process; returns those that failed."""
    begin, failed = time.perf_counter(), []
    gpus, slots = visible_gpus(), queue.SimpleQueue()
    for index in range(args.jobs):
        slots.put(gpus[index % len(gpus)] if gpus else None)
    cells = sorted(cells, key=lambda cell: -cell[1])  # the longest first
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        jobs = {pool.submit(spawn, out, args, *cell, gpus, slots): cell for cell in cells}
        for count, job in enumerate(concurrent.futures.as_completed(jobs), 1):
            mixer, width = jobs[job]
            row = read(out, args, mixer, width)
            if row is None:
                failed.append((mixer, width))
            shown = "failed" if row is None else recall_table.summary(row)
            left = (time.perf_counter() - begin) / count * (len(cells) - count)
            progress.say(f"{count}/{len(cells)}  {mixer} {width}: {shown}  ({left / 60:.1f} min left)")
    return failed


def spawn(out, args, mixer, width, gpus, slots):
    """Runs a cell in a process of its own, on a free slot of a GPU, its output in a log beside the result."""
    share = -(-args.jobs // max(len(gpus), 1))  # cells on a GPU at once
    env = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / share:.3f}"}
    join = lambda items: ",".join(map(str, items))
    words = [f"--out={out}", f"--mixers={mixer}", f"--widths={width}", "--cell"]
    words += [f"--rates={join(args.rates)}", f"--seeds={join(args.seeds)}"]
    words += [f"--steps={args.steps}"] if args.steps is not None else []
    words += [f"--batch-size={args.batch_size}"] if args.batch_size is not None else []
    gpu = slots.get()
    env |= {"CUDA_VISIBLE_DEVICES": gpu} if gpu is not None else {}
    try:
        with open(out / f"{mixer}_{width}.log", "w") as file:
            end_with = [sys.executable, "-S", str(CHILD), str(os.getpid()), ""]  # the kernel kills it with this process
            command = [*end_with, sys.executable, "-m", "experiments.recall", *words]
            subprocess.run(command, stdout=file, stderr=file, env=env)
    finally:
        slots.put(gpu)


def visible_gpus():
    """Ids of the NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES lists them."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except FileNotFoundError:
        return []
    return [str(index) for index, _ in enumerate(listed.stdout.splitlines())] if listed.returncode == 0 else []


def log(out, mixer, width):
    """The last line that a cell's process wrote."""
    lines = (out / f"{mixer}_{width}.log").read_text().strip().splitlines()
    return lines[-1] if lines else "no output"


def one(out, args, mixer, width):
    """Trains the lanes of a cell and stores the result."""
    import jax

    from experiments import lanes

    cfg = config(args, mixer, width)
    runs = lanes.Lanes(cfg, args.rates, args.seeds, EVERY)
    say = lambda step, loss, speed: progress.say(
        f"{mixer} {width}: step {step}/{cfg.steps}  lowest loss {loss:.3f}  {speed:.1f} steps/s  "
        f"ETA {(cfg.steps - step) / speed:.0f} s"
    )
    result = runs.run(say)
    row = {
        "mixer": mixer,
        "width": width,
        "digest": digest(args, mixer, width),
        "parameters": cfg.model.count(),
        "mixers": [type(mixer).__name__ for mixer in cfg.model.mixers],
        "state": cfg.model.period[-1].state_size(cfg.data.seq_len),
        "rates": args.rates,
        "seeds": args.seeds,
        "steps": cfg.steps,
        "batch_size": cfg.data.batch_size,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        **{key: result[key] for key in ("seconds", "compile_seconds", "val", "test")},
        "loss": [[round(float(x), 4) for x in lane] for lane in result["loss"].T],
    }
    temporary = out / f"{mixer}_{width}.json.tmp"
    temporary.write_text(json.dumps(row))
    temporary.replace(out / f"{mixer}_{width}.json")


if __name__ == "__main__":
    sys.exit(main())
