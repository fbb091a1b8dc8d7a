"""One image explained on one page: a file of its own that asks no network for anything, and runs its own script only.

The page's text, style and script are in the folder ``explain`` beside this file. All names reach it as JSON and are put
into it as text.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from minivit.errors import DTypeError
from minivit.files import write_text
from minivit.show.document import digest
from minivit.show.markup import escape
from minivit.show.style import PAPER_STYLE

SCRIPTS = ("data.js", "draw.js", "steps.js", "maps.js", "numbers.js", "page.js")
FIRST = (
    "raw", "seen", "weight", "bias", "embedded", "class_token", "positions", "entering", "looks", "looks_scale",
    "norms", "features", "head_weight", "head_bias", "logits", "scale",
)  # fmt: skip
"""What the seven steps are drawn from, and the script reads at its start: it stands before the script, all other arrays
after it."""


def write_explainer(
    path: str | Path,
    *,
    title: str,
    lead: str,
    about: Mapping[str, Any],
    maps: Mapping[str, np.ndarray],
    numbers: Mapping[str, np.ndarray],
) -> None:
    """Write the page to ``path``; it is whole or not there.

    ``about`` is what the script knows besides arrays, as JSON can hold it. ``maps``, float, are kept in one byte a
    number (:func:`companded`); ``numbers`` as they are: uint8, integers below 65,536 as two bytes, others as float32.
    ``title`` and ``lead`` are texts. The script stands before the large arrays: the seven steps are drawn while a
    browser still reads those.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, values in maps.items():
        arrays[name], arrays[f"{name}_scale"] = companded(values)
    arrays |= {name: stored(values) for name, values in numbers.items()}
    blocks = {
        name: f'<script type="text/plain" id="array-{name}">{base64.b64encode(array.tobytes()).decode()}</script>'
        for name, array in arrays.items()
    }
    shapes = {name: {"dtype": array.dtype.str[1:], "shape": array.shape} for name, array in arrays.items()}
    style = PAPER_STYLE + part("page.css")
    script = "\n".join(map(part, SCRIPTS))
    fields = {
        "title": escape(title),
        "lead": escape(lead),
        "policy": f"default-src 'none'; script-src {digest(script)}; style-src {digest(style)}; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "about": embedded_json({**about, "arrays": shapes}),
        "first": "\n".join(block for name, block in blocks.items() if name in FIRST),
        "script": script,
        "rest": "\n".join(block for name, block in blocks.items() if name not in FIRST),
    }
    pieces = part("page.html").split("{{")
    # each field once, by its place: what stands in a name is not looked at again
    text = pieces[0] + "".join(fields[name] + rest for name, rest in (piece.split("}}", 1) for piece in pieces[1:]))
    write_text(Path(path), text)


def part(name: str) -> str:
    """Return a file of the page."""
    return resources.files("minivit.show").joinpath("explain", name).read_text("utf-8")


def embedded_json(value: Any) -> str:
    """Return JSON that can stand in a script element: ASCII, and without any < that could end it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def companded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return rows (…, T) as bytes, and the scale m of each, (…,) float32, its largest absolute value.

    A byte b stands for (b/255)²·m, or in an array with negative values, int8, for sign(b)·(b/127)²·m. A number x is off
    by at most √(x·m)/255 (or 127), and a little more near 0: small numbers keep more digits than by equal steps.
    """
    largest = np.abs(values).max(axis=-1, keepdims=True, initial=0.0)
    signed = bool((values < 0).any())
    share = np.divide(np.abs(values), largest, out=np.zeros(values.shape), where=largest > 0)
    level = np.rint(np.sqrt(share) * (127 if signed else 255))
    as_bytes = (np.sign(values) * level).astype(np.int8) if signed else level.astype(np.uint8)
    return as_bytes, largest[..., 0].astype("<f4")


def stored(values: np.ndarray) -> np.ndarray:
    """Return an array as the page keeps it. Raises DTypeError for integers that two bytes do not hold."""
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind in "iu":
        if values.size and not (values.min() >= 0 and values.max() < 1 << 16):
            raise DTypeError(f"integers from {values.min()} to {values.max()}", "the page keeps 0 to 65,535")
        return values.astype("<u2")
    return values.astype("<f4")
