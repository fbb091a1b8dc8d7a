"""What a study of a model has found as a folder: one page, and each figure as a file beside it. No model is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from minivit.files import write_text
from minivit.show.beside import SMALL, STYLE, fitted
from minivit.show.captions import CAPTIONS, UNTRAINED
from minivit.show.curves import write_svg
from minivit.show.document import all_sections, document
from minivit.show.lettering import drawable_names
from minivit.show.markup import escape
from minivit.show.pictures import attention_overlay
from minivit.show.study_figures import DRAW, Drawn, Found, Shown, both

PAGE = "study.html"
SHEETS = {"attention": 4, "gallery": 16}  # figures that are written as one picture, and how many images stand in a row


def write_study(
    folder: Path,
    title: str,
    about: str,
    facts: Sequence[tuple[str, str, str]],
    shown: Shown,
    found: Mapping[str, tuple[Found, Found]],
) -> dict[str, str]:
    """Write ``study.html`` and the figures' files into ``folder``; return what can be read off each figure.

    ``found`` has, for each figure to draw, what was found of the trained and of the untrained model: see
    :data:`~minivit.show.study_figures.DRAW`. Of one that the model cannot have that is {"why_not": a sentence}.
    ``about`` is a line under the title, ``facts`` are (what, value, remark). The page, whole or not there, is written
    last. It loads nothing and runs nothing.
    """
    sections, said = {}, {}
    for name, pair in found.items():
        drawn = Drawn({}, said=pair[0]["why_not"]) if "why_not" in pair[0] else DRAW[name](*pair, shown)
        sections[CAPTIONS[name].title], said[name] = _section(name, drawn, shown.reader), drawn.said
        for file, svg in drawn.svgs.items():
            if svg:  # there is none of nothing but zeros on a logarithmic axis
                write_svg(folder / f"{file}.svg", svg)
        if name in SHEETS:
            _write_sheets(folder, name, pair, shown)
    tiles = [
        f"<div><span>{escape(what)}</span><b>{escape(value)}</b><small>{escape(remark)}</small></div>"
        for what, value, remark in facts
    ]
    head = f'<p>{escape(about)}</p>\n<div class="figures">{"".join(tiles)}</div>\n<p>{escape(UNTRAINED)}</p>\n'
    write_text(folder / PAGE, document(title, head + all_sections(sections), STYLE))
    return said


def _section(name: str, drawn: Drawn, reader: str) -> str:
    caption = CAPTIONS[name]
    parts = [
        f"<p>{escape(caption.shows.format(reader=reader))}</p>",
        f"<p><b>Not seen here:</b> {escape(caption.hides)}</p>",
        f'<p class="said">{escape(drawn.said)}</p>' if drawn.said else "",
        f'<div class="charts">{"".join(drawn.svgs.values())}</div>' if drawn.svgs else "",
        drawn.html,
    ]
    return "\n".join(part for part in parts if part)


def _write_sheets(folder: Path, name: str, pair: tuple[Found, Found], shown: Shown) -> None:
    """Write the images under the attention of each model, as a picture each."""
    places = list(shown.singly) if name == "attention" else [*range(len(shown.images))]
    images = np.stack([np.asarray(fitted(shown.images[i], SMALL)).transpose(2, 0, 1) for i in places])  # (n, 3, h, w)
    names = drawable_names(shown.classes)
    labels, *predictions = ([names[numbers[i]] for i in places] for numbers in (shown.labels, *shown.predictions))
    for (model, found), predicted in zip(both(*pair), predictions, strict=True):
        file, title = folder / f"{name}_{model}.png", f"Attention rolled out, {model}"
        attention_overlay(images, found["maps"][places], labels, predicted, file, SHEETS[name], title)
