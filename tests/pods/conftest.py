"""Runs `experiments.compile` in a process of its own, which sets what libtpu and jax read when they start."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest


@pytest.fixture
def compile_for(tmp_path):
    """compile_for(config, topology, *flags): the report of `experiments.compile`; skips without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu: make pods")

    def call(config, topology, *flags):
        command = [sys.executable, "-m", "experiments.compile", f"--config={config}", f"--topology={topology}", *flags]
        env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
        done = subprocess.run([*command, f"--out={tmp_path}"], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        (path,) = tmp_path.glob("*.json")
        return json.loads(path.read_text())

    return call
