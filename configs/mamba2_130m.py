"""Mamba-2 130M: the shape of the released state-spaces/mamba2-130m (arXiv 2405.21060, table 10)."""

import dataclasses

from configs.mamba2_1b import mamba2_1b
from experiments import config


def mamba2_130m() -> config.Train:
    """24 Mamba-2 layers of width 768, no MLPs, tied embeddings: 129.0M weights.

    python -m experiments.train --config=mamba2_130m
    """
    base = mamba2_1b()
    return dataclasses.replace(
        base,
        name="mamba2_130m",
        model=dataclasses.replace(base.model, d_model=768, n_layers=24),
        optim=dataclasses.replace(base.optim, peak_lr=3e-3, warmup=500),
        steps=5_000,
    )
