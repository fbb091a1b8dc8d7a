"""Images beside what two models make of them, as HTML: under heat, or as maps of colours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from minivit.show.embedded import embedded
from minivit.show.markup import escape, short
from minivit.show.matrix import heat_legend
from minivit.show.pictures import enlarged, under_heat

if TYPE_CHECKING:
    from PIL import Image

UNFOLDED = 44  # images that are in sight, the others behind a click
LARGE, SMALL = 168, 88  # pixels a side of pictures that are shown singly, and of those of many

STYLE = """
.shows { color: var(--ink); }
.said { border-left: 3px solid var(--blue); padding-left: 10px; color: var(--ink); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 18px 22px; }
.tiles .three { display: grid; grid-template-columns: repeat(3, 1fr); gap: 4px; align-items: start; }
.tiles .three img { width: 100%; height: auto; }
.many { grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)); gap: 14px 8px; }
.many .three { grid-template-columns: 1fr; gap: 2px; }
.scale { white-space: nowrap; }
.legend { width: 90px; height: 9px; }
"""
"""What the page needs besides the style of all pages."""

Triples = Iterable[tuple["Image.Image", "Image.Image", "Image.Image"]]
"""Of every image itself, the trained and the untrained model's picture of it."""


def fitted(image: np.ndarray, side: int) -> Image.Image:
    """Return an image uint8 (C, H, W) with about ``side`` pixels at its longer side, small ones by sharp pixels."""
    longest = max(image.shape[1:])
    picture = enlarged(image, max(1, round(side / longest)))
    if longest > side:
        picture.thumbnail((side, side))
    return picture


def heat_tiles(
    images: Sequence[np.ndarray],
    maps: tuple[np.ndarray, np.ndarray],
    captions: Sequence[tuple[str, str]],
    many: bool,
) -> str:
    """Return ``images``, uint8 (C, H, W), each with itself under the two models' ``maps`` (N, rows, columns)."""
    side = SMALL if many else LARGE

    def drawn() -> Triples:
        for image, *both in zip(images, *maps, strict=True):
            picture = fitted(image, side)
            first, second = (under_heat(picture, weights) for weights in both)
            yield picture, first, second

    return _tiles(drawn(), captions, many, f"Colours: {_scale('nothing', 'most of its image')}.")


def map_tiles(
    images: Sequence[np.ndarray],
    colours: tuple[np.ndarray, np.ndarray],
    captions: Sequence[tuple[str, str]],
    ends: tuple[str, str] | None = None,
) -> str:
    """Return ``images``, uint8 (C, H, W), each with the two models' ``colours`` of its patches, (n, rows, columns, 3).

    The colours are uint8; a patch is a sharp square. If they are heat, ``ends`` are what its least and most stand for.
    """
    from PIL import Image

    def drawn() -> Triples:
        for image, *both in zip(images, *colours, strict=True):
            picture = fitted(image, LARGE)
            first, second = (Image.fromarray(c).resize(picture.size, Image.Resampling.NEAREST) for c in both)
            yield picture, first, second

    return _tiles(drawn(), captions, False, f"Colours: {_scale(*ends)}." if ends else "")


def _scale(least: str, most: str) -> str:
    return f'<span class="scale">{escape(least)} {heat_legend()} {escape(most)}</span>'


def _tiles(pictures: Triples, captions: Sequence[tuple[str, str]], many: bool, scale: str) -> str:
    figures = []
    for three, (label, prediction) in zip(pictures, captions, strict=True):
        texts = (label, "by the trained model", "by the untrained model")
        shown = "".join(f'<img alt="{escape(a)}" src="{_source(p)}">' for a, p in zip(texts, three, strict=True))
        kind = ' class="wrong"' if prediction != label else ""
        names = f"{short(label)}<span{kind}>{short(prediction)}</span>"
        figures.append(
            f'<figure><div class="three">{shown}</div><figcaption title="label, prediction">{names}</figcaption>'
            "</figure>\n"
        )
    order = "below it" if many else "beside it"
    remark = f"Image; {order} the trained model's, then the untrained one's; label and the trained model's prediction."
    kind = "tiles many" if many else "tiles"
    found = f'<p>{remark} {scale}</p>\n<div class="{kind}">{"".join(figures[:UNFOLDED])}</div>'
    if rest := figures[UNFOLDED:]:
        found += f'\n<details><summary>{len(rest):,} more</summary><div class="{kind}">{"".join(rest)}</div></details>'
    return found


def _source(picture: Image.Image) -> str:
    """Return a picture as a data URL: photos and heat as JPEG, pictures of few colours as PNG."""
    few = picture.getcolors(64) is not None
    return embedded(picture, 0 if few else max(picture.size))
