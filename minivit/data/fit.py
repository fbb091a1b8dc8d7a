"""How a picture of any size and shape is brought to the size that a model takes: minivit's ways and other systems'."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minivit.errors import ConfigError, DataError, value_text

if TYPE_CHECKING:
    from PIL import Image

OWN_FITS = ("stretch", "crop")
"""minivit's ways: see :func:`fitted`."""

OTHER_FITS = ("centre", "squash")
"""Other systems' ways, of which a fit says interpolation and part as well: "centre bicubic 0.9"."""

INTERPOLATIONS = ("bilinear", "bicubic")

LEAST_PART = 0.1
MAX_SCALED = 50_000_000
"""Pixels of the largest picture that is made on the way: a long strip is scaled until its shorter side fits."""


class Fit(NamedTuple):
    """A fit in parts: see :func:`fitted`."""

    how: str
    interpolation: str = "bicubic"
    part: float = 1.0


def read_fit(text: str) -> Fit:
    """Return a fit in its parts; raise ConfigError if ``text`` is none."""
    how, *rest = text.split(" ") if isinstance(text, str) else [""]
    if how in OWN_FITS and not rest:
        return Fit(how)
    if how in OTHER_FITS and len(rest) == 2 and rest[0] in INTERPOLATIONS:
        try:
            part = float(rest[1])
        except ValueError:
            part = math.nan
        if LEAST_PART <= part <= 1:
            return Fit(how, rest[0], part)
    known = f"{', '.join(OWN_FITS)}, or as 'centre bicubic 0.9' or 'squash bilinear 1', of parts from {LEAST_PART} to 1"
    raise ConfigError(f"unknown fit {value_text(text)}", f"known: {known}")


def is_fit(text: object) -> bool:
    """Tell whether ``text`` is one of the fits that :func:`fitted` knows."""
    try:
        return isinstance(text, str) and bool(read_fit(text))
    except ConfigError:
        return False


def fitted(page: Image.Image, size: tuple[int, int], fit: str, name: str = "picture") -> np.ndarray:
    """Return a picture of mode "L" or "RGB" as uint8 (C, height, width) of this ``size``. The fits are:

    - ``stretch`` gives up its proportions: by area averaging where it shrinks along both axes (as the UCI digits were
      made from their bitmaps), else by bicubic interpolation;
    - ``crop`` cuts the largest part that has the right proportions from its middle, and scales that by bicubic
      interpolation, widened to average where it shrinks;
    - ``centre INTERPOLATION PART`` scales it until the shorter side is floor(side / PART) and cuts the middle out: what
      timm does unless told otherwise, and most who train on ImageNet;
    - ``squash INTERPOLATION PART`` scales both sides to floor(side / PART), whatever its proportions, and cuts the
      middle out: with part 1, Hugging Face's ViTImageProcessor and, but that it does not average where it shrinks,
      Google's vit_jax.

    INTERPOLATION is bilinear or bicubic, PART from 0.1 to 1. Raises ConfigError for another fit; DataError, with the
    ``name``, for a strip so long that it would have more than :data:`MAX_SCALED` pixels once its shorter side fits.
    """
    from PIL.Image import Resampling

    height, width = size
    how, interpolation, part = read_fit(fit)
    if how == "crop":
        step = min(page.width / width, page.height / height)  # of the picture's pixels to one of the result's
        left, top = (page.width - step * width) / 2, (page.height - step * height) / 2
        box = (max(left, 0.0), max(top, 0.0), min(page.width - left, page.width), min(page.height - top, page.height))
        resized = page.resize((width, height), Resampling.BICUBIC, box)
    elif how == "stretch":
        shrinks = height <= page.height and width <= page.width
        resized = page.resize((width, height), Resampling.BOX if shrinks else Resampling.BICUBIC)
    else:
        high, wide = math.floor(height / part), math.floor(width / part)
        if how == "centre":
            high, wide = _scaled(page.height, page.width, high, wide)
        if high * wide > MAX_SCALED:
            what = f"{name}: {page.width} × {page.height} is a strip that would be scaled to {wide:,} × {high:,}"
            raise DataError(what, "cut it to a shape nearer to the model's first")
        method = Resampling.BICUBIC if interpolation == "bicubic" else Resampling.BILINEAR
        top, left = round((high - height) / 2), round((wide - width) / 2)  # halves to the even number
        resized = page.resize((wide, high), method).crop((left, top, left + width, top + height))
    pixels = np.asarray(resized).reshape(height, width, -1)  # (H, W) or (H, W, 3) → (H, W, C)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (C, H, W)


def _scaled(height: int, width: int, high: int, wide: int) -> tuple[int, int]:
    """Return the height and width of a picture that is scaled until it covers ``high`` × ``wide``.

    Of a square the other side is rounded down, of a rectangle to the nearest, as timm has it.
    """
    if high == wide:
        short = min(height, width)
        return (high * height // short, wide * width // short)
    ratio = min(height / high, width / wide)
    return round(height / ratio), round(width / ratio)
