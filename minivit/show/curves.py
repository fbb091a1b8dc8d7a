"""Curves as SVG: a chart for a page, or a file of its own; no script, no font and no style from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from minivit.files import write_text
from minivit.show.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, log_ticks, ticks
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
.chart .mid, .chart .cell { text-anchor: middle; }
.chart .cell { font-size: 10px; }
.chart .on-dark { fill: #ffffff; }
.chart .on-light { fill: #000000; }
.chart polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.chart .grid { stroke: var(--faint); stroke-width: 1; }
.chart .mark { stroke: var(--quiet); stroke-dasharray: 4 3; }
.chart .line1 { stroke: var(--blue); }
.chart .line2 { stroke: var(--orange); }
.chart .dot { fill: var(--quiet); fill-opacity: 0.55; }
.chart .dot1, .chart .name1 { fill: var(--blue); }
.chart .dot2, .chart .name2 { fill: var(--orange); }
"""
"""What a chart looks like, in the colours that :data:`COLOURS` names; whoever puts charts in a page sets these."""

MOST_DOTS = 60  # points of a line that are marked one by one, each with its figures to hover over


def chart(
    title: str,
    lines: Mapping[str, Points],
    x_label: str,
    form: Callable[[float], str] = "{:.3g}".format,
    log_x: bool = False,
    marks: Mapping[str, float] | None = None,
    *,
    dots: Sequence[tuple[float, float, str]] = (),
    dots_are: str = "",
    levels: Mapping[str, float] | None = None,
    reach: Sequence[float] = (),
    log_y: bool = False,
) -> str:
    """Return a chart of up to two named ``lines`` of points (x, y), or "" if no point is finite.

    ``form`` writes a y. ``marks`` are one or two places x to point out, by what to call them, ``levels`` heights y.
    ``dots`` are single points (x, y, what it is), called ``dots_are`` in the legend. The y axis goes as far as
    ``reach``, so that two charts can be compared. On a logarithmic axis what is not above 0 is left out.
    """

    def fits(x: float, y: float) -> bool:
        return math.isfinite(x) and math.isfinite(y) and not (log_x and x <= 0) and not (log_y and y <= 0)

    lines = {name: [p for p in points if fits(*p)] for name, points in lines.items()}
    lines = {name: points for name, points in lines.items() if points}
    dots = [dot for dot in dots if fits(*dot[:2])]
    if not lines and not dots:
        return ""
    levels = {name: y for name, y in (levels or {}).items() if fits(1, y)}
    points = [p for line in lines.values() for p in line] + [dot[:2] for dot in dots]
    xs, ys = [x for x, _ in points], [y for _, y in points] + [*levels.values()] + [y for y in reach if fits(1, y)]
    axes = Axes(min(xs), max(xs), (log_ticks if log_y else ticks)(min(ys), max(ys)), log_x, log_y)

    parts = [f'<text class="title" x="0" y="16">{escape(title)}</text>']
    if len(lines) > 1 or dots or levels:
        kinds = [("", f"● {dots_are}")] * bool(dots)
        kinds += [(f' class="name{i}"', f"● {name}") for i, name in enumerate(lines, 1)]
        kinds += [("", f"┄ {name}") for name in levels]
        names = [f'<tspan{kind} dx="12">{escape(name)}</tspan>' for kind, name in kinds]
        parts.append(f'<text class="end" x="{WIDTH - RIGHT}" y="16">{"".join(names)}</text>')
    parts += axes.drawn(x_label, form)
    parts += _pointed_out(axes, marks or {}, levels)
    for x, y, what in dots:
        px, py = axes.place(x, y)
        parts.append(f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="4"><title>{escape(what)}</title></circle>')
    for i, (name, line) in enumerate(lines.items(), 1):
        parts += _line(axes, i, name, line, x_label, form)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _pointed_out(axes: Axes, marks: Mapping[str, float], levels: Mapping[str, float]) -> list[str]:
    """Return dashed lines at places along the x axis, with what to call them, and at heights."""
    parts, bottom = [], HEIGHT - BOTTOM
    rising = sorted(marks.items(), key=lambda mark: mark[1])
    for name, x in rising:
        px, _ = axes.place(x, axes.marks[0])
        side, gap = ("start", 4) if name == rising[-1][0] and px < WIDTH - 140 else ("end", -4)
        parts.append(f'<line class="mark" x1="{px:.1f}" x2="{px:.1f}" y1="{TOP - 14}" y2="{bottom}"/>')
        parts.append(f'<text class="{side}" x="{px + gap:.1f}" y="{TOP - 6}">{escape(name)}</text>')
    for y in levels.values():
        _, py = axes.place(axes.x_low, y)
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
    return parts


def _line(axes: Axes, i: int, name: str, points: Points, x_label: str, form: Callable[[float], str]) -> list[str]:
    """Return line number ``i``, its points marked if they are few."""
    spots = [axes.place(x, y) for x, y in points]
    parts = [f'<polyline class="line{i}" points="{" ".join(f"{px:.1f},{py:.1f}" for px, py in spots)}"/>']
    if len(points) <= MOST_DOTS:
        parts += [
            f'<circle class="dot{i}" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{escape(name)}, '
            f"{escape(x_label)} {x:g}: {escape(form(y))}</title></circle>"
            for (px, py), (x, y) in zip(spots, points, strict=True)
        ]
    return parts


def write_svg(path: str | Path, svg: str) -> None:
    """Write a chart to a file of its own: on white, and with nothing that only browsers understand."""
    style = STYLE
    for name, (light, _) in COLOURS.items():
        style = style.replace(f"var(--{name})", light)
    start, _, rest = svg.partition(">")
    width, height = (int(number) for number in start.partition('viewBox="0 0 ')[2].partition('"')[0].split())
    view = f"-12 -8 {width + 24} {height + 16}"  # with a margin
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="{view}" width="{2 * width}">'
    paper = '<rect x="-12" y="-8" width="100%" height="100%" fill="white"/>'
    write_text(Path(path), f"{head}<style>{style}</style>{paper}{rest}")
