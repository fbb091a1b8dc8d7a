"""Figures and tables as text, for people and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minivit.errors import printable


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Return rows aligned under their headings, two spaces apart; the columns in ``right`` to the right.

    A cell that holds a name, perhaps with a line break in it, is shown as :func:`minivit.errors.printable` has it.
    """
    head, *rows = ([printable(cell) for cell in row] for row in (head, *rows))
    form = row_format([max(len(row[i]) for row in [head, *rows]) for i in range(len(head))], right)
    return "\n".join(form.format(*row).rstrip() for row in [head, *rows])


def row_format(widths: Sequence[int], right: Sequence[int] = ()) -> str:
    """Return the format string of a row with columns of these widths, two spaces apart."""
    return "  ".join(f"{{:{'>' if i in right else '<'}{width}}}" for i, width in enumerate(widths))


def json_text(value: Any) -> str:
    """Return ``value`` as JSON; arrays become lists, and what is not finite null: NaN and infinity are not JSON."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent_interval(result: dict[str, Any]) -> str:
    """Return "97.50% (95% interval 96.67 to 98.13%)"."""
    low, high = result["interval"]
    return f"{result['accuracy']:.2%} (95% interval {100 * low:.2f} to {high:.2%})"


def plural(number: int, noun: str) -> str:
    """Return "1 step" or "2,000 steps"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def bytes_text(size: float) -> str:
    """Return a size in bytes for people: "1.5 MB", in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.5 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
