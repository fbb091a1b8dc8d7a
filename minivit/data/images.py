"""Image files as a model takes them: whatever is in the file, bytes of one size and one number of channels come out."""

from __future__ import annotations

import warnings
from os import PathLike
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from minivit.data.datasets import reading
from minivit.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What may be read, recognised by content and not by the file's name. Pillow knows many more, most of them old code."""

MAX_PIXELS = 50_000_000
"""The largest picture that is decoded. A few bytes can claim any size: this is checked before memory is taken."""


def read_image(source: str | PathLike[str] | BinaryIO, size: tuple[int, int], channels: int) -> np.ndarray:
    """Read the image file ``source``, a path or an open binary file, as uint8 (channels, height, width).

    It is turned upright as its EXIF orientation says, put on a white page where it is transparent, and converted to
    grey (``channels`` 1; Rec. 601 luma) or RGB (3). 16-bit greys are scaled to 8 bits; of an animation the first frame
    counts. Then it is stretched to ``size``, (height, width): by area averaging where it shrinks along both axes (as
    the UCI digits were made from their bitmaps), else by bicubic interpolation.

    It is not inverted: the digits' models expect light strokes on a black background.

    Raises DataError with path and reason for what cannot be read, is not of :data:`FORMATS`, is larger than
    :data:`MAX_PIXELS`, or has no fixed range to scale (32-bit integers, floats).
    """
    from PIL import Image, UnidentifiedImageError

    name = str(source) if isinstance(source, str | PathLike) else str(getattr(source, "name", "image"))
    if channels not in (1, 3):
        raise DataError(f"{name}: image files are read as 1 or 3 channels, not {channels}", "pass an array instead")
    height, width = size
    with reading(name, "check or convert the file"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on metadata, and on sizes that are refused here anyway
        try:
            with Image.open(source, formats=FORMATS) as image:
                _check_size(image, name)
                image.load()
                picture = _put_on_white(image, name).convert("L" if channels == 1 else "RGB")
                turn = _turn(image)
                if turn is not None:
                    picture = picture.transpose(turn)
                shrinks = height <= picture.height and width <= picture.width
                resampling = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
                pixels = np.array(picture.resize((width, height), resampling))  # (H, W) or (H, W, 3)
        except UnidentifiedImageError:
            raise DataError(f"{name}: not an image, or damaged", f"known: {', '.join(FORMATS)}") from None
    return np.ascontiguousarray(pixels.reshape(height, width, channels).transpose(2, 0, 1))  # (C, H, W)


def _check_size(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        what = f"{name}: {image.width} × {image.height} is more than {MAX_PIXELS // 10**6} megapixels"
        raise DataError(what, "scale it down first")


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what turns the image upright, by its orientation (EXIF 2.32, tag 0x0112)."""
    from PIL.Image import Transpose

    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # damaged EXIF: the picture is whole, but which side is up is not known
        return None
    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return turns.get(orientation) if isinstance(orientation, int) else None


def _put_on_white(image: Image.Image, name: str) -> Image.Image:
    """Return the image in a mode of 8 bits without transparency: the page under it is white, as on paper."""
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _sixteen_bits_on_white(image)
    if image.mode.startswith(("I", "F")):
        what = f"{name}: pixels of mode {image.mode!r} (32 bits) have no fixed range"
        raise DataError(what, "save it with 8 or 16 bits a pixel")
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)


def _sixteen_bits_on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    pixels = np.asarray(image).astype(np.int64)  # (H, W); Pillow holds some 16-bit files in 32 bits
    grey = ((pixels + 128) // 257).clip(0, 255)  # round(255 v / 65535)
    transparent = image.info.get("transparency")  # in PNG: one grey that is the page
    if isinstance(transparent, int):
        grey[pixels == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))
