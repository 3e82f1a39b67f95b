"""What `experiments.recall` computed, as a table and pictures: a row is the stored result of a mixer at a width."""

import json

from experiments import progress


def best(row):
    """(learning rate, {pairs: (mean, sample standard deviation, accuracy of each seed)}) of a cell."""
    import numpy as np

    shape = (len(row["rates"]), len(row["seeds"]))
    hardest = max(row["val"], key=int)
    chosen = int(np.argmax(np.reshape(row["val"][hardest], shape).mean(1)))
    lanes = {pairs: np.reshape(values, shape)[chosen] for pairs, values in row["test"].items()}
    spread = lambda a: float(a.std(ddof=1)) if a.size > 1 else 0.0
    return row["rates"][chosen], {pairs: (float(a.mean()), spread(a), a.tolist()) for pairs, a in lanes.items()}


def _percent(score):
    """A mean and its spread; one seed has none."""
    mean, sd, seeds = score
    return f"{100 * mean:.1f}" + (f" ± {100 * sd:.1f}" if len(seeds) > 1 else "")


def summary(row):
    """A cell in half a line."""
    rate, scores = best(row)
    shown = ", ".join(f"{pairs} pairs {_percent(score)}" for pairs, score in scores.items())
    return f"{shown} at lr {rate:g}, {row['seconds']:.0f} s"


def write(out, rows):
    """recall.json, recall.md and the pictures."""
    (out / "recall.json").write_text(json.dumps(rows, indent=None) + "\n")
    text = markdown(rows)
    (out / "recall.md").write_text(text)
    print(text)
    try:
        import matplotlib
    except ImportError:
        progress.say("no pictures: pip install '.[report]'")
        return
    matplotlib.use("agg")
    draw(out, rows)


def markdown(rows):
    """The table, one line a mixer, sorted by its accuracy at the most pairs and the least width."""
    widths, pairs = sorted({row["width"] for row in rows}), list(rows[0]["test"])
    cell = {(row["mixer"], row["width"]): row for row in rows}
    names = list(dict.fromkeys(row["mixer"] for row in rows))
    order = lambda name: -best(cell[name, widths[0]])[1][pairs[-1]][0] if (name, widths[0]) in cell else 1
    heads = [f"width {w}: {part}" for w in widths for part in ("state", "lr", *(f"{n} pairs" for n in pairs))]
    lines = [f"| mixer | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in sorted(names, key=order):
        parts = []
        for width in widths:
            row = cell.get((name, width))
            rate, scores = best(row) if row else (None, {})
            shown = [_percent(scores[n]) if row else "" for n in pairs]
            parts += [f"{row['state']:,}", f"{rate:g}", *shown] if row else ["", "", *shown]
        lines.append(f"| {name} | {' | '.join(parts)} |")
    return "\n".join(lines) + "\n"


def draw(out, rows):
    """Accuracy by mixer, and the loss curves of each mixer's best learning rate."""
    import matplotlib.pyplot as plt
    import numpy as np

    widths = sorted({row["width"] for row in rows})
    figure, axes = plt.subplots(2, len(widths), figsize=(7 * len(widths), 10), squeeze=False, layout="constrained")
    for column, width in enumerate(widths):
        chosen = sorted((r for r in rows if r["width"] == width), key=lambda r: best(r)[1][max(r["test"], key=int)][0])
        bars, curves = axes[:, column]
        for offset, (pairs, colour) in enumerate(zip(chosen[0]["test"], ("#9ecae1", "#08519c"), strict=False)):
            means, errors = zip(*(best(row)[1][pairs][:2] for row in chosen), strict=True)
            place = np.arange(len(chosen)) + 0.4 * offset
            bars.barh(
                place, 100 * np.array(means), 0.38, xerr=100 * np.array(errors), color=colour, label=f"{pairs} pairs"
            )
        bars.set_yticks(np.arange(len(chosen)) + 0.2, [row["mixer"] for row in chosen])
        bars.set(xlabel="right answers, %", xlim=(0, 102), title=f"width {width}")
        bars.legend(loc="lower right")
        for index, row in enumerate(reversed(chosen)):
            rate = best(row)[0]
            lanes = np.reshape(row["loss"], (len(row["rates"]), len(row["seeds"]), -1))[row["rates"].index(rate)]
            step = np.linspace(0, row["steps"], lanes.shape[1] + 1)[1:]
            style = dict(color=plt.cm.tab20(index % 20), ls=("-", "--")[index // 20])
            curves.plot(step, lanes.mean(0), label=row["mixer"], lw=1.2, **style)
        curves.set(xlabel="step", ylabel="training loss, nats per answer (mean of seeds)")
        curves.legend(fontsize=7, ncols=2)
    for suffix in ("png", "svg"):
        figure.savefig(out / f"recall.{suffix}", dpi=130)
    plt.close(figure)
