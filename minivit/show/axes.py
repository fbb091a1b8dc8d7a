"""The frame of a chart as SVG: its axes, and where a point lies between them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from minivit.show.markup import escape

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 16, 36, 44  # margins around the plot


@dataclass(frozen=True)
class Axes:
    """Axes from the lowest to the highest x, and along ``marks``, the round numbers at the y axis.

    The logarithmic ones are given what their logarithms are taken of.
    """

    x_low: float
    x_high: float
    marks: list[float]
    log_x: bool = False
    log_y: bool = False

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Return where a point is drawn."""
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        across = _share(x, self.x_low, self.x_high, self.log_x)
        up = _share(y, self.marks[0], self.marks[-1], self.log_y)
        return LEFT + 6 + (right - LEFT - 12) * across, bottom - (bottom - TOP) * up

    def drawn(self, x_label: str, form: Callable[[float], str]) -> list[str]:
        """Return the lines and numbers of both axes; ``form`` writes a y."""
        right, bottom, parts = WIDTH - RIGHT, HEIGHT - BOTTOM, []
        for y in self.marks:
            _, py = self.place(self.x_low, y)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{py:.1f}" y2="{py:.1f}"/>')
            parts.append(f'<text class="end" x="{LEFT - 8}" y="{py + 4:.1f}">{escape(form(y))}</text>')
        for x in _x_ticks(self.x_low, self.x_high, self.log_x):
            px, _ = self.place(x, self.marks[0])
            parts.append(f'<text class="mid" x="{px:.1f}" y="{bottom + 18}">{x:g}</text>')
        parts.append(f'<text class="mid" x="{(LEFT + right) / 2}" y="{HEIGHT - 6}">{escape(x_label)}</text>')
        return parts


def _share(value: float, low: float, high: float, log: bool) -> float:
    """Return how far ``value`` is on the way from ``low`` to ``high``."""
    if log:
        value, low, high = math.log10(value), math.log10(low), math.log10(high)
    return (value - low) / (high - low) if high > low else 0.5


def ticks(low: float, high: float) -> list[float]:
    """Return four to seven round numbers, evenly spaced, from at most ``low`` to at least ``high``."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value: it gets some room
        low, high = low - abs(low) / 10, high + (abs(high) / 10 or 1.0)
    unit = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= (high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return at most eight powers of ten, or over less than two decades 1, 2 and 5 times these, around both ends."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if last - first > 2:
        step = -(-(last - first) // 7)
        return [10.0**e for e in range(first, last + step, step)]
    fine = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
    start = max(i for i, y in enumerate(fine) if y <= low * (1 + 1e-9))
    stop = min((i for i, y in enumerate(fine) if y >= high * (1 - 1e-9)), default=len(fine) - 1)
    return fine[start : max(stop, start + 1) + 1]


def _x_ticks(low: float, high: float, log: bool) -> list[float]:
    """Return the numbers under the axis: powers of ten, or whole numbers, because epochs are counted."""
    if log:
        low, high = math.log10(low), math.log10(high)
        return [10.0**e for e in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)]
    return [x for x in ticks(low, high) if low <= x <= high and x == round(x)] or [round(low)]
