"""How many weights each config has: a change here is a change of the experiment."""

import importlib

import pytest

COUNTS = {
    "quickstart": 821_384,
    "mamba2_130m": 128_989_632,
    "mamba2_1b": 1_343_757_312,
    "transformer_1b": 1_336_215_552,
    "hybrid_1b": 1_341_455_104,
}


@pytest.mark.parametrize("name", COUNTS)
def test_count(name):
    cfg = getattr(importlib.import_module(f"configs.{name}"), name)()
    assert cfg.name == name
    assert cfg.model.count() == COUNTS[name], cfg.model.parts()
    assert f"--config={name}\n" in getattr(importlib.import_module(f"configs.{name}"), name).__doc__
