"""The reading of image files: every mode against a reference of its own, damaged and hostile files."""

from __future__ import annotations

import csv
import io
import os
import re
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from minivit.backend import Key, random_bits
from minivit.data import read_image
from minivit.data.fit import fitted
from minivit.data.images import _scans, decode, is_image
from minivit.errors import ConfigError, DataError

FIXTURES = Path(os.environ.get("MINIVIT_IMAGE_FIXTURES", "no such folder"))  # odd files of Pillow's own test suite


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


PIXELS = (random_bits(Key(9), (6, 4, 3)) >> 24).astype(np.uint8)  # (H, W, 3)
GREY = PIXELS[:, :, 0]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_formats_without_loss(kind):
    stream = saved(Image.fromarray(PIXELS), kind, **({"lossless": True} if kind == "WEBP" else {}))
    assert np.array_equal(read_image(stream, (6, 4), 3), PIXELS.transpose(2, 0, 1))


def test_paths_and_streams_give_the_same(tmp_path):
    (tmp_path / "x.dat").write_bytes(saved(Image.fromarray(GREY)).getvalue())  # by content, not by name
    from_path = read_image(tmp_path / "x.dat", (6, 4), 1)
    assert from_path.dtype == np.uint8
    assert np.array_equal(from_path, GREY[None])
    assert np.array_equal(from_path, read_image(saved(Image.fromarray(GREY)), (6, 4), 1))


@pytest.mark.parametrize(
    ("orientation", "store"),
    [
        (1, lambda x: x),
        (2, np.fliplr),
        (3, lambda x: np.rot90(x, 2)),
        (4, np.flipud),
        (5, np.transpose),
        (6, lambda x: np.rot90(x, 1)),
        (7, lambda x: np.rot90(x, 2).T),
        (8, lambda x: np.rot90(x, -1)),
        (9, lambda x: x),
    ],
)
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_orientation_is_applied(orientation, store, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(store(GREY)))
    assert np.array_equal(read_image(saved(stored, kind, exif=exif), (6, 4), 1)[0], GREY)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled(kind):
    deep = np.array([[0, 257, 256, 32896, 65535, 128, 129]], np.uint16)
    by_hand = io.BytesIO(b"P5 7 1 65535\n" + deep.astype(">u2").tobytes())  # older Pillows cannot write it
    stream = by_hand if kind == "PPM" else saved(Image.fromarray(deep), kind)
    assert read_image(stream, (1, 7), 1).ravel().tolist() == [0, 1, 1, 128, 255, 0, 1]


@pytest.mark.parametrize("white_is_zero", [False, True])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_greys_of_tiff_are_scaled_by_their_bits_and_turned_to_black_is_zero(bits, white_is_zero):
    shares = np.array([0, 1, 2, 3]) / 3  # of white
    values = np.rint((1 - shares if white_is_zero else shares) * (2**bits - 1)).astype(int)
    numbers = "".join(f"{value:0{bits}b}" for value in values)
    strip = int(numbers, 2).to_bytes(bits // 2, "big")  # four pixels of 12 bits are packed, the highest bit first
    if bits == 16:
        strip = values.astype("<u2").tobytes()
    tags = {256: 4, 257: 1, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 200, 277: 1, 278: 1, 279: len(strip)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    if (bits, white_is_zero) == (12, True):  # Pillow knows no such file
        with pytest.raises(DataError, match="not an image"):
            read_image(io.BytesIO(data.ljust(200, b"\0") + strip), (1, 4), 1)
    else:
        shown = read_image(io.BytesIO(data.ljust(200, b"\0") + strip), (1, 4), 1)
        assert shown.ravel().tolist() == [0, 85, 170, 255]


def test_transparent_is_white():
    alpha = np.array([[0, 255], [128, 0]], np.uint8)
    grey = np.full((2, 2), 100, np.uint8)
    la = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha)))
    assert read_image(saved(la), (2, 2), 1).ravel().tolist() == [255, 100, 177, 255]
    rgba = la.convert("RGBA")
    assert read_image(saved(rgba), (2, 2), 3).reshape(3, 4).tolist() == [[255, 100, 177, 255]] * 3
    deep = saved(Image.fromarray(np.array([[0, 65535, 257]], np.uint16)), transparency=0)
    assert read_image(deep, (1, 3), 1).ravel().tolist() == [255, 255, 1]


def test_palette_one_bit_and_cmyk():
    palette = Image.fromarray(PIXELS).quantize(24)
    assert np.array_equal(read_image(saved(palette), (6, 4), 3), np.array(palette.convert("RGB")).transpose(2, 0, 1))
    bits = Image.fromarray(GREY > 127)
    assert np.array_equal(read_image(saved(bits), (6, 4), 1)[0], np.where(GREY > 127, 255, 0))
    ink = Image.new("CMYK", (2, 2), (0, 255, 255, 0))
    assert read_image(saved(ink, "TIFF"), (2, 2), 3)[:, 0, 0].tolist() == [255, 0, 0]


def test_grey_is_luma():
    assert read_image(saved(Image.new("RGB", (2, 2), (255, 0, 0))), (2, 2), 1)[0, 0, 0] == 76  # 0.299 · 255


def test_shrinking_averages_areas():
    bitmap = random_bits(Key(4), (32, 32)) > 2**31  # as the digits were made: 4 × 4 points to a pixel
    small = read_image(saved(Image.fromarray(bitmap)), (8, 8), 1)[0]
    expected = bitmap.reshape(8, 4, 8, 4).mean((1, 3)) * 255
    assert np.abs(small - expected).max() <= 1
    assert read_image(saved(Image.fromarray(GREY)), (12, 2), 3).shape == (3, 12, 2)


def png_claiming(width: int, height: int) -> io.BytesIO:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b"\0" * 100), b"IEND"]
    framed = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + framed)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (lambda: "no/such/file.png", "file.png: no such file"),
        (lambda: ".", "cannot be read"),
        (lambda: io.BytesIO(b""), "not an image"),
        (lambda: io.BytesIO(b"GIF89a nonsense"), "image"),
        (lambda: saved(Image.fromarray(GREY), "TGA"), "not an image"),  # Pillow could, but it is not on the list
        (lambda: io.BytesIO(saved(Image.fromarray(PIXELS)).getvalue()[:60]), "cannot be read"),
        (lambda: png_claiming(10_000, 5_001), "50 megapixels"),
        (lambda: png_claiming(10_000, 5_000), "cannot be read"),  # small enough to be decoded, but damaged
        (lambda: png_claiming(2**30, 2**30), "image"),
        (lambda: saved(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "no fixed range"),
        (lambda: saved(Image.fromarray(np.ones((2, 2), np.int32)), "TIFF"), "no fixed range"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(source, message):
    with pytest.raises(DataError, match=message) as caught:
        read_image(source(), (8, 8), 1)
    assert caught.value.remedy


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_channels_are_refused(channels):
    with pytest.raises(DataError, match=f"not {channels}"):
        read_image(saved(Image.fromarray(GREY)), (8, 8), channels)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damaged_image_files_raise_nothing_else(kind):
    whole = saved(Image.fromarray(np.tile(PIXELS, (5, 5, 1))), kind).getvalue()
    places = random_bits(Key(1), (60,)) % len(whole)
    for i, position in enumerate(places.tolist()):
        broken = whole[:position] + bytes([random_bits(Key(2), (1,), start=i)[0] & 255]) + whole[position + 1 :]
        for content in (broken, whole[:position]):
            try:
                assert read_image(io.BytesIO(content), (8, 8), 3).shape == (3, 8, 8)
            except DataError as error:
                assert error.what


# ---- a reference that shares no code with Pillow's conversions -------------------------------------------------------


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Composite colours (H, W, 3) in [0, 255] with alpha (H, W) in [0, 1] on white."""
    return colour * alpha[..., None] + 255 * (1 - alpha[..., None])


def chunks_of(data: bytes) -> dict[bytes, bytes]:
    """Join a PNG's chunks by type, up to the end of the image (an animation's further frames are of other types)."""
    found: dict[bytes, bytes] = {}
    at = 8
    while at < len(data) and b"IEND" not in found:
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        found[kind] = found.get(kind, b"") + data[at + 8 : at + 8 + length]
        at += 12 + length
    return found


def unfilter(raw: bytes, rows: int, row_bytes: int, step: int) -> np.ndarray:
    """Undo PNG's filters (PNG 1.2, section 6): uint8 (rows, row_bytes)."""
    above, out = bytearray(step + row_bytes), []  # zeros above and to the left
    for y in range(rows):
        kind, *line = raw[y * (row_bytes + 1) : (y + 1) * (row_bytes + 1)]
        row = bytearray(step) + bytearray(line)
        for x in range(step, step + row_bytes) if kind else ():
            a, b, c = row[x - step], above[x], above[x - step]
            guess = (a, b, (a + b) // 2, 0)[kind - 1]
            if kind == 4:  # Paeth's
                to_a, to_b, to_c = abs(b - c), abs(a - c), abs(a + b - 2 * c)
                guess = a if to_a <= to_b and to_a <= to_c else b if to_b <= to_c else c
            row[x] = (row[x] + guess) & 255
        out.append(row[step:])
        above = row
    return np.frombuffer(b"".join(out), np.uint8).reshape(rows, row_bytes)


def png_reference(data: bytes) -> np.ndarray:
    """Decode a PNG of any kind on white: float64 (H, W, 3) in [0, 255], of 16 bits all of them."""
    chunks = chunks_of(data)
    width, height, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    raw, values = zlib.decompressobj().decompress(chunks[b"IDAT"]), np.zeros((height, width, channels), np.int64)
    passes = [(0, 0, 1, 1)]  # row, column, and the steps between rows and columns
    if interlaced:
        passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    for y, x, dy, dx in passes:
        part = values[y::dy, x::dx]
        if part.size == 0:
            continue
        rows, columns = part.shape[:2]
        row_bytes = -(-columns * channels * depth // 8)
        lines = unfilter(raw, rows, row_bytes, max(1, channels * depth // 8))
        raw = raw[rows * (row_bytes + 1) :]
        bits = np.unpackbits(lines, axis=1)[:, : columns * channels * depth].reshape(rows, columns, channels, depth)
        part[:] = bits @ (1 << np.arange(depth)[::-1])
    clear = chunks.get(b"tRNS")
    scale = 255 / (2**depth - 1)
    alpha = np.ones((height, width))
    if kind == 3:
        palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)
        alphas = np.full(256, 255)
        alphas[: len(clear or b"")] = list(clear or b"")
        return on_white(palette[values[..., 0]].astype(np.float64), alphas[values[..., 0]] / 255)
    if kind in (4, 6):
        values, alpha = values[..., :-1], values[..., -1] * scale / 255
    elif clear is not None:
        alpha = 1.0 - (values == np.frombuffer(clear, ">u2")).all(-1)
    return on_white(np.broadcast_to(values * scale, (height, width, 3)), alpha)


def reference(data: bytes) -> np.ndarray:
    """Return what a file shows before it is turned, float64 (H, W, 3), from its values as they are stored."""
    if data.startswith(b"\x89PNG"):
        return png_reference(data)
    with Image.open(io.BytesIO(data)) as image:
        raw, clear = np.asarray(image).astype(np.float64), image.info.get("transparency")
        palette = np.array(image.getpalette("RGB") or [0, 0, 0], np.float64).reshape(-1, 3)
        mode = image.mode
    grey = raw.reshape(*raw.shape[:2], -1)[..., :1]  # (H, W, 1)
    if mode == "P":
        index = raw.astype(int)
        return on_white(palette[index], 1.0 - (index == clear))
    if mode == "CMYK":
        return (255 - raw[..., :3]) * (255 - raw[..., 3:]) / 255
    if mode == "RGBA":
        return on_white(raw[..., :3], raw[..., 3] / 255)
    if mode == "RGB":
        return raw
    scale = {"1": 255, "L": 1, "I": 1 / 257, "I;16": 1 / 257, "I;16B": 1 / 257}[mode]
    return np.broadcast_to(grey * scale, (*raw.shape[:2], 3))


TURNS = {2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1)}
TURNS |= {6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}


def assert_shows(expected: np.ndarray, picture: np.ndarray, orientation: int = 1, bound: float = 1) -> None:
    """Compare a picture (C, H, W) with what was stored (H, W, 3): no value may be off by more than ``bound`` of 255."""
    expected = TURNS.get(orientation, np.asarray)(expected)
    assert picture.shape == (3, *expected.shape[:2])
    assert np.abs(picture.transpose(1, 2, 0) - expected).max() <= bound


def made_png(depth: int, kind: int, pixels: np.ndarray, *chunks: bytes) -> bytes:
    """Write a PNG: ``pixels`` (H, W, C) of ``depth`` bits."""
    height, width = pixels.shape[:2]
    bits = (pixels[..., None] >> np.arange(depth)[::-1] & 1).astype(np.uint8).reshape(height, -1)
    lines = b"".join(b"\0" + row.tobytes() for row in np.packbits(bits, axis=1))
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    framed = [header, *chunks, b"IDAT" + zlib.compress(lines), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in framed
    )


DEEP = random_bits(Key(11), (9, 7, 4)).astype(np.int64) & 0xFFFF  # (H, W, 4)
COLOURS = b"PLTE" + random_bits(Key(12), (48,)).astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("kind", "depth", "transparent"),
    [(0, depth, clear) for depth in (1, 2, 4, 8, 16) for clear in (False, True)]
    + [(2, depth, clear) for depth in (8, 16) for clear in (False, True)]
    + [(3, depth, clear) for depth in (1, 2, 4, 8) for clear in (False, True)]
    + [(kind, depth, True) for kind in (4, 6) for depth in (8, 16)],
)
def test_every_kind_of_png(kind, depth, transparent):
    pixels = DEEP[..., : {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]] >> (16 - depth)
    chunks = []
    if kind == 3:
        pixels, chunks = pixels % 16, [COLOURS]
    if transparent and kind in (0, 2):  # the colour of one pixel is that of the page
        chunks.append(b"tRNS" + pixels[4, 3].astype(">u2").tobytes())
    elif transparent and kind == 3:
        chunks.append(b"tRNS" + bytes([0, 255, 100, 30, 255, 1]))
    data = made_png(depth, kind, pixels, *chunks)
    bound = 2 if depth == 16 and kind in (4, 6) else 1  # Pillow keeps the high bytes of colour and of alpha
    assert_shows(png_reference(data), read_image(io.BytesIO(data), (9, 7), 3), bound=bound)


ALPHA = (DEEP >> 8).astype(np.uint8)  # (H, W, 4)
BYTES = np.ascontiguousarray(ALPHA[..., :3])


@pytest.mark.parametrize(
    ("kind", "modes"),
    [
        ("TIFF", "1 L P RGB RGBA CMYK I;16 I;16B"),
        ("JPEG", "L RGB CMYK"),
        ("PPM", "1 L RGB"),
        ("BMP", "1 L P RGB RGBA"),
        ("GIF", "1 L P"),
        ("WEBP", "RGB RGBA"),
    ],
)
def test_every_mode_of_other_formats(kind, modes):
    for mode in modes.split():
        deep = Image.fromarray(DEEP[..., 0].astype(">u2" if mode == "I;16B" else "<u2"))
        image = deep if mode.startswith("I") else Image.fromarray(ALPHA).convert(mode)
        data = saved(image, kind).getvalue()
        assert_shows(reference(data), read_image(io.BytesIO(data), (9, 7), 3))


def test_cmyk_as_adobe_writes_it():
    ink = Image.fromarray(np.stack([np.full((8, 8), v, np.uint8) for v in (200, 100, 0, 50)], -1), "CMYK")
    data = saved(ink, "JPEG", quality=100).getvalue()
    assert b"Adobe" in data  # then its inks are stored inverted
    shown = read_image(io.BytesIO(data), (8, 8), 3)[:, 4, 4]
    assert np.abs(shown - np.array([55 * 205, 155 * 205, 255 * 205]) / 255).max() <= 3


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(kind, tmp_path):
    frames = [Image.new("RGB", (3, 3), (grey, grey, grey)) for grey in (10, 200, 30)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:]).getvalue()
    (tmp_path / "moving").write_bytes(data)
    with pytest.warns(UserWarning, match="moving holds more than one picture"):
        shown = read_image(tmp_path / "moving", (3, 3), 1)
    assert np.abs(shown.astype(int) - 10).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "PNG", "TIFF"])
def test_orientation_in_every_format(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(BYTES), kind, exif=exif).getvalue()
    size = (7, 9) if orientation > 4 else (9, 7)
    stored = BYTES if kind == "TIFF" else reference(data)  # in TIFF Pillow has turned it before the reference sees it
    assert_shows(stored, read_image(io.BytesIO(data), size, 3), orientation)


# ---- the right size --------------------------------------------------------------------------------------------------


def test_crop_takes_the_middle():
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 10:50] = 200
    image = Image.fromarray(wide)
    assert (read_image(saved(image), (10, 10), 1, fit="crop") == 200).all()
    assert (read_image(saved(image.transpose(Image.Transpose.TRANSPOSE)), (10, 10), 1, fit="crop") == 200).all()
    assert (read_image(saved(image), (40, 40), 1, fit="crop") == 200).all()  # enlarged as well
    stretched = read_image(saved(image), (10, 10), 1)
    assert stretched[0, 0].tolist() == [0, 67, 200, 200, 200, 200, 200, 200, 67, 0]  # its edges are at 1⅔ and 8⅓


def test_crop_keeps_circles_round_and_averages():
    y, x = np.indices((120, 200))
    disc = Image.fromarray((((y - 59.5) ** 2 + (x - 99.5) ** 2 < 50**2) * 255).astype(np.uint8))
    shown = read_image(saved(disc), (12, 12), 1, fit="crop")[0].astype(int)
    assert np.abs(shown - shown.T).max() <= 8  # Pillow rounds between the axes; stretched it would be over 100
    assert shown[6, 6] == 255
    assert shown.mean() == pytest.approx(255 * np.pi * 50**2 / 120**2, rel=0.02)  # the disc's share of the square
    checks = Image.fromarray(((y + x) % 2 * 255).astype(np.uint8))
    assert np.abs(read_image(saved(checks), (12, 12), 1, fit="crop").astype(int) - 127).max() <= 1


def test_crop_of_the_same_size_changes_nothing():
    assert np.array_equal(read_image(saved(Image.fromarray(BYTES)), (9, 7), 3, "crop"), BYTES.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("page", "size"), [((1, 1), (5, 3)), ((1000, 1), (3, 7)), ((3, 999), (64, 64)), ((7, 5), (1, 1))]
)
def test_crop_of_any_shape(page, size):
    assert fitted(Image.new("RGB", page, "red"), size, "crop")[0].tolist() == np.full(size, 255).tolist()


def test_an_unknown_fit_is_refused():
    with pytest.raises(ConfigError, match="'zoom'"):
        read_image(saved(Image.fromarray(GREY)), (6, 4), 1, fit="zoom")


def test_a_large_jpeg_is_decoded_smaller_to_the_same_picture():
    smooth = Image.fromarray(BYTES).resize((800, 600), Image.Resampling.BICUBIC)
    data = saved(smooth, "JPEG", quality=95)
    small, whole = decode(data, 3, at_least=(64, 64)).page, decode(data, 3).page
    assert whole.size == (800, 600)
    assert small.size == (200, 150)
    pictures = [fitted(page, (64, 64), "crop").astype(int) for page in (small, whole)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 4
    assert decode(saved(smooth, "PNG"), 3, at_least=(64, 64)).page.size == (800, 600)


# ---- hostile files, and threads --------------------------------------------------------------------------------------


def claim(kind: str, side: int) -> io.BytesIO:
    """Return a small file that says it holds side × side pixels."""
    if kind == "PNG":
        return png_claiming(side, side)
    data = saved(Image.new("RGB", (16, 16)), kind).getvalue()
    if kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        return io.BytesIO(data[:at] + struct.pack(">HH", side, side) + data[at + 4 :])
    if kind == "GIF":
        return io.BytesIO(data.replace(struct.pack("<HH", 16, 16), struct.pack("<HH", side, side)))
    return io.BytesIO(data.replace(struct.pack("<ii", 16, 16), struct.pack("<ii", side, side)))  # BMP


@pytest.mark.parametrize("side", [7072, 20_000, 60_000])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP"])
def test_too_large_a_picture_is_refused_before_it_is_decoded(kind, side, monkeypatch):
    def decodes(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decodes)
    with pytest.raises(DataError, match="more than 50 megapixels"):
        read_image(claim(kind, side), (8, 8), 3)


def test_text_that_inflates_is_refused():
    text = b"zTXtComment\0\0" + zlib.compress(b"x" * 2_000_000)
    data = made_png(8, 2, BYTES.astype(np.int64), text)
    assert len(data) < 10_000
    with pytest.raises(DataError, match="too large"):
        read_image(io.BytesIO(data), (9, 7), 3)


def test_the_peak_of_a_refusal_is_small(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_claiming(2**15, 2**15).getvalue())
    (tmp_path / "good.png").write_bytes(saved(Image.fromarray(GREY)).getvalue())
    code = """
import resource, sys
from minivit.data import read_image
from minivit.errors import DataError
read_image(sys.argv[1], (8, 8), 3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_image(sys.argv[2], (8, 8), 3)
except DataError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "good.png"), str(tmp_path / "bomb.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) * (1 if sys.platform != "darwin" else 1 / 1024) < 20_000  # kibibytes


def scanned(side: int, scans: int, progressive: bool = True) -> bytes:
    """Return a JPEG that goes over its pixels ``scans`` times."""
    data = saved(Image.new("RGB", (side, side), (128,) * 3), "JPEG", progressive=progressive).getvalue()
    if not progressive:  # of one channel each, and empty
        return data[: data.index(b"\xff\xda")] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" * scans + data[-2:]
    starts = [match.start() for match in re.finditer(rb"\xff\xda", data)]
    return data[:-2] + data[starts[-1] : -2] * (scans - len(starts)) + data[-2:]


def test_a_jpeg_of_too_many_scans_is_refused_before_it_is_decoded(monkeypatch):
    assert read_image(io.BytesIO(scanned(1000, 400)), (8, 8), 1).mean() == 128
    photo = saved(Image.fromarray(BYTES).resize((64, 64)), "JPEG", progressive=True, comment=b"\xff\xda" * 30_000)
    assert _scans(photo) == 10  # those in the comment are none
    baseline = saved(Image.fromarray(BYTES), "JPEG").getvalue()
    assert _scans(io.BytesIO(baseline + baseline)) == 1  # the next picture's do not count

    def decodes(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decodes)
    for side, scans, progressive in ((1000, 1001, True), (3000, 112, True), (7000, 21, False), (100, 100_001, False)):
        data = scanned(side, scans, progressive)
        with pytest.raises(DataError, match=f"{scans:,} scans over"):
            read_image(io.BytesIO(data), (8, 8), 1)


def test_what_would_take_long_or_much_for_its_size_is_refused_before_it_is_decoded(monkeypatch):
    def decodes(self):
        raise AssertionError("decoded")

    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: 30_000, 323: 30_000, 324: 200, 325: 8}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiles = (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)).ljust(208, b"\0")
    lines = b"\1\0\0\0" * 1000 + b"\0\1"  # a pixel, then the line's end: Pillow fills it in Python
    header = struct.pack("<IiiHHIIiiII", 40, 6000, 1000, 1, 8, 1, len(lines), 0, 0, 256, 256)
    bitmap = b"BM" + struct.pack("<IHHI", 1078 + len(lines), 0, 0, 1078) + header + bytes(1024) + lines
    webp = saved(Image.new("RGB", (5001, 5000)), "WEBP", lossless=True, method=0).getvalue()
    monkeypatch.setattr(ImageFile.ImageFile, "load", decodes)
    for data, message in (
        (tiles, "tiles of 30000 × 30000 for 256 pixels"),
        (bitmap, "run-length encoded BMP of 6,000,000 pixels"),
        (webp, "more than 25 megapixels of WebP"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            read_image(io.BytesIO(data), (8, 8), 1)
        assert caught.value.remedy


def test_a_file_larger_than_a_picture_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "x.webp", "wb") as file:
        file.write(b"RIFF\0\0\0\0WEBPVP8 ")
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="1,099,511,627,776 bytes are more than a picture takes"):
        read_image(tmp_path / "x.webp", (8, 8), 3)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="where Linux counts a process's memory")
@pytest.mark.parametrize("kind", ["RGBA", "I;16", "P"])
def test_large_pictures_on_white_take_twice_their_own_memory_at_most(kind, tmp_path):
    side = 4000
    image = Image.new(kind, (side, side), (90, 80, 70, 0) if kind == "RGBA" else 0)
    image.save(tmp_path / "large.png", compress_level=1, **({"transparency": 0} if kind == "P" else {}))
    code = """
import sys
from minivit.data import read_image
peaks = []
for path in sys.argv[1:]:
    shown = read_image(path, (8, 8), 3)
    status = dict(line.split(":") for line in open("/proc/self/status"))
    peaks.append(int(status["VmHWM"].split()[0]))  # ru_maxrss counts the process that this one came from
assert shown.min() == shown.max() == (0 if "I;16" in sys.argv[2] else 255)
print(peaks[1] - peaks[0])
"""
    saved_small = tmp_path / f"{kind}-small.png"
    Image.new("RGBA", (8, 8)).save(saved_small)
    path = (tmp_path / "large.png").rename(tmp_path / f"{kind}.png")
    done = subprocess.run([sys.executable, "-c", code, str(saved_small), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 9.5 * side**2  # four bytes a pixel, read and on white


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()])
def test_only_regular_files_are_read(tmp_path, make):
    make(tmp_path / "x.png")
    code = """
import sys
from minivit.data import read_image
from minivit.data.images import is_image
print(is_image(sys.argv[1]))
read_image(sys.argv[1], (8, 8), 1)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"
    assert "DataError" in done.stderr
    assert "x.png: cannot be read: not a regular file" in done.stderr


def test_what_is_an_image(tmp_path):
    for name, content, expected in [
        ("a", saved(Image.fromarray(GREY)).getvalue(), True),
        ("b", saved(Image.fromarray(GREY)).getvalue()[:70], True),  # an image, though damaged
        ("c", png_claiming(2**15, 2**15).getvalue(), True),
        ("d", b"some text", False),
        ("e", b"", False),
        ("f", saved(Image.fromarray(GREY), "TGA").getvalue(), False),
    ]:
        (tmp_path / name).write_bytes(content)
        assert is_image(tmp_path / name) == expected, name


def test_threads_leave_the_warnings_filters_as_they_were():
    exif = Image.Exif()
    exif[0x0112] = 3
    data = saved(Image.fromarray(BYTES), "JPEG", exif=exif).getvalue().replace(b"II*\0", b"II*\1")
    before, wrong = list(warnings.filters), []

    def work():
        for _ in range(50):
            try:
                decode(io.BytesIO(data), 3)
            except DataError as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
    assert not wrong


# ---- real odd files --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="MINIVIT_IMAGE_FIXTURES names no folder of odd image files")
@pytest.mark.filterwarnings("ignore:.*more than one picture:UserWarning")
def test_odd_files_give_the_right_picture_or_a_typed_error():
    with open(FIXTURES / "MANIFEST.tsv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    refused = set()
    for row in rows:
        width, height = map(int, (row["size"] or "8x8").split("x"))
        orientation = int(row["orientation"]) if row["orientation"].isdecimal() else 1
        size = (width, height) if orientation > 4 else (height, width)
        try:
            picture = read_image(FIXTURES / row["file"], size, 3)
        except DataError as error:
            assert row["file"] in str(error)
            refused.add(row["file"])
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, in the reference
            assert_shows(reference((FIXTURES / row["file"]).read_bytes()), picture, orientation)
    assert len(rows) == 60
    assert refused == {row["file"] for row in rows if row["load"] != "ok"} | {"broken_data_stream.png"}
    deep = read_image(FIXTURES / "hopper_16bit.pgm", (128, 128), 1).astype(int)
    assert np.abs(deep - read_image(FIXTURES / "hopper_8bit.pgm", (128, 128), 1)).max() <= 1


@pytest.mark.parametrize(
    ("brand", "said"), [(b"heic", "HEIC"), (b"mif1", "HEIC"), (b"avif", "AVIF"), (b"isom", "not an")]
)
def test_a_phones_photo_is_called_by_its_format(tmp_path, brand, said):
    path = tmp_path / "IMG_1.HEIC"
    path.write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
    for source in (path, io.BytesIO(path.read_bytes())):
        with pytest.raises(DataError, match=said):
            read_image(source, (8, 8), 3)
