"""experiments.bench: rows kept as they come, failures named, errors and rates that are what they say."""

import argparse
import gzip
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import __main__ as bench
from experiments.bench import (
    attention,
    attention_heads,
    attention_moba,
    attention_nsa,
    check_cases,
    checks,
    decode,
    errors,
    profile,
    recurrent,
    results,
    suites,
    timing,
    tune,
)


def test_a_mistake_is_one_line_with_exit_code_2(capsys, tmp_path):
    for words, said in (
        (["run", "--suite=recurent"], "--suite: invalid choice: 'recurent'"),
        (
            ["run", "--suite=recurrent", "--only=gal", f"--out={tmp_path}"],
            "--only: expected parts of recurrent, which are ssd, simple_gla, retnet, gla, scan, got 'gal'; did you",
        ),
        (["run"], "--suite"),
        (["run", "--suite=train", "--suite=recurrent"], "--suite: given twice"),
        (["run", "--suite=train", "--match=1c"], "--match: expected a pattern that a case of --list has, got '1c'"),
        (["run", "--suite=train", "--match=(b"], "--match: expected a regular expression, got '(b' ("),
        (["run", "--suite=train", "--only="], "--only: expected words joined by commas, got ''"),
        (["run", "--suite=recurrent", f"--out={__file__}"], "--out: expected a folder that can be written"),
        (["run", "--suite=recurrent", "--compile-only"], "--compile-only: expected --suite=scaling, got recurrent"),
        (["tune", "--list"], "--list: belongs to run"),
        (["run", "--suite=train", "--jobs=2"], "--jobs: train runs one case after the other, got 2"),
        (["run", "--suite=recurrent", "--case=99"], "--case: expected 0 to 14, got 99"),
        (["run", "--suite=recurrent", "--jobs=0"], "--jobs: expected at least 1, got 0"),
        (["run", "--suite=recurrent", "--peer"], "--peer: unknown flag, did you mean --peers?"),
    ):
        assert bench.main(words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and said in lines[0]
    assert not any(tmp_path.iterdir())


def test_every_suite_names_its_cases(capsys):
    for name in suites.SUITES:
        assert bench.main(["run", f"--suite={name}", "--list"]) == 0
        assert len(capsys.readouterr().out.splitlines()) > 5


def test_rows_of_earlier_cases_are_kept_when_a_case_fails(tmp_path, monkeypatch, capsys):
    def fails(args):
        yield {"op": "scan", "implementation": "first"}
        raise RuntimeError("no such thing\nin two lines")

    monkeypatch.setattr(recurrent, "cases", lambda args: [suites.Case("scan", "scan B1", fails)])
    assert bench.main(["run", "--suite=recurrent", f"--out={tmp_path}"]) == 1
    rows = json.loads((tmp_path / "cpu_recurrent.json").read_text())["rows"]
    assert [row.get("failed") for row in rows] == [None, "RuntimeError: no such thing in two lines"]
    assert "failed: scan B1: RuntimeError" in capsys.readouterr().err


def test_the_recurrent_suite_times_and_compares(tmp_path, monkeypatch):
    for name, value in {"CHANNELS": 8, "SHAPES": ((1, 64),), "ERROR_SHAPE": (1, 32), "SETS": 1}.items():
        monkeypatch.setattr(recurrent, name, value)
    recurrent._rate.cache_clear()
    monkeypatch.setattr(timing, "copy_rate", lambda: 1e9)
    assert bench.main(["run", "--suite=recurrent", "--only=scan", f"--out={tmp_path}"]) == 0
    kept = json.loads((tmp_path / "cpu_recurrent.json").read_text())
    (row,) = kept["rows"]
    assert kept["command"].startswith("python -m experiments.bench") and kept["versions"]["jax"] == jax.__version__
    assert 0 < row["error"] < 5e-3 and 0 < row["gradient_error"] < 5e-3
    assert row["floor_ms"] == pytest.approx(1e3 * 3 * 2 * 64 * 8 / 1e9)  # x and decays read, h written, bfloat16
    assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["fwd_ms"])
    assert "| scan | 1 | 64 | chunked |" in (tmp_path / "cpu_recurrent.md").read_text()
    recurrent._rate.cache_clear()


def test_rows_of_shared_key_heads_count_the_pairs_of_the_window_and_are_near_float64():
    shape = attention_heads.Shape(2, 64, 4, 2, 16, window=20)
    rows = list(attention_heads._case(shape, argparse.Namespace(peers=False)))
    assert [row["implementation"] for row in rows] == ["default", "chunked"]
    pairs = sum(min(t + 1, 20) for t in range(64))
    for row in rows:
        assert row["pattern"] == "4 heads to 2 of 16, window 20" and row["density"] == pairs / 64**2
        assert row["tflops"] == pytest.approx(4 * 16 * 4 * 2 * pairs / row["fwd_ms"] / 1e9)
        assert row["error"] < 5e-3 and row["gradient_error"] < 5e-3


def test_patterns_and_their_masks_are_the_same(monkeypatch):
    """Options of `attention` and the mask by which pairs are counted say the same."""
    for name, value in {"WINDOW": 20, "SINK_TOKENS": 4, "BLOCK": 16, "BOX": (4, 4), "NEAR": 5}.items():
        monkeypatch.setattr(attention, name, value)
    length, k = 64, jnp.ones((1, 64, 1, 8))
    for name, (options, mask) in attention.patterns(length).items():
        call = attention._call(options, 1)
        v = jnp.eye(length)[None, :, None]  # outputs are the weights
        weights = np.asarray(call(k, k, v))[0, :, 0]
        assert np.array_equal(weights > 0, mask.dense(length)), name


def test_the_pairs_of_moba_are_those_that_its_tokens_see():
    q, k = (jax.random.normal(jax.random.key(n), (1, 60, 1, 4)) for n in range(2))
    weights = attention_moba.call(q, k, jnp.eye(60)[None, :, None], "reference", size=8)
    assert (weights > 0).sum() == attention_moba.pairs_left(60, 8)


def test_the_lists_of_nsa_are_of_the_past_and_the_same_in_stretches():
    index = np.asarray(attention_nsa.lists(256, 4))
    own = np.arange(256) // attention_nsa.SIZE
    assert index.shape == (1, attention_nsa.KEY_HEADS, 256, 3) and (index < own[:, None]).all()
    assert ((index >= 0).sum(-1) == own).all()  # none but the past is left out
    assert np.array_equal(index, attention_nsa.lists(256, 4, stretch=100))


def test_compared_names_the_worst_gradient():
    exact = (np.ones(4), (np.ones(4), 2 * np.ones(4)))
    found = errors.compared((np.ones(4), (np.ones(4), 2 * np.ones(4) + 0.02)), exact, "ab")
    assert (found["error"], found["worst_gradient"]) == (0, "b")
    assert found["gradient_error"] == pytest.approx(0.01)


def test_a_check_fails_beyond_its_bound():
    """A result that is 1% off is a row, and then a failed case that names it."""

    def made(name):
        run = lambda x, implementation: ((1 if implementation == "reference" else float(name)) * x * x,)
        return check_cases.Check("square", name, {"x": jnp.linspace(1, 2, 16)}, run, ("y",))

    (right, *_) = checks._case(made, "1.001", None)
    assert right["share"] == pytest.approx(0.2, rel=0.01)
    with pytest.raises(ArithmeticError, match="gpu: d?[xy] is off by 1.0e-02"):
        list(checks._case(made, "1.01", None))


def test_repeats_with_other_bits_are_counted(monkeypatch):
    monkeypatch.setattr(checks, "REPEATS", 8)
    calls = iter(range(9))
    third = lambda x: (x, (x + 1e-6 * (next(calls) % 3 == 2),))
    assert checks.repeated(third, (jnp.ones(4),)) == {"repeats": 8, "same_bits": 5}


def test_the_checks_of_a_convolution_pass_here(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "REPEATS", 2)
    assert bench.main(["run", "--suite=checks", "--only=short_conv", f"--out={tmp_path}"]) == 0
    rows = json.loads((tmp_path / "cpu_checks.json").read_text())["rows"]
    assert {row["case"] for row in rows} == set(check_cases.CONV)
    assert all(0 < row["error"] < checks.BOUND and row["same_bits"] == 2 for row in rows)


def test_a_generation_is_the_op_over_all_tokens_and_its_bytes_are_counted(monkeypatch):
    for name, value in {"HEADS": 2, "WIDTH": 8, "TOKENS": 5}.items():
        monkeypatch.setattr(decode, name, value)
    state, cache, tokens = decode._linear((2,))(jax.random.key(0), 3)
    y, last = decode.generate("linear_attention, decay a token", state, cache, tokens)
    whole = [jnp.moveaxis(x[:, :, 0], 0, 1) for x in tokens]
    expected, expected_last = recurrent.ops.linear_attention(*whole, state=state)
    np.testing.assert_allclose(np.moveaxis(np.asarray(y, np.float32)[:, :, 0], 0, 1), expected, rtol=0.02, atol=0.02)
    np.testing.assert_allclose(last, expected_last, rtol=0.01, atol=0.01)
    monkeypatch.setitem(decode.OPS, "decayed", decode._linear((2,)))
    # float32 state read and written, q, k, v and y in bfloat16, decays in float32
    assert decode.bytes_of("decayed", 3) == 3 * 2 * (2 * 4 * 8 * 8 + 4 * 2 * 8 + 4)


def test_device_kinds_become_words():
    kinds = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200", "TPU v5 lite": "v5", "cpu": "cpu"}
    assert {kind: results.short(kind) for kind in kinds} == kinds


PROGRAM = """
%inside (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} negate(%a), metadata={op_name="jit(_step)/transpose(jvp(norm))/mul"}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %loop.fusion.3 = f32[8]{0} fusion(%x), kind=kLoop, calls=%inside
  %scores = f32[8]{0} exponential(%loop.fusion.3), metadata={op_name="jit(_step)/jvp(loss)/exp"}
  ROOT %out = f32[8]{0} add(%scores, %x)
}
"""


def test_a_trace_is_booked_by_the_scopes_of_the_model(tmp_path):
    names = [(1, None, "/device:GPU:0"), (1, 7, "Stream #7(Compute)"), (1, 8, "Steps"), (2, None, "/host:CPU")]
    events = [
        {
            "ph": "M",
            "name": "process_name" if tid is None else "thread_name",
            "pid": pid,
            "tid": tid,
            "args": {"name": n},
        }
        for pid, tid, n in names
    ]
    kernels = [  # from, for, in microseconds; of two steps
        (0, 400, "loop_fusion_3"),
        (400, 1000, "nvjet_sm90_tst_128x160"),
        (1000, 1200, "short_conv_forward_mosaic_gpu_kernel"),
        (1400, 1600, "scores"),
        (1500, 1600, "memcpy128"),
        (1600, 1800, "unheard_of"),
    ]
    events += [{"ph": "X", "pid": 1, "tid": 7, "ts": a, "dur": b - a, "name": name} for a, b, name in kernels]
    events.append({"ph": "X", "pid": 1, "tid": 8, "ts": 0, "dur": 9e9, "name": "no kernel"})
    with gzip.open(tmp_path / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = profile.read(tmp_path, PROGRAM, 2)
    parts = {"products": 0.3, "norm backward": 0.2, "kernel short_conv_forward": 0.1, "loss": 0.1, "other": 0.1}
    assert found["parts"] == parts | {"idle": 0.1, "copies": 0.05, "at once": 0.05}
    assert found["kernels"][0] | {"from": ""} == {
        "kernel": "nvjet_sm90_tst_128x160",
        "part": "products",
        "ms": 0.3,
        "count": 0.5,
        "from": "",
    }
    with pytest.raises(ValueError, match="expected a trace"):
        profile.read(tmp_path / "nothing", PROGRAM, 2)


def test_tuning_needs_a_gpu_and_a_known_op(capsys):
    for words, said in (
        (["tune"], "tune: expected a Hopper GPU"),
        (["tune", "--only=scan"], "--only: expected some of ssd"),
    ):
        assert bench.main(words) == 2
        assert said in capsys.readouterr().err


def test_an_entry_goes_into_a_table_beside_the_others(tmp_path):
    from pallas_kernels import tuned

    table = tmp_path / "tuned.json"
    tune.write(table, "card", "kernel B1", {"stages": 2, "ms": 1.5})
    tune.write(table, "card", "kernel B2", {"stages": 3, "ms": 2.0})
    tune.write(table, "card", "kernel B1", {"stages": 4, "ms": 1.0})
    assert json.loads(table.read_text())["card"] == {
        "kernel B1": {"stages": 4, "ms": 1.0},
        "kernel B2": {"stages": 3, "ms": 2.0},
    }
    assert len(table.read_text().splitlines()) == 6
    assert tuned.key("kernel", 3, 100, H=2) == "kernel B4 T128 H2"
