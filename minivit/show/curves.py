"""Curves as SVG: a chart for a page, or a file of its own; no script, no font and no style from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from minivit.files import write_text
from minivit.show.markup import escape

Points = Sequence[tuple[float, float]]

COLOURS = {  # on light and on dark paper
    "paper": ("#ffffff", "#0d1117"),
    "ink": ("#1f2328", "#e6edf3"),
    "quiet": ("#59636e", "#9198a1"),
    "faint": ("#dfe3e8", "#2b3138"),
    "blue": ("#0969da", "#4493f8"),
    "orange": ("#bc4c00", "#f0883e"),
    "red": ("#cf222e", "#f85149"),
}
STYLE = """\
.chart { width: 100%; height: auto; font: 12px system-ui, sans-serif; }
.chart text { fill: var(--quiet); }
.chart .title { fill: var(--ink); font-weight: 600; font-size: 14px; }
.chart .end { text-anchor: end; }
.chart .mid { text-anchor: middle; }
.chart polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.chart .grid { stroke: var(--faint); stroke-width: 1; }
.chart .mark { stroke: var(--quiet); stroke-dasharray: 4 3; }
.chart .line1 { stroke: var(--blue); }
.chart .line2 { stroke: var(--orange); }
.chart .dot1, .chart .name1 { fill: var(--blue); }
.chart .dot2, .chart .name2 { fill: var(--orange); }
"""
"""What a chart looks like, in the colours that :data:`COLOURS` names; whoever puts charts in a page sets these."""

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 36, 44  # margins around the plot
MOST_DOTS = 60  # points of a line that are marked one by one, each with its figures to hover over


def chart(
    title: str,
    lines: Mapping[str, Points],
    x_label: str,
    form: Callable[[float], str] = "{:.3g}".format,
    log_x: bool = False,
    marks: Mapping[str, float] | None = None,
) -> str:
    """Return a chart of up to two named ``lines`` of points (x, y), or "" if no point is finite.

    ``form`` writes a y. ``marks`` are one or two places x to point out, by what to call them.
    """
    lines = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    along = math.log10 if log_x else float
    xs = [along(x) for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_low, x_high = min(xs), max(xs)
    y_ticks = ticks(min(ys), max(ys))
    y_low, y_high = y_ticks[0], y_ticks[-1]
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        share = (along(x) - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return LEFT + 6 + (right - LEFT - 12) * share, bottom - (bottom - TOP) * (y - y_low) / (y_high - y_low)

    parts = [f'<text class="title" x="0" y="16">{escape(title)}</text>']
    if len(lines) > 1:
        names = [f'<tspan class="name{i}" dx="12">● {escape(name)}</tspan>' for i, name in enumerate(lines, 1)]
        parts.append(f'<text class="end" x="{right}" y="16">{"".join(names)}</text>')
    for y in y_ticks:
        _, py = place(1.0, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 8}" y="{py + 4:.1f}">{escape(form(y))}</text>')
    for x in _x_ticks(x_low, x_high, log_x):
        px, _ = place(x, y_low)
        parts.append(f'<text class="mid" x="{px:.1f}" y="{bottom + 18}">{x:g}</text>')
    parts.append(f'<text class="mid" x="{(LEFT + right) / 2}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
    rising = sorted((marks or {}).items(), key=lambda mark: mark[1])
    for name, x in rising:
        px, _ = place(x, y_low)
        side, gap = ("start", 4) if name == rising[-1][0] and px < WIDTH - 140 else ("end", -4)
        parts.append(f'<line class="mark" x1="{px:.1f}" x2="{px:.1f}" y1="{TOP - 14}" y2="{bottom}"/>')
        parts.append(f'<text class="{side}" x="{px + gap:.1f}" y="{TOP - 6}">{escape(name)}</text>')
    for i, (name, points) in enumerate(lines.items(), 1):
        spots = [place(x, y) for x, y in points]
        parts.append(f'<polyline class="line{i}" points="{" ".join(f"{px:.1f},{py:.1f}" for px, py in spots)}"/>')
        if len(points) <= MOST_DOTS:
            parts += [
                f'<circle class="dot{i}" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{escape(name)}, '
                f"{escape(x_label)} {x:g}: {escape(form(y))}</title></circle>"
                for (px, py), (x, y) in zip(spots, points, strict=True)
            ]
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def ticks(low: float, high: float) -> list[float]:
    """Return four to seven round numbers, evenly spaced, from at most ``low`` to at least ``high``."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: it gets some room
        low, high = low - abs(low) / 10, high + (abs(high) / 10 or 1.0)
    unit = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= (high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _x_ticks(low: float, high: float, log: bool) -> list[float]:
    """Return the numbers under the axis: powers of ten, or whole numbers, because epochs are counted."""
    if log:
        return [10.0**e for e in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)]
    return [x for x in ticks(low, high) if low <= x <= high and x == round(x)] or [round(low)]


def write_svg(path: str | Path, svg: str) -> None:
    """Write a chart to a file of its own: on white, and with nothing that only browsers understand."""
    style = STYLE
    for name, (light, _) in COLOURS.items():
        style = style.replace(f"var(--{name})", light)
    view = f"-12 -8 {WIDTH + 24} {HEIGHT + 16}"  # with a margin
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="{view}" width="{2 * WIDTH}">'
    paper = '<rect x="-12" y="-8" width="100%" height="100%" fill="white"/>'
    write_text(Path(path), f"{head}<style>{style}</style>{paper}{svg.partition('>')[2]}")
