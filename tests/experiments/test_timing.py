"""How calls are timed beside those of PyTorch: by the faster of two ways."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import attention, timing


@dataclasses.dataclass
class Queue:
    """Stands for what is queued, in no time."""

    what: object

    def __call__(self, count):
        pass


@pytest.mark.parametrize(
    ("queued", "filled", "fills", "best"),
    [(3.0, 2.5, 1.0, 1.5), (3.0, 4.5, 1.0, 3.0), (30.0, 25.0, 1.0, 30.0)],
    ids=["faster when rested", "faster in a queue", "too long to rest"],
)
def test_of_calls_in_a_queue_and_after_fills_the_faster_counts(monkeypatch, queued, filled, fills, best):
    took = {(True, False): queued, (True, True): filled, (False, False): fills}  # ms, of what is queued
    monkeypatch.setattr(timing, "_queue", lambda call, sets=None, before=None: Queue((sets is not None, bool(before))))
    monkeypatch.setattr(timing, "_seconds", lambda queue, count: 1e-3 * took[queue.what])
    monkeypatch.setattr(timing, "FILLED", 1 << 10)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert timing.best_ms(jax.jit(lambda x: x + 1), [(jnp.zeros(2),)]) == pytest.approx(best)


def test_a_cpu_is_timed_in_queues_alone(monkeypatch):
    monkeypatch.setattr(timing, "_queue", lambda call, sets: Queue("calls"))
    monkeypatch.setattr(timing, "_seconds", lambda queue, count: {"calls": 2e-3}[queue.what])
    assert timing.best_ms(jax.jit(lambda x: x + 1), [(jnp.zeros(2),)]) == pytest.approx(2.0)


def test_ratios_to_the_best_peer_come_as_peers_rows_do():
    ours = {"part": "dense", "pattern": "causal", "tokens": 8, "fwd_ms": 2.0, "fwd_bwd_ms": 5.0}
    rows = [ours, ours | {"tokens": 16}]
    attention.relate(rows)
    assert "peer_ratio" not in ours
    rows += [ours | {"fwd_ms": fwd, "fwd_bwd_ms": both, "peer": True} for fwd, both in ((3.0, 4.0), (1.0, 6.0))]
    attention.relate(rows)
    assert (ours["peer_ratio"], ours["peer_ratio_both"]) == (0.5, 0.8)
    assert "peer_ratio" not in rows[1] and "peer_ratio" not in rows[2]


def test_a_queue_takes_the_sets_in_turn_each_after_what_comes_before():
    seen = []
    timing._queue(seen.append, [(1,), (2,)], lambda: seen.append("fill"))(3)
    assert seen == ["fill", 1, "fill", 2, "fill", 1]
