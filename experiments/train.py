"""Trains a language model: `python -m experiments.train --config=NAME [--field=value ...] [--workdir=DIR]
[--dry-run] [--allow-data-change]`.

The default workdir is runs/NAME. The same command resumes: on the CPU a run that was killed and restarted has
the losses of an unbroken one to the bit, because batch i and the randomness of step i depend on i alone.

Exit codes: 0 done; 1 the training failed (a loss that is not finite, a full disk, a process that died or hangs);
2 a mistake in the command or its inputs (one line `error: ...`); 75 stopped by SIGTERM or SIGINT, after saving if a
step was made since the last checkpoint: resumable, run the same command. A second signal does not wait for the
save. `docs/faults.md` lists what can happen to a run and what it costs.
"""

import contextlib
import dataclasses
import math
import typing
from pathlib import Path

from absl import app, logging
from absl import flags as absl_flags


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
    saved = checkpoint.Checkpoints(workdir, cfg.checkpoint, warn=progress.say)
    restored = saved.restore(trainer.params, trainer.rest)
    if restored is None:
        with progress.phase("initialising the weights"):
            return trainer, dataset, saved, 0, jax.block_until_ready(trainer.init()), config
    start, params, rest, manifest = restored
    dataset.identity.resumed(start, manifest["fingerprint"])
    progress.say(f"resumed from step {start}")
    return trainer, dataset, saved, start, {"params": params, **rest}, config


@dataclasses.dataclass
class Run:
    """What the loop and its hooks share."""

    cfg: typing.Any
    workdir: Path
    trainer: typing.Any
    dataset: typing.Any
    saved: typing.Any
    curves: typing.Any
    clock: typing.Any
    watchdog: typing.Any
    stop: typing.Any
    meta: dict  # what each checkpoint's manifest says of data and config


def train(cfg, workdir, prepared, stop, clock):
    """Steps to the end and reports, or saves and stops when asked; returns the exit code."""
    from experiments import checkpoint, distributed, files, finish, process, progress
    from experiments import clock as clocks

    trainer, dataset, saved, start, state, config = prepared
    starts, curves = (1, 0), progress.NoCurves()
    if distributed.first():
        also = _wandb(cfg, workdir, config)
        saved.clean()
        process.forget(workdir)
        files.write_json(Path(workdir) / "config.json", config)
        files.write_json(Path(workdir) / "data.json", dataset.identity.record())
        starts = clocks.note_start(workdir, start, progress.last_logged(workdir))
        curves = progress.Curves(workdir, start, also)
    meta = {"fingerprint": dataset.fingerprint, "config": config}
    watchdog = process.Watchdog(cfg.watchdog, workdir)
    run = Run(cfg, Path(workdir), trainer, dataset, saved, curves, clock, watchdog, stop, meta)
    try:
        state, done = _loop(run, state, start)
        if not done:
            curves.close()
            progress.say(f"training {process.RESUMABLE}; what it saved is in {workdir}")
            return process.STOPPED
        finish.finish(run, state.get("ema", state["params"]), starts)
    finally:
        watchdog.close()
        if not distributed.several():  # else a peer that is gone would be waited for
            with contextlib.suppress(checkpoint.NotSaved):
                saved.wait()
    return 0


def _wandb(cfg, workdir, config):
    if cfg.wandb is None:
        return None
    from experiments.wandb_run import WandbRun

    return WandbRun(cfg.wandb, cfg.name, workdir, config)


def _loop(run, state, start):
    """Steps from `start` to cfg.steps; returns (state, whether it got there). Hooks run at boundaries."""
    from experiments import clock, distributed, progress

    cfg, trainer, stop, spent = run.cfg, run.trainer, run.stop, run.clock
    if start >= cfg.steps:
        return state, True
    share = trainer.share
    batches = run.dataset.train_batches(start, *share)
    batch = trainer.put(next(batches), share=share)
    with progress.phase("compiling the train step"), spent.on("compile"):
        train_step = trainer.compile_step(state, batch)
    shown = progress.Progress(cfg.steps, start, trainer.chunkless_flops, trainer.peak)
    trace = clock.Trace(cfg.profile, start, run.workdir / "profile")
    pending, before = [], None
    run.watchdog.start()
    try:
        for step in range(start + 1, cfg.steps + 1):
            stop.waits = True  # from here on, a signal waits for a save
            trace.before(step)
            with spent.on("step"):
                state, metrics = train_step(state, batch)
                trace.after(step, metrics)
            pending.append((step, metrics))
            if step < cfg.steps:
                with spent.on("data wait"):
                    batch = trainer.put(next(batches), stop.asked, share)
            with spent.on("step"):
                stopping, before = _stopping(stop, before), metrics
            evaluates, saves = _due(cfg, step, stopping)
            if step % cfg.log_every == 0 or evaluates or saves:
                with spent.on("step"):
                    loss = _log(run, pending, shown)
            run.watchdog.beat()
            metric = loss if saves and cfg.checkpoint.metric == "loss" else None
            if evaluates:
                found = _evaluate(run, step, state, shown)
                metric = found if cfg.checkpoint.metric == "val_loss" else metric
            if saves:
                _save(run, step, state, metric, required=stopping or step == cfg.steps)
            if evaluates or saves:
                shown.restart_clock(step)
            if stopping:
                return state, False
        return state, distributed.several() or not stop.asked
    finally:
        trace.close()
        shown.close()


def _stopping(stop, before):
    """Whether the run stops after this step. Several processes have to agree, so there the flags that went into
    the step before decide, which have been added up by now.
    """
    from experiments import distributed

    if not distributed.several():
        return stop.asked
    return before is not None and int(before["stop"]) > 0


def _due(cfg, step, stopping):
    """(whether to evaluate after this step, whether to save)."""
    divides = lambda every: every > 0 and step % every == 0
    last = step == cfg.steps
    saves = last or divides(cfg.checkpoint.every)
    compared = saves and cfg.checkpoint.keep_best > 0 and cfg.checkpoint.metric == "val_loss"
    return (divides(cfg.eval.every) and not last) or compared, saves or stopping


def _log(run, pending, shown):
    """Fetches the metrics of the pending steps and records each; returns the last loss. Refuses to go on from a
    loss that is not finite.
    """
    import jax

    from experiments import batches

    tokens, loss = 0, None
    for step, metrics in jax.device_get(pending):
        values = {key: float(value) for key, value in metrics.items() if key != "stop"}
        record, loss = {"kind": "train", "step": step, **values}, values["loss"]
        if not (math.isfinite(loss) and math.isfinite(values["grad_norm"])):
            run.curves.flush()
            raise FloatingPointError(batches.not_finite(run.workdir, run.dataset, step, values))
        run.curves.write(record)
        tokens += record["tokens"]
    if pending:
        spoken = shown.update(step, loss, tokens)
        run.curves.write({"kind": "speed", "step": step, **spoken})
        run.curves.show()
    pending.clear()
    return loss


def _evaluate(run, step, state, shown):
    """Validates, records it and returns the loss."""
    cfg, weights = run.cfg, state.get("ema", state["params"])
    with run.clock.on("eval"):
        record = run.trainer.evaluate(weights, run.dataset, cfg.eval.batches, run.watchdog.beat)
    run.curves.write({"kind": "val", "step": step, **record})
    shown.say(f"step {step}  val  " + "  ".join(f"{k} {v:.4f}" for k, v in record.items() if k != "tokens"))
    return record["loss"]


def _save(run, step, state, metric, required):
    """Begins a save, or when `required` makes it; a failure raises, or warns if the settings say so."""
    import jax

    from experiments import checkpoint, progress

    def attempt(action, required):
        try:
            action()
        except checkpoint.NotSaved as error:
            if required or run.cfg.checkpoint.on_failure == "stop":
                raise
            progress.say(f"warning: {error}; training goes on")

    jax.block_until_ready(state)
    rest = {key: value for key, value in state.items() if key != "params"}
    with run.clock.on("save"):
        run.curves.flush()
        attempt(run.saved.wait, required=False)
        meta = {**run.meta, "data_position": step}
        attempt(lambda: run.saved.save(step, state["params"], rest, meta, metric), required)
        if required:
            attempt(run.saved.wait, required)
            run.stop.waits = False


def main(argv):
    """Entry point behind absl: parses, then trains or prints the dry run."""
    from experiments import clock, flags

    spent = clock.Clock()
    cfg = None
    try:
        cfg, args = flags.parse(argv[1:])
        if args.dry_run:
            from experiments import dryrun

            dryrun.show(cfg)
            return 0
        from experiments import distributed

        distributed.start(cfg.distributed)
    except ValueError as error:
        flags.fail(flags.named(error, cfg))
    from experiments import process, progress

    workdir = args.workdir or f"runs/{cfg.name}"
    if not distributed.first():
        progress.mute()
    with process.failing(workdir):
        return _run(cfg, workdir, args.allow_data_change, process.Stop(workdir), spent)


def _run(cfg, workdir, allow_data_change, stop, spent):
    """Prepares and trains under the workdir's lock; returns the exit code."""
    from experiments import checkpoint, distributed, flags, process

    try:
        with process.lock(workdir) if distributed.first() else contextlib.nullcontext():
            try:
                with spent.on("start-up"):
                    prepared = prepare(cfg, workdir, allow_data_change)
            except ValueError as error:  # while training, one is a bug and keeps its traceback
                flags.fail(flags.named(error, cfg))
            process.keep_compiled(workdir)
            return train(cfg, workdir, prepared, stop, spent)
    except checkpoint.Refused as error:
        flags.fail(error)
    except (checkpoint.NotSaved, FloatingPointError, OSError) as error:
        flags.fail(error, code=1)


def only_program(argv):
    """absl's flags are left at their defaults: every argument is ours. What Orbax logs, it raises too."""
    absl_flags.FLAGS(argv[:1])
    logging.set_verbosity(logging.FATAL)
    return argv


if __name__ == "__main__":
    app.run(main, flags_parser=only_program)
