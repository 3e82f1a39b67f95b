"""Many runs of one config: `python -m experiments.sweep --config=NAME --sweep=FILE`.

A sweep is a generator function, named like its file, that yields the overrides of each run: a dict of dotted
fields, or the flags of `experiments.train` as one string or a list of them.
"""

import itertools


def grid(**axes):
    """One dict for every choice of a value from each axis, the last axis fastest; `__` in a name is a dot.

    grid(optim__peak_lr=(1e-3, 3e-3), seed=(0, 1)) gives {"optim.peak_lr": 0.001, "seed": 0}, and three more.
    Raises ValueError for an axis without values.
    """
    for name, values in axes.items():
        if not isinstance(values, (list, tuple, range)) or not values:
            raise ValueError(f"{name}: expected a list of at least one value, got {values!r}")
    names = [name.replace("__", ".") for name in axes]
    return [dict(zip(names, choice)) for choice in itertools.product(*axes.values())]
