"""Associative recall as in Zoology (arXiv 2312.04927): two layers of one mixer, nothing beside it, equal states."""

from experiments import config
from seqmix import catalog
from seqmix.mixers.conv.base_conv import BaseConv
from seqmix.models import LM
from seqmix.tasks import MQAR

NO_CONV = ("retnet", "lightning", "hgrn2", "gateloop", "glru", "linear_attention", "hedgehog", "based")


def mqar(mixer: str = "attention", width: int = 64) -> config.Train:
    """Multi-query associative recall: two layers of --mixer=NAME at --width=64 or so.

    As in Zoology's own comparison, a recurrence without a convolution of its own has a short one (BaseConv, three
    taps) before it in each layer: else nothing tells a value which key stands beside it.

    python -m experiments.train --config=mqar --mixer=deltanet
    """
    try:
        row = catalog.find(mixer)
    except ValueError as error:
        raise ValueError(f"mixer: {str(error).partition(': ')[2]}") from None
    mixers = (row.load()(**fields(row.name, width)),)
    mixers = (BaseConv(), *mixers) if row.name in NO_CONV else mixers
    model = LM(vocab=8192, d_model=width, n_layers=2 * len(mixers), mixers=mixers, compute_dtype="float32", z_loss=0.0)
    return config.Train(
        name=f"mqar_{row.name}_{width}",
        model=model,
        data=config.Synthetic(task=MQAR(vocab=8192, seq_len=128, pairs=(8, 32), noise=False), batch_size=64),
        optim=config.Optim(peak_lr=1e-2, warmup=200, b2=0.98, weight_decay=0.1, end_lr_ratio=0.0),
        eval=config.Eval(every=500, batches=4, final_batches=32),
        checkpoint=config.Checkpoint(every=1000, keep=1),
        steps=4000,
        log_every=50,
        sample_tokens=0,
    )


def fields(mixer: str, width: int) -> dict:
    """Fields of a mixer whose recurrence keeps 32 numbers per channel of the stream, as far as it can.

    Matrix states are 32 x 32 a head (or of as many elements); normalisers and the tails of short convolutions come
    on top. A state that is a vector (glru, rglru) or grows (attention, hyena, rat, mega's chunk) cannot be set so.
    Raises ValueError for a width that is no multiple of 64.
    """
    if width < 64 or width % 64:
        raise ValueError(f"width: expected a multiple of 64, got {width}")
    heads = width // 32
    own = {
        "attention": dict(heads=2),
        "mamba2": dict(d_state=16, head_dim=32, chunk=64),
        "log_linear_mamba2": dict(max_len=128, d_state=16, head_dim=32, chunk=64),
        "mamba": dict(d_state=16),
        "retnet": dict(heads=heads, key_dim=16, value_dim=64, chunk=64),
        "lightning": dict(heads=heads, chunk=64),
        "gla": dict(heads=heads, key_dim=32, value_dim=32, conv_width=4),
        "gated_deltanet": dict(heads=heads, key_dim=32, value_dim=32),
        "log_linear_gated_deltanet": dict(max_len=128, heads=heads, key_dim=32, value_dim=32),
        "gateloop": dict(heads=2 * heads),
        "hedgehog": dict(heads=2 * heads, key_dim=16, value_dim=16),
        "based": dict(heads=heads, key_dim=6, value_dim=32),
        "rwkv7": dict(head_dim=32),
        "hyena": dict(max_len=128),
        "rglru": dict(heads=4),
        "rat": dict(heads=4),
        "moba": dict(heads=2, size=16, count=3),
        "nsa": dict(heads=4, kv_heads=1, size=16, count=4, compress=8, stride=4, window=16),
        "mosa": dict(heads=8, dense_heads=2, window=16, sparsity=8),
        "mega": dict(d_state=16, key_dim=32, chunk=16),
        "sparse_transformer": dict(heads=2, stride=16),
        "power_attention": dict(heads=2, size=4, window=2),
    }
    if mixer in own:
        return own[mixer]
    return dict(heads=heads) if "heads" in catalog.load(mixer).__dataclass_fields__ else {}
