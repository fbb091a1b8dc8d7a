"""Text and tables as HTML, in which no name can do anything."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from minivit.errors import printable, shortened


def escape(text: str) -> str:
    """Return text for HTML and SVG, in which what does not show is escaped as :func:`printable` has it."""
    return html.escape(printable(text))


def short(name: str, width: int = 40) -> str:
    """Return a name as HTML, cut to ``width`` characters."""
    return escape(shortened(name, width))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int]) -> str:
    """Return a table of cells that are HTML already; the columns in ``numbers`` stand to the right."""
    kinds = [' class="number"' if i in numbers else "" for i in range(len(head))]
    top = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(head, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>\n" for row in rows
    )
    return f'<div class="wide"><table>\n<thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'
