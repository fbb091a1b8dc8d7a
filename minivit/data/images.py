"""Image files as a model takes them: whatever is in the file, bytes of one size and one number of channels come out."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from minivit.data.datasets import reading
from minivit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL import Image, ImageFile

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What may be read, recognised by content and not by the file's name. Pillow knows many more, most of them old code."""

MAX_PIXELS = 50_000_000
"""The largest picture that is decoded. A few bytes can claim any size: this is checked before memory is taken."""

FITS = ("stretch", "crop")
"""How a picture is brought to a size of another shape: see :func:`read_image`."""


def read_image(
    source: str | PathLike[str] | BinaryIO, size: tuple[int, int], channels: int, fit: str = "stretch"
) -> np.ndarray:
    """Read the image file ``source``, a path or an open binary file, as uint8 (channels, height, width).

    It is turned upright as its EXIF orientation says, put on a white page where it is transparent, and converted to
    grey (``channels`` 1; Rec. 601 luma) or RGB (3). Greys of 12 and 16 bits are scaled to 8 bits; of 16-bit colours the
    high byte is taken, which is off by 1 at most, and by 2 where it is half transparent. Of an animation, or of several
    pages, the first one counts, with a warning.

    Then it is brought to ``size``, (height, width). ``fit="stretch"`` gives up its proportions: by area averaging where
    it shrinks along both axes (as the UCI digits were made from their bitmaps), else by bicubic interpolation.
    ``fit="crop"`` cuts the largest part that has the right proportions from its middle, and scales that by bicubic
    interpolation, widened to average where it shrinks.

    It is not inverted: the digits' models expect light strokes on a black background.

    Raises DataError with path and reason for what cannot be read, is not of :data:`FORMATS`, is larger than
    :data:`MAX_PIXELS`, or has no fixed range to scale (32-bit integers, floats).
    """
    if fit not in FITS:
        raise ConfigError(f"unknown fit {fit!r}", f"known: {', '.join(FITS)}")
    picture = decode(source, channels)
    if picture.animated:
        warnings.warn(f"{_name(source)} holds more than one picture: the first one is read", stacklevel=2)
    return fitted(picture.page, size, fit)


@dataclass(frozen=True)
class Picture:
    """What an image file holds: ``page``, upright, of mode "L" or "RGB"; and of the file itself the rest."""

    page: Image.Image
    format: str
    mode: str  # Pillow's, such as "I;16" or "CMYK"
    animated: bool


def decode(source: str | PathLike[str] | BinaryIO, channels: int, at_least: tuple[int, int] | None = None) -> Picture:
    """Decode an image file in its own size: see :func:`read_image`. Any number of threads may do so at once.

    With ``at_least``, (height, width), a large JPEG may come out smaller by 2, 4 or 8, which takes a fraction of the
    time, but not below twice that size: what it is scaled to then hardly differs.
    """
    from PIL import Image, UnidentifiedImageError

    name = _name(source)
    if channels not in (1, 3):
        raise DataError(f"{name}: image files are read as 1 or 3 channels, not {channels}", "pass an array instead")
    with reading(name, "check or convert the file"), _quiet:
        try:
            with Image.open(source, formats=FORMATS) as image:
                _check_size(image, name)
                stored = {"format": image.format or "", "mode": image.mode}
                if at_least is not None:
                    image.draft(None, (2 * max(at_least), 2 * max(at_least)))  # of either way up
                _widen_transparency(image)
                image.load()
                page = _put_on_white(image, name).convert("L" if channels == 1 else "RGB")
                turn = _turn(image)
                if turn is not None:
                    page = page.transpose(turn)
                return Picture(page, **stored, animated=_animated(image))
        except UnidentifiedImageError:
            raise DataError(f"{name}: not an image, or damaged", f"known: {', '.join(FORMATS)}") from None
        except Image.DecompressionBombError:  # Pillow's own limit, met before it says the size
            raise DataError(f"{name}: more than {MAX_PIXELS // 10**6} megapixels", "scale it down first") from None


def fitted(page: Image.Image, size: tuple[int, int], fit: str) -> np.ndarray:
    """Return a picture of mode "L" or "RGB" as uint8 (C, height, width) of this ``size``: see :func:`read_image`."""
    from PIL.Image import Resampling

    height, width = size
    if fit == "crop":
        step = min(page.width / width, page.height / height)  # of the picture's pixels to one of the result's
        left, top = (page.width - step * width) / 2, (page.height - step * height) / 2
        box = (max(left, 0.0), max(top, 0.0), min(page.width - left, page.width), min(page.height - top, page.height))
        resized = page.resize((width, height), Resampling.BICUBIC, box)
    else:
        shrinks = height <= page.height and width <= page.width
        resized = page.resize((width, height), Resampling.BOX if shrinks else Resampling.BICUBIC)
    pixels = np.asarray(resized).reshape(height, width, -1)  # (H, W) or (H, W, 3) → (H, W, C)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (C, H, W)


def is_image(path: str | PathLike[str]) -> bool:
    """Tell whether a file begins like one of :data:`FORMATS`. It may still be damaged, or too large to be decoded."""
    from PIL import Image, UnidentifiedImageError

    with _quiet:
        try:
            with Image.open(path, formats=FORMATS):
                return True
        except UnidentifiedImageError:
            return False
        except Exception:  # recognised, and then refused
            return True


def _name(source: str | PathLike[str] | BinaryIO) -> str:
    return str(source) if isinstance(source, str | PathLike) else str(getattr(source, "name", "image"))


class _Quiet:
    """Silences Pillow's remarks on metadata, and on sizes that are refused here anyway, while any thread decodes.

    Were each thread to catch warnings on its own, one would put back the filters that another has set.
    """

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.caught = warnings.catch_warnings()
                self.caught.__enter__()
                warnings.simplefilter("ignore")
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.caught.__exit__(None, None, None)


_quiet = _Quiet()


def _widen_transparency(image: ImageFile.ImageFile) -> None:
    """Bring the colour of a PNG that stands for the page to 8 bits: Pillow does so with the pixels only."""
    widened = {"L;2": lambda v: v * 85, "L;4": lambda v: v * 17, "RGB;16B": lambda v: tuple(x >> 8 for x in v)}
    clear, stored = image.info.get("transparency"), image.tile[0][3] if image.tile else None
    if image.format == "PNG" and clear is not None and stored in widened:
        image.info["transparency"] = widened[stored](clear)


def _check_size(image: Image.Image, name: str) -> None:
    if image.width * image.height > MAX_PIXELS:
        what = f"{name}: {image.width} × {image.height} is more than {MAX_PIXELS // 10**6} megapixels"
        raise DataError(what, "scale it down first")


def _animated(image: Image.Image) -> bool:
    """Tell whether a file holds further pictures. A phone's JPEG may hold a second view (MPO), which is no matter."""
    try:
        return bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    except Exception:  # damaged behind the first one, which has been read
        return True


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
    white = 65535
    if image.format == "TIFF":  # TIFF 6.0, tags 258, BitsPerSample, and 262, PhotometricInterpretation
        tags = image.tag_v2  # type: ignore[attr-defined]
        white = 2 ** tags[258][0] - 1
        if tags.get(262, 0) == 0:  # WhiteIsZero, which Pillow heeds for up to 8 bits only
            pixels = white - pixels
    grey = ((255 * pixels + white // 2) // white).clip(0, 255)  # round(255 v / white)
    transparent = image.info.get("transparency")  # in PNG: one grey that is the page
    if isinstance(transparent, int):
        grey[pixels == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))
