"""Reports: groups, spread, runs that are broken or not at their end, and the page in a real browser."""

import dataclasses
import html
import json
import math
import re
import statistics

import numpy as np
import pytest

from configs.quickstart import quickstart
from experiments import serialize
from experiments.report import __main__ as command_line
from experiments.report import chart, compare, curves, page, read
from experiments.sweep import plan
from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.recurrent.retnet import RetNet
from tests.browser import look

STEPS = 40
PROBE = """<script>
const button = document.querySelector(".legend button[data-group='0']");
const before = document.querySelectorAll("figure .off[data-group='0']").length;
button.click();
const after = document.querySelectorAll("figure .off[data-group='0']").length;
const svg = document.querySelector("figure[data-chart='loss'] svg"), box = svg.getBoundingClientRect();
const where = {clientX: box.left + box.width / 2, clientY: box.top + box.height / 2};
svg.dispatchEvent(new PointerEvent("pointermove", where));
document.body.dataset.seen = JSON.stringify({before, after, pressed: button.getAttribute("aria-pressed"),
  tip: document.querySelector(".tip:not(.off)").textContent, width: document.documentElement.scrollWidth});
</script></body>"""


def config(mixer, lr, seed):
    base = quickstart()
    model = dataclasses.replace(base.model, mixers=(mixer,), n_layers=2)
    return dataclasses.replace(
        base, model=model, optim=dataclasses.replace(base.optim, peak_lr=lr), seed=seed, steps=STEPS
    )


def write(root, cfg, bits, end=STEPS, fingerprint="f"):
    """The directory of a run that made `end` steps."""
    run = plan.Run(cfg, {}, root)
    folder = run.workdir
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(serialize.to_json(cfg)))
    (folder / "data.json").write_text(json.dumps({"fingerprint": fingerprint}))
    lines = []
    for step in range(1, end + 1):
        loss = 2 + 3 * math.exp(-step / 20) + 0.1 * cfg.seed
        lines.append({"kind": "train", "step": step, "loss": loss, "grad_norm": 1 / step, "lr": 1e-3})
        if step % 10 == 0:
            lines.append({"kind": "speed", "step": step, "tokens_per_second": 1000.0 + step, "mfu": 0.31})
            lines.append({"kind": "val", "step": step, "loss": loss, "bits_per_byte": loss * 1.4})
    if end == STEPS:
        lines.append({"kind": "final", "step": end, "loss": bits / 1.4, "bits_per_byte": bits})
        report = {"step": end, "loss": bits / 1.4, "bits_per_byte": bits, "prompt": "a < b", "sample": "</script>&"}
        (folder / "report.json").write_text(json.dumps(report | {"device": "toy", "devices": 1}))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return run.id


MIXERS = (Attention(heads=4, kv_heads=4, head_dim=32), RetNet(heads=4))


@pytest.fixture
def eight(tmp_path):
    """Two mixers x two learning rates x two seeds."""
    root = tmp_path / "eight"
    ids = []
    for m, mixer in enumerate(MIXERS):
        for lr in (1e-3, 3e-3):
            ids += [write(root, config(mixer, lr, seed), 2 + m + 100 * lr + 0.1 * seed) for seed in (0, 1)]
    return root, ids


def test_runs_are_grouped_over_seeds_with_their_spread(eight):
    found = compare.groups(read.find([eight[0]]))
    assert [group.label for group in found] == [
        "Attention · peak_lr=0.001",
        "Attention · peak_lr=0.003",
        "RetNet · peak_lr=0.001",
        "RetNet · peak_lr=0.003",
    ]
    for group, mean in zip(found, (2.1, 2.3, 3.1, 3.3)):
        spread = group.spread(compare.BITS.of)
        assert spread.n == 2 and [run.cfg.seed for run in group.runs] == [0, 1]
        np.testing.assert_allclose(spread.mean, mean + 0.05)
        np.testing.assert_allclose(spread.sd, statistics.stdev([0, 0.1]))
    assert len({(group.colour, group.dash) for group in found}) == 4
    assert [group.colour for group in found][0] == found[1].colour != found[2].colour  # one colour a mixer
    ((path, lines),) = compare.numeric(found)
    assert path == "optim.peak_lr" and [[value for value, _ in line] for line in lines] == [[1e-3, 3e-3]] * 2


def test_one_value_has_no_deviation():
    assert compare.spread([1.5]) == compare.Spread(1.5, None, 1, (1.5,))
    assert compare.spread([]).mean is None


def test_two_of_one_class_are_told_apart_by_their_fields(tmp_path):
    for heads in (2, 4):
        write(tmp_path, config(RetNet(heads=heads), 1e-3, 0), 2.0)
    labels = [group.label for group in compare.groups(read.find([tmp_path]))]
    assert labels == ["RetNet(heads=2)", "RetNet(heads=4)"]


def test_costs_are_those_of_the_mixers(eight):
    costs = compare.costs(compare.groups(read.find([eight[0]])))
    retnet = RetNet(heads=4, d_model=128)
    seq = quickstart().data.seq_len
    (found,) = (cost for cost in costs if cost.name.startswith("RetNet"))
    assert len(costs) == 2 and found.flops == retnet.flops(1, seq) / seq
    assert found.state == tuple(retnet.state_size(seq * times) for times in compare.CONTEXTS)
    (attention,) = (cost for cost in costs if cost.name.startswith("Attention"))
    assert attention.state[0] < attention.state[1] < attention.state[2]


def test_runs_that_are_not_whole_are_shown_as_such(tmp_path):
    whole = write(tmp_path, config(MIXERS[0], 1e-3, 0), 2.0)
    half = write(tmp_path, config(MIXERS[0], 1e-3, 1), 2.0, end=17, fingerprint="g")
    with open(tmp_path / half / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st\nnull\n[1]\n{"kind": "odd", "step": 1}\n')
    failed = write(tmp_path, config(MIXERS[0], 1e-3, 2), 2.0, end=3)
    (tmp_path / failed / "outcome.json").write_text(json.dumps({"code": 1, "reason": "exit code 1"}))
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    waiting = tmp_path / "waiting"
    waiting.mkdir()
    (waiting / "config.json").write_text(json.dumps(serialize.to_json(config(MIXERS[1], 1e-3, 0))))
    runs = {run.id: run for run in read.find([tmp_path])}
    names = {name: run.state.name for name, run in runs.items()}
    assert names == {
        whole: "finished",
        half: "unfinished",
        failed: "failed",
        "broken": "broken",
        "waiting": "waiting",
    }
    assert runs[half].state.step == 17 and runs[half].column("train", "loss")[1].size == 17
    text = page.page(list(runs.values()), "some")
    assert all(name in text for name in names) and "exit code 1" in text
    assert "did not all read the same data" in text
    group = compare.groups(list(runs.values()))[0]
    assert group.spread(compare.BITS.of).n == 1  # unfinished runs have no final score


def test_a_config_of_another_version_is_still_shown(tmp_path):
    name = write(tmp_path, config(MIXERS[0], 1e-3, 0), 2.0)
    path = tmp_path / name / "config.json"
    path.write_text(path.read_text().replace('"heads"', '"heds"'))
    (run,) = read.find([tmp_path])
    assert run.cfg is None and run.state.name == "finished"
    assert name in page.page([run], "old")


def test_long_curves_are_averaged_over_equal_stretches():
    steps, values = np.arange(1.0, 10_001), np.arange(1.0, 10_001) * 2
    xs, ys = curves.thinned(steps, values)
    assert xs.size == curves.POINTS
    np.testing.assert_allclose(ys, 2 * xs)
    np.testing.assert_allclose(np.average(ys), np.average(values), rtol=1e-2)  # stretches differ by one step at most


def test_the_mean_is_over_steps_that_all_have():
    steps, values = curves.mean([(np.array([1, 2, 3]), np.array([1.0, 2, 3])), (np.array([2, 3]), np.array([4.0, 5]))])
    assert steps.tolist() == [2, 3] and values.tolist() == [3, 4]


@pytest.mark.parametrize(
    "values, log", [((0, 1), False), ((4.1, 4.2), False), ((5, 5), False), ((1e-4, 3e-3), True), ((0.9, 1.1), True)]
)
def test_axes_have_some_round_ticks_inside(values, log):
    axis = chart.Axis(values, 0, 100, log)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 10 and all(0 <= axis(tick) <= 100 for tick in ticks)
    assert len({axis.text(tick) for tick in ticks}) == len(ticks)


def test_a_logarithmic_axis_leaves_out_what_is_not_positive():
    line = chart.Line(0, "x", [1, 2, 3], [0.0, 1.0, 10.0], "#000")
    assert "NaN" not in chart.lines("t", [line], "step", "norm", logy=True)[0]
    empty = chart.Line(0, "x", [1, 2], [0.0, 0.0], "#000")
    assert "data-group" not in chart.lines("t", [empty], "step", "norm", logy=True)[0]


def test_runs_on_a_task_are_ranked_by_their_hardest_rows(tmp_path):
    ids = {}
    for mixer, right in zip(MIXERS, (0.4, 0.9)):
        name = ids[type(mixer).__name__] = write(tmp_path, config(mixer, 1e-3, 0), 2.0)
        accuracies = {"loss": 1.0, "accuracy/8": 0.95, "accuracy/32": right}
        (tmp_path / name / "report.json").write_text(json.dumps({"step": STEPS, **accuracies}))
        path = tmp_path / name / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            if record.pop("bits_per_byte", None) is not None:
                record |= accuracies
        path.write_text("\n".join(map(json.dumps, records)) + "\n")
    runs = read.find([tmp_path])
    assert [score.key for score in compare.scores(runs)] == ["accuracy/32", "accuracy/8"]
    text = page.page(runs, "recall")
    assert "bits" not in text
    head, first, second = re.findall("<tr>.*?</tr>", text)[:3]
    assert "<th>accuracy, 32 pairs</th><th>accuracy, 8 pairs</th>" in head
    assert "RetNet" in first and '<td class="best">0.900</td><td class="best">0.950</td>' in first
    assert "Attention" in second and "<td>0.400</td>" in second
    for title in ("Final accuracy, 32 pairs", "Accuracy, 8 pairs"):
        assert f"<figcaption>{title}</figcaption>" in text
    assert all(
        re.search(f"<code>{name}</code>.*?0.9000" if "Ret" in kind else name, text) for kind, name in ids.items()
    )


def test_text_and_tasks_beside_each_other(tmp_path):
    write(tmp_path, config(MIXERS[0], 1e-3, 0), 2.0)
    name = write(tmp_path, config(MIXERS[1], 1e-3, 0), 2.0)
    (tmp_path / name / "report.json").write_text(json.dumps({"loss": 1.0, "accuracy/4": 0.5}))
    runs = read.find([tmp_path])
    assert [score.key for score in compare.scores(runs)] == ["bits_per_byte", "accuracy/4"]
    text = page.page(runs, "both")
    assert "2.0000" in text and "0.500" in text


def test_the_page_in_a_browser(eight, tmp_path):
    out = tmp_path / "report.html"
    assert command_line.main([str(eight[0]), f"--out={out}"]) == 0
    text = out.read_text()
    assert set(re.findall(r"https?://[^\s\"'<]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"src=|@import|url\(", text) and re.findall(r'href="(.*?)"', text) == ["data:,"]
    out.write_text(text.replace("</body>", PROBE))
    dom, console = look(out)
    assert console == []
    for name in eight[1]:
        assert f"<code>{name}</code>" in dom and f'data-run="{name}"' in dom
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', dom).group(1)))
    assert seen["before"] == 0 < seen["after"] and seen["pressed"] == "false"
    assert "Attention · peak_lr=0.001" not in seen["tip"] and "RetNet · peak_lr=0.001" in seen["tip"]
    assert "<mark>a &lt; b</mark>&lt;/script&gt;&amp;" in dom
    dom, console = look(out, width=500)  # as narrow as Chromium's windows get
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', dom).group(1)))
    assert console == [] and seen["width"] <= 500  # wide tables scroll on their own


def test_the_browser_tells_of_errors(tmp_path):
    path = tmp_path / "bad.html"
    path.write_text("<!doctype html><script>nosuchthing()</script>")
    assert any("nosuchthing" in line for line in look(path)[1])


def test_figures_for_papers(eight, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "figures"
    assert command_line.main([str(eight[0]), f"--out={tmp_path / 'r.html'}", f"--figures={out}"]) == 0
    names = {path.name for path in out.iterdir()}
    assert {"loss.png", "loss.svg", "bits_per_byte.svg", "mfu.png", "final.png", "final.svg"} <= names
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "RetNet · peak_lr=0.003" in (out / "loss.svg").read_text()
    assert "validation bits/byte" in (out / "final.svg").read_text()


@pytest.mark.parametrize("arguments", [["nowhere"], ["{empty}"], [], ["{empty}", "--outt=x"]])
def test_a_mistake_is_one_line(tmp_path, capsys, arguments):
    assert command_line.main([a.format(empty=tmp_path) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
