"""A hybrid small enough for a laptop's CPU, on bytes of Python source."""

from experiments import config
from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.recurrent.mamba2 import Mamba2
from seqmix.models import LM


def quickstart() -> config.Train:
    """Three Mamba-2 layers and one attention layer, 0.8M weights, two or three minutes on two CPU cores.

    python -m experiments.train --config=quickstart
    """
    mamba = Mamba2(d_state=32, head_dim=32, chunk=32)
    attention = Attention(heads=4, kv_heads=4, head_dim=32)
    model = LM(
        vocab=260,  # bytes and four special tokens
        d_model=128,
        n_layers=4,
        mixers=(mamba, mamba, attention, mamba),
        mlp_hidden=256,
        compute_dtype="float32",
        loss_chunk=256,
    )
    return config.Train(
        name="quickstart",
        model=model,
        data=config.Data(seq_len=256, batch_size=8),
        optim=config.Optim(peak_lr=3e-3, warmup=20, weight_decay=0.1),
        mesh=config.Mesh(),
        eval=config.Eval(every=50, batches=8),
        checkpoint=config.Checkpoint(every=50, keep=2),
        steps=200,
        seed=0,
        log_every=10,
        sample_prompt="def ",
        sample_tokens=192,
    )
