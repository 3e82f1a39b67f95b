"""Which implementation runs."""

import logging

import pytest

from seqmix.ops import dispatch

REASONS = {"gpu": "needs a GPU", "chunked": None, "reference": None}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(dispatch, "_chosen", {})


def test_none_takes_the_first_that_can():
    assert dispatch.pick("op", None, REASONS) == "chunked"
    assert dispatch.pick("op", "reference", REASONS) == "reference"
    assert dispatch.chosen("op") == ("chunked", "reference") and dispatch.chosen("other") == ()


def test_a_named_one_runs_or_says_why_not():
    with pytest.raises(ValueError, match="implementation: op cannot run 'gpu': needs a GPU"):
        dispatch.pick("op", "gpu", REASONS)
    with pytest.raises(ValueError, match="did you mean 'chunked'"):
        dispatch.pick("op", "chunk", REASONS)
    with pytest.raises(ValueError, match="expected one of gpu, chunked, reference"):
        dispatch.pick("op", "tpu", REASONS)
    with pytest.raises(ValueError, match="none for this call"):
        dispatch.pick("op", None, {"gpu": "needs a GPU"})
    assert dispatch.chosen("op") == ()


def test_a_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="seqmix.ops"):
        for _ in range(3):
            dispatch.pick("op", None, REASONS)
    assert [record.getMessage() for record in caplog.records] == ["op runs as 'chunked'"]
