"""Single images as HTML, each with its label and what a model takes it for: part of the page, not files beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minivit.show.embedded import embedded
from minivit.show.markup import escape, short
from minivit.show.pictures import enlarged

MISTAKES, RIGHT = 24, 12  # how many are shown
SHARP = 64  # pixels: larger images are photos, and are kept small
LARGE = 400_000  # bytes of a picture that is made smaller to be part of the page


def mistakes(log_p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the wrongly read images with the highest loss, worst first."""
    wrong = np.flatnonzero(log_p.argmax(axis=1) != labels)
    return wrong[np.argsort(log_p[wrong, labels[wrong]], kind="stable")[:MISTAKES]]


def right_ones(log_p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return some rightly read images, evenly spread over all: data sets are often in the order of their classes."""
    right = np.flatnonzero(log_p.argmax(axis=1) == labels)
    return right[np.unique(np.linspace(0, len(right) - 1, RIGHT).astype(int))] if len(right) else right


def gallery(
    chosen: np.ndarray, images: Any, log_p: np.ndarray, labels: np.ndarray, names: Sequence[str], files: Sequence[str]
) -> str:
    """Return the ``chosen`` images with label, prediction and its probability, and file where ``files`` has them."""
    figures = []
    for i, image in zip(chosen.tolist(), images[chosen], strict=True):
        label, prediction = int(labels[i]), int(log_p[i].argmax())
        verdict = f"{short(names[prediction])}, {np.exp(log_p[i, prediction]):.0%}"
        kind = ' class="wrong"' if prediction != label else ""
        file = f"<span>{short(Path(files[i]).name)}</span>" if files else ""
        where = files[i] if files else f"image {i}"
        figures.append(
            f'<figure title="{escape(where)}, loss {-log_p[i, label]:.2f}">{_picture(image)}'
            f"<figcaption>{short(names[label])}<span{kind}>{verdict}</span>{file}</figcaption></figure>\n"
        )
    remark = "Under each image its label, then the prediction and its probability"
    remark += ", then its file." if files else "."
    return f'<p>{remark}</p>\n<div class="images">{"".join(figures)}</div>' if figures else ""


def _picture(image: np.ndarray) -> str:
    picture = enlarged(image, scale=1)
    small = max(picture.size) <= SHARP
    return f'<img alt=""{" class=sharp" if small else ""} src="{embedded(picture, 0 if small else 2 * SHARP)}">'


def samples_picture(path: str | Path | None) -> str:
    """Return the picture in a file, of samples, smaller where it is large; "" if there is no such file."""
    from PIL import Image

    if path is None or not Path(path).is_file():
        return ""
    with Image.open(path) as picture:
        large = Path(path).stat().st_size > LARGE
        return f'<img class="samples" alt="training images" src="{embedded(picture, 1000 if large else 0)}">'
