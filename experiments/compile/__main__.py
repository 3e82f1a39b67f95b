"""Compiles a config's training step for chips that are not here: `python -m experiments.compile --config=NAME
--topology=v5p:4x4x4 [--field=value ...]`. Exit codes: 0 it fits, 1 it does not, 2 a mistake in the command.
"""

import sys
from pathlib import Path

USAGE = """usage: python -m experiments.compile --config=NAME --topology=TOPOLOGY [--field=value ...]
       python -m experiments.compile --scaling[=CHIP]

Compiles the training step of a config, with its mesh, for chips that this machine does not have, and prints memory by
kind, FLOPs, collectives and a bound on the step time. Nothing is run: the times are estimates (docs/compile.md).

  --topology=T      v5e:16x16, v5p:4x4x4, v6e:8x8 (TPU slices, up to 256 chips) or h100:1x8 (hosts x GPUs).
                    Their compilers come with `make targets`, for .venv-targets/bin/python
  --fit             search mesh, microbatches and remat on paper, and compile the best that fits
  --tries=N         layouts that --fit compiles at most (3)
  --scaling[=CHIP]  estimate mamba2_1b, transformer_1b and hybrid_1b on 1 to 256 chips (v5p), and draw them
  --out=DIR         folder of the JSON and the picture (runs/compile)
  --field=value     any field of the config, as with experiments.train: --mesh.fsdp=64 --data.seq-len=8192
"""
SWITCHES = ("fit", "scaling")
OWN = ("topology", "tries", "out", *SWITCHES)


def read(argv):
    """(own flags by name, the config or None with --scaling); raises ValueError in one line."""
    from experiments import flags

    words = [f"{word}=" if word.lstrip("-") in SWITCHES else word for word in argv]
    given = flags.split(words)
    own = {name: given.pop(name) for name in list(given) if name in OWN}
    if "help" in given:
        print(USAGE, end="")
        raise SystemExit(0)
    for name, text in own.items():
        if not text and name not in SWITCHES:
            raise ValueError(f"--{name}: expected a value, as in --{name}=VALUE")
    if own.get("fit"):
        raise ValueError(f"--fit: expected no value, got {own['fit']!r}")
    tries = own.get("tries", "3")
    if not (tries.isdecimal() and int(tries) > 0):
        raise ValueError(f"--tries: expected an integer of at least 1, got {tries!r}")
    if "scaling" in own:
        _alone(own, given)
        return own, None
    if "tries" in own and "fit" not in own:
        raise ValueError("--tries: expected --fit beside it")
    cfg, args = flags.parse([f"--{n}" if text is None else f"--{n}={text}" for n, text in given.items()], OWN)
    for name in ("workdir", "dry_run", "allow_data_change"):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')}: belongs to experiments.train, nothing is run here")
    if "topology" not in own:
        raise ValueError("--topology: expected a topology such as v5p:4x4x4, got none")
    return own, cfg


def _alone(own, given):
    from experiments.compile import chips

    for name in (*(name for name in own if name not in ("scaling", "out")), *given):
        raise ValueError(f"--{name}: expected nothing but --out beside --scaling, which has its own configs")
    if own["scaling"] and own["scaling"] not in chips.CHIPS:
        raise ValueError(f"--scaling: expected one of {', '.join(chips.CHIPS)}, got {own['scaling']!r}")


def main(argv=None):
    """Parses, compiles or estimates, prints and writes; returns the exit code."""
    from experiments.compile import chips

    chips.environment()
    from experiments import cli, flags

    cfg = None
    try:
        own, cfg = read(sys.argv[1:] if argv is None else argv)
        folder = Path(own.get("out", "runs/compile"))
        return _scaling(own, folder) if cfg is None else _compile(own, cfg, folder)
    except ValueError as error:
        return cli.refuse(flags.named(error, cfg))


def _scaling(own, folder):
    from experiments import files, progress
    from experiments.compile import scaling

    with progress.phase("estimating"):
        found = scaling.curves(own["scaling"] or "v5p")
    scaling.show(found)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / "scaling.json", found)
    for path in (folder / "scaling.json", *scaling.draw(found, folder)):
        print(path)
    return 0


def _compile(own, cfg, folder):
    from experiments import cli, files, progress
    from experiments.compile import chips, fit, show, step

    topology = chips.parse(own["topology"])
    devices = chips.devices(topology)
    listed = None
    try:
        if "fit" in own:
            listed, report = fit.best(cfg, topology, int(own.get("tries", "3")), devices)
            show.layouts(listed)
            if report is None:
                return cli.refuse(f"no layout of {cfg.name} that was tried fits {topology}", code=1)
        else:
            with progress.phase(f"compiling {cfg.name} for {topology}"):
                report = step.compiled(cfg, topology, devices)
    except step.TooLarge as error:
        return cli.refuse(error, code=1)
    show.report(report)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{cfg.name}-{str(topology).replace(':', '-')}-{cfg.data.seq_len}.json"
    files.write_json(path, report | ({"layouts": listed[:20]} if listed else {}))
    print(path)
    return 0 if report["memory"]["free"] > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
