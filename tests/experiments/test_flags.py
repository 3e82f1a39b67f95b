"""The command line: typed fields at any depth, and one line for every mistake."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from experiments import config, flags
from seqmix.core.mixer import Mixer
from seqmix.core.param import Param
from seqmix.models import LM

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    kind: str  # how
    factor: float = 2.0  # how much, at least 1

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"factor: expected at least 1, got {self.factor}")


@dataclass(frozen=True, kw_only=True)
class Plain(Mixer):
    rate: float = 0.5  # of something

    def params(self):
        return {"in": Param((self.d_model, 4), ("embed", None))}


@dataclass(frozen=True, kw_only=True)
class Rich(Plain):
    heads: int = 4  # how many
    window: int | None = None  # keys
    scaling: Scaling | None = None  # unset
    set_scaling: Scaling | None = Scaling(kind="ntk")  # set
    norm: bool = False  # or not
    implementation: str | None = None  # by name


MIXERS = {1: (Rich(),), 2: (Plain(), Rich()), 4: (Plain(), Plain(rate=0.1), Plain(), Rich(heads=2))}


@pytest.fixture(params=MIXERS)
def parse(request, monkeypatch):
    """flags.parse for a config named toy whose last mixer is a Rich one, at position parse.last."""
    mixers = MIXERS[request.param]
    model = LM(vocab=260, d_model=8, n_layers=len(mixers), mixers=mixers)
    toy = config.Train(name="toy", model=model, data=config.Data(), optim=config.Optim(peak_lr=0.1), steps=10)
    monkeypatch.setattr(flags, "_load", lambda name, given=None: toy)
    last = len(mixers) - 1

    def parse(*arguments):
        return flags.parse(["--config=toy", *(a.replace("LAST", f"model.mixers.{last}") for a in arguments)])

    parse.last, parse.base = last, toy
    return parse


def test_fields_of_every_kind(parse):
    cfg, args = parse(
        "--LAST.heads=8",
        "--LAST.window=16",
        "--LAST.norm=true",
        "--LAST.implementation=chunked",
        "--LAST.set_scaling.factor=4",
        "--LAST.scaling.kind=linear",
        "--model.d-model=64",
        "--model.tie_embeddings=False",
        "--optim.peak-lr=1e-3",
        "--data.path",
        "some/where",
        "--sample-prompt=--config=x y",
        "--steps=3",
        "--workdir=w",
    )
    made = cfg.model.mixers[parse.last]
    assert made == Rich(
        heads=8,
        window=16,
        norm=True,
        implementation="chunked",
        set_scaling=Scaling(kind="ntk", factor=4.0),
        scaling=Scaling(kind="linear"),
    )
    assert cfg.model.mixers[:-1] == parse.base.model.mixers[:-1]
    assert (cfg.model.d_model, cfg.model.tie_embeddings, cfg.optim.peak_lr) == (64, False, 1e-3)
    assert (cfg.data.path, cfg.sample_prompt, cfg.steps) == ("some/where", "--config=x y", 3)
    assert (args.config, args.workdir, args.dry_run) == ("toy", "w", False)


def test_no_flags_is_the_config(parse):
    cfg, args = parse()
    assert cfg == parse.base and args.workdir is None
    assert parse("--dry-run")[1].dry_run


def test_none_is_a_value_where_it_may_be(parse):
    made = parse("--LAST.window=none", "--LAST.set-scaling=None", "--data.path=None")[0]
    assert made.model.mixers[parse.last].window is None
    assert made.model.mixers[parse.last].set_scaling is None


def test_one_width_or_one_for_each_position(parse):
    assert parse("--model.mlp-hidden=16")[0].model.mlp_hidden == 16
    widths = tuple(range(1, parse.last + 3))[: parse.last + 1]
    if len(widths) > 1:
        text = ",".join(map(str, widths))
        assert parse(f"--model.mlp-hidden={text}")[0].model.mlp_hidden == widths


MISTAKES = {
    "--optim.peek-lr=1": "--optim.peek-lr: unknown field, did you mean --optim.peak-lr?",
    "--peak-lr=1": "--peak-lr: unknown field, did you mean --optim.peak-lr?",
    "--model.mixers.9.heads=1": "--model.mixers.9.heads: unknown field, did you mean --LAST.heads?",
    "--LAST.hads=1": "--LAST.hads: unknown field, did you mean --LAST.heads?",
    "--workdri=x": "--workdri: unknown field, did you mean --workdir?",
    "--model.mixers=x": "--model.mixers: expected one of its fields, such as --model.mixers.0.d-model",
    "--LAST.heads=64.5": "--LAST.heads: expected an integer, got '64.5'",
    "--LAST.heads=None": "--LAST.heads: expected an integer, got 'None'",
    "--LAST.window=x": "--LAST.window: expected an integer or None, got 'x'",
    "--LAST.norm=2": "--LAST.norm: expected True or False, got '2'",
    "--LAST.scaling.factor=3": "--LAST.scaling: expected kind too",
    "--LAST.set-scaling.factor=0.5": "--LAST.set-scaling.factor: expected at least 1, got 0.5",
    "--model.mlp-hidden=1,x": "--model.mlp-hidden: expected an integer or integers joined by commas, got '1,x'",
    "--model.d-model=0": "--model.d-model: expected a positive integer, got 0",
    "--optim.peak-lr=abc": "--optim.peak-lr: expected a float, got 'abc'",
    "--optim.peak-lr=nan": "--optim.peak-lr: expected a positive number, got nan",
    "--optim.accumulate=3": "--optim.accumulate: expected a divisor of data.batch_size 8, got 3",
    "--optim.schedule=step": "--optim.schedule: expected cosine or wsd or linear or constant, got 'step'",
    "--mesh.data=0": "--mesh.data: expected a positive size or -1, got 0",
    "--distributed.process=1": "--distributed.process: expected distributed.coordinator and processes beside it, got "
    "'none'",
    "--profile=3,1": "--profile: expected two steps, first and last, got (3, 1)",
    "--optim.peak-lr": "--optim.peak-lr: expected a value, as in --optim.peak-lr=VALUE",
    "--workdir=": "--workdir: expected a value, as in --workdir=VALUE",
    "--config=x": "--config: given twice",
    "peak-lr=1": "peak-lr=1: expected --FIELD=VALUE",
    "-s=1": "-s=1: expected --FIELD=VALUE",
    "--": "--: expected --FIELD=VALUE",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_mistakes_take_one_line(parse, flag, capfd):
    with pytest.raises(ValueError) as caught:
        parse(flag)
    assert str(caught.value) == MISTAKES[flag].replace("LAST", f"model.mixers.{parse.last}")
    assert capfd.readouterr() == ("", "")


def test_a_flag_given_twice(parse):
    with pytest.raises(ValueError, match="^--steps: given twice$"):
        parse("--steps=1", "--steps=1")
    with pytest.raises(ValueError, match="^--optim.peak-lr: given twice$"):
        parse("--optim.peak-lr=1", "--optim.peak_lr=1")


def test_help_lists_fields_values_and_comments(parse, capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    for part in ("--optim.peak-lr", "0.1", f"--model.mixers.{parse.last}.heads", "how many", "--workdir"):
        assert part in shown


def run(*arguments):
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    return done, time.monotonic() - start


def test_the_program_answers_a_typo_in_one_line():
    for arguments, message in {
        ("--config=mamba2_1B",): "error: --config: unknown config 'mamba2_1B', did you mean 'mamba2_1b'?",
        ("--config=quickstart", "--optim.peek-lr=1"): "error: --optim.peek-lr: unknown field, did you mean",
        (): "error: --config: expected one of hybrid_1b, mamba2_130m, mamba2_1b, mqar, quickstart, transformer_1b",
    }.items():
        done, seconds = run(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(message) and done.stderr.count("\n") == 1
        assert seconds < 15  # two where nothing else runs


def test_the_program_lists_its_configs():
    done, _ = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    for name in ("quickstart", "mamba2_1b"):
        assert f"  {name} " in done.stdout
    assert "layers" in done.stdout
