"""A tape as a picture: operations from top to bottom, arcs where one is read further down, parts that fold.

The layout is what a tape asks for: nearly a chain. Each operation stands below the one before it, an arrow leads to the
next one where that reads it, and what else reads it is at the end of an arc on the left: so residual connections are
seen. Parts are folded at first; the script unfolds them. Where scripts do not run, the picture stays folded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from minivit.errors import shortened
from minivit.files import write_text
from minivit.show.curves import COLOURS
from minivit.show.document import digest, page
from minivit.show.folding import SCRIPT
from minivit.show.markup import escape
from minivit.show.operations import Operation, runs_of_parts, shape_text
from minivit.show.text import bytes_text, plural

WIDTH, LEFT, RIGHT = 940, 84, 664  # of the picture; of the boxes' sides
KEPT, GRADIENT, BAR = 684, 816, 56  # where the columns of figures begin; length of their longest bar
ROW, LINE, GAP, PAD = 26, 17, 16, 10  # heights: a box, each line more, between boxes, around a part's boxes
LETTER = 6.4  # width of a usual one
LANE, ROUND = 13, 6  # distance of arcs from each other, and the radius of their corners

_STYLE = """\
.tape { font: 12px system-ui, sans-serif; }
.tape text { fill: INK; }
.tape .quiet, .tape .marker { fill: QUIET; }
.tape .title { font-size: 18px; font-weight: 600; }
.tape .name { font-weight: 600; }
.tape .end { text-anchor: end; }
.tape .paper { fill: PAPER; }
.tape .box { fill: PAPER; stroke: QUIET; }
.tape .part { fill: FAINT; stroke: QUIET; }
.tape .frame { fill: none; stroke: QUIET; stroke-dasharray: 3 3; }
.tape .next { stroke: QUIET; fill: none; }
.tape .arc { stroke: ORANGE; fill: none; stroke-width: 1.5; }
.tape .tip { fill: QUIET; }
.tape .arctip { fill: ORANGE; }
.tape .kept { fill: BLUE; }
.tape .gradient { fill: ORANGE; }
.tape .bad { fill: RED; }
.tape .fold { cursor: pointer; }
.tape .fold:focus { outline: none; }
.tape .fold:hover .part, .tape .fold:focus .part { stroke: BLUE; stroke-width: 2; }
.tape #all:focus text { fill: BLUE; text-decoration: underline; }
"""


def tape_svg(tape: Sequence[Operation], title: str, about: Sequence[str] = ()) -> str:
    """Return the picture of a tape as SVG, with its style and its script in it: a file of its own, or part of a page.

    ``about`` are lines under the title.
    """
    top = 46 + 18 * (len(about) + 1)
    items = [_Item(tape, run) for run in runs_of_parts(tape)]
    most = max((item.kept for item in items), default=0), max((_finite(one) for one in tape if one.shape), default=0.0)
    parts, y = [_heading(title, about, any(operation.gradient is not None for operation in tape))], top
    for i, item in enumerate(items):
        before = items[i - 1] if i else None
        opens = "" if item.part is None else f' data-open="{item.open_height}"'
        parts.append(
            f'<g class="item" data-height="{item.height}"{opens} transform="translate(0 {y})">\n'
            f"{item.drawn(before, most)}</g>"
        )
        y += item.height + GAP
    parts.append(_far_arcs(items, top))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="tape" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        f'data-top="{top}" data-gap="{GAP}">'
    )
    paper = f'<rect class="paper" width="{WIDTH}" height="{y}"/>'
    return f"{head}\n<style>{STYLE}</style>\n{paper}\n{chr(10).join(parts)}\n<script>{SCRIPT}</script>\n</svg>\n"


def write_tape(path: str | Path, tape: Sequence[Operation], title: str, about: Sequence[str] = ()) -> None:
    """Write the picture of a tape to a file: a page if its name ends in .html, else SVG. Neither loads anything."""
    svg = tape_svg(tape, title, about)
    write_text(Path(path), _page(svg, title) if Path(path).suffix.lower() == ".html" else svg)


def _page(svg: str, title: str) -> str:
    """Return the page: its Content-Security-Policy lets only the styles and the script of the picture count."""
    style, script, own = (digest(text) for text in (STYLE, SCRIPT, PAGE_STYLE))
    policy = f"default-src 'none'; style-src {style} {own}; script-src {script}; base-uri 'none'"
    return page(title, policy, PAGE_STYLE, f'<main tabindex="0" aria-label="{escape(title)}">\n{svg}</main>\n')


def _coloured(style: str, dark: bool) -> str:
    for name, colours in COLOURS.items():
        style = style.replace(name.upper(), colours[dark])
    return style


STYLE = f"{_coloured(_STYLE, False)}@media (prefers-color-scheme: dark) {{\n{_coloured(_STYLE, True)}}}\n"
"""Colours are written out, light ones first: what draws SVG and is no browser knows no variables."""
PAGE_STYLE = (
    ":root { color-scheme: light dark; }\nbody { margin: 8px auto; max-width: 960px; }\n"
    "main { overflow-x: auto; }\n"
    f"@media (prefers-color-scheme: dark) {{ body {{ background: {COLOURS['paper'][1]}; }} }}\n"
)


# ---- one after the other ---------------------------------------------------------------------------------------------


class _Item:
    """What stands in the column: an operation, or a part of several, which unfolds; ``run`` are its operations."""

    def __init__(self, tape: Sequence[Operation], run: range) -> None:
        self.tape, self.run = tape, run
        self.part = tape[run[0]].part if len(run) > 1 else None
        self.kept = sum(tape[i].kept for i in run)
        self.tops, y = {}, (0 if self.part is None else ROW + GAP + PAD)
        for i in run:
            self.tops[i] = y
            y += _height(tape[i]) + GAP
        self.open_height = y - GAP + PAD
        self.height = ROW if self.part is not None else _height(tape[run[0]])

    def drawn(self, before: _Item | None, most: tuple[float, float]) -> str:
        """Return it folded and, not displayed, unfolded, with its top at 0; ``most`` are the longest bars' figures."""
        last = None if before is None else before.run[-1]
        chained = last is not None and any(last in self.tape[i].inputs for i in self.run)
        arrow = _arrow(-GAP, 0) if chained else ""
        if self.part is None:
            return arrow + _box(self.tape[self.run[0]], 0, most)
        rows = "".join(_box(self.tape[i], self.tops[i], most, self.part) for i in self.run)
        frame = (
            f'<rect class="frame" x="{LEFT - 70}" y="{ROW / 2}" width="{RIGHT - LEFT + 78}" '
            f'height="{self.open_height - ROW / 2}" rx="8"/>\n'
        )
        inner = f'<g class="inner" display="none">\n{frame}{self._edges(last if chained else None)}{rows}</g>\n'
        return f"{arrow}{inner}{self._header(most)}"

    def _header(self, most: tuple[float, float]) -> str:
        """Return the folded part: what it is, the shape that comes out of it, and the sums of its columns."""
        operations = [self.tape[i] for i in self.run]
        numbers = sum(math.prod(w.shape) for w in {w.name: w for one in operations for w in one.weights}.values())
        inside = plural(len(operations), "operation") + (f", {plural(numbers, 'parameter')}" if numbers else "")
        last = operations[-1]
        assert self.part is not None
        what = f"{self.part}, {last.kind}: {inside}"
        name, kind = (
            shortened(self.part, 24),
            # the name's letters are bold, a sixth wider
            shortened(f"{last.kind}, {inside}", _room(last) - min(len(self.part), 24) * 7 // 6 - 1),
        )
        return (
            f'<g class="fold"><title>{escape(what)}</title>'
            f'<rect class="part" x="{LEFT}" y="0" width="{RIGHT - LEFT}" height="{ROW}" rx="6"/>'
            f'<text class="marker" x="{LEFT + 8}" y="17">▸</text>'
            f'<text x="{LEFT + 24}" y="17"><tspan class="name">{escape(name)}</tspan> '
            f'<tspan class="quiet">{escape(kind)}</tspan></text></g>'
            f"{_figures(last, self.kept, 0, most)}\n"
        )

    def _edges(self, entry: int | None) -> str:
        """Return the arrows and arcs between its operations, and from what comes in, the result of ``entry``."""
        fork = ROW + PAD  # a point below the header, from which the part's input goes out
        edges, arcs = [], []
        before, y = entry, float(fork - PAD)
        for i in self.run:
            top = self.tops[i]
            if before is not None and before in self.tape[i].inputs:
                edges.append(_arrow(y, top))
            arcs += [
                (fork if j == entry else self.tops[j] + _height(self.tape[j]) / 2, top + ROW / 2, j == entry)
                for j in self.tape[i].inputs
                if j != before and (j == entry or j in self.tops)
            ]
            before, y = i, top + _height(self.tape[i])
        edges.append(_line(y, self.open_height))
        for (start, stop, enters), lane in zip(arcs, _lanes([arc[:2] for arc in arcs]), strict=True):
            edges.append(f'<path class="arc" d="{_arc(start, stop, lane, enters)}"/>{_tip(stop)}\n')
        return "".join(edges)


def _room(one: Operation) -> int:
    """Return how many letters there is room for in a box beside its shape and dtype."""
    return int((RIGHT - LEFT - 54) / LETTER) - len(f"{shape_text(one.shape)} {one.dtype}")


def _height(operation: Operation) -> int:
    return ROW + LINE * len(operation.weights)


def _finite(operation: Operation) -> float:
    return operation.gradient if operation.gradient is not None and math.isfinite(operation.gradient) else 0.0


def _box(one: Operation, y: float, most: tuple[float, float], within: str = "") -> str:
    """Return an operation: its module and name, its result's shape, the parameters that it reads, and the figures.

    The module's path is that ``within`` the part around the box.
    """
    name = shortened(one.name, 24)
    place = shortened(one.place.removeprefix(f"{within}."), _room(one) - len(name)) if one.place != within else ""
    place = f'<tspan class="quiet">{escape(place)}</tspan> ' if place else ""
    lines = [
        f'<text class="quiet" x="{LEFT + 24}" y="{y + 17 + LINE * n}">{escape(shortened(_own_name(w.name, one), 30))} '
        f"{shape_text(w.shape)}</text>{_norm_text(w.gradient, y + 17 + LINE * n, 'quiet')}"
        for n, w in enumerate(one.weights, 1)
    ]
    return (
        f"<g><title>{escape(f'{one.place} {one.name}'.strip())}</title>"
        f'<rect class="box" x="{LEFT}" y="{y}" width="{RIGHT - LEFT}" height="{_height(one)}" rx="6"/>'
        f'<text x="{LEFT + 10}" y="{y + 17}">{place}<tspan class="name">{escape(name)}</tspan></text>'
        f"{''.join(lines)}</g>{_figures(one, one.kept, y, most)}\n"
    )


def _own_name(name: str, one: Operation) -> str:
    """Return a parameter's name within its module."""
    return name.removeprefix(f"{one.place}.") if one.place else name


def _figures(one: Operation, kept: int, y: float, most: tuple[float, float]) -> str:
    """Return a row's shape and dtype, the bytes that it keeps, and the norm of its gradient."""
    parts = [
        f'<text class="quiet end" x="{RIGHT - 10}" y="{y + 17}">{shape_text(one.shape)} {escape(one.dtype)}</text>'
    ]
    if kept:
        length = max(1.0, BAR * kept / max(most[0], 1))
        parts.append(f'<rect class="kept" x="{KEPT}" y="{y + 8}" width="{length:.1f}" height="10" rx="2"/>')
        parts.append(f'<text x="{KEPT + length + 6:.1f}" y="{y + 17}">{bytes_text(kept)}</text>')
    if one.gradient is not None:
        length = max(1.0, BAR * min(_finite(one) / (most[1] or 1.0), 1.0))
        parts.append(f'<rect class="gradient" x="{GRADIENT}" y="{y + 8}" width="{length:.1f}" height="10" rx="2"/>')
        parts.append(_norm_text(one.gradient, y + 17, "", GRADIENT + length + 6))
    return "".join(parts)


def _norm_text(norm: float | None, y: float, kind: str, x: float = GRADIENT) -> str:
    """Return a gradient's norm, in red where it is not finite, or "" where there is none."""
    if norm is None:
        return ""
    return f'<text class="{kind if math.isfinite(norm) else "bad"}" x="{x:.1f}" y="{y}">{norm:.3g}</text>'


def _heading(title: str, about: Sequence[str], gradients: bool) -> str:
    """Return the title, the lines under it, the columns' headings, and what the script shows: how to unfold."""
    lines = [f'<text class="title" x="14" y="24">{escape(shortened(title, 80))}</text>']
    for n, line in enumerate(about):
        lines.append(f'<text class="quiet" x="14" y="{44 + 18 * n}">{escape(shortened(line, 130))}</text>')
    y = 56 + 18 * len(about)
    lines.append(
        f'<g class="fold" id="all" display="none" role="button" tabindex="0"><text x="{LEFT}" y="{y}">'
        '<tspan class="marker">▸</tspan> unfold all</text></g>'
    )
    lines.append(f'<text class="quiet end" x="{RIGHT - 10}" y="{y}">result</text>')
    lines.append(
        f'<text class="quiet" x="{KEPT}" y="{y}">kept for backward'
        "<title>each array once, at the first operation that holds it</title></text>"
    )
    if gradients:
        lines.append(
            f'<text class="quiet" x="{GRADIENT}" y="{y}">gradient’s norm'
            "<title>of the loss’s gradient at the result, and at each parameter</title></text>"
        )
    return "\n".join(lines)


# ---- arrows and arcs -------------------------------------------------------------------------------------------------


def _arrow(start: float, stop: float) -> str:
    """Return the arrow from a box to the one below it."""
    x = (LEFT + RIGHT) / 2
    return (
        f"{_line(start, stop - 5)}"
        f'<path class="tip" d="M{x:g} {stop:g}l-4 -7h8z"/>\n'
    )  # fmt: skip


def _line(start: float, stop: float) -> str:
    return f'<path class="next" d="M{(LEFT + RIGHT) / 2:g} {start:g}V{stop:g}"/>'


def _arc(start: float, stop: float, lane: int, enters: bool = False) -> str:
    """Return the path from one height to another, left of the boxes; one that ``enters`` comes from the arrow above."""
    x, side = ((LEFT + RIGHT) / 2 if enters else LEFT), max(LEFT - 14 - LANE * lane, 4)
    return (
        f"M{x:g} {start:g}H{side + ROUND}q{-ROUND} 0 {-ROUND} {ROUND}V{stop - ROUND:g}"
        f"q0 {ROUND} {ROUND} {ROUND}H{LEFT - 5}"
    )


def _tip(stop: float) -> str:
    return f'<path class="arctip" d="M{LEFT} {stop:g}l-7 -4v8z"/>'


def _lanes(spans: Sequence[tuple[float, float]]) -> list[int]:
    """Return a lane for each span of heights, such that those in one lane do not overlap; short ones stay inside."""
    lanes: dict[int, list[tuple[float, float]]] = {}
    found = [0] * len(spans)
    for i in sorted(range(len(spans)), key=lambda i: spans[i][1] - spans[i][0]):
        start, stop = spans[i]
        lane = next(n for n in range(len(spans)) if all(b <= start or a >= stop for a, b in lanes.get(n, [])))
        lanes.setdefault(lane, []).append((start, stop))
        found[i] = lane
    return found


def _far_arcs(items: Sequence[_Item], top: int) -> str:
    """Return the arcs between items that do not follow each other, as they are while all is folded.

    The script moves them: ``data-from`` and ``data-to`` say which items they join, and at what height below the item's
    top, folded and unfolded.
    """
    of = {i: n for n, item in enumerate(items) for i in item.run}
    tops = [top]
    for item in items:
        tops.append(tops[-1] + item.height + GAP)
    joined: dict[tuple[int, int, float, float], None] = {}
    for n, item in enumerate(items):
        for i in item.run:
            for j in item.tape[i].inputs:
                source = items[of[j]]
                if of[j] != n and not (of[j] == n - 1 and j == source.run[-1]):
                    joined[of[j], n, source.tops[j] + _height(item.tape[j]) / 2, item.tops[i] + ROW / 2] = None
    spans = [(tops[a] + ROW / 2, tops[b] + ROW / 2) for a, b, _, _ in joined]
    return "".join(
        f'<g class="far" data-from="{a} {ROW / 2:g} {start:g}" data-to="{b} {ROW / 2:g} {stop:g}" data-lane="{lane}">'
        f'<path class="arc" d="{_arc(*span, lane)}"/>{_tip(span[1])}</g>\n'
        for (a, b, start, stop), span, lane in zip(joined, spans, _lanes(spans), strict=True)
    )
