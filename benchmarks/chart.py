"""The benchmarks' pictures, written as plain SVG: bars that are compared, and curves on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

BLUE, GREY, FAINT, INK, QUIET = "#0969da", "#b6bfc9", "#e4e8ec", "#1f2328", "#59636e"
COLOURS = (BLUE, "#bc4c00", "#1a7f37", "#8250df", "#bf3989")


def bars(path: str, columns: Sequence[str], groups: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
    """Write a picture with a panel for each of ``groups``, a bar for each of its rows, and a scale for each column.

    A row is a label with one number for each of ``columns``; every group's first row stands out.
    """
    left, width, pitch, height = 140, 300, 390, 22
    parts = [text(left + pitch * i, 24, name, QUIET) for i, name in enumerate(columns)]
    y = 30
    for heading, rows in groups.items():
        y += 26
        parts.append(text(16, y, heading, weight="bold"))
        y += 8
        for row, (label, values) in enumerate(rows.items()):
            colour = GREY if row else BLUE
            parts.append(text(left - 10, y + 15, label, anchor="end"))
            for i, value in enumerate(values):
                longest = max(numbers[i] for numbers in rows.values())
                x, length = left + pitch * i, width * value / longest
                parts.append(f'<rect x="{x}" y="{y + 3}" width="{length:.1f}" height="{height - 6}" fill="{colour}"/>')
                parts.append(text(x + length + 6, y + 15, number(value)))
            y += height
    write(path, left + pitch * len(columns), y + 14, parts)


def curves(path: str, y_label: str, panels: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Write a picture with a panel for each list of points (x, y), both axes logarithmic and the y axis shared."""
    left, top, width, height, pitch = 66, 44, 190, 230, 226
    values = [y for points in panels.values() for _, y in points]
    ticks = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 5)]
    low = max(t for t in ticks if t < min(values))
    high = min(t for t in ticks if t > max(values))
    place_y = lambda y: top + height * (1 - math.log(y / low) / math.log(high / low))
    parts = [text(16, 24, y_label, QUIET)]
    for i, (x_label, points) in enumerate(panels.items()):
        x0, x1 = left + pitch * i, left + pitch * i + width
        first, last = points[0][0], points[-1][0]
        place_x = lambda x, x0=x0, first=first, last=last: (
            x0 + 16 + (width - 32) * (math.log(x / first) / math.log(last / first) if last > first else 0.5)
        )
        for tick in (t for t in ticks if low <= t <= high):
            parts.append(line([(x0, place_y(tick)), (x1, place_y(tick))], FAINT))
            if i == 0:
                parts.append(text(x0 - 8, place_y(tick) + 4, number(tick), QUIET, anchor="end"))
        spots = [(place_x(x), place_y(y)) for x, y in points]
        parts.append(line(spots, BLUE, 2))
        aside = (6, "end") if points[-1][1] > 2 * points[0][1] else (0, "middle")  # beside a curve that climbs
        for (px, py), (x, y) in zip(spots, points, strict=True):
            parts.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{BLUE}"/>')
            parts.append(text(px - aside[0], py - 8, number(y), size=11, anchor=aside[1]))
            parts.append(text(px, top + height + 18, number(x), QUIET, size=11, anchor="middle"))
        parts.append(text((x0 + x1) / 2, top + height + 40, x_label, anchor="middle"))
    write(path, left + pitch * len(panels), top + height + 56, parts)


def accuracies(path: str, x_label: str, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]) -> None:
    """Write a picture with a panel for each heading, and in it named lines of points, both shares of 1.

    The x axis is logarithmic. A line's name stands at its end, where there is room for it.
    """
    left, top, width, height, pitch = 56, 56, 320, 300, 470
    parts = []
    for i, (heading, lines) in enumerate(panels.items()):
        x0, x1 = left + pitch * i, left + pitch * i + width
        xs = sorted({x for points in lines.values() for x, _ in points})
        ys = [y for points in lines.values() for _, y in points]
        low, high = math.floor(min(ys) * 10) / 10, math.ceil(max(ys) * 10) / 10
        place_x = lambda x, x0=x0, xs=xs: x0 + 16 + (width - 32) * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
        place_y = lambda y, low=low, high=high: top + height * (1 - (y - low) / (high - low))
        parts.append(text(x0, 28, heading, weight="bold"))
        for tick in (tenth / 10 for tenth in range(round(low * 10), round(high * 10) + 1)):
            parts.append(line([(x0, place_y(tick)), (x1, place_y(tick))], FAINT))
            parts.append(text(x0 - 8, place_y(tick) + 4, f"{tick:.0%}", QUIET, anchor="end"))
        for x in xs:
            parts.append(text(place_x(x), top + height + 18, f"{x:.0%}", QUIET, size=11, anchor="middle"))
        parts.append(text((x0 + x1) / 2, top + height + 40, x_label, anchor="middle"))
        ends = sorted(lines, key=lambda name: -lines[name][-1][1])
        y_name = -math.inf
        for name in ends:
            colour = COLOURS[list(lines).index(name) % len(COLOURS)]
            spots = [(place_x(x), place_y(y)) for x, y in lines[name]]
            parts.append(line(spots, colour, 2))
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in spots]
            y_name = max(spots[-1][1] + 4, y_name + 16)  # names below each other where lines end close together
            parts.append(text(x1, y_name, f"{name} {lines[name][-1][1]:.1%}", colour))
    write(path, left + pitch * len(panels), top + height + 56, parts)


def rates(path: str, y_label: str, x_label: str, lines: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Write a picture of named lines of points, both axes logarithmic, x by powers of 2; faint: as fast as x times one.

    A line's name stands at its end.
    """
    left, top, width, height = 80, 50, 560, 380
    xs = sorted({x for points in lines.values() for x, _ in points})
    ys = [y for points in lines.values() for _, y in points]
    low, high = (10.0 ** end(math.log10(y)) for end, y in ((math.floor, min(ys)), (math.ceil, max(ys))))
    place_x = lambda x: left + 16 + (width - 32) * math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
    place_y = lambda y: top + height * (1 - math.log(y / low) / math.log(high / low))
    parts = [text(16, 26, y_label, weight="bold")]
    for e in range(round(math.log10(low)), round(math.log10(high)) + 1):
        parts.append(line([(left, place_y(10.0**e)), (left + width, place_y(10.0**e))], FAINT))
        parts.append(text(left - 8, place_y(10.0**e) + 4, number(10.0**e), QUIET, anchor="end"))
    for x in xs:
        parts.append(text(place_x(x), top + height + 18, number(x), QUIET, size=11, anchor="middle"))
    parts.append(text(left + width / 2, top + height + 40, x_label, anchor="middle"))
    for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
        (first, begin), (last, end_rate) = points[0], points[-1]
        most = min(last, first * high / begin)
        ideal = [(place_x(first), place_y(begin)), (place_x(most), place_y(begin * most / first))]
        parts.append(line(ideal, GREY))
        spots = [(place_x(x), place_y(y)) for x, y in points]
        parts.append(line(spots, colour, 2))
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in spots]
        parts.append(text(spots[-1][0] + 12, spots[-1][1] + 4, f"{name}  {number(end_rate)}", colour))
    write(path, left + width + 150, top + height + 56, parts)


def number(value: float) -> str:
    """Return a number with three digits, or all those of its whole part."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def text(
    x: float, y: float, words: str, colour: str = INK, size: int = 13, anchor: str = "start", weight: str = "normal"
) -> str:
    style = f'font-size="{size}" text-anchor="{anchor}" font-weight="{weight}" fill="{colour}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def line(points: Iterable[tuple[float, float]], colour: str, width: float = 1) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def write(path: str, width: float, height: float, parts: list[str]) -> None:
    """Write the picture, on white so that it reads on a dark page too."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
    page = [head + 'font-family="system-ui, sans-serif">', '<rect width="100%" height="100%" fill="white"/>', *parts]
    Path(path).write_text("\n".join([*page, "</svg>", ""]), encoding="utf-8")
