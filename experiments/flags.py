"""The command line of `experiments.train`: `--config=NAME` (or the config.json of a run), then any field of that
config as a typed flag, and any argument of the config's function (`--config=mqar --mixer=deltanet`).

`--model.d-model=64 --model.mixers.0.d-state=64 --optim.peak-lr=1e-3`: dots go down, a number picks from a
tuple, `-` and `_` are the same. tyro reads the values by their fields' types and prints the help; every
mistake is a ValueError of one line that names the flag and the nearest right one.
"""

import ast
import difflib
import importlib
import inspect
import sys
import types
import typing
from pathlib import Path

import tyro

from experiments import cli, fields, serialize

CONFIGS = Path(__file__).parents[1] / "configs"
OWN = ("config", "workdir", "dry-run", "allow-data-change", "help")  # flags beside the config's fields
SWITCHES = ("dry-run", "allow-data-change")  # True without a value; attributes of what `parse` returns
PROGRAM = (
    "python -m experiments.train --config={} [--field=value ...] [--workdir=DIR] [--dry-run] [--allow-data-change]"
)


def parse(argv, also=()):
    """(cfg, args) from the arguments after the program's name; args has config, workdir (or None), dry_run, and
    changed, the names of the fields given. `also` are flags that another program has read already.

    `--help` prints (the configs, or with --config the fields and their defaults) and exits with 0. Raises
    ValueError in one line.
    """
    given = split(argv)
    helps = given.pop("help", None) is not None
    name = _text("config", given.pop("config")) if "config" in given else None
    if name is None and helps:
        print(_overview())
        raise SystemExit(0)
    cfg = _load(name, given)
    if helps:
        _help(cfg, name)
    args = types.SimpleNamespace(
        config=name,
        workdir=_text("workdir", given.pop("workdir")) if "workdir" in given else None,
        **{name.replace("-", "_"): fields.read(name, given.pop(name, "False"), bool) for name in SWITCHES},
    )
    args.changed = tuple(given)
    return _change(cfg, given, also), args


def override(cfg, changes):
    """The config with {dotted name: value} written into it; `-` and `_` are the same in a name.

    A value is read as its flag's text would be, so it gets the field's type; a dataclass, a tuple of them, or
    anything else that has no text replaces what is there, before the fields below it are read. Raises ValueError
    in one line.
    """
    changes = {name.replace("_", "-"): value for name, value in changes.items()}
    plain = {name: text for name, value in changes.items() if (text := _as_text(value)) is not None}
    for name in (name for name in changes if name not in plain):
        if not any(known == name or known.startswith(f"{name}.") for known, _ in fields.leaves(cfg)):
            raise ValueError(fields.unknown(name, dict(fields.leaves(cfg)), OWN))
        cfg = fields.replace(cfg, {tuple(name.replace("-", "_").split(".")): changes[name]})
    return _change(cfg, plain)


def _as_text(value):
    if isinstance(value, tuple) and value and all(isinstance(item, (int, float, str)) for item in value):
        return ",".join(map(str, value))
    return str(value) if value is None or isinstance(value, (bool, int, float, str)) else None


def _change(cfg, given, also=()):
    """The config with {flag: text} read and written into it."""
    known = dict(fields.leaves(cfg))
    changes = {}
    for flag, text in given.items():
        if flag not in known:
            raise ValueError(fields.unknown(flag, known, (*OWN, *also)))
        changes[tuple(flag.replace("-", "_").split("."))] = fields.read(flag, _text(flag, text), known[flag])
    try:
        return fields.replace(cfg, changes) if changes else cfg
    except ValueError as error:
        raise ValueError(named(error, cfg)) from None


def named(error, cfg=None):
    """What an error says, with the flag `--optim.peak-lr` for a leading field `optim.peak_lr` of `cfg`, or for
    leading `model: d_model`.
    """
    known = [] if cfg is None else [name for name, _ in fields.leaves(cfg)]
    flag, parts = "", str(error).split(": ")
    while len(parts) > 1:
        longer = f"{flag}.{parts[0]}".removeprefix(".").replace("_", "-")
        if longer not in known and not any(name.startswith(f"{longer}.") for name in known):
            break
        flag, parts = longer, parts[1:]
    return ": ".join([f"--{flag}", *parts] if flag else parts)


def fail(message, code=2):
    """Ends the process with one line; `error: ` comes first."""
    sys.exit(cli.refuse(message, code))


def split(argv):
    """{flag: text} of `--flag=text` or `--flag text`, None where there is no text; names with dashes.

    Raises ValueError in one line.
    """
    given, rest = {}, list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in ("-h", "--help"):
            given["help"] = ""
            continue
        if not argument.startswith("--") or argument == "--":
            raise ValueError(f"{argument}: expected --FIELD=VALUE")
        flag, equals, text = argument.removeprefix("--").partition("=")
        flag = flag.replace("_", "-")
        if flag in given:
            raise ValueError(f"--{flag}: given twice")
        if not equals:
            if flag in SWITCHES:
                text = "True"
            else:
                text = rest.pop(0) if rest and not rest[0].startswith("--") else None
        given[flag] = text
    return given


def _text(flag, text):
    if text is None or (text == "" and flag in OWN):
        raise ValueError(f"--{flag}: expected a value, as in --{flag}=VALUE")
    return text


# Configs


def _names():
    return sorted(path.stem for path in CONFIGS.glob("*.py") if not path.stem.startswith("_"))


def _load(name, given=None):
    """The config called `name`; what its function takes is popped from the given flags."""
    names = _names()
    if name and name.endswith(".json"):
        return serialize.load(Path(name))
    if name is None:
        raise ValueError(f"--config: expected one of {', '.join(names)}, got none")
    if name not in names:
        nearest = difflib.get_close_matches(name, names, 1, 0)[0]
        raise ValueError(f"--config: unknown config {name!r}, did you mean {nearest!r}? ({', '.join(names)})")
    function = _function(name)
    hints = typing.get_type_hints(function)
    values = {}
    for argument in inspect.signature(function).parameters:
        flag = argument.replace("_", "-")
        if flag in (given or {}):
            values[argument] = fields.read(flag, _text(flag, given.pop(flag)), hints[argument])
    try:
        return function(**values)
    except ValueError as error:  # of an argument, by its name, or of a field
        named = str(error).partition(":")[0] in hints
        raise ValueError(f"--{error}" if named else f"--config={name}: {error}") from None


def _function(name):
    return getattr(importlib.import_module(f"configs.{name}"), name)


def _arguments(name):
    """The flags that the config's own function takes, as text for the help."""
    if name not in _names():  # the config.json of a run
        return ""
    parameters = inspect.signature(_function(name)).parameters.values()
    return ", ".join(f"--{p.name.replace('_', '-')} ({p.default})" for p in parameters)


def _overview():
    """What `--help` says without a config; the configs' docstrings are read without importing them."""
    lines = [f"usage: {PROGRAM.format('NAME')}", "", "Trains a language model; the same command resumes.", ""]
    for name in _names():
        functions = ast.parse((CONFIGS / f"{name}.py").read_text()).body
        made = next(f for f in functions if isinstance(f, ast.FunctionDef) and f.name == name)
        lines.append(f"  {name:16} {ast.get_docstring(made).splitlines()[0]}")
    return "\n".join([*lines, "", "--config=NAME --help lists the fields of a config and their values."])


def _help(cfg, name):
    arguments = _arguments(name)
    own = f" Of the config itself: {arguments}." if arguments else ""
    tyro.cli(
        type(cfg),
        default=cfg,
        args=["--help"],
        prog=PROGRAM.format(name),
        description="Every field is a flag, --field=value. --workdir: the run's directory (runs/NAME). "
        "--dry-run: print parameters, FLOPs, memory and shardings, and end. --allow-data-change: resume on other "
        f"data than the run had, and note it in the workdir.{own}",
        config=fields.MARKERS,
    )
