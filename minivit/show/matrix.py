"""Tables of numbers as colours, and pictures of small maps, as SVG that stands in a page or in a file of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minivit.show.axes import BOTTOM, LEFT, RIGHT, TOP, WIDTH
from minivit.show.colours import heat, signed
from minivit.show.embedded import embedded
from minivit.show.markup import escape

if TYPE_CHECKING:
    from PIL import Image

LETTER = 6  # pixels: a digit in a cell is about as wide
NAMES = 14  # of columns that have room under them
TALLEST = 24  # pixels of a row
HIGHEST = 400  # pixels of all rows
BAR, STEPS = 90, 30  # pixels and steps of a legend's colours
SHADES = 32  # of each sign, in a picture of small maps
SIDE = 480  # pixels: as large as a picture of small maps is made at least


def matrix(
    title: str,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str],
    most: float,
    two_signs: bool = False,
) -> str:
    """Return ``values`` (R, C) as a table of colours from 0, or with ``two_signs`` from -``most``, to ``most``.

    ``rows`` and ``columns`` are the R and C names at the edges, ``labels`` what both of them are. A value that is NaN
    has no cell. Numbers, in their cells where there is room, else to hover over, show a hundredth of the largest.
    """
    digits = max(0, 1 - math.floor(math.log10(most)) + (most >= 1)) if most > 0 else 1
    form = f"{{:{'+' if two_signs else ''}z.{digits}f}}".format
    scaled = np.nan_to_num(values) / (most or 1.0)  # (R, C)
    colours = signed(scaled) if two_signs else heat(scaled)  # (R, C, 3)
    wide, high = (WIDTH - LEFT - RIGHT) / len(columns), min(TALLEST, HIGHEST / len(rows))
    bottom, written = TOP + high * len(rows), high >= 14 and LETTER * len(form(most)) + 2 <= wide
    parts = _head(title, (form(-most) if two_signs else "0", form(most)), two_signs)
    for (i, j), value in np.ndenumerate(values):
        if not np.isfinite(value):
            continue
        x, y, colour = LEFT + wide * j, TOP + high * i, colours[i, j]
        column = f"{labels[1]} {columns[j]}" if columns[j].isdigit() else columns[j]
        what = f"{labels[0]} {rows[i]}, {column}: {form(value)}"
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - 1:.1f}" height="{high - 1:.1f}" '
            f'fill="{_hex(colour)}"><title>{escape(what)}</title></rect>'
        )
        if written:
            ink = "on-light" if _light(colour) else "on-dark"
            place = f'x="{x + wide / 2:.1f}" y="{y + high / 2 + 3.5:.1f}"'
            parts.append(f'<text class="cell {ink}" {place}>{escape(form(value))}</text>')
    for i in range(0, len(rows), -(-len(rows) // int(HIGHEST / 14))):
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{TOP + high * (i + 0.5) + 4:.1f}">{escape(rows[i])}</text>')
    for j in range(0, len(columns), -(-len(columns) // NAMES)):
        parts.append(
            f'<text class="mid" x="{LEFT + wide * (j + 0.5):.1f}" y="{bottom + 16}">{escape(columns[j])}</text>'
        )
    return _svg(title, [*parts, *_labels(labels, TOP, bottom)], bottom + BOTTOM)


def maps_of_maps(title: str, values: np.ndarray, labels: tuple[str, str], least: float) -> str:
    """Return ``values`` (R, C, r, c) of at most 1 as R × C maps of r × c cells, coloured from ``least`` to 1.

    If ``least`` is below 0 the colours are of two signs, from -1 to 1. Of very many maps, evenly spaced ones are drawn:
    at most sixteen a row and sixteen a column.
    """
    two_signs = least < 0
    down, across = (np.unique(np.linspace(0, n - 1, min(n, 16)).round().astype(int)) for n in values.shape[:2])
    shown = values[np.ix_(down, across)]  # (R, C, r, c)
    shown = shown if two_signs else (shown - least) / ((1 - least) or 1.0)
    shown = np.round(shown * SHADES) / SHADES  # few, so that the file is small
    picture = sheet_of([*(signed if two_signs else heat)(shown).reshape(-1, *shown.shape[2:], 3)], len(across))
    room = WIDTH - LEFT - RIGHT
    high = min(room * picture.height / picture.width, 1.5 * room)
    wide = high * picture.width / picture.height
    parts = _head(title, ("-1" if two_signs else f"{least:.2g}", "1"), two_signs)
    parts.append(_image(picture, LEFT, TOP, wide, high))
    for i in range(0, len(down), -(-len(down) // 8)):
        y = TOP + high * (i + 0.5) / len(down) + 4
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{y:.1f}">{down[i] + 1}</text>')
    for j in range(0, len(across), -(-len(across) // 8)):
        x = LEFT + wide * (j + 0.5) / len(across)
        parts.append(f'<text class="mid" x="{x:.1f}" y="{TOP + high + 16:.1f}">{across[j] + 1}</text>')
    return _svg(title, [*parts, *_labels(labels, TOP, TOP + high)], TOP + high + BOTTOM)


def sheet(title: str, tiles: Sequence[np.ndarray], columns: int, note: str) -> str:
    """Return small pictures ``tiles``, uint8 (h, w, 3), in rows of ``columns``, over a ``note``."""
    picture = sheet_of(tiles, columns)
    wide = WIDTH - 2 * RIGHT
    high = min(wide * picture.height / picture.width, wide)
    parts = [f'<text class="title" x="0" y="16">{escape(title)}</text>']
    parts.append(_image(picture, 0, TOP - 8, high * picture.width / picture.height, high))
    parts.append(f'<text x="0" y="{TOP + high + 12:.1f}">{escape(note)}</text>')
    return _svg(title, parts, TOP + high + 24)


def sheet_of(tiles: Sequence[np.ndarray], columns: int) -> Image.Image:
    """Return ``tiles``, uint8 (h, w, 3), in rows of ``columns``, enlarged by sharp pixels, between transparent gaps."""
    from PIL import Image

    rows, columns = -(-len(tiles) // columns), min(columns, len(tiles))
    height, width, _ = tiles[0].shape
    scale = max(1, round(SIDE / max(rows * height, columns * width)))
    height, width = height * scale, width * scale
    gap = max(1, round(0.08 * min(height, width)))
    whole = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for k, tile in enumerate(tiles):
        y, x = k // columns * (height + gap), k % columns * (width + gap)
        place = whole[y : y + height, x : x + width]
        place[..., :3], place[..., 3] = tile.repeat(scale, axis=0).repeat(scale, axis=1), 255
    return Image.fromarray(whole)


# ---- parts of an SVG -------------------------------------------------------------------------------------------------


def _svg(title: str, parts: Sequence[str], height: float) -> str:
    inside = "\n".join(parts)
    view = f"0 0 {WIDTH} {height:.0f}"
    return f'<svg class="chart" viewBox="{view}" role="img" aria-label="{escape(title)}">\n{inside}\n</svg>\n'


def _head(title: str, ends: tuple[str, str], two_signs: bool) -> list[str]:
    """Return the title, and the legend: a bar of the colours between its two ends."""
    x = WIDTH - RIGHT - 8 * max(map(len, ends)) - BAR
    parts = [f'<text class="title" x="0" y="16">{escape(title)}</text>', *_bar(x, 8, two_signs)]
    parts.append(f'<text class="end" x="{x - 5}" y="16">{escape(ends[0])}</text>')
    parts.append(f'<text x="{x + BAR + 5}" y="16">{escape(ends[1])}</text>')
    return parts


def _bar(x: float, y: float, two_signs: bool) -> list[str]:
    """Return a bar of the colours."""
    places = (f'x="{x + k * BAR / STEPS:.1f}" y="{y}" width="{BAR / STEPS + 0.3:.1f}" height="9"' for k in range(STEPS))
    colours = (signed if two_signs else heat)(np.linspace(-1 if two_signs else 0, 1, STEPS))
    return [f'<rect {place} fill="{_hex(colour)}"/>' for place, colour in zip(places, colours, strict=True)]


def heat_legend() -> str:
    """Return the colours of :func:`heat` as a bar that stands in a line of text."""
    return f'<svg class="legend" viewBox="0 0 {BAR} 9" aria-hidden="true">{"".join(_bar(0, 0, False))}</svg>'


def _labels(labels: tuple[str, str], top: float, bottom: float) -> list[str]:
    """Return what the rows and what the columns are."""
    middle, centre = (top + bottom) / 2, (LEFT + WIDTH - RIGHT) / 2
    return [
        f'<text class="mid" transform="rotate(-90 12 {middle:.1f})" x="12" y="{middle:.1f}">{escape(labels[0])}</text>',
        f'<text class="mid" x="{centre}" y="{bottom + 36:.1f}">{escape(labels[1])}</text>',
    ]


def _image(picture: Image.Image, x: float, y: float, width: float, height: float) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f'<image {place} image-rendering="pixelated" preserveAspectRatio="none" href="{embedded(picture, 0)}"/>'


def _hex(colour: Any) -> str:
    return "#" + "".join(f"{int(c):02x}" for c in colour)


def _light(colour: np.ndarray) -> bool:
    """Tell whether black can be read on a colour better than white."""
    return float(colour @ np.array([0.299, 0.587, 0.114])) > 140
