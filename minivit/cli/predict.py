"""``minivit predict``: the class of each image, how sure the model is, and what else it could have been."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivit.cli.main import BAD_INPUTS, OK, one_of

if TYPE_CHECKING:
    import numpy as np

    from minivit.models import Model
    from minivit.runs.trained import Trained

RUNNERS_UP = 2
LISTED = 8
"""So many files are named in a warning."""

DARK, BRIGHT = 0.35, 0.55
"""Means, of 0 to 1, up to which training images are dark, and from which an image is not: :func:`looks_inverted`."""

AT_ONCE = 512
"""Images held in memory before they are classified."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "checkpoint", metavar="CKPT|RUN",
        help="checkpoint, or a run's folder, such as runs/digits-1: its best checkpoint if there is one, else the last",
    )  # fmt: skip
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+",
        help="image file, folder of them, .npy or .npz of images as bytes, or - for an image on standard input",
    )  # fmt: skip
    parser.add_argument("--invert", action="store_true",
                        help="turn dark into light: for black on white, where it learned white on black")  # fmt: skip
    parser.add_argument("--format", type=one_of("format", ("table", "json", "csv")), default="table",
                        help="table (default), json or csv")  # fmt: skip
    parser.add_argument("--json", action="store_const", const="json", dest="format", help="print JSON: --format json")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")


def run(args: argparse.Namespace) -> int:
    """Print a row for each image; 3 if some could not be read."""
    from minivit.backend import auto_device, keep_freed_memory
    from minivit.errors import printable
    from minivit.runs.trained import open_trained

    keep_freed_memory()
    trained = open_trained(args.checkpoint)
    if trained.path != args.checkpoint:
        print(printable(f"checkpoint  {trained.path}"), file=sys.stderr)
    trained.model.to(auto_device(args.device)[0])
    rows: list[dict[str, Any]] = []
    waiting: list[tuple[dict[str, Any], np.ndarray]] = []
    inverted: list[str] = []
    for name, image in read_all(args.images, trained):
        rows.append({"file": name})
        if isinstance(image, str):
            rows[-1]["error"] = image
            continue
        if args.invert:
            image = negative(image)
        if looks_inverted(image, trained.mean):
            inverted.append(name)
        waiting.append((rows[-1], image))
        if len(waiting) == AT_ONCE:
            classify(trained, waiting)
            waiting.clear()
    classify(trained, waiting)
    if inverted:
        warnings.warn(_inverted_text(inverted, len(rows), args.invert), stacklevel=2)
    {"table": _print_table, "json": _print_json, "csv": _print_csv}[args.format](rows)
    return BAD_INPUTS if any("error" in row for row in rows) else OK


def classify(trained: Trained, waiting: list[tuple[dict[str, Any], np.ndarray]]) -> None:
    """Add to the row of each image, uint8 (C, H, W), what it is, or the error that it has no finite answer."""
    import numpy as np

    from minivit import ops
    from minivit.data import standardize
    from minivit.data.datasets import class_names
    from minivit.train.step import predict_logits

    if not waiting:
        return
    images = standardize(np.stack([image for _, image in waiting]), trained.mean, trained.std)  # (N, C, H, W)
    logits = predict_logits(trained.model, images)  # (N, K)
    classes = class_names(trained.classes, logits.shape[1])
    for (row, _), own in zip(waiting, logits, strict=True):
        if np.isfinite(own).all():
            row |= _answer(ops.softmax(own), classes)
        else:
            row["error"] = "the model gives NaN or infinity → train it again with a lower learning rate"


# ---- images in -------------------------------------------------------------------------------------------------------


def read_all(sources: Sequence[str], trained: Trained) -> Iterator[tuple[str, np.ndarray | str]]:
    """Yield (name, image uint8 (C, H, W)) for each image of each source; or, where it cannot be read, the reason."""
    import os

    from minivit.errors import MinivitError

    for source in sources:
        try:
            if os.path.isdir(source):  # which, unlike Path's, raises nothing for a name that is too long, and knows ""
                yield from read_all(files_in(source), trained)
            else:
                yield from read(source, trained.model, trained.data.get("fit", "stretch"))
        except MinivitError as error:  # the others may be sound
            yield source, f"{error.what.removeprefix(f'{source}: ')} → {error.remedy}"


def files_in(folder: str) -> list[str]:
    """Return the image files in a folder and below it; say how many others are there. Raises DataError for none."""
    from minivit.data.datasets import reading
    from minivit.data.folder import is_image_file, visible_files
    from minivit.errors import DataError, printable
    from minivit.show.text import plural

    with reading(folder, "check its permissions"):
        files = visible_files(Path(folder))
        images = [str(file) for file in files if is_image_file(file)]
    if not images:
        raise DataError(f"{folder}: no image files", "give a folder that has some")
    if others := len(files) - len(images):
        print(printable(f"skipped     {plural(others, 'file')} in {folder}: no images"), file=sys.stderr)
    return images


def read(source: str, model: Model, fit: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, image uint8 (C, H, W)) for each image of a file; raise DataError, before the first, if it is bad."""
    import io

    from minivit.data import read_image
    from minivit.data.images import MAX_BYTES

    channels, *size = model.settings.image_shape
    if source == "-":
        yield "-", read_image(io.BytesIO(sys.stdin.buffer.read(MAX_BYTES + 1)), size, channels, fit)
    elif Path(source).suffix.lower() in (".npy", ".npz"):
        for i, image in enumerate(read_arrays(Path(source), (channels, *size))):
            yield f"{source}[{i}]", image
    else:
        yield source, read_image(source, size, channels, fit)


def read_arrays(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Return the images of a NumPy file as uint8 (N, C, H, W); ``shape`` is the (C, H, W) that the model takes.

    An .npy file holds one array; in an .npz the array is called ``images``, ``test_images`` or is the only one. It may
    be (N, C, H, W), (N, H, W, C) or, for one channel, (N, H, W) or (H, W).
    """
    import os

    import numpy as np

    from minivit.data.datasets import channels_first, read_npy, read_npz, reading
    from minivit.errors import DataError
    from minivit.files import open_regular

    def choose(names: Collection[str]) -> dict[str, str]:
        known = [n for n in ("images", "test_images") if n in names]
        if not known and len(names) != 1:
            raise DataError(f"{path} has no array 'images', but {', '.join(names) or 'none'}", "save it as images=…")
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


def looks_inverted(image: np.ndarray, mean: Sequence[float]) -> bool:
    """Tell whether the model most likely learned from negatives of images like this one, uint8 (C, H, W).

    So it is where the training images are mostly dark, with a ``mean`` of a third at most (photos have about a half),
    and this one is bright: all of it, and its border, which strokes leave free. Or the other way round.
    """
    import numpy as np

    colours = image[:3] / np.float32(255)  # (C, H, W)
    border = np.concatenate([colours[:, [0, -1]].ravel(), colours[:, 1:-1, [0, -1]].ravel()])
    learned, here, around = float(np.mean(mean[:3])), float(colours.mean()), float(border.mean())
    if learned > 0.5:
        learned, here, around = 1 - learned, 1 - here, 1 - around
    return learned <= DARK and here >= BRIGHT and around >= BRIGHT


def _inverted_text(names: Sequence[str], count: int, turned: bool) -> str:
    from minivit.errors import printable
    from minivit.show.text import plural

    some = ", ".join(map(printable, names[:LISTED])) + (
        f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    )
    alike = "looks like a negative" if len(names) == 1 else "look like negatives"
    remedy = "leave --invert out" if turned else "add --invert"
    return (
        f"{len(names):,} of {plural(count, 'image')} {alike} of what the model learned from, such as "
        f"black on white instead of white on black: {some}; the classes are then wrong: {remedy}"
    )


# ---- answers out -----------------------------------------------------------------------------------------------------


def _answer(probabilities: np.ndarray, classes: list[str]) -> dict[str, Any]:
    first, *others = probabilities.argsort()[::-1][: 1 + RUNNERS_UP].tolist()
    return {
        "class": classes[first],
        "probability": round(float(probabilities[first]), 6),
        "runners_up": [{"class": classes[i], "probability": round(float(probabilities[i]), 6)} for i in others],
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    from minivit.show.text import text_table

    cells = []
    for row in rows:
        others = ", ".join(f"{other['class']} {other['probability']:.1%}" for other in row.get("runners_up", []))
        answer = [row.get("class", "–"), f"{row['probability']:.1%}" if "class" in row else "–"]
        cells.append([row["file"], *answer, others or row.get("error", "")])
    print(text_table(["file", "class", "probability", "runners-up"], cells, right=[2]))


def _print_json(rows: list[dict[str, Any]]) -> None:
    from minivit.show.text import json_text

    print(json_text(rows))


def _print_csv(rows: list[dict[str, Any]]) -> None:
    import csv

    from minivit.errors import printable

    others = [f"{word}_{n}" for n in range(2, RUNNERS_UP + 2) for word in ("class", "probability")]
    writer = csv.DictWriter(sys.stdout, ["file", "class", "probability", *others, "error"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {key: value for key, value in row.items() if key != "runners_up"}
        for n, other in enumerate(row.get("runners_up", []), start=2):
            flat |= {f"class_{n}": other["class"], f"probability_{n}": other["probability"]}
        writer.writerow({key: printable(str(value)) for key, value in flat.items()})
