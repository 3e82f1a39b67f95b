"""Trains a language model: `python -m experiments.train --config=NAME [--field=value ...] [--workdir=DIR]
[--dry-run] [--allow-data-change]`.

The default workdir is runs/NAME. The same command resumes: on the CPU a run that was killed and restarted has
the losses of an unbroken one to the bit, because batch i and the randomness of step i depend on i alone.

Exit codes: 0 done; 1 the training failed (a loss that is not finite, a full disk); 2 a mistake in the command
or its inputs (one line `error: ...`); 75 stopped by SIGTERM or SIGINT, after saving if a step was made since
the last checkpoint: resumable, run the same command. A second signal does not wait for the save.
"""

import functools
import math
import os
import signal
import sys
import threading
from pathlib import Path

from absl import app, logging
from absl import flags as absl_flags

STOPPED = 75
RESUMABLE = f"stopped, resumable: run the same command (exit code {STOPPED})"


def prepare(cfg, workdir, allow_data_change=False):
    """What a run needs before its first step: (trainer, dataset, checkpoints, start, state, config as JSON).

    Everything that can refuse does so before anything in `workdir` is written.
    """
    import jax

    from experiments import checkpoint, data, loop, progress, serialize

    config = serialize.to_json(cfg)
    checkpoint.check_config(workdir, config)
    mesh = loop.make_mesh(cfg)
    progress.say(f"devices: {mesh.devices.size} x {mesh.devices.flat[0].device_kind}")
    trainer = loop.Trainer(cfg, mesh)
    with progress.phase("reading the data"):
        align = math.lcm(*(mixer.align for mixer in cfg.model.period))
        dataset = data.load(cfg.data, cfg.model.vocab, align, trainer.packs)
    progress.say(dataset.summary)
    for change in dataset.identity.check(workdir, allow_data_change):
        progress.say(f"warning: other data from here on: {change}")

    if not trainer.packs:
        progress.say("warning: a mixer of this model cannot pack, so the documents of a row see each other")
    saved = checkpoint.Checkpoints(workdir, cfg.checkpoint.keep, warn=progress.say)
    restored = saved.restore(trainer.params, trainer.rest)
    if restored is None:
        with progress.phase("initialising the weights"):
            return trainer, dataset, saved, 0, jax.block_until_ready(trainer.init()), config
    start, params, rest, manifest = restored
    dataset.identity.resumed(start, manifest["fingerprint"])
    progress.say(f"resumed from step {start}")
    return trainer, dataset, saved, start, {"params": params, **rest}, config


def train(cfg, workdir, prepared, stop):
    """Steps to the end and reports, or saves and stops when asked; returns the exit code."""
    from experiments import checkpoint, finish, progress

    trainer, dataset, saved, start, state, config = prepared
    saved.clean()
    checkpoint.write_json(Path(workdir) / "config.json", config)
    checkpoint.write_json(Path(workdir) / "data.json", dataset.identity.record())
    curves = progress.Curves(workdir, start)
    save = functools.partial(_save, saved, {"fingerprint": dataset.fingerprint, "config": config})
    state, done = _loop(cfg, trainer, dataset, state, start, curves, save, stop)
    if not done:
        curves.close()
        progress.say(RESUMABLE)
        return STOPPED
    finish.finish(cfg, workdir, trainer, dataset, state["params"], curves)
    return 0


def _loop(cfg, trainer, dataset, state, start, curves, save, stop):
    """Steps from `start` to cfg.steps; returns (state, whether it got there). Hooks run at boundaries."""
    import jax

    from experiments import progress

    if start >= cfg.steps:
        return state, True
    batches = dataset.train_batches(start)
    batch = trainer.put(next(batches))
    with progress.phase("compiling the train step"):
        train_step = trainer.compile_step(state, batch)
    shown = progress.Progress(cfg.steps, start, trainer.flops_per_step, trainer.peak)
    pending = []
    try:
        for step in range(start + 1, cfg.steps + 1):
            stop.waits = True  # from here to the next save, a signal waits for one
            state, metrics = train_step(state, batch)
            pending.append((step, metrics))
            batch = trainer.put(next(batches)) if step < cfg.steps else None
            last, stopping = step == cfg.steps, stop.asked
            evaluates = cfg.eval.every > 0 and step % cfg.eval.every == 0 and not last
            saves = last or stopping or (cfg.checkpoint.every > 0 and step % cfg.checkpoint.every == 0)
            if step % cfg.log_every == 0 or evaluates or saves:
                _log(pending, curves, shown)
            if evaluates:
                record = trainer.evaluate(state["params"], dataset, cfg.eval.batches)
                curves.write({"kind": "val", "step": step, **record})
                shown.say(f"step {step}  val  " + "  ".join(f"{k} {v:.4f}" for k, v in record.items() if k != "tokens"))
            if saves:
                curves.flush()
                save(step, jax.block_until_ready(state))
                stop.waits = False
            if evaluates or saves:
                shown.restart_clock(step)
            if stopping:
                return state, False
        return state, not stop.asked
    finally:
        shown.close()


def _log(pending, curves, shown):
    """Fetches the metrics of the pending steps, records each, refuses to go on from a loss that is not
    finite.
    """
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
        curves.write({"kind": "speed", "step": step, **shown.update(step, record["loss"], tokens)})
        curves.file.flush()
    pending.clear()


def _save(saved, meta, step, state):
    rest = {key: value for key, value in state.items() if key != "params"}
    saved.save(step, state["params"], rest, {**meta, "data_position": step})


class Stop:
    """What SIGTERM and SIGINT do. While `waits`, the first one sets `asked`, which the loop sees after its
    step; otherwise, and the second time, the process ends at once.

    A thread acts on them, since Python's own handlers do not run while the main thread compiles.
    """

    def __init__(self):
        self.asked = self.waits = False
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # the byte in the pipe is what counts
        threading.Thread(target=self._watch, args=(read,), daemon=True).start()

    def _watch(self, read):
        while True:
            number = os.read(read, 1)[0]
            if number not in (signal.SIGTERM, signal.SIGINT):
                continue
            name = signal.Signals(number).name
            if self.asked or not self.waits:
                cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # which the live line hides
                print(f"{cursor}{name}: {RESUMABLE}", file=sys.stderr, flush=True)
                os._exit(STOPPED)
            self.asked = True
            print(f"{name}: saving at the next step", file=sys.stderr, flush=True)


def fail(message, code=2):
    """Ends the process with one line; `error: ` comes first."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    sys.exit(code)


def main(argv):
    """Entry point behind absl: parses, then trains or prints the dry run."""
    from experiments import flags

    try:
        cfg, args = flags.parse(argv[1:])
        if args.dry_run:
            from experiments import dryrun

            dryrun.show(cfg)
            return 0
    except ValueError as error:
        fail(error)
    stop = Stop()
    from experiments import checkpoint

    workdir = args.workdir or f"runs/{cfg.name}"
    try:
        with checkpoint.lock(workdir):
            try:
                prepared = prepare(cfg, workdir, args.allow_data_change)
            except ValueError as error:  # while training, one is a bug and keeps its traceback
                fail(error)
            return train(cfg, workdir, prepared, stop)
    except checkpoint.Refused as error:
        fail(error)
    except (checkpoint.NotSaved, FloatingPointError, OSError) as error:
        fail(error, code=1)


def only_program(argv):
    """absl's flags are left at their defaults: every argument is ours. What Orbax logs, it raises too."""
    absl_flags.FLAGS(argv[:1])
    logging.set_verbosity(logging.FATAL)
    return argv


if __name__ == "__main__":
    app.run(main, flags_parser=only_program)
