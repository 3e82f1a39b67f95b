"""`experiments.compile`: CPU devices stand in for chips, so the step is the real one and only the numbers of the chip
are borrowed; what libtpu compiles is in tests/pods.
"""

import dataclasses
import json
import math

import jax
import pytest

from experiments import flags
from experiments.compile import __main__ as command
from experiments.compile import chips, fit, paper, scaling, step

TINY = (
    "--config=mamba2_130m",
    "--model.d-model=64",
    "--model.vocab=512",
    "--model.n-layers=2",
    "--model.loss-chunk=64",
    "--model.mixers.0.head-dim=32",  # four heads
    "--model.mixers.0.d-state=16",
    "--model.mixers.0.chunk=32",
    "--data.seq-len=128",
    "--data.batch-size=16",
)
SLICE = chips.parse("v5p:2x2x2")


def config(*more):
    return flags.parse([*TINY, *more])[0]


@pytest.fixture(scope="module")
def report():
    return step.compiled(config("--mesh.data=2", "--mesh.fsdp=4"), SLICE, jax.devices())


def test_the_report_is_plain_and_its_parts_add_up(report):
    assert json.loads(json.dumps(report)) == report
    memory = report["memory"]
    assert sum(memory["kinds"].values()) == memory["total"]
    assert 0 < memory["kinds"]["temporary"] < memory["total"] < memory["chip"]
    assert memory["free"] == 1 - memory["total"] / memory["chip"]
    assert report["step_seconds"] == [max(report["seconds"].values()), sum(report["seconds"].values())]


def test_weights_and_moments_are_those_of_one_share(report):
    weights = 4 * config().model.count() / 4  # fsdp=4
    assert report["memory"]["kinds"]["weights"] == pytest.approx(weights, rel=0.1)  # a few are too small to cut
    assert report["memory"]["kinds"]["moments"] == pytest.approx(2 * report["memory"]["kinds"]["weights"], abs=64)


def test_the_program_has_the_flops_of_the_formula_and_what_remat_repeats(report):
    # remat=full runs the forward pass twice; the formula leaves elementwise work in, the program's count does not.
    expected = report["model_flops"] / 8 * 4 / 3
    assert 0.75 * expected < report["flops"] < 1.1 * expected


def test_gradients_are_exchanged_over_both_axes_of_the_batch(report):
    over = {axis for one in report["collectives"] for axis in one["axes"].split("+")}
    assert over == {"data", "fsdp"}
    assert all(one["bytes"] > 0 and one["seconds"] > 0 for one in report["collectives"])


def test_the_estimate_on_paper_is_near_what_was_compiled(report):
    sizes = dict(data=2, fsdp=4, context=1, model=1)
    guess = paper.estimate(config(), SLICE, sizes)
    assert guess["mesh"] == report["mesh"] and guess["model_flops"] == report["model_flops"]
    assert guess["flops"] == pytest.approx(report["flops"], rel=0.25)


def test_more_chips_of_an_axis_never_hold_more_weights():
    held = [paper._weights(config().model, fsdp, 1)[0] for fsdp in (1, 2, 4, 8)]
    assert held == sorted(held, reverse=True) and held[-1] < held[0] / 4


def test_layouts_are_those_that_a_run_takes():
    cfg = config()
    found = list(paper.layouts(cfg, 8))
    assert {"data": 1, "fsdp": 2, "context": 2, "model": 2} in found
    for mesh in found:
        assert math.prod(mesh.values()) == 8
        assert cfg.data.batch_size % (mesh["data"] * mesh["fsdp"]) == 0
    assert not any(mesh["model"] == 8 for mesh in found)  # four heads


def test_fit_compiles_the_best_that_fits_and_passes_over_what_does_not(monkeypatch):
    listed = fit.candidates(config(), SLICE)
    assert [one["step_seconds"][1] for one in listed] == sorted(one["step_seconds"][1] for one in listed)
    asked = []

    def compiled(cfg, topology, devices):
        asked.append(cfg)
        if len(asked) == 1:
            raise step.TooLarge("too large")
        return {"memory": {"free": 0.5}}

    monkeypatch.setattr(step, "compiled", compiled)
    _, report = fit.best(config(), SLICE, 3)
    assert report == {"memory": {"free": 0.5}} and len(asked) == 2
    assert asked[0] == fit.config(config(), listed[0]) != asked[1]


def test_a_chip_too_small_has_no_layout():
    small = dataclasses.replace(SLICE, chip=dataclasses.replace(SLICE.chip, memory=1e5))
    assert fit.best(config(), small, 3) == ([], None)


def test_where_a_chip_stands_and_how_fast_its_links_are():
    pod = chips.parse("v5p:4x4x4")
    assert [pod.place(i) for i in (0, 1, 4, 16, 63)] == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (3, 3, 3)]
    link = pod.chip.link
    row, part = [(0, 0, z) for z in range(4)], [(0, 0, z) for z in range(2)]
    assert pod.rate(row) == 2 * link  # a side of 4 closes to a ring
    assert pod.rate(part) == link
    assert pod.rate([pod.place(i) for i in range(64)]) == 6 * link
    hosts = chips.parse("h100:2x8")
    assert hosts.rate([(0, 0), (0, 7)]) == hosts.chip.link > hosts.rate([(0, 0), (1, 0)]) == hosts.chip.outward


@pytest.mark.parametrize("size", [1, 2, 8, 32, 256])
@pytest.mark.parametrize("chip", chips.CHIPS)
def test_standard_boxes_have_their_size(chip, size):
    assert chips.standard(chip, size).size == size


def test_scaling_divides_the_time_until_links_or_rows_run_out(tmp_path):
    found = scaling.curves(models=("mamba2_1b",), lengths=(8192, 1_048_576), sizes=(1, 16, 64, 256))
    strong = [one for one in found if one["kind"] == "strong" and one["fits"]]
    short = [one["step_seconds"][0] for one in strong if one["length"] == 8192]
    assert len(short) == 4 and short == sorted(short, reverse=True)
    assert short[0] / short[-1] == pytest.approx(256, rel=0.3)
    cut = {one["size"]: one["mesh"]["context"] for one in strong if one["length"] == 1_048_576}
    assert cut[256] > 1  # four rows do not go round
    scaling.show(found)
    pytest.importorskip("matplotlib", reason="draws a picture")
    assert [path.stat().st_size > 10_000 for path in scaling.draw(found, tmp_path)] == [True, True]


MISTAKES = {
    "--topology: expected a topology such as v5p:4x4x4, got none": (*TINY,),
    "--topology: expected one of v5e, v5p, v6e, h100 before the colon, got 'v5x', did you mean v5p?": (
        *TINY,
        "--topology=v5x:2x2",
    ),
    "--topology: expected 3 positive sides as in v5p:4x4x4, got 'v5p:4x4'": (*TINY, "--topology=v5p:4x4"),
    "--topology: expected at most 256 chips, got 512 in v5e:16x32": (*TINY, "--topology=v5e:16x32"),
    "--topology: expected a value, as in --topology=VALUE": (*TINY, "--topology"),
    "--tries: expected --fit beside it": (*TINY, "--topology=v5p:2x2x1", "--tries=2"),
    "--tries: expected an integer of at least 1, got '0'": (*TINY, "--topology=v5p:2x2x1", "--fit", "--tries=0"),
    "--fit: expected no value, got 'yes'": (*TINY, "--topology=v5p:2x2x1", "--fit=yes"),
    "--topologie: unknown field, did you mean --topology?": (*TINY, "--topologie=v5p:2x2x1"),
    "--workdir: belongs to experiments.train, nothing is run here": (*TINY, "--workdir=x", "--topology=v5p:2x2x1"),
    "--scaling: expected one of v5e, v5p, v6e, h100, got 'v9'": ("--scaling=v9",),
    "--config: expected nothing but --out beside --scaling, which has its own configs": ("--scaling", TINY[0]),
}


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments): (exit code, stdout, stderr), with the CPU's devices for every topology of eight."""
    monkeypatch.setattr(chips, "environment", lambda: None)

    def call(*arguments):
        code = command.main(list(arguments))
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_is_one_line(run, message):
    assert run(*MISTAKES[message]) == (2, "", f"error: {message}\n")


def test_what_a_run_refuses_is_refused_before_anything_compiles(run, monkeypatch):
    monkeypatch.setattr(chips, "devices", lambda topology: jax.devices())
    code, out, err = run(*TINY, "--topology=v5p:2x2x2", "--mesh.context=3", "--mesh.data=1")
    assert (code, out) == (2, "") and err.endswith(
        "error: --data.seq-len: expected a multiple of context = 3, got 128\n"
    )
    code, out, err = run(*TINY, "--topology=v5p:2x2x2", "--mesh.data=1", "--mesh.model=8")
    assert (code, out) == (2, "") and "expected a multiple of 8" in err and err.count("error: ") == 1


def test_without_a_compiler_the_command_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr(chips, "_installed", lambda module: False)
    assert run(*TINY, "--topology=v5e:2x4")[2].startswith("error: --topology: TPUs need libtpu: make targets")
    assert run(*TINY, "--topology=h100:1x8")[2].startswith(
        "error: --topology: GPUs need jax's CUDA plug-in: make targets"
    )


def test_the_command_prints_tables_and_writes_json(run, report, monkeypatch, tmp_path):
    monkeypatch.setattr(chips, "devices", lambda topology: jax.devices())
    monkeypatch.setattr(step, "compiled", lambda cfg, topology, devices: report | {"involuntary_resharding": 3})
    code, out, _ = run(*TINY, "--topology=v5p:2x2x2", f"--out={tmp_path}")
    assert code == 0
    for words in ("not run", "Memory of a chip", "Collectives of a step", "MFU at most", "all-reduce", "3 times"):
        assert words in out
    written = json.loads((tmp_path / "mamba2_130m-v5p-2x2x2-128.json").read_text())
    assert written["chips"] == 8 and written["mesh"] == {"data": 2, "fsdp": 4, "context": 1, "model": 1}


def test_a_step_too_large_ends_with_one_line_and_code_1(run, monkeypatch):
    monkeypatch.setattr(chips, "devices", lambda topology: jax.devices())

    def refuse(trainer, state, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 120.50G of 95.74G hbm.")

    monkeypatch.setattr("experiments.loop.Trainer.compile_step", refuse)
    code, out, err = run(*TINY, "--topology=v5p:2x2x2")
    assert (code, out) == (1, "")
    assert err.endswith("error: a chip of v5p:2x2x2 has 95.7 GiB, the step needs 120.5 GiB\n")


def test_help_names_every_flag_and_that_nothing_is_run(run, capsys):
    with pytest.raises(SystemExit) as ended:
        run("--help")
    told = capsys.readouterr().out
    assert ended.value.code == 0
    assert "Nothing is run" in told and all(f"--{name}" in told for name in command.OWN)
