"""Four mixers in one small stack, at two learning rates and two seeds."""

from experiments.sweep import grid
from seqmix.mixers.dense.attention import Attention
from seqmix.mixers.recurrent.gla import GLA
from seqmix.mixers.recurrent.mamba2 import Mamba2
from seqmix.mixers.recurrent.retnet import RetNet

MIXERS = (
    (Attention(heads=4, kv_heads=4, head_dim=16),),
    (RetNet(heads=4, chunk=32),),
    (GLA(heads=4, chunk=32),),
    (Mamba2(d_state=32, head_dim=32, chunk=32),),
)


def mixers():
    """Sixteen runs, two layers of width 64 each.

    python -m experiments.sweep --config=quickstart --sweep=mixers
    """
    small = {"model.d_model": 64, "model.n_layers": 2, "model.mlp_hidden": 128}
    # The seed first: runs that differ in it alone use the same programs, which the earlier one has compiled by then.
    for choice in grid(seed=(0, 1), model__mixers=MIXERS, optim__peak_lr=(1e-3, 3e-3)):
        yield small | choice


def space(trial):
    """The same mixers for Optuna, which draws the learning rate and the decay of weights.

    python -m experiments.sweep --config=quickstart --sweep=mixers --sampler=optuna --trials=16
    """
    names = [type(stack[0]).__name__ for stack in MIXERS]
    return {
        "model.d_model": 64,
        "model.n_layers": 2,
        "model.mlp_hidden": 128,
        "model.mixers": MIXERS[names.index(trial.suggest_categorical("mixer", names))],
        "optim.peak_lr": trial.suggest_float("peak_lr", 3e-4, 1e-2, log=True),
        "optim.weight_decay": trial.suggest_float("weight_decay", 0.0, 0.3),
    }
