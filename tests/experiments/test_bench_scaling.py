"""experiments.bench: what several devices take, send and give beside one."""

import pytest

from experiments import config
from experiments.bench import __main__ as bench
from experiments.bench import scaling, scaling_ops, scaling_train
from seqmix.models import LM
from tests.toys import Leaky


def test_ops_over_devices_are_timed_with_the_bytes_they_send(monkeypatch):
    monkeypatch.setattr(scaling_ops, "HEADS", 2)
    monkeypatch.setattr(scaling_ops, "WIDTH", 8)
    args = bench.parse(["run", "--suite=scaling"])
    (row,) = scaling_ops.attention("heads", 2, 64, args)
    assert row["fwd_ms"] > 0 and row["fwd_bwd_ms"] > 0 and row["sent"] >= row["sent_formula"] > 0
    assert row["tflops"] == pytest.approx(2 * 2 * 8 * 64**2 / 2 / row["fwd_ms"] / 1e9)


def test_values_over_devices_are_those_of_one(monkeypatch):
    monkeypatch.setattr(scaling_ops, "CHECKED", 8)
    monkeypatch.setattr(scaling_ops, "CHANNELS", 8)
    (row,) = scaling_ops.equal("linear_scan", "context", bench.parse(["run", "--suite=scaling"]))
    assert row["devices"] == 8 and 0 < row["error"] < 5e-3 and 0 < row["gradient_error"] < 2e-2


def test_no_row_says_cudnn_where_another_made_the_gradients():
    args = bench.parse(["run", "--suite=scaling"])
    with pytest.raises(ValueError, match="cuDNN makes no gradients of travelling keys here"):
        list(scaling_ops.equal("attention", scaling_ops.CUDNN, args))


def test_cases_that_stand_for_all_come_first(capsys):
    assert bench.main(["run", "--suite=scaling", "--list"]) == 0
    labels = [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()]
    assert len(set(labels)) == len(labels) == 2 + 6 + 12 + 3 * 6 + 2 * 8 + 1
    assert labels[:2] == ["attention one on 1, T=262144", "attention zigzag on 8, T=262144"]
    assert labels[7] == "linear_attention on 1, T=131072" and labels[10] == "linear_attention on 8, T=1048576"
    assert labels[19:21] == ["mamba2_1b one on 1", "mamba2_1b fsdp on 8"]
    assert labels[35] == "attention zigzag on 8, values" and labels[-1] == "attention ring on 8, T=1048576"


def test_training_over_devices_has_the_losses_of_one(monkeypatch):
    model = LM(vocab=32, d_model=8, n_layers=1, mixers=(Leaky(),), compute_dtype="float32")
    reads = config.Data(path="none", seq_len=8, batch_size=8)
    toy = config.Train(name="toy", model=model, data=reads, optim=config.Optim(peak_lr=0.01), steps=8)
    monkeypatch.setattr(scaling_train.flags, "parse", lambda words: (toy, None))
    args = bench.parse(["run", "--suite=scaling"])
    runs = ("one", 1), ("fsdp, one device's batch", 2)
    rows = [row for how, devices in runs for row in scaling_train._run("toy", how, devices, 8, args)]
    scaling_train.relate(rows)
    assert rows[1]["loss_error"] < 1e-5 and len(rows[1]["losses"]) == 8 and rows[1]["losses"][0] > 3
    assert rows[1]["tokens"] == 64 and rows[1]["settings"] == "remat=none, layers a loop"


def test_shares_come_of_rows_in_any_order():
    rows = [
        {"part": "attention", "devices": 4, "tokens": 128, "fwd_ms": 5.0, "fwd_bwd_ms": 20.0},
        {"part": "attention", "devices": 4, "tokens": 64, "fwd_ms": 1.25, "fwd_bwd_ms": 2.5},
        {"part": "attention", "devices": 1, "tokens": 64, "fwd_ms": 4.0, "fwd_bwd_ms": 9.0},
        {"part": "recurrences", "devices": 2, "tokens": 64, "fwd_ms": 5.0, "fwd_bwd_ms": 10.0},
        {"part": "recurrences", "devices": 1, "tokens": 32, "fwd_ms": 4.0, "fwd_bwd_ms": 9.0},
        {"part": "train", "devices": 4, "tokens": 128, "tokens_per_second": 30.0, "losses": [4.0]},
        {"part": "train", "devices": 4, "tokens": 32, "tokens_per_second": 20.0, "losses": [4.0]},
        {"part": "train", "devices": 1, "tokens": 32, "tokens_per_second": 10.0, "losses": [5.0]},
    ]
    rows = [{"what": row["part"], **row} for row in rows]
    scaling.relate(rows[:2])
    assert not any("share" in row for row in rows)
    for _ in range(2):
        scaling.relate(rows)
    found = [(row.get("share"), row.get("share_both")) for row in rows]
    assert found[:3] == [(0.8, 9 / 20), (0.8, 0.9), (None, None)]
    assert found[3:6] == [(0.8, 0.9), (None, None), (0.75, None)]
    assert [row.get("loss_error") for row in rows[5:]] == [None, pytest.approx(0.2), None]
