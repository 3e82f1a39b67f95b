"""The training steps of the large configs, compiled for TPU slices by libtpu on a CPU (`make pods`)."""

import pytest

SMALL = ("--data.seq-len=512", "--data.batch-size=8", "--model.n-layers=6", "--model.d-model=256", "--model.vocab=1024")
TOKENS = ("--data.seq-len=8192", "--data.batch-size=512", "--mesh.data=1")  # 4M tokens a step
LONG = ("--data.seq-len=1048576", "--data.batch-size=4", "--mesh.data=1", "--mesh.fsdp=4", "--mesh.context=16")
PODS = [
    *((config, "v5p:4x4x4", *TOKENS, "--mesh.fsdp=64") for config in ("mamba2_1b", "transformer_1b", "hybrid_1b")),
    *((config, "v5e:16x16", *TOKENS, "--mesh.fsdp=256") for config in ("mamba2_1b", "transformer_1b", "hybrid_1b")),
    ("hybrid_1b", "v5p:4x4x4", *LONG),
]
LINEAR = {"linear_attention_forward", "linear_attention_states", "linear_attention_backward"}


def kernels_missing(report):
    """What should be in the program and is not: kernels of Mamba-2's op, and of attention where time is whole."""
    found, config = report["kernels"].keys(), report["config"]
    wanted = set() if config == "transformer_1b" else set(LINEAR)
    if config != "mamba2_1b" and report["mesh"]["context"] == 1 and not any("splash" in name for name in found):
        wanted.add("splash")
    return wanted - found


@pytest.mark.tpu
def test_a_small_hybrid_is_compiled_for_a_slice_of_four(compile_for):
    mesh = ("--mesh.data=1", "--mesh.fsdp=2", "--mesh.context=2")
    report = compile_for("hybrid_1b", "v5p:2x2x1", *SMALL, *mesh)
    assert report["chips"] == 4
    assert report["involuntary_resharding"] == 0
    assert report["memory"]["free"] > 0.9
    assert not kernels_missing(report)
    # remat=full: the forward pass twice. The formula has elementwise work too.
    assert 0.6 < report["flops"] / (4 / 3 * report["model_flops"] / 4) < 1.2
    axes = {one["axes"] for one in report["collectives"]}
    assert axes & {"fsdp", "fsdp+context"} and axes & {"context", "fsdp+context"}


@pytest.mark.pods
@pytest.mark.parametrize("pod", PODS, ids=lambda pod: "-".join(pod[:2]) + ("-1M" if LONG[0] in pod else ""))
def test_a_pod_holds_the_step_with_a_twentieth_of_its_memory_free(compile_for, pod):
    report = compile_for(*pod)
    assert report["batch_size"] * report["seq_len"] == 2**22
    assert report["memory"]["free"] >= 0.05
    assert report["involuntary_resharding"] == 0
    assert not kernels_missing(report)
    assert report["compile_cpu_seconds"] < 600  # of all threads together: no longer on a core of its own
