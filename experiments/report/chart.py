"""Line and dot charts as SVG text: nothing to load, sharp at any size, readable without scripts."""

import dataclasses
import math
from html import escape

WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, TOP, BOTTOM = 74, 12, 12, 46


@dataclasses.dataclass(frozen=True)
class Line:
    """One line: points, and how it is drawn; `thin` ones lie behind and are not read by the pointer."""

    group: int  # its legend entry
    label: str
    xs: list
    ys: list
    colour: str
    dash: str = ""
    thin: bool = False
    run: str = ""
    dots: bool = False


class Axis:
    """Maps [low, high] to pixels, linearly or by the logarithm, with about six round ticks."""

    def __init__(self, values, start, end, log=False):
        values = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(values), max(values)) if values else (1.0, 10.0)
        self.log = log
        if log:
            low, high = math.log10(low), math.log10(high)
        pad = 0.04 * (high - low) or 0.05 * abs(high) or 0.5
        self.low, self.high, self.start, self.end = low - pad, high + pad, start, end

    def __call__(self, value):
        """The pixel of a value."""
        value = math.log10(value) if self.log else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self):
        """Round values inside the range."""
        if self.log:
            return _log_ticks(self.low, self.high)
        step = nice((self.high - self.low) / 7)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step) + 1)]

    def text(self, value):
        """A tick's label."""
        if self.log:
            return f"{value:g}"
        step = nice((self.high - self.low) / 7)
        return number(value, max(0, -math.floor(math.log10(step) + 1e-9)))


def nice(span):
    """The smallest of 1, 2, 5 times a power of ten that is at least `span`."""
    power = 10 ** math.floor(math.log10(span))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= span * (1 - 1e-9))


def number(value, digits):
    """With so many decimals; thousands as k, millions as M where that loses nothing."""
    value = 0.0 if abs(value) < 1e-12 else value
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.{digits}f}" if digits < 5 else f"{value:.1e}"


def _log_ticks(low, high):
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        powers = range(math.floor(low), math.ceil(high) + 1)
        found = [f * 10.0**p for p in powers for f in factors]
        found = [value for value in found if low <= math.log10(value) <= high]
        if len(found) >= 3:
            return found[:: math.ceil(len(found) / 6)]
    return found


def lines(name, found, xlabel, ylabel, *, logx=False, logy=False):
    """(SVG text, what the pointer needs as plain JSON) of a line chart."""
    found = [line for line in found if line.xs]
    x = Axis([v for line in found for v in line.xs], LEFT, WIDTH - RIGHT, logx)
    y = Axis([v for line in found for v in line.ys], HEIGHT - BOTTOM, TOP, logy)
    parts = [_frame(x, y, xlabel, ylabel)]
    for line in sorted(found, key=lambda line: not line.thin):
        parts.append(_line(line, x, y))
    parts.append(f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>')
    text = _svg(name, HEIGHT, "".join(parts))
    read = [
        {
            "group": line.group,
            "label": line.label,
            "colour": line.colour,
            "x": [round(x(v), 1) for v in line.xs],
            "at": [float(f"{v:.6g}") for v in line.xs],
            "y": [float(f"{v:.5g}") for v in line.ys],
        }
        for line in found
        if not line.thin
    ]
    return text, {"xlabel": xlabel, "lines": read}


def _svg(name, height, inside):
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(name)}" '
        f'xmlns="http://www.w3.org/2000/svg">{inside}</svg>'
    )


def _frame(x, y, xlabel, ylabel):
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in y.ticks():
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4.5:.1f}" text-anchor="end">{y.text(value)}</text>')
    for value in x.ticks():
        at = x(value)
        parts.append(f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{x.text(value)}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(xlabel)}</text>')
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(ylabel)}</text>'
    )
    return "".join(parts)


def _line(line, x, y):
    points = [(x(a), y(b)) for a, b in zip(line.xs, line.ys) if math.isfinite(b) and (b > 0 or not y.log)]
    if not points:
        return ""
    path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
    kind = "run" if line.thin else "mean"
    run = f' data-run="{escape(line.run)}"' if line.run else ""
    dash = f' stroke-dasharray="{line.dash}"' if line.dash else ""
    drawn = f'<path class="{kind}" stroke="{line.colour}"{dash} d="{path}"/>'
    if line.dots or len(points) == 1:
        drawn += "".join(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{line.colour}"/>' for a, b in points)
    return f'<g data-group="{line.group}"{run}><title>{escape(line.label)}</title>{drawn}</g>'


def dots(name, rows, xlabel):
    """SVG of one row each (group, label, colour, values, mean, sd or None): the values, their mean and mean +- sd."""
    step, top = 44, 6
    height = top + step * len(rows) + 44
    bottom = height - 40
    x = Axis([v for row in rows for v in (*row[3], *_ends(row[4], row[5]))], 12, WIDTH - 12)
    parts = []
    for value in x.ticks():
        at = x(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}"/>')
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{x.text(value)}</text>')
    parts.append(f'<path class="axis" d="M12 {bottom}H{WIDTH - 12}"/>')
    parts.append(f'<text x="{WIDTH / 2}" y="{height - 6}" text-anchor="middle">{escape(xlabel)}</text>')
    for index, (group, label, colour, values, mean, sd) in enumerate(rows):
        y = top + index * step + 30
        inside = f'<text x="12" y="{y - 13}">{escape(label)}</text>'
        if sd is not None:
            low, high = (x(end) for end in _ends(mean, sd))
            inside += f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
        inside += f'<path d="M{x(mean):.1f} {y - 7}v14" stroke="{colour}" stroke-width="3"/>'
        inside += "".join(
            f'<circle cx="{x(v):.1f}" cy="{y}" r="4.5" fill="{colour}" fill-opacity=".55"/>' for v in values
        )
        parts.append(f'<g data-group="{group}">{inside}</g>')
    return _svg(name, height, "".join(parts))


def _ends(mean, sd):
    return (mean,) if sd is None else (mean - sd, mean + sd)
