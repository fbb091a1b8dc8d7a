"""Image files as a model takes them: whatever is in the file, bytes of one size and one number of channels come out."""

from __future__ import annotations

import contextlib
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from minivit.data.fit import fitted, read_fit
from minivit.data.reading import reading
from minivit.errors import DataError
from minivit.files import open_regular

if TYPE_CHECKING:
    from PIL import Image, ImageFile

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
"""What may be read, recognised by content and not by the file's name. Pillow knows many more, most of them old code."""

MAX_PIXELS = 50_000_000
"""The largest picture that is decoded. A few bytes can claim any size: this is checked before memory is taken."""

MAX_SCANS = 20
"""A JPEG of :data:`MAX_PIXELS` may have so many scans over them, a smaller one more; usual are ten at most."""

MAX_BYTES = 8 * MAX_PIXELS + (64 << 20)
"""The largest file that is read: four channels of 16 bits take so much, and some metadata."""

_LARGEST_TILE = 1 << 24  # pixels of a TIFF's tile, which may be larger than the picture: 4096 × 4096


def read_image(
    source: str | PathLike[str] | BinaryIO, size: tuple[int, int], channels: int, fit: str = "stretch"
) -> np.ndarray:
    """Read the image file ``source``, a path or an open binary file, as uint8 (channels, height, width).

    It is turned upright as its EXIF orientation says, put on a white page where it is transparent, and converted to
    grey (``channels`` 1; Rec. 601 luma) or RGB (3). Greys of 12 and 16 bits are scaled to 8 bits; of 16-bit colours the
    high byte is taken, which is off by 1 at most, and by 2 where it is half transparent. Of an animation, or of several
    pages, the first one counts, with a warning.

    Then it is brought to ``size``, (height, width): ``fit="stretch"`` gives up its proportions, ``"crop"`` cuts the
    largest part that has the right ones from its middle, and other systems' models have their own:
    :func:`~minivit.data.fit.fitted`.

    It is not inverted: the digits' models expect light strokes on a black background.

    Raises DataError with path and reason for what cannot be read, is no regular file (a pipe, a device), is not of
    :data:`FORMATS`, is larger than :data:`MAX_PIXELS` (WebP: half of that), would take unusually long to decode for its
    size, or has no fixed range to scale (32-bit integers, floats). What is read takes at most about 400 MB meanwhile.
    """
    read_fit(fit)  # before the work
    picture = decode(source, channels)
    if picture.animated:
        warnings.warn(f"{_name(source)} holds more than one picture: the first one is read", stacklevel=2)
    return fitted(picture.page, size, fit, _name(source))


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
            with _opened(source, name) as file, Image.open(file, formats=FORMATS) as image:
                _check_size(image, name)
                _check_work(image, file, name)
                stored = {"format": image.format or "", "mode": image.mode}
                if at_least is not None:
                    image.draft(None, (2 * max(at_least), 2 * max(at_least)))  # of either way up
                _widen_transparency(image)
                image.load()
                page = _on_white(image, name, "L" if channels == 1 else "RGB")
                turn = _turn(image)
                if turn is not None:
                    page = page.transpose(turn)
                return Picture(page, **stored, animated=_animated(image))
        except UnidentifiedImageError:
            raise _not_known(source, name) from None
        except Image.DecompressionBombError:  # Pillow's own limit, met before it says the size
            raise DataError(f"{name}: more than {MAX_PIXELS // 10**6} megapixels", "scale it down first") from None


def _not_known(source: str | PathLike[str] | BinaryIO, name: str) -> DataError:
    """Return why a file is none of :data:`FORMATS`; a phone's photos are often HEIC (ISO/IEC 23008-12), or AVIF."""
    with contextlib.suppress(OSError), _opened(source, name) as file:
        head = file.read(12)
        brand = head[8:].decode("ascii", "replace")
        if head[4:8] == b"ftyp" and brand in ("heic", "heix", "hevc", "mif1", "msf1", "avif", "avis"):
            kind = "AVIF" if brand.startswith("av") else "HEIC"
            return DataError(f"{name}: a photo in the format {kind}, which is not read", "save it as JPEG or PNG")
    return DataError(f"{name}: not an image, or damaged", f"known: {', '.join(FORMATS)}")


def is_image(path: str | PathLike[str]) -> bool:
    """Tell whether a file begins like one of :data:`FORMATS`. It may still be damaged, or too large to be decoded."""
    from PIL import Image, UnidentifiedImageError

    with _quiet:
        try:
            if not os.path.isfile(path):
                return False
            with open_regular(path) as file, Image.open(file, formats=FORMATS):
                return True
        except UnidentifiedImageError:
            return False
        except Exception:  # recognised, and then refused
            return True


@contextlib.contextmanager
def _opened(source: str | PathLike[str] | BinaryIO, name: str) -> Iterator[BinaryIO]:
    """Yield ``source``, or the file at that path, as an open file of no more bytes than a picture may take."""
    with open_regular(source) if isinstance(source, str | PathLike) else contextlib.nullcontext(source) as file:
        if (size := file.seek(0, os.SEEK_END)) > MAX_BYTES:
            raise DataError(f"{name}: {size:,} bytes are more than a picture takes", "convert it, or scale it down")
        file.seek(0)
        yield file


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


def _check_work(image: ImageFile.ImageFile, file: BinaryIO, name: str) -> None:
    """Raise DataError where a small file would keep its decoder busy, or take memory, out of proportion."""
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        if (scans := _scans(file)) * pixels > MAX_SCANS * MAX_PIXELS:
            raise DataError(f"{name}: {scans:,} scans over {pixels:,} pixels: usual are ten at most", "save it again")
    elif image.format == "BMP" and image.tile and image.tile[0][0] == "bmp_rle" and pixels > MAX_PIXELS // 10:
        raise DataError(f"{name}: a run-length encoded BMP of {pixels:,} pixels", "save it as PNG")  # decoded by Python
    elif image.format == "TIFF":
        width, height = (image.tag_v2.get(tag, 0) for tag in (322, 323))  # type: ignore[attr-defined]
        if width * height > max(pixels, _LARGEST_TILE):
            raise DataError(f"{name}: tiles of {width} × {height} for {pixels:,} pixels", "save it again")
    elif image.format == "WEBP" and pixels > MAX_PIXELS // 2:  # its decoder takes 16 bytes a pixel, twice the others'
        what = f"{name}: {image.width} × {image.height} is more than {MAX_PIXELS // 2 // 10**6} megapixels of WebP"
        raise DataError(what, "scale it down first, or save it as PNG or JPEG")


def _scans(file: BinaryIO) -> int:
    """Count a JPEG's scans up to the end of its first picture (ITU T.81, annex B). Where it is read stays as it was."""
    at = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(at)
    scans, at = 0, 2  # behind the marker that starts every file
    while (marker := _MARKER.search(data, at)) and (code := data[marker.end() - 1]) != 0xD9:
        scans += code == 0xDA
        # behind the segment, whose length comes first: what looks like a marker in it is none
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return scans


_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")  # in a scan, 0xff comes before 0 or a restart's number as well


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


def _on_white(image: Image.Image, name: str, mode: str) -> Image.Image:
    """Return the image in ``mode``, "L" or "RGB", without transparency: the page under it is white, as on paper."""
    from PIL import Image

    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode.startswith(("I", "F")) and not deep:
        what = f"{name}: pixels of mode {image.mode!r} (32 bits) have no fixed range"
        raise DataError(what, "save it with 8 or 16 bits a pixel")
    if not deep and not image.has_transparency_data:
        return image if image.mode == mode else image.convert(mode)
    flat = _sixteen_bits_on_white(image) if deep else _composed_on_white
    page, rows = Image.new(mode, image.size), max(1, (1 << 20) // image.width)
    for top in range(0, image.height, rows):  # in strips: what is between needs several times the picture's memory
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        page.paste(flat(strip).convert(mode), (0, top))
    return page


def _composed_on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)


def _sixteen_bits_on_white(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """Return what brings a part of ``image`` to 8 bits."""
    from PIL import Image

    white, inverted = 65535, False
    if image.format == "TIFF":  # TIFF 6.0, tags 258, BitsPerSample, and 262, PhotometricInterpretation
        tags = image.tag_v2  # type: ignore[attr-defined]
        white = 2 ** tags[258][0] - 1
        inverted = tags.get(262, 0) == 0  # WhiteIsZero, which Pillow heeds for up to 8 bits only
    transparent = image.info.get("transparency")  # in PNG: one grey that is the page

    def flat(part: Image.Image) -> Image.Image:
        pixels = np.asarray(part).astype(np.int64)  # (H, W); Pillow holds some 16-bit files in 32 bits
        if inverted:
            pixels = white - pixels
        grey = ((255 * pixels + white // 2) // white).clip(0, 255)  # round(255 v / white)
        if isinstance(transparent, int):
            grey[pixels == transparent] = 255
        return Image.fromarray(grey.astype(np.uint8))

    return flat
