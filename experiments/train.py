"""Trains a language model: `python -m experiments.train --config=NAME [--field=value] [--workdir=DIR]
[--dry-run]`.

The default workdir is runs/NAME. The same command resumes: on the CPU a run that was killed and restarted has
the losses of an unbroken one to the bit, because batch i and the randomness of step i depend on i alone.

Exit codes: 0 done; 1 the training failed (a loss that is not finite); 2 a mistake in the command or its
inputs (one line `error: ...`); 75 stopped by SIGTERM or SIGINT after saving: resumable, run the same command.
"""

import functools
import signal
import sys
import time
from pathlib import Path

from absl import app, logging
from absl import flags as absl_flags

STOPPED = 75


def run(cfg, workdir):
    """Trains `cfg` in `workdir` from its newest good checkpoint, or from the start; returns the exit code."""
    import jax

    from experiments import checkpoint, data, loop, progress, serialize

    config = serialize.to_json(cfg)
    checkpoint.check_config(workdir, config)
    held = checkpoint.lock(workdir)  # released when the process ends
    stop = _Stop()
    mesh = loop.make_mesh(cfg.mesh, cfg.data.batch_size // cfg.optim.accumulate)
    progress.say(f"devices: {mesh.devices.size} x {mesh.devices.flat[0].device_kind}")

    with _phase("reading the data"):
        dataset = data.load(cfg.data, cfg.model.vocab)
    checkpoint.check_data(workdir, dataset.fingerprint)

    trainer = loop.Trainer(cfg, mesh)
    saved = checkpoint.Checkpoints(workdir, cfg.checkpoint.keep, warn=progress.say)
    restored = saved.restore(trainer.params, trainer.rest)
    if restored:
        start, params, rest, manifest = restored
        if manifest["fingerprint"] != dataset.fingerprint:
            raise checkpoint.Refused(
                f"checkpoint {start} in {workdir} was made on other data: fingerprint differs"
            )
        state = {"params": params, **rest}
        progress.say(f"resumed from step {start}")
    else:
        start = 0
        with _phase("initialising the weights"):
            state = jax.block_until_ready(trainer.init())
    saved.clean()
    checkpoint.write_json(Path(workdir) / "config.json", config)
    checkpoint.write_json(Path(workdir) / "data.json", {"fingerprint": dataset.fingerprint})
    curves = progress.Curves(workdir, start)

    meta = {"fingerprint": dataset.fingerprint, "config": config}
    save = functools.partial(_save, saved, meta)
    state, done = _loop(cfg, trainer, dataset, state, start, curves, save, stop)
    if not done:
        curves.close()
        progress.say(f"stopped, resumable: run the same command (exit code {STOPPED})")
        return STOPPED
    from experiments import report

    report.finish(cfg, workdir, trainer, dataset, state["params"], curves)
    held.close()
    return 0


def _loop(cfg, trainer, dataset, state, start, curves, save, stop):
    """Steps from `start` to cfg.steps; returns (state, whether it got there). Hooks run at boundaries."""
    import jax

    from experiments import progress

    if start >= cfg.steps:
        return state, True
    batches = dataset.train_batches(start)
    batch = trainer.put(next(batches))
    with _phase("compiling the train step"):
        train_step = trainer.compile_step(state, batch)
    shown = progress.Progress(cfg.steps, start, trainer.flops_per_step, trainer.peak)
    pending = []
    try:
        for step in range(start + 1, cfg.steps + 1):
            state, metrics = train_step(state, batch)
            pending.append((step, metrics))
            batch = trainer.put(next(batches)) if step < cfg.steps else None
            last = step == cfg.steps
            evaluates = cfg.eval.every > 0 and step % cfg.eval.every == 0 and not last
            saves = last or stop.asked or (cfg.checkpoint.every > 0 and step % cfg.checkpoint.every == 0)
            if step % max(cfg.log_every, 1) == 0 or evaluates or saves:
                _log(pending, curves, shown)
            if evaluates:
                record = {"kind": "val", "step": step, **trainer.evaluate(state["params"], dataset)}
                curves.write(record)
                shown.say(
                    f"step {step}  val loss {record['loss']:.4f}  {record['bits_per_byte']:.3f} bits/byte"
                )
            if saves:
                curves.flush()
                save(step, jax.block_until_ready(state))
            if evaluates or saves:
                shown.restart_clock(step)
            if stop.asked and not last:
                return state, False
        return state, True
    finally:
        shown.close()


def _log(pending, curves, shown):
    """Fetches the metrics of the pending steps, records each, refuses to go on from a loss that is not
    finite.
    """
    import math

    import jax

    tokens = 0
    for step, metrics in jax.device_get(pending):
        record = {"kind": "train", "step": step, **{key: float(value) for key, value in metrics.items()}}
        if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
            curves.flush()
            raise FloatingPointError(
                f"loss {record['loss']}, gradient norm {record['grad_norm']} at step {step} "
                f"(batch {step - 1}): not saved; the last checkpoint is from before"
            )
        curves.write(record)
        tokens += record["tokens"]
    if pending:
        shown.update(step, record["loss"], tokens)
        curves.file.flush()
    pending.clear()


def _save(saved, meta, step, state):
    rest = {key: value for key, value in state.items() if key != "params"}
    saved.save(step, state["params"], rest, {**meta, "data_position": step})


class _Stop:
    """Notes SIGTERM and SIGINT; the loop looks at step boundaries. A second one kills at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.asked = True
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_DFL)
        print(f"{signal.Signals(number).name}: saving at the next step", file=sys.stderr, flush=True)


class _phase:
    """Says what a long phase is and how long it took."""

    def __init__(self, text):
        self.text = text

    def __enter__(self):
        print(f"{self.text} ...", file=sys.stderr, flush=True)
        self.start = time.monotonic()

    def __exit__(self, kind, *_):
        if kind is None:
            print(f"{self.text}: {time.monotonic() - self.start:.1f} s", file=sys.stderr, flush=True)


def fail(message, code=2):
    """Ends the process with one line; `error: ` comes first."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    sys.exit(code)


def main(argv):
    """Entry point behind absl: parses, then trains or prints the dry run."""
    from experiments import flags

    try:
        cfg, args = flags.parse(argv[1:])
    except ValueError as error:
        fail(error)
    from experiments.checkpoint import Refused

    try:
        if args.dry_run:
            from experiments import dryrun

            dryrun.show(cfg)
            return 0
        return run(cfg, args.workdir or f"runs/{cfg.name}")
    except (Refused, ValueError, OSError) as error:
        fail(error)
    except FloatingPointError as error:
        fail(error, code=1)


def only_program(argv):
    """absl's flags are left at their defaults: every argument is ours."""
    absl_flags.FLAGS(argv[:1])
    logging.set_verbosity(logging.WARNING)
    return argv


if __name__ == "__main__":
    app.run(main, flags_parser=only_program)
