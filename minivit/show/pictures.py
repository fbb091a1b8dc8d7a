"""Pictures, as PNG files: what a model is given, and where it looks. Arrays in; no model is known here."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minivit.errors import ShapeError
from minivit.files import replacing
from minivit.show.colours import heat
from minivit.show.lettering import drawable_names, lettered, write

if TYPE_CHECKING:
    from PIL import Image

Colour = tuple[int, int, int]
PAPER, INK, FAINT, RED, BLUE = (255, 255, 255), (31, 35, 40), (110, 118, 129), (207, 34, 46), (9, 105, 218)

TILE = 80  # pixels: about how large an image is shown
GAP, MARGIN = 12, 20
TITLE_SIZE, TEXT_SIZE = 20, 14
LINE = TEXT_SIZE + 4
MOST_NAMED = 20  # classes of a confusion matrix whose names and counts can be read


def mosaic(
    images: np.ndarray,
    labels: Sequence[object],
    path: str | PathLike[str],
    columns: int = 10,
    scale: int | None = None,
    title: str = "Samples",
) -> None:
    """Write a grid of ``images``, uint8 (N, C, H, W) with C 1 or 3, each with its label under it.

    A pixel becomes ``scale`` × ``scale`` pixels, by default as many as make an image about 80 pixels wide.
    """
    _check(images, labels=labels)
    tiles = [enlarged(image, scale) for image in images]
    _write_sheet(path, title, tiles, [[(str(label), INK)] for label in labels], columns)


def attention_overlay(
    images: np.ndarray,
    attention: np.ndarray,
    labels: Sequence[object],
    predictions: Sequence[object],
    path: str | PathLike[str],
    columns: int = 10,
    title: str = "Where the class token looks",
) -> None:
    """Write ``images``, uint8 (N, C, H, W) with C 1 or 3, each above itself under a heat map of its ``attention``.

    ``attention`` (N, grid_h, grid_w) is what the class token gives to each patch, at least 0. Each map is drawn from 0
    to its own largest value. Under it stand label and prediction, marked in red where they differ.
    """
    from PIL import Image

    _check(images, attention=attention, labels=labels, predictions=predictions)
    tiles = []
    for image, weights in zip(images, attention, strict=True):
        plain = enlarged(image)
        tile = Image.new("RGB", (plain.width, 2 * plain.height + 3), PAPER)
        tile.paste(plain, (0, 0))
        tile.paste(under_heat(plain, weights), (0, plain.height + 3))
        tiles.append(tile)
    captions, note = _verdicts(labels, predictions)
    _write_sheet(path, title, tiles, captions, columns, note, legend=True)


def predictions_picture(
    images: np.ndarray,
    labels: Sequence[object],
    predictions: Sequence[object],
    path: str | PathLike[str],
    columns: int = 10,
    title: str = "Predictions",
) -> None:
    """Write ``images``, uint8 (N, C, H, W) with C 1 or 3, with label and prediction, in red where they differ."""
    _check(images, labels=labels, predictions=predictions)
    captions, note = _verdicts(labels, predictions)
    _write_sheet(path, title, [enlarged(image) for image in images], captions, columns, note)


def _verdicts(labels: Sequence[object], predictions: Sequence[object]) -> tuple[list[list[tuple[str, Colour]]], str]:
    """Return the lines under each image, and what they come to."""
    pairs = list(zip(labels, predictions, strict=True))
    right = sum(label == prediction for label, prediction in pairs)
    captions = [[(str(a), INK), (str(b), FAINT if a == b else RED)] for a, b in pairs]
    return captions, f"label above, prediction below: {right} of {len(pairs)} right"


def confusion_picture(
    confusion: np.ndarray, classes: Sequence[str], path: str | PathLike[str], title: str = "Confusion"
) -> None:
    """Write the matrix ``confusion`` (K, K) of counts, labels by row and predictions by column, as a heat map.

    A cell's colour is its share of its row, by its square root, so that rare mistakes show: blue where right, red where
    wrong. Up to 20 classes have their names and counts; more are numbered along the edges.
    """
    from PIL import Image, ImageDraw

    count = len(confusion)
    if confusion.shape != (count, count) or len(classes) != count or count == 0:
        what = f"a confusion matrix of shape {confusion.shape} for {len(classes)} classes"
        raise ShapeError(what, "give counts (K, K) and K names")
    named = count <= MOST_NAMED
    cell = 44 if named else max(1, 800 // count)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)  # (K, K)
    most = np.where(np.eye(count, dtype=bool)[:, :, None], BLUE, RED)  # (K, K, 3)
    depth = 0.75 * np.sqrt(shares)[:, :, None]  # (K, K, 1): dark ink stays readable on it
    cells = (np.array(PAPER) * (1 - depth) + most * depth).round().astype(np.uint8)
    heat_map = Image.fromarray(cells).resize((cell * count, cell * count), Image.Resampling.NEAREST)

    names = dict(enumerate(drawable_names(classes))) if named else _every(count)
    shown = {i: lettered(name, TEXT_SIZE, 140) for i, name in names.items()}
    room = int(max(font.getlength(text) for text, font in shown.values())) + 10  # for names, beside and above
    left, top = MARGIN + room, MARGIN + TITLE_SIZE + 16 + LINE + 6 + room
    sheet = Image.new("RGB", (max(left + heat_map.width + MARGIN, 420), top + heat_map.height + MARGIN), PAPER)
    sheet.paste(heat_map, (left, top))
    draw = ImageDraw.Draw(sheet)
    write(draw, (MARGIN, MARGIN), title, INK, TITLE_SIZE)
    note = f"label by row, prediction by column: {np.trace(confusion):,} of {confusion.sum():,} right"
    write(draw, (MARGIN, MARGIN + TITLE_SIZE + 10), note, FAINT, TEXT_SIZE)
    for i, (text, font) in shown.items():
        middle = cell * i + cell // 2
        draw.text((left - 8, top + middle), text, INK, font, anchor="rm")
        upright = Image.new("L", (room, LINE), 0)
        ImageDraw.Draw(upright).text((0, LINE // 2), text, 255, font, anchor="lm")
        mask = upright.rotate(90, expand=True)  # reads upwards
        sheet.paste(INK, (left + middle - LINE // 2, top - 8 - room), mask)
    if named:
        for (i, j), n in np.ndenumerate(confusion):
            place = (left + cell * j + cell // 2, top + cell * i + cell // 2)
            write(draw, place, f"{n}" if n else "·", INK if n else FAINT, TEXT_SIZE, anchor="mm")
    draw.rectangle((left - 1, top - 1, left + heat_map.width, top + heat_map.height), outline=FAINT)
    with replacing(Path(path)) as f:
        sheet.save(f, "PNG", optimize=True)


def _every(count: int) -> dict[int, str]:
    """Return about ten of ``count`` numbers, evenly spaced, as text."""
    step = next(m * 10**e for e in range(9) for m in (1, 2, 5) if count <= 12 * m * 10**e)
    return {i: str(i) for i in range(0, count, step)}


def _check(images: np.ndarray, **others: Sequence[object] | np.ndarray) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        what = f"images to draw must be uint8 (N, C, H, W) with C 1 or 3, not {images.dtype} {images.shape}"
        raise ShapeError(what, "give bytes from 0 to 255, and at least one image")
    for name, values in others.items():
        if len(values) != len(images):
            raise ShapeError(f"{len(images)} images but {len(values)} {name}", "give one for each image")


# ---- an image --------------------------------------------------------------------------------------------------------


def enlarged(image: np.ndarray, scale: int | None = None) -> Image.Image:
    """Return an image (C, H, W) in RGB, every pixel a square of ``scale``, as sharp as the model gets it.

    Of more than three channels the first three are drawn, of two the first.
    """
    from PIL import Image

    channels, height, width = image.shape
    scale = scale or max(1, round(TILE / max(height, width)))
    pixels = np.broadcast_to(image[: 3 if channels >= 3 else 1].transpose(1, 2, 0), (height, width, 3))
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    return picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)


def under_heat(picture: Image.Image, weights: np.ndarray) -> Image.Image:
    """Return a picture under the heat map of ``weights`` (rows, columns), from 0 to the largest of them."""
    from PIL import Image

    grid = Image.fromarray(weights.astype(np.float32))
    smooth = np.asarray(grid.resize(picture.size, Image.Resampling.BICUBIC))  # (H, W)
    smooth = smooth.clip(0) / max(smooth.max(), np.finfo(np.float32).tiny)
    light = np.asarray(picture.convert("L"))[:, :, None] / 255.0  # (H, W, 1)
    mixed = heat(smooth) * (0.8 - 0.3 * light) + 255.0 * light * 0.5  # strokes stay light, their ground is coloured
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


# ---- the sheet -------------------------------------------------------------------------------------------------------


def _write_sheet(
    path: str | PathLike[str],
    title: str,
    tiles: list[Image.Image],
    captions: list[list[tuple[str, Colour]]],
    columns: int,
    note: str = "",
    legend: bool = False,
) -> None:
    """Write tiles of one size in a grid, each with its lines of text, under a title, a note and the heat's colours."""
    from PIL import Image, ImageDraw

    columns = max(1, min(columns, len(tiles)))
    rows = -(-len(tiles) // columns)
    tile_w, tile_h = tiles[0].size
    cell_w, cell_h = tile_w + GAP, tile_h + LINE * len(captions[0]) + GAP + 2
    top = MARGIN + TITLE_SIZE + 16 + (LINE + 6 if note or legend else 0)
    most, font = lettered("most", TEXT_SIZE)
    least, bar = "no attention", 120  # the legend's other end, and its width
    head = [_length(title, TITLE_SIZE), _length(note, TEXT_SIZE)]
    if legend:
        head[1] += 24 + int(font.getlength(least) + font.getlength(most)) + bar + 16
    width, height = max(columns * cell_w - GAP, *head) + 2 * MARGIN, top + rows * cell_h - GAP + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, (MARGIN, MARGIN), title, INK, TITLE_SIZE)
    write(draw, (MARGIN, MARGIN + TITLE_SIZE + 10), note, FAINT, TEXT_SIZE)
    if legend:
        x, y = width - MARGIN, MARGIN + TITLE_SIZE + 10
        draw.text((x, y), most, FAINT, font, anchor="ra")
        x -= int(font.getlength(most)) + 8 + bar
        sheet.paste(Image.fromarray(np.tile(heat(np.linspace(0, 1, bar)), (12, 1, 1))), (x, y + 3))
        draw.text((x - 8, y), least, FAINT, font, anchor="ra")
    for i, (tile, lines) in enumerate(zip(tiles, captions, strict=True)):
        x, y = MARGIN + i % columns * cell_w, top + i // columns * cell_h
        sheet.paste(tile, (x, y))
        if any(colour == RED for _, colour in lines):
            draw.rectangle((x - 3, y - 3, x + tile_w + 2, y + tile_h + 2), outline=RED, width=2)
        for n, (text, colour) in enumerate(lines):
            place = (x + tile_w / 2, y + tile_h + 4 + n * LINE)
            words, font = lettered(text, TEXT_SIZE, cell_w - 2)
            draw.text(place, words, colour, font, anchor="ma")
    with replacing(Path(path)) as f:
        sheet.save(f, "PNG", optimize=True)


def _length(text: str, size: int) -> int:
    """Return how many pixels wide a line is."""
    words, font = lettered(text, size)
    return int(font.getlength(words)) + 1
