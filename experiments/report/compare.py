"""Runs beside each other: grouped over seeds, told apart by what differs, their scores and costs."""

import dataclasses
import itertools
import statistics

from experiments import checkpoint, serialize
from experiments.sweep import plan
from seqmix.core import param

SEEDS = ("seed", "data.seed")
MIXERS = "model.mixers"
CONTEXTS = (1, 8, 64)  # times the training length, for the size of the decoding state
SHADES = ("#0b62a4", "#c8500a", "#1a7f37", "#8a3ffc", "#b3123f", "#0e7c86", "#6b4a1e", "#5a5a5a")
DASHES = ("", "7 3", "2 3", "9 3 2 3")


@dataclasses.dataclass
class Group:
    """Runs that differ in their seeds alone."""

    runs: list
    settings: dict  # dotted path: value, without seeds and what does not change what is learned
    label: str = ""
    index: int = 0  # in the order of the labels
    colour: str = SHADES[0]
    dash: str = ""  # of SVG's stroke-dasharray

    def spread(self, value):
        """The Spread of value(run) over the runs that have one (not None)."""
        return spread([found for run in self.runs if (found := value(run)) is not None])


@dataclasses.dataclass(frozen=True)
class Spread:
    """Mean, sample standard deviation (None for fewer than two), number, and the values themselves."""

    mean: float | None
    sd: float | None
    n: int
    values: tuple


def spread(values):
    """The Spread of some numbers; of none, mean is None."""
    mean = statistics.fmean(values) if values else None
    return Spread(mean, statistics.stdev(values) if len(values) > 1 else None, len(values), tuple(values))


@dataclasses.dataclass(frozen=True)
class Score:
    """What runs are ranked by: bits per byte of text, or the share of right answers of a task."""

    key: str  # in report.json and in the records of evaluations
    name: str
    unit: str
    sign: int  # 1: the less the better; -1: the more

    def of(self, run):
        """Of the last evaluation of a finished run, else None."""
        return run.report.get(self.key) if run.state.name == "finished" else None

    def rank(self, value):
        """A key by which the best comes first and None last."""
        return (value is None, self.sign * (value or 0))


BITS = Score("bits_per_byte", "validation bits/byte", "bits per byte", 1)
ACCURACY = "accuracy/"  # then the number of pairs


def scores(runs):
    """The Scores that runs have, at least one: bits per byte, then accuracies, the hardest rows' first."""
    keys = {key for run in runs for key in (*run.report, *run.curves["val"])}
    pairs = sorted((int(key.removeprefix(ACCURACY)) for key in keys if key.startswith(ACCURACY)), reverse=True)
    answers = [Score(f"{ACCURACY}{n}", f"accuracy, {n} pairs", "share of right answers", -1) for n in pairs]
    return [*([BITS] if BITS.key in keys or not answers else []), *answers]


def val_loss(run):
    """Validation loss in nats per token at the end of a finished run, else None."""
    return run.report.get("loss") if run.state.name == "finished" else None


def groups(runs):
    """The Groups of the readable runs, labelled by what differs and in the order of the labels."""
    made = {}
    for run in runs:
        if not run.config:
            continue
        flat = dict(serialize.flatten(run.config))
        fixed = (*checkpoint.FREE_FIELDS, *SEEDS)
        settings = {p: v for p, v in flat.items() if not any(p == f or p.startswith(f"{f}.") for f in fixed)}
        made.setdefault(tuple(sorted(settings.items(), key=repr)), Group([], settings)).runs.append(run)
    found = list(made.values())
    for group, name in zip(found, labels(found), strict=True):
        group.label = name
        group.runs.sort(key=seeds)
    found.sort(key=lambda group: group.label)
    _colour(found)
    return found


def _colour(found):
    """Gives each group its index and style: one colour a stack of mixers, dashes within it, where that is enough."""
    families = {}
    for group in found:
        families.setdefault(stack(group), []).append(group)
    few = 1 < len(families) <= len(SHADES) and max(map(len, families.values())) <= len(DASHES)
    for index, group in enumerate(found):
        own = stack(group)
        shade, dash = divmod(index, len(SHADES))[::-1]
        if few:
            shade, dash = list(families).index(own), families[own].index(group)
        group.index, group.colour, group.dash = index, SHADES[shade], DASHES[dash % len(DASHES)]


def seeds(run):
    """(seed of the weights, seed of the data)."""
    data = run.config.get("data") or {}
    return run.config.get("seed", 0), data.get("seed", 0)


def varying(found):
    """Dotted paths whose values differ between groups, in the order of the config."""
    paths = dict.fromkeys(path for group in found for path in group.settings)
    return [path for path in paths if len({repr(group.settings.get(path)) for group in found}) > 1]


def labels(found):
    """A short name for each group: its mixers where they differ, then the other fields that do."""
    paths = varying(found)
    mixers = any(path.startswith(MIXERS) for path in paths)
    others = [path for path in paths if not (mixers and path.startswith(MIXERS))]
    last = [path.rsplit(".", 1)[-1] for path in others]
    short = [path if last.count(name) > 1 else name for path, name in zip(others, last)]
    stacks = [stack(group) for group in found]
    classes = [_stack(group, lambda mixer: type(mixer).__name__) for group in found]
    plain = len(set(zip(stacks, classes))) == len(set(classes))
    made = []
    for index, group in enumerate(found):
        words = [classes[index] if plain else stacks[index]] if mixers else []
        words += [f"{name}={plan.brief(group.settings.get(path))}" for name, path in zip(short, others)]
        made.append(" · ".join(words) or str(group.runs[0].config.get("name", group.runs[0].id)))
    return made


def stack(group):
    """The mixers of a group's model with the fields that are not at their defaults."""
    return _stack(group, plan.brief)


def _stack(group, name):
    """The mixers of a group's model, equal neighbours counted."""
    cfg = group.runs[0].cfg
    if cfg is None:
        return "?"
    counted = [(key, len(list(same))) for key, same in itertools.groupby(map(name, cfg.model.mixers))]
    return " + ".join(f"{count} {key}" if count > 1 else key for key, count in counted)


def numeric(found):
    """(path, {rest of the settings: [(value, group), ...]}) for each varying number with a line to draw."""
    paths = varying(found)
    for path in paths:
        values = [group.settings.get(path) for group in found]
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
            continue
        lines = {}
        for group in found:
            rest = tuple((p, repr(group.settings.get(p))) for p in paths if p != path)
            lines.setdefault(rest, []).append((group.settings[path], group))
        lines = [sorted(line, key=lambda point: point[0]) for line in lines.values() if len(line) > 1]
        if lines:
            yield path, lines


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one mixer layer costs, by its own formulas."""

    name: str
    weights: int
    length: int
    flops: float  # of the forward pass, a token, at that length
    state: tuple  # elements of the decoding state a sequence, at each of CONTEXTS x length; None: no decoding


def costs(found):
    """The Cost of every distinct mixer among the groups, with its stack's width filled in."""
    made = {}
    for group in found:
        cfg = group.runs[0].cfg
        for mixer in cfg.model.period if cfg else ():
            made.setdefault((mixer, cfg.data.seq_len), None)
    return [_cost(mixer, length) for mixer, length in made]


def _cost(mixer, length):
    try:
        flops = mixer.flops(1, length) / length
    except TypeError:  # its cost depends on more than the length
        flops = None
    sizes = [mixer.state_size(length * times) for times in CONTEXTS] if mixer.decodes else [None] * len(CONTEXTS)
    name = f"{plan.brief(mixer)}, width {mixer.d_model}"
    return Cost(name, param.count(mixer.params()), length, flops, tuple(sizes))
