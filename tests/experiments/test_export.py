"""Weights leave as safetensors and come back, by the loader that the docs show, equal to the bit."""

import re

import jax
import numpy as np
import pytest

from experiments import export
from tests import runs

pytest.importorskip("safetensors")
PAGE = (runs.ROOT / "docs" / "checkpoints.md").read_text()


def test_the_loader_of_the_docs(unbroken, tmp_path, capsys):
    held = {}
    exec(re.search(r"^```python\n(.*?)^```", PAGE, re.M | re.S).group(1), held)
    out = tmp_path / "weights.safetensors"
    assert export.main([f"--workdir={unbroken[0]}", f"--out={out}"]) == 0
    assert "step 30" in capsys.readouterr().out
    cfg, params = held["load"](out)
    expected_cfg, step, expected = export.read(unbroken[0])
    assert cfg == expected_cfg and step == 30
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    tokens = np.arange(16, dtype=np.int32)[None]
    np.testing.assert_array_equal(cfg.model.forward(params, tokens)[0], cfg.model.forward(expected, tokens)[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ("--step=5", "no checkpoint of step 5"),
        ("--weights=ema", "keeps no average"),
        ("--out=/nowhere/x", "--out: /nowhere/x cannot be written"),
        ("--workdir=/nowhere", "expected the directory of a run"),
        ("--stp=5", "unrecognized arguments: --stp=5"),
    ],
)
def test_mistakes_take_one_line(unbroken, tmp_path, capsys, change, message):
    arguments = runs.changed((f"--workdir={unbroken[0]}", f"--out={tmp_path / 'x'}"), change)
    assert export.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not list(tmp_path.iterdir())
