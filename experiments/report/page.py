"""The HTML of a report: text, tables and charts in one string that loads nothing."""

import json
import time
from html import escape
from pathlib import Path

from experiments.report import chart, compare, curves
from experiments.sweep import plan

HERE = Path(__file__).parent
NONE = "–"


def page(runs, title):
    """The whole document on these runs."""
    groups, scores = compare.groups(runs), compare.scores(runs)
    main, charts = scores[0], {}
    body = [
        _head(runs, groups, title),
        "<h2>Comparison</h2>",
        _comparison(groups, scores),
        f'<div class="charts">{_final(groups, scores)}{_sensitivity(groups, charts, main)}</div>',
        "<h2>Curves</h2>",
        _legend(groups),
        _curves(groups, charts, scores),
        "<h2>What differs</h2>",
        _differences(groups),
        "<h2>Costs of the mixers</h2>",
        _costs(groups),
        "<h2>Runs</h2>",
        _runs(runs, groups, main),
        "<h2>Samples</h2>",
        _samples(runs, groups, main),
    ]
    data = json.dumps(charts, separators=(",", ":")).replace("</", "<\\/")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{(HERE / 'page.css').read_text()}</style></head>\n<body>\n"
        + "\n".join(body)
        + f'\n<script type="application/json" id="data">{data}</script>'
        + f"\n<script>{(HERE / 'page.js').read_text()}</script>\n</body></html>\n"
    )


def _head(runs, groups, title):
    states = [run.state.name for run in runs]
    counted = ", ".join(f"{states.count(name)} {name}" for name in dict.fromkeys(states))
    devices = sorted({f"{r.report['devices']} x {r.report['device']}" for r in runs if "device" in r.report})
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="note">{len(runs)} runs: {counted}']
    parts.append(f" · on {escape(', '.join(devices))}" if devices else "")
    parts.append(f" · written {time.strftime('%Y-%m-%d %H:%M %Z')}</p>")
    if len({run.fingerprint for run in runs if run.fingerprint}) > 1:
        parts.append(
            '<p class="warn">These runs did not all read the same data (or not in the same way): '
            "their losses cannot be compared as they stand.</p>"
        )
    bad = [run for run in runs if run.state.name in ("failed", "broken")]
    if bad:
        named = ", ".join(f"{escape(run.id)} ({escape(run.state.reason)})" for run in bad)
        parts.append(f'<p class="warn">Failed or unreadable: {named}.</p>')
    return "".join(parts)


def table(columns, rows, left=1):
    """An HTML table that scrolls sideways on its own; cells are HTML, or (HTML, class)."""
    head = "".join(f'<th class="left">{c}</th>' if i < left else f"<th>{c}</th>" for i, c in enumerate(columns))
    lines = []
    for row in rows:
        cells = []
        for index, cell in enumerate(row):
            text, kind = cell if isinstance(cell, tuple) else (cell, "")
            kind = f"{kind} left".strip() if index < left else kind
            cells.append(f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _key(group):
    dash = f' stroke-dasharray="{group.dash}"' if group.dash else ""
    line = f'<path d="M0 5H26" stroke="{group.colour}" stroke-width="3"{dash}/>'
    return f'<svg class="key" viewBox="0 0 26 10" aria-hidden="true">{line}</svg>'


def _number(value, form):
    return NONE if value is None else format(value, form)


def _spread(found, form):
    if found.mean is None:
        return NONE
    sd = "" if found.sd is None else f" ± {found.sd:{form}}"
    return f"{found.mean:{form}}{sd}"


def _last_loss(run):
    values = run.column("train", "loss")[1]
    return float(values[-1]) if values.size else None


def _comparison(groups, scores):
    rows, main = [], scores[0]
    best = {score: min((score.rank(group.spread(score.of).mean) for group in groups), default=None) for score in scores}
    for group in sorted(groups, key=lambda group: (main.rank(group.spread(main.of).mean), group.index)):
        finished = sum(run.state.name == "finished" for run in group.runs)
        cfg = group.runs[0].cfg
        rows.append(
            (
                (_key(group) + escape(group.label), "wrap"),
                *(_scored(group, score, best[score]) for score in scores),
                f"{finished}/{len(group.runs)}",
                _spread(group.spread(compare.val_loss), ".4f"),
                _spread(group.spread(_last_loss), ".4f"),
                f"{cfg.model.count():,}" if cfg else NONE,
                _spread(group.spread(lambda run: run.tokens_per_second()), ",.0f"),
                _spread(group.spread(lambda run: m * 100 if (m := run.mfu()) is not None else None), ".1f"),
            )
        )
    columns = ("runs that differ in seeds alone", *(score.name for score in scores), "finished", "validation loss")
    columns += ("last training loss", "weights", "tokens/s", "MFU %")
    note = (
        "Mean ± sample standard deviation over seeds; best first. Validation figures are of finished runs, losses in "
    )
    note += "nats per token; tokens/s is a run's median. "
    if all(run.mfu() is None for group in groups for run in group.runs):
        note += "MFU is not known: the peak of this device is in no table. "
    return table(columns, rows) + f'<p class="note">{note}</p>'


def _scored(group, score, best):
    found = group.spread(score.of)
    form = ".4f" if score.sign > 0 else ".3f"
    return _spread(found, form), "best" if found.n and score.rank(found.mean) == best else ""


def _final(groups, scores):
    parts = []
    for score in scores:
        rows = []
        for group in groups:
            found = group.spread(score.of)
            if found.n:
                rows.append((group.index, group.label, group.colour, found.values, found.mean, found.sd))
        if rows:
            rows.sort(key=lambda row: score.rank(row[4]))
            title = f"Final {score.name}"
            drawn = chart.dots(title, rows, f"{score.unit} (dots: seeds, bar: mean, line: ± one sd)")
            parts.append(f"<figure><figcaption>{escape(title)}</figcaption>{drawn}</figure>")
    return "".join(parts) or '<p class="note">No run is finished yet.</p>'


def _legend(groups):
    entries = "".join(
        f'<button type="button" data-group="{group.index}" aria-pressed="true">'
        f"{_key(group)}{escape(group.label)}</button>"
        for group in groups
    )
    return f'<div class="legend">{entries}<button type="button" class="all">all / none</button></div>'


def _figure(name, title, drawn, charts):
    text, charts[name] = drawn
    return f'<figure data-chart="{escape(name)}"><figcaption>{escape(title)}</figcaption>{text}</figure>'


def _curves(groups, charts, scores):
    parts = []
    for name, kind, title, unit, log in curves.kinds(scores):
        lines = curves.lines(groups, kind, name)
        if lines:
            drawn = chart.lines(title, lines, "step", unit, logy=log)
            parts.append(_figure(name, title, drawn, charts))
    note = (
        f"Thick: mean over seeds, at the steps that all have; thin: each run. Beyond {curves.POINTS} points a curve is "
    )
    note += "averaged over equal stretches. The last validation point covers all that the config "
    note += "asks for at the end, those before a sample of it."
    return f'<div class="charts">{"".join(parts)}</div><p class="note">{note}</p>'


def _sensitivity(groups, charts, score):
    """A chart of the final score over every varying number."""
    parts = []
    for path, found in compare.numeric(groups):
        lines = []
        for line in found:
            scored = [(value, group, group.spread(score.of).mean) for value, group in line]
            scored = [(value, group, mean) for value, group, mean in scored if mean is not None]
            if len(scored) > 1:
                group = scored[0][1]
                short = path.rsplit(".", 1)[-1]
                words = [w for w in group.label.split(" · ") if not w.startswith((f"{short}=", f"{path}="))]
                label = " · ".join(words) or group.label
                xs, ys = [s[0] for s in scored], [s[2] for s in scored]
                lines.append(chart.Line(group.index, label, xs, ys, group.colour, group.dash, dots=True))
        values = [x for line in lines for x in line.xs]
        if lines:
            log = min(values) > 0 and max(values) >= 2 * min(values)
            drawn = chart.lines(path, lines, path, score.unit, logx=log)
            parts.append(_figure(f"over {path}", f"Final {score.name} over {path}", drawn, charts))
    return "".join(parts)


def _differences(groups):
    paths = compare.varying(groups)
    if not paths:
        return '<p class="note">Nothing but seeds.</p>'
    rows = []
    if any(path.startswith(compare.MIXERS) for path in paths):
        rows.append((f"<code>{compare.MIXERS}</code>", *((escape(compare.stack(g)), "wrap") for g in groups)))
        paths = [path for path in paths if not path.startswith(compare.MIXERS)]
    for path in paths:
        values = [escape(plan.brief(g.settings[path])) if path in g.settings else NONE for g in groups]
        rows.append((f"<code>{escape(path)}</code>", *values))
    note = (
        "Of the mixers, fields at their defaults are left out. Seeds, and how often a run logs, evaluates and saves, "
    )
    note += "are not compared."
    named = (_key(group) + escape(group.label) for group in groups)
    return table(("field", *named), rows) + f'<p class="note">{note}</p>'


def _costs(groups):
    costs = compare.costs(groups)
    if not costs:
        return '<p class="note">No config could be read.</p>'
    rows = []
    for cost in costs:
        sizes = [NONE if size is None else f"{size:,}" for size in cost.state]
        rows.append(((escape(cost.name), "wrap"), f"{cost.weights:,}", _number(cost.flops, ",.0f"), *sizes))
    lengths = sorted({cost.length for cost in costs})
    named = [f"state, {t} T" if t > 1 else "state, T" for t in compare.CONTEXTS]
    note = (
        f"One layer, by its own formulas; T = {' or '.join(map(str, lengths))} tokens, the training length. FLOPs are "
    )
    note += "of the forward pass, a multiply-add being two; the state is the elements that decoding one sequence keeps."
    return table(("mixer", "weights", "FLOPs/token at T", *named), rows) + f'<p class="note">{note}</p>'


def _runs(runs, groups, score):
    label = {id(run): group for group in groups for run in group.runs}
    rows = []
    for run in runs:
        group = label.get(id(run))
        reason = f" {escape(run.state.reason)}" if run.state.reason else ""
        state = f'<span class="state {run.state.name}">{run.state.name}</span>{reason}'
        seeds = compare.seeds(run)
        rows.append(
            (
                f"<code>{escape(run.id)}</code>",
                (_key(group) + escape(group.label) if group else NONE, "wrap"),
                (state, "wrap"),
                str(seeds[0]) if not seeds[1] else f"{seeds[0]}, data {seeds[1]}",
                f"{run.state.step}/{run.steps}",
                _number(score.of(run), ".4f"),
                _number(run.tokens_per_second(), ",.0f"),
            )
        )
    return table(("run", "what", "state", "seed", "steps", score.name, "tokens/s"), rows, left=3)


def _samples(runs, groups, score):
    label = {id(run): group.label for group in groups for run in group.runs}
    parts = []
    for run in sorted(runs, key=lambda run: score.rank(score.of(run))):
        if not isinstance(run.report.get("sample"), str):
            continue
        prompt, sample = escape(run.report.get("prompt") or ""), escape(run.report["sample"])
        reached = f"{score.name} {_number(score.of(run), '.4f')}"
        shown = "" if parts else " open"
        title = f"{escape(label.get(id(run), ''))} · <code>{escape(run.id)}</code> · {reached}"
        parts.append(f"<details{shown}><summary>{title}</summary><pre><mark>{prompt}</mark>{sample}</pre></details>")
    return "".join(parts) or '<p class="note">No run has made a sample.</p>'
