"""Figures for papers by matplotlib: PNG at 300 dots an inch, and SVG with text as text."""

from experiments.report import compare, curves

PAPER = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "seqmix",  # the same file for the same runs
}
DASHES = {"": "solid", "7 3": "dashed", "2 3": "dotted", "9 3 2 3": "dashdot"}


def write(runs, folder):
    """Writes a figure of every curve and of the final scores into a folder; the paths, PNG then SVG of each."""
    try:
        import matplotlib
    except ImportError:
        raise ImportError("--figures needs matplotlib: pip install '.[report]'") from None
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    groups, scores = compare.groups(runs), compare.scores(runs)
    written = []
    with matplotlib.rc_context(PAPER):
        for name, kind, title, unit, log in curves.kinds(scores):
            lines = curves.lines(groups, kind, name)
            if lines:
                figure = Figure(figsize=(6.0, 3.0), layout="constrained")
                _curves(figure.subplots(), lines, unit, log)
                written += _save(figure, folder / name.replace("/", "_"), title)
        main = scores[0]
        scored = [(group, found) for group in groups if (found := group.spread(main.of)).n]
        if scored:
            figure = Figure(figsize=(4.6, 0.6 + 0.28 * len(scored)), layout="constrained")
            _scores(figure.subplots(), sorted(scored, key=lambda pair: -main.sign * pair[1].mean), main.name)
            written += _save(figure, folder / "final", "Final validation")
    return written


def _curves(axes, lines, unit, log):
    for line in lines:
        style = {"color": line.colour, "linestyle": DASHES[line.dash]}
        width, alpha, label = (0.6, 0.45, None) if line.thin else (1.5, 1.0, line.label)
        axes.plot(line.xs, line.ys, linewidth=width, alpha=alpha, label=label, **style)
    axes.set(xlabel="step", ylabel=unit, yscale="log" if log else "linear")
    axes.figure.legend(fontsize=7, loc="outside right upper")


def _scores(axes, scored, name):
    for row, (group, found) in enumerate(scored):
        axes.errorbar(found.mean, row, xerr=found.sd, color=group.colour, fmt="|", markersize=10, capsize=2)
        axes.plot(found.values, [row] * found.n, "o", color=group.colour, alpha=0.55, markersize=4)
    axes.set_yticks(range(len(scored)), [group.label for group, _ in scored])
    axes.set(xlabel=name, ylim=(-0.6, len(scored) - 0.4))


def _save(figure, path, title):
    plain = {"Date": None, "Title": title}
    figure.savefig(path.with_suffix(".png"), dpi=300)
    figure.savefig(path.with_suffix(".svg"), metadata=plain)
    return [path.with_suffix(".png"), path.with_suffix(".svg")]
