"""Mamba-2, attention and MLPs at the size of `mamba2_1b` (after the hybrids of arXiv 2405.21060)."""

import dataclasses

from configs.mamba2_1b import mamba2_1b
from experiments import config
from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.recurrent.mamba2 import Mamba2
from seqmix.models import LM


def hybrid_1b() -> config.Train:
    """24 layers of width 2048, one in six attention, each with a gated MLP of 4608: 1,341.5M weights.

    python -m experiments.train --config=hybrid_1b
    """
    mamba = Mamba2(d_state=128, head_dim=64, expand=2, n_groups=1, conv_width=4, chunk=256)
    attention = Attention(heads=16, kv_heads=4, head_dim=128)
    model = LM(
        vocab=50288,
        d_model=2048,
        n_layers=24,
        mixers=(mamba, mamba, mamba, attention, mamba, mamba),
        mlp_hidden=4608,
        remat="full",
    )
    base = mamba2_1b()
    return dataclasses.replace(base, name="hybrid_1b", model=model, optim=dataclasses.replace(base.optim, peak_lr=8e-4))
