"""The TPU kernels, compiled by libtpu for chips that are not there, each in a process of its own.

libtpu must be in the Python of these tests, or in the one that SEQMIX_TPU_PYTHON names.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from tools import tpu_bundles, tpu_cases

PYTHON = os.environ.get("SEQMIX_TPU_PYTHON") or (sys.executable if importlib.util.find_spec("libtpu") else None)

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="needs libtpu, here or in the Python that SEQMIX_TPU_PYTHON names"),
]


def versions():
    """jax and libtpu of that Python."""
    code = "import importlib.metadata as m, json; print(json.dumps({p: m.version(p) for p in ('jax', 'libtpu')}))"
    return json.loads(subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("chip", tpu_bundles.TOPOLOGIES)
def test_every_kernel_compiles_and_takes_no_more_bundles_than_it_did(chip):
    """3% is what a neutral change of the code makes of a schedule; with other versions only that they compile."""
    found = tpu_bundles.count(chip, list(tpu_cases.cases()), python=PYTHON)
    kept = json.loads(tpu_bundles.KEPT.read_text())
    assert found.keys() == kept["counts"][chip].keys()
    assert all(numbers["bundles"] > 50 for numbers in found.values())
    if versions() == kept["versions"]:
        for name, numbers in found.items():
            for kind in ("bundles", "inner"):
                assert numbers[kind] <= 1.03 * kept["counts"][chip][name][kind], (name, kind)


def test_kernels_are_in_the_program_of_eight_chips_and_no_token_moves():
    env = os.environ | tpu_bundles.ENVIRONMENT
    command = [PYTHON, "-m", "tools.tpu_mesh"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tpu_bundles.ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    wanted = [("linear_attention", "fsdp"), ("linear_scan", "fsdp"), ("attention", "fsdp")]
    wanted += [("linear_attention", "context"), ("linear_scan", "context")]
    assert [(row["op"], row["mesh"]) for row in rows] == wanted
    for row in rows:
        assert row["missing"] == []
        # A state has K or one number a channel; a share of the tokens has 1024, or 512 with the context cut.
        assert bool(row["moved"]) == (row["mesh"] == "context")
        assert not any(re.search(r"\b(512|1024)\b", shape) for shape in row["moved"]), row
