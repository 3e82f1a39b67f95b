"""Mamba-2 1.3B: the shape of the released state-spaces/mamba2-1.3b (arXiv 2405.21060, table 10)."""

from experiments import config
from seqmix.mixers.recurrent.mamba2 import Mamba2
from seqmix.models import LM


def mamba2_1b() -> config.Train:
    """48 Mamba-2 layers of width 2048, no MLPs, tied embeddings: 1,343.8M weights.

    python -m experiments.train --config=mamba2_1b
    """
    model = LM(
        vocab=50288,  # the GPT-NeoX tokenizer's 50277, padded to a multiple of 16 as released
        d_model=2048,
        n_layers=48,
        mixers=(Mamba2(d_state=128, head_dim=64, expand=2, n_groups=1, conv_width=4, chunk=256),),
        remat="full",
    )
    return config.Train(
        name="mamba2_1b",
        model=model,
        data=config.Data(seq_len=2048, batch_size=256),
        optim=config.Optim(peak_lr=1e-3, warmup=1000, weight_decay=0.1),
        mesh=config.Mesh(),
        eval=config.Eval(every=1000, batches=32),
        checkpoint=config.Checkpoint(every=1000, keep=3),
        steps=50_000,  # 26B tokens, 20 a weight
        seed=0,
        log_every=10,
        sample_prompt="def ",
        sample_tokens=128,
    )
