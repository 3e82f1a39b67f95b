"""`python tests/faults/inject.py FAULT STEP [flags of experiments.train]`: a run that a fault befalls at a step.

nan: the loss of that batch is NaN. spike: it is ten times as large. raise, hang: process 1 (or the only one)
raises or sleeps when it reads that batch. overflow: a weight becomes infinite after that step.
"""

import sys
import time

import numpy as np
from absl import app

from experiments import data, loop, train


def _batches(fault, at):
    original = data.Dataset.train_batches

    def train_batches(self, start=0, *share):
        import jax

        for index, batch in enumerate(original(self, start, *share), start + 1):
            if index == at and fault in ("raise", "hang") and jax.process_index() == jax.process_count() - 1:
                if fault == "raise":
                    raise RuntimeError(f"injected at step {at}")
                time.sleep(3600)
            rows = batch["mask"].shape[0]
            factor = {"nan": np.nan, "spike": 10.0}.get(fault, 1.0) if index == at else 1.0
            yield batch | {"factor": np.full((rows, 1), factor, np.float32)}

    return train_batches


def _loss(original):
    def loss(self, params, batch, rng=None):
        batch = dict(batch)
        factor = batch.pop("factor", None)
        value, metrics = original(self, params, batch, rng)
        return (value if factor is None else value * factor.mean()), metrics

    return loss


def _overflow(original, at):
    def compile_step(self, state, batch):
        step = original(self, state, batch)
        made = [int(state["step"])]

        def broken(state, batch):
            state, metrics = step(state, batch)
            made[0] += 1
            if made[0] == at:
                scale = state["params"]["final_norm"]["scale"]
                state["params"]["final_norm"]["scale"] = scale.at[0].set(np.inf)
            return state, metrics

        return broken

    return compile_step


if __name__ == "__main__":
    _fault, _step = sys.argv[1], int(sys.argv[2])
    del sys.argv[1:3]
    data.Dataset.train_batches = _batches(_fault, _step)
    loop.Trainer._loss = _loss(loop.Trainer._loss)
    if _fault == "overflow":
        loop.Trainer.compile_step = _overflow(loop.Trainer.compile_step, _step)
    app.run(train.main, flags_parser=train.only_program)
