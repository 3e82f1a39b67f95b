"""A Llama-like Transformer of the size of `mamba2_1b`, the baseline beside it."""

import dataclasses

from configs.mamba2_1b import mamba2_1b
from experiments import config
from seqmix.mixers.dense.attention import Attention
from seqmix.models import LM


def transformer_1b() -> config.Train:
    """24 layers of width 2048: 16 heads over 4 key heads, rotary, gated MLPs of 6656, tied: 1,336.2M weights.

    python -m experiments.train --config=transformer_1b
    """
    model = LM(
        vocab=50288,
        d_model=2048,
        n_layers=24,
        mixers=(Attention(heads=16, kv_heads=4, head_dim=128),),
        mlp_hidden=6656,
        remat="full",
    )
    base = mamba2_1b()
    return dataclasses.replace(
        base, name="transformer_1b", model=model, optim=dataclasses.replace(base.optim, peak_lr=8e-4)
    )
