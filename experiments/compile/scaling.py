"""Strong and weak scaling on paper: the best layout of each model, length and number of chips, by formulas alone."""

import dataclasses
from pathlib import Path

from experiments import flags, progress
from experiments.compile import chips, fit

MODELS = ("mamba2_1b", "transformer_1b", "hybrid_1b")
LENGTHS = (8192, 131_072, 1_048_576)
SIZES = tuple(2**n for n in range(9))
STRONG = 2**22  # tokens of a step
WEAK = 2**16  # tokens of a step for each chip, but at least one sequence
COLOURS = dict(zip(MODELS, ("#1b6ca8", "#c0392b", "#2e8b57"), strict=True))


def curves(chip="v5p", models=MODELS, lengths=LENGTHS, sizes=SIZES) -> list[dict]:
    """An estimate for each kind ("strong": STRONG tokens a step, "weak": WEAK a chip), model, length and size, with
    "kind" beside it and "fits" False where no layout does; those have nothing else to say.
    """
    found = []
    for model in models:
        base, _ = flags.parse([f"--config={model}"])
        for length in lengths:
            for kind in ("strong", "weak"):
                for size in sizes:
                    tokens = STRONG if kind == "strong" else WEAK * size
                    rows = max(tokens // length, 1)
                    data = dataclasses.replace(base.data, seq_len=length, batch_size=rows)
                    topology = chips.standard(chip, size)
                    listed = fit.candidates(dataclasses.replace(base, data=data), topology, ("full",))
                    named = {"kind": kind, "model": model, "length": length, "size": size, "fits": bool(listed)}
                    found.append(named | (listed[0] if listed else {}))
    return found


def show(found):
    """A table for each kind and length: seconds a step, the layout, and the share that communication would add."""
    for kind in ("strong", "weak"):
        for length in sorted({one["length"] for one in found}):
            rows = []
            for one in (x for x in found if (x["kind"], x["length"]) == (kind, length)):
                name = f"{one['model']} on {one['size']}"
                rows.append((name, *(_cells(one) if one["fits"] else ("does not fit", "", "", "", ""))))
            columns = ("model on chips", "s/step", "MFU bound", "data fsdp context model", "microbatches", "links")
            told = f"{STRONG:,} tokens a step" if kind == "strong" else f"{WEAK:,} tokens a chip"
            progress.table(f"{kind} scaling at {length:,} tokens, {told}", columns, rows)


def _cells(one):
    seconds = one["seconds"]
    share = seconds["links"] / sum(seconds.values())
    mesh = " ".join(str(size) for size in one["mesh"].values())
    return f"{one['step_seconds'][0]:.3g}", f"{one['mfu_bound']:.1%}", mesh, one["accumulate"], f"{share:.1%}"


def draw(found, folder) -> list[Path]:
    """scaling.png and scaling.svg: seconds a step over chips; a ring where time is cut, dashed what the links take.
    Raises ValueError in one line where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--scaling: the picture needs matplotlib: pip install '.[plot]'") from None
    from matplotlib.figure import Figure

    from experiments.report import figures

    lengths = sorted({one["length"] for one in found})
    with matplotlib.rc_context(figures.PAPER):
        figure = Figure(figsize=(3.2 * len(lengths), 5.6), layout="constrained")
        grid = figure.subplots(2, len(lengths), squeeze=False, sharex=True)
        for row, kind in enumerate(("strong", "weak")):
            for axes, length in zip(grid[row], lengths, strict=True):
                _panel(axes, [x for x in found if x["fits"] and (x["kind"], x["length"]) == (kind, length)])
                axes.set_title(f"{kind}, T = {length:,}")
        for axes in grid[1]:
            axes.set_xlabel("chips")
        for axes in grid[:, 0]:
            axes.set_ylabel("seconds a step (estimate)")
        grid[0][0].legend(fontsize=7)
        figure.suptitle("Best layout on paper; rings: time is cut over chips; dashed: links alone; nothing was run")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"scaling.{kind}" for kind in ("png", "svg")]
        for path in paths:
            figure.savefig(path, dpi=300, metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def _panel(axes, found):
    axes.set(yscale="log")
    axes.set_xscale("log", base=2)
    for model, colour in COLOURS.items():
        here = [one for one in found if one["model"] == model]
        sizes = [one["size"] for one in here]
        axes.plot(sizes, [one["step_seconds"][0] for one in here], color=colour, marker=".", label=model)
        cut = [one for one in here if one["mesh"]["context"] > 1]
        ends = [one["size"] for one in cut], [one["step_seconds"][0] for one in cut]
        axes.plot(*ends, "o", markerfacecolor="none", markersize=9, color=colour)
        linked = [one for one in here if one["seconds"]["links"]]
        ends = [one["size"] for one in linked], [one["seconds"]["links"] for one in linked]
        axes.plot(*ends, color=colour, linestyle="dashed", linewidth=0.8)
