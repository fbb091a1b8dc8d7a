"""Images from anywhere, as a trained model takes them, and what it says they are."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minivit import ops
from minivit.data import read_image, standardize
from minivit.data.dataset import class_names
from minivit.data.images import MAX_BYTES
from minivit.data.listing import is_image_file, visible_files
from minivit.data.npz import channels_first
from minivit.data.reading import read_npy, read_npz, reading
from minivit.errors import DataError, MinivitError, printable
from minivit.files import open_regular
from minivit.runs.trained import Trained
from minivit.show.text import plural
from minivit.train.inference import predict_logits

RUNNERS_UP = 2

AT_ONCE = 512
"""Images held in memory before they are classified."""

DARK, BRIGHT = 0.35, 0.55
"""Means, of 0 to 1, up to which training images are dark, and from which an image is not: :func:`looks_inverted`."""


def answer_all(
    sources: Sequence[str], trained: Trained, invert: bool, tell: Callable[[str], object]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each image of the ``sources``, and the names of those that look like negatives.

    A row has the image's name as ``file``, and what :func:`classify` says, or the ``error`` that it cannot be read.
    ``invert`` turns dark into light before. ``tell`` is called as by :func:`read_all`.
    """
    rows: list[dict[str, Any]] = []
    waiting: list[tuple[dict[str, Any], np.ndarray]] = []
    inverted: list[str] = []

    def answer() -> None:
        for (row, _), said in zip(waiting, classify(trained, [image for _, image in waiting]), strict=True):
            row |= said
        waiting.clear()

    for name, image in read_all(sources, trained, tell):
        rows.append({"file": name})
        if isinstance(image, str):
            rows[-1]["error"] = image
            continue
        if invert:
            image = negative(image)
        if seems_negative(image, trained):
            inverted.append(name)
        waiting.append((rows[-1], image))
        if len(waiting) == AT_ONCE:
            answer()
    answer()
    return rows, inverted


def classify(trained: Trained, images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """Return what each of the ``images``, uint8 (C, H, W), is: class, probability, and the runners-up.

    Or the ``error`` that there is no finite answer.
    """
    if not images:
        return []
    pixels = standardize(np.stack(images), trained.mean, trained.std)  # (N, C, H, W)
    logits = predict_logits(trained.model, pixels)  # (N, K)
    classes = class_names(trained.classes, logits.shape[1])
    bad = {"error": "the model gives NaN or infinity → train it again with a lower learning rate"}
    return [_answer(ops.softmax(own), classes) if np.isfinite(own).all() else dict(bad) for own in logits]


def _answer(probabilities: np.ndarray, classes: list[str]) -> dict[str, Any]:
    first, *others = probabilities.argsort()[::-1][: 1 + RUNNERS_UP].tolist()
    return {
        "class": classes[first],
        "probability": round(float(probabilities[first]), 6),
        "runners_up": [{"class": classes[i], "probability": round(float(probabilities[i]), 6)} for i in others],
    }


# ---- images in -------------------------------------------------------------------------------------------------------


def read_all(
    sources: Sequence[str], trained: Trained, tell: Callable[[str], object]
) -> Iterator[tuple[str, np.ndarray | str]]:
    """Yield (name, image uint8 (C, H, W)) for each image of each source; or, where it cannot be read, the reason.

    A source is an image file, a folder of them, an .npy or .npz file, or "-", for standard input. ``tell`` is called
    with a line about what was passed over.
    """
    for source in sources:
        try:
            if os.path.isdir(source):  # which, unlike Path's, raises nothing for a name that is too long, and knows ""
                yield from read_all(files_in(source, tell), trained, tell)
            else:
                yield from read(source, trained.image_shape, trained.preparation.fit)
        except MinivitError as error:  # the others may be sound
            yield source, f"{error.what.removeprefix(f'{source}: ')} → {error.remedy}"


def files_in(folder: str, tell: Callable[[str], object]) -> list[str]:
    """Return the image files in a folder and below it; tell how many others are there. Raises DataError for none."""
    with reading(folder, "check its permissions"):
        files = visible_files(Path(folder))
        images = [str(file) for file in files if is_image_file(file)]
    if not images:
        raise DataError(f"{folder}: no image files", "give a folder that has some")
    if others := len(files) - len(images):
        tell(printable(f"skipped     {plural(others, 'file')} in {folder}: no images"))
    return images


def read(source: str, shape: tuple[int, int, int], fit: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, image uint8) for each image of a file, each of the ``shape`` (C, H, W) that the model takes.

    Raises DataError, before the first, if the file is bad.
    """
    channels, height, width = shape
    size = height, width
    if source == "-":
        yield "-", read_image(io.BytesIO(sys.stdin.buffer.read(MAX_BYTES + 1)), size, channels, fit)
    elif Path(source).suffix.lower() in (".npy", ".npz"):
        for i, image in enumerate(read_arrays(Path(source), shape)):
            yield f"{source}[{i}]", image
    else:
        yield source, read_image(source, size, channels, fit)


def read_arrays(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the images of a NumPy file as uint8 (N, C, H, W); ``shape`` is the (C, H, W) that the model takes.

    An .npy file holds one array; in an .npz the array is called ``images``, ``test_images`` or is the only one. It may
    be (N, C, H, W), (N, H, W, C) or, for one channel, (N, H, W) or (H, W).
    """

    def choose(names: Collection[str]) -> dict[str, str]:
        known = [n for n in ("images", "test_images") if n in names]
        if not known and len(names) != 1:
            few = ", ".join([*names][:5]) + (f" and {len(names) - 5} others" if len(names) > 5 else "") or "none"
            raise DataError(f"{path} has no array 'images', but {few}", "save it as images=…")
        return {"images": [*known, *names][0]}

    if path.suffix.lower() == ".npz":
        found = read_npz(path, choose)["images"]
    else:
        with reading(str(path), "save it with np.save"), open_regular(path) as f:
            found = read_npy(f, os.fstat(f.fileno()).st_size)
    channels = shape[0]
    images = found[None] if found.ndim == 2 else found  # (H, W) → (1, H, W)
    images = channels_first(images, path, (channels,))
    if len(images) == 0:
        raise DataError(f"{path} holds no images: {found.dtype} {found.shape}", "give at least one")
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise DataError(
            f"{path} holds {found.dtype} {found.shape}; the model takes {' × '.join(map(str, shape))} images",
            f"save np.uint8 images, 0 to 255, of shape (N, {', '.join(map(str, shape))})",
        )
    return images


# ---- black on white --------------------------------------------------------------------------------------------------


def negative(image: np.ndarray) -> np.ndarray:
    """Return the negative of an image uint8 (C, H, W); a fourth channel is transparency, and stays."""
    turned = 255 - image
    turned[3:] = image[3:]
    return turned


def seems_negative(image: np.ndarray, trained: Trained) -> bool:
    """Return whether an image (C, H, W) looks like a negative of those that a model learned from.

    Of weights from elsewhere nobody knows: the mean that they are prepared with is not their images' own.
    """
    return not trained.from_elsewhere and looks_inverted(image, trained.mean)


def looks_inverted(image: np.ndarray, mean: Sequence[float]) -> bool:
    """Tell whether the model most likely learned from negatives of images like this one, uint8 (C, H, W).

    So it is where the training images are mostly dark, with a ``mean`` of a third at most (photos have about a half),
    and this one is bright: all of it, and its border, which strokes leave free. Or the other way round.
    """
    colours = image[:3] / np.float32(255)  # (C, H, W)
    border = np.concatenate([colours[:, [0, -1]].ravel(), colours[:, 1:-1, [0, -1]].ravel()])
    learned, here, around = float(np.mean(mean[:3])), float(colours.mean()), float(border.mean())
    if learned > 0.5:
        learned, here, around = 1 - learned, 1 - here, 1 - around
    return learned <= DARK and here >= BRIGHT and around >= BRIGHT
