"""Lists and runs a sweep: `python -m experiments.sweep --config=NAME --sweep=FILE [--field=value ...]`.

FILE is a name in configs/sweeps or the path of such a file; fields of the config hold for every run. Exit codes:
0 all runs are finished, 1 some failed, 2 a mistake in the command or the sweep, 75 stopped by a signal: resumable.
"""

import os
import sys
from pathlib import Path

from absl import logging

USAGE = """usage: python -m experiments.sweep --config=NAME --sweep=FILE [--field=value ...]

Trains every run of a sweep, skipping what is finished and resuming what is not. --field=value holds for all runs.

  --list            print each run's id, state and overrides, and end
  --workdir=DIR     the sweep's directory (runs/CONFIG-SWEEP); each run has DIR/ID, with its log.txt
  --jobs=N          runs at once; GPUs and CPUs are shared out (one for each GPU, or for every two CPUs)
  --launcher=slurm  submit an array of jobs instead; --slurm.partition=..., --slurm.timeout-min=... (submitit's names)
  --sampler=optuna  draw overrides from the file's space(trial), --trials=N of them, for the least validation loss
  --print           print one command for each run, for any scheduler
  --emit=skypilot   write YAML for SkyPilot or, with jobset, for Kubernetes JobSets: generated, not run
  --image=IMAGE     the container of JobSets
  --run=ID          train one run of the sweep in this process: what those commands do
"""
SWITCHES = ("list", "print")
OWN = ("sweep", "jobs", "launcher", "sampler", "trials", "emit", "image", "run", *SWITCHES)


def read(argv):
    """(own flags by name, base config, workdir, fields changed, the arguments that fix the base)."""
    from experiments import flags

    arguments = [argument if argument.lstrip("-") not in SWITCHES else f"{argument}=True" for argument in argv]
    given = flags.split(arguments)
    own = {name: given.pop(name) for name in list(given) if name in OWN or name.startswith("slurm.")}
    for name, text in own.items():
        if not text:
            raise ValueError(f"--{name}: expected a value, as in --{name}=VALUE")
    if "help" in given:
        print(USAGE, end="")
        raise SystemExit(0)
    base = [f"--{name}" if text is None else f"--{name}={text}" for name, text in given.items()]
    cfg, args = flags.parse(base, OWN)
    if "sweep" not in own:
        raise ValueError("--sweep: expected a name in configs/sweeps or a file, got none")
    _check(own, args)
    workdir = args.workdir or f"runs/{Path(args.config).stem}-{Path(own['sweep']).stem}"
    shared = [argument for argument in base if not argument.startswith("--workdir=")]
    return own, cfg, workdir, args.changed, shared


def _check(own, args):
    if args.dry_run:
        raise ValueError("--dry-run: expected a single run, so with experiments.train")
    choices = {"launcher": ("local", "slurm"), "sampler": ("optuna",), "emit": ("skypilot", "jobset")}
    for name, allowed in choices.items():
        if name in own and own[name] not in allowed:
            raise ValueError(f"--{name}: expected {' or '.join(allowed)}, got {own[name]!r}")
    for name in ("jobs", "trials"):
        if name in own and not (own[name].isdecimal() and int(own[name]) > 0):
            raise ValueError(f"--{name}: expected an integer of at least 1, got {own[name]!r}")
    sampled = own.get("sampler") == "optuna"
    if sampled != ("trials" in own):
        raise ValueError("--sampler=optuna, --trials=N: expected both or neither")
    for name in ("print", "emit", "run"):
        if sampled and name in own:
            raise ValueError(f"--{name}: expected a sweep whose runs are known beforehand, not --sampler=optuna")
    slurm = own.get("launcher") == "slurm"
    if sampled and slurm:
        raise ValueError("--launcher: expected local with --sampler=optuna, got 'slurm'")
    for name in own:
        if name.startswith("slurm.") and not slurm:
            raise ValueError(f"--{name}: expected --launcher=slurm beside it")


def show(runs):
    """The table of --list."""
    from experiments import progress
    from experiments.sweep import plan

    rows = []
    for run in runs:
        state = plan.state(run.workdir, run.cfg.steps)
        text = f"{state.name} ({state.reason})" if state.reason else state.name
        rows.append((run.id, text, f"{state.step}/{run.cfg.steps}", run.describe()))
    progress.table(f"{len(rows)} runs", ("run", "state", "steps", "overrides"), rows, left=4)


def launch(own, cfg, workdir, fixed, shared):
    """Does what the flags say; returns the exit code."""
    from experiments import process
    from experiments.sweep import emit, local, plan

    root = Path(workdir).absolute()
    jobs = int(own["jobs"]) if "jobs" in own else None
    if "sampler" in own:
        from experiments.sweep import tuner

        space = plan.function(own["sweep"], "space")
        trials = lambda: tuner.Trials(space, cfg, root, fixed, int(own["trials"]))
        if "list" in own:
            drawn = trials().runs() if (root / tuner.JOURNAL).exists() else []
            if drawn:
                show(drawn)
            else:
                print(f"no trial has been drawn yet; without --list, {own['trials']} are")
            return 0
        with process.lock(root):
            source = trials()
            code = local.Local(root, source, jobs).run()
            source.report()
            return code
    runs = plan.runs(plan.function(own["sweep"])(), cfg, root, fixed)
    if "list" in own:
        show(runs)
        return 0
    if "run" in own:
        return _train(runs, own["run"])
    if "print" in own or "emit" in own:
        command = ["python", "-m", "experiments.sweep", *shared, f"--sweep={own['sweep']}", f"--workdir={workdir}"]
        if "print" in own:
            emit.commands(runs, command)
        else:
            emit.write(own["emit"], runs, command, root, own.get("image"))
        return 0
    if own.get("launcher") == "slurm":
        from experiments.sweep import slurm

        options = {name.removeprefix("slurm."): text for name, text in own.items() if name.startswith("slurm.")}
        submitted = slurm.submit(runs, root, jobs, options)
        for job in submitted:
            print(job.job_id)
        print(f"submitted {len(submitted)} of {len(runs)} runs; their logs: {root}/ID/log.txt and {root}/slurm")
        return 0
    with process.lock(root):
        return local.Local(root, local.Listed(runs), jobs).run()


def _train(runs, wanted):
    """Becomes the training of one run."""
    from experiments.sweep import local

    found = next((run for run in runs if run.id == wanted), None)
    if found is None:
        raise ValueError(f"--run: expected one of {', '.join(run.id for run in runs)}, got {wanted!r}")
    command = found.command()
    os.execvpe(command[0], command, os.environ | local.shared_cache(found.root))


def main(argv=None):
    """Entry point."""
    logging.set_verbosity(logging.FATAL)
    from experiments.checkpoint import Refused

    try:
        return launch(*read(sys.argv[1:] if argv is None else argv))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except (ValueError, Refused, OSError, ImportError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
