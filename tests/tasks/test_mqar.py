"""Associative recall: every question has its answer earlier in the row, and nothing else is asked."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmix.tasks import MQAR, mqar

SMALL = MQAR(vocab=64, seq_len=32, pairs=(2, 8))


def rows(task, seed, count):
    batch = jax.jit(task.batch, static_argnums=1)(jax.random.key(seed), count)
    return {name: np.asarray(value) for name, value in batch.items()}


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_each_key_of_the_prefix_is_asked_once_and_answered_by_the_value_beside_it(seed):
    batch = rows(SMALL, seed, 4)
    for i, n in enumerate((2, 8, 2, 8)):
        tokens, targets, mask = (batch[name][i] for name in ("tokens", "targets", "mask"))
        keys, values = tokens[: 2 * n : 2], tokens[1 : 2 * n : 2]
        assert len(set(keys)) == n and keys.min() >= 1 and keys.max() < 32
        assert len(set(values)) == n and values.min() >= 32 and values.max() < 64
        asked = np.flatnonzero(mask)
        assert len(asked) == n and asked.min() >= 2 * n and not np.any(asked % 2)
        assert dict(zip(tokens[asked], targets[asked])) == dict(zip(keys, values))
        assert not targets[mask == 0].any()


def test_short_gaps_are_likelier_and_every_slot_can_be_asked():
    task = MQAR(vocab=64, seq_len=32, pairs=(2,))
    share = rows(task, 0, 2000)["mask"].mean(0)[4::2]  # 14 slots
    weights = np.arange(1, 15) ** (task.power - 1)
    first = weights / weights.sum()
    # Of two draws without replacement, slot g is the first with probability p_g, else the second.
    second = first * sum(p / (1 - p) for p in first) - first * first / (1 - first)
    np.testing.assert_allclose(share, first + second, atol=4 * np.sqrt(0.25 / 2000))
    assert share.min() > 0


def test_tokens_around_the_questions_are_random_or_zero():
    quiet = rows(MQAR(vocab=64, seq_len=32, pairs=(2,), noise=False), 1, 8)
    loud = rows(MQAR(vocab=64, seq_len=32, pairs=(2,)), 1, 8)
    elsewhere = (quiet["mask"] == 0) & (np.arange(32) >= 4)
    assert not quiet["tokens"][elsewhere].any()
    assert len(np.unique(loud["tokens"][elsewhere])) > 40
    np.testing.assert_array_equal(quiet["targets"], loud["targets"])


def test_a_row_can_be_full_of_questions():
    batch = rows(SMALL, 3, 2)
    assert batch["mask"][1, 16::2].all()  # 8 pairs in 32 tokens leave 8 slots


def test_hits_count_right_answers_among_the_questions():
    batch = rows(SMALL, 0, 2)
    right, asked = mqar.hits(np.where(np.arange(32) < 20, batch["targets"], -1), batch["targets"], batch["mask"])
    assert asked == 10 and right == batch["mask"][:, :20].sum()
    with pytest.raises(ValueError, match=r"targets: expected shape \(B=2, T=32\)"):
        mqar.hits(batch["targets"], batch["targets"][:, 1:], batch["mask"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(vocab=63), "vocab: expected an even number of at least 4, got 63"),
        (dict(seq_len=2), "seq_len: expected an even number"),
        (dict(seq_len=32, pairs=(9,)), r"pairs: expected numbers in \[1, 8\] for 32 tokens, got \(9,\)"),
        (dict(pairs=()), "pairs: expected numbers"),
        (dict(power=0.0), "power: expected a positive number, got 0.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        MQAR(**fields)
