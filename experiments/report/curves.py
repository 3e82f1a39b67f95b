"""The curves of a comparison, ready to draw: one line a run, and the mean of a group's runs."""

import numpy as np

from experiments.report.chart import Line
from experiments.report.compare import ACCURACY

POINTS = 240  # of a line; longer curves are averaged over equal stretches

# name in the records, kind, title, unit, logarithmic axis
CURVES = (
    ("loss", "train", "Training loss", "nats per token", False),
    ("bits_per_byte", "val", "Validation", "bits per byte", False),
    ("grad_norm", "train", "Gradient norm, before clipping", "norm", True),
    ("lr", "train", "Learning rate", "learning rate", False),
    ("tokens_per_second", "speed", "Throughput", "tokens per second", False),
    ("mfu", "speed", "Model FLOPs utilisation", "share of the device's peak", False),
)


def kinds(scores):
    """CURVES with those of the scores that are accuracies behind the bits per byte."""
    answers = [(s.key, "val", s.name.capitalize(), s.unit, False) for s in scores if s.key.startswith(ACCURACY)]
    return (*CURVES[:2], *answers, *CURVES[2:])


def thinned(steps, values, points=POINTS):
    """At most about `points` means over equal stretches of a curve: (steps, values)."""
    if steps.size <= points:
        return steps, values
    edges = np.linspace(0, steps.size, points + 1).astype(int)[:-1]
    sizes = np.diff([*edges, steps.size])
    return np.add.reduceat(steps, edges) / sizes, np.add.reduceat(values, edges) / sizes


def mean(curves):
    """The mean of several curves at the steps that all of them have; of one, itself."""
    common = curves[0][0]
    for steps, _ in curves[1:]:
        common = np.intersect1d(common, steps)
    tables = [dict(zip(steps.tolist(), values.tolist())) for steps, values in curves]
    return common, np.array([np.mean([table[step] for table in tables]) for step in common.tolist()])


def lines(groups, kind, name):
    """The Lines of one quantity: thin ones for runs of a group of several, a thick one for the group."""
    made = []
    for group in groups:
        curves = [(run, *run.column(kind, name)) for run in group.runs]
        curves = [curve for curve in curves if curve[1].size]
        if not curves:
            continue
        style = {"colour": group.colour, "dash": group.dash}
        several = len(curves) > 1
        if several:
            for run, steps, values in curves:
                xs, ys = thinned(steps, values)
                label = f"{group.label}, {run.id}"
                made.append(Line(group.index, label, xs.tolist(), ys.tolist(), thin=True, run=run.id, **style))
        xs, ys = thinned(*mean([curve[1:] for curve in curves]))
        run = "" if several else curves[0][0].id
        made.append(Line(group.index, group.label, xs.tolist(), ys.tolist(), run=run, **style))
    return made
