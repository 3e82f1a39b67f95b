"""Sweeps before anything runs: grids, ids, overrides, mistakes in the command, what is emitted for schedulers."""

import dataclasses
import json
from pathlib import Path

import pytest

from configs.quickstart import quickstart
from experiments import flags, serialize
from experiments.sweep import __main__ as command_line
from experiments.sweep import emit, grid, plan
from seqmix.mixers.recurrent.retnet import RetNet


def test_a_grid_has_every_choice_once():
    made = grid(optim__peak_lr=(0.1, 0.2), seed=range(3))
    assert len(made) == 6 and made[1] == {"optim.peak_lr": 0.1, "seed": 1}
    assert len({tuple(choice.items()) for choice in made}) == 6
    with pytest.raises(ValueError, match="seed: expected a list of at least one value"):
        grid(seed=())


def test_an_id_is_that_of_the_resolved_config(tmp_path):
    base = quickstart()
    same = [
        {"optim.peak_lr": 1e-4, "seed": 3},
        {"seed": 3, "optim.peak-lr": "0.0001"},
        "--seed=3 --optim.peak-lr=1e-4",
        ["--optim.peak-lr", "1e-4", "--seed", "3"],
    ]
    (run,) = plan.runs(same, base, tmp_path)
    assert run.cfg == dataclasses.replace(base, seed=3, optim=dataclasses.replace(base.optim, peak_lr=1e-4))
    assert len({r.id for r in plan.runs([{"seed": seed} for seed in range(4)], base, tmp_path)}) == 4
    run.command()
    assert serialize.from_json(json.loads((run.workdir / "config.json").read_text())) == run.cfg


def test_the_config_of_a_run_is_a_config(tmp_path):
    (run,) = plan.runs([{"model.mixers": (RetNet(heads=4),)}], quickstart(), tmp_path)
    path = run.command()[3].removeprefix("--config=")
    assert flags.parse([f"--config={path}"])[0] == run.cfg
    assert flags.parse([f"--config={path}", "--steps=3"])[0] == dataclasses.replace(run.cfg, steps=3)
    Path(path).write_text("{")
    with pytest.raises(ValueError, match="^--config: .*config.json: Expecting"):
        flags.parse([f"--config={path}"])
    with pytest.raises(ValueError, match="^--config: .*none.json: No such file"):
        flags.parse([f"--config={tmp_path}/none.json"])


def test_a_mixer_is_replaced_before_its_fields_are_read(tmp_path):
    overrides = {"model.mixers.0.heads": 2, "model.mixers": (RetNet(heads=4),)}
    (run,) = plan.runs([overrides], quickstart(), tmp_path)
    assert run.cfg.model.mixers == (RetNet(heads=2),)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            {"optim.peak_lrr": 1},
            r"^run 1 of the sweep: --optim.peak-lrr: unknown field, did you mean --optim.peak-lr\?",
        ),
        ({"steps": "many"}, "^run 1 of the sweep: --steps: expected an integer, got 'many'"),
        ({"steps": 0}, "^run 1 of the sweep: (--)?steps: expected an integer of at least 1, got 0"),
        ({"model.mixerz": (RetNet(),)}, "^run 1 of the sweep: --model.mixerz: unknown field, did you mean"),
        ("--seed", "^run 1 of the sweep: expected --FIELD=VALUE, got seed"),
        (3, "^run 1 of the sweep: expected a dict of overrides or flags, got int"),
        ({"data.seed": 1}, "^run 1 of the sweep: --data.seed: the sweep sets it, so the command line cannot"),
    ],
)
def test_an_override_that_does_not_fit_is_named(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        plan.runs([{"seed": 1}, overrides], quickstart(), tmp_path, fixed=("data.seed",))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sweep=mixer"], "error: --sweep: unknown sweep 'mixer', did you mean 'mixers'? (mixers)"),
        ([], "error: --sweep: expected a name in configs/sweeps or a file, got none"),
        (["--sweep=mixers", "--jbos=2"], "error: --jbos: unknown field, did you mean --jobs?"),
        (["--sweep=mixers", "--jobs=0"], "error: --jobs: expected an integer of at least 1, got '0'"),
        (["--sweep=mixers", "--sampler=optuna"], "error: --sampler=optuna, --trials=N: expected both or neither"),
        (["--sweep=mixers", "--emit=make"], "error: --emit: expected skypilot or jobset, got 'make'"),
    ],
)
def test_a_mistake_in_the_command_is_one_line(tmp_path, capsys, arguments, message):
    assert command_line.main(["--config=quickstart", f"--workdir={tmp_path / 'sweep'}", *arguments]) == 2
    assert capsys.readouterr().err == message + "\n"
    assert not (tmp_path / "sweep").exists()


def test_the_mixers_sweep_lists_sixteen_runs(tmp_path, capsys):
    arguments = ["--config=quickstart", "--sweep=mixers", f"--workdir={tmp_path}"]
    assert command_line.main([*arguments, "--list"]) == 0
    assert "16 runs" in (listed := capsys.readouterr().out) and listed.count("waiting") == 16
    assert command_line.main([*arguments, "--print", "--steps=7"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(set(printed)) == 16 and all("--steps=7" in line and "--run=" in line for line in printed)


@pytest.mark.parametrize("kind", ["skypilot", "jobset"])
def test_emitted_yaml_holds_the_command(tmp_path, kind):
    yaml = pytest.importorskip("yaml")
    runs = plan.runs([{"seed": 0}, {"seed": 1}], quickstart(), tmp_path)
    emit.write(kind, runs, ["python", "-m", "experiments.sweep", "--config=quickstart"], tmp_path, image="a/b:1")
    for run in runs:
        made = yaml.safe_load((tmp_path / kind / f"{run.id}.yaml").read_text())
        if kind == "skypilot":
            assert made["run"].endswith(f"-m experiments.sweep --config=quickstart --run={run.id}")
        else:
            pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
            assert pod["containers"][0]["command"][-1] == f"--run={run.id}" and pod["containers"][0]["image"] == "a/b:1"


def test_trials_are_listed_while_the_sweep_runs_and_before(tmp_path, capsys):
    pytest.importorskip("optuna")
    from experiments import process
    from experiments.sweep import tuner

    root, sweep = tmp_path / "sweep", tmp_path / "rates.py"
    sweep.write_text("def space(trial):\n    return {'optim.peak_lr': trial.suggest_float('lr', 1e-3, 1e-2)}\n")
    arguments = ["--config=quickstart", f"--sweep={sweep}", f"--workdir={root}", "--sampler=optuna", "--trials=2"]
    assert command_line.main([*arguments, "--list"]) == 0
    assert capsys.readouterr().out == "no trial has been drawn yet; without --list, 2 are\n" and not root.exists()
    with process.lock(root):
        drawn = tuner.Trials(plan.function(str(sweep), "space"), quickstart(), root, (), 2).next()
        assert command_line.main([*arguments, "--list"]) == 0
    assert drawn.id in capsys.readouterr().out
