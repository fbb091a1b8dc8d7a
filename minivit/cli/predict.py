"""``minivit predict``: the class of each image, how sure the model is, and what else it could have been."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivit.cli.main import BAD_INPUTS, OK, one_of

if TYPE_CHECKING:
    import numpy as np

    from minivit.models.vit import ViT

RUNNERS_UP = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint, such as runs/digits-1/checkpoints/last.npz")
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+",
        help="image file, .npy or .npz of images as bytes, or - for an image on standard input; digits are expected "
        "as light strokes on black",
    )  # fmt: skip
    parser.add_argument("--format", type=one_of("format", ("table", "json", "csv")), default="table",
                        help="table (default), json or csv")  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")


def run(args: argparse.Namespace) -> int:
    """Print a row for each image; 3 if some could not be read."""
    import numpy as np

    from minivit import ops
    from minivit.backend import auto_device
    from minivit.data import standardize
    from minivit.data.datasets import class_names
    from minivit.errors import MinivitError
    from minivit.train.step import predict_logits
    from minivit.train.weights import read_model

    model, meta = read_model(args.checkpoint)
    model.to(auto_device(args.device)[0])
    recorded = meta.get("data", {})
    rows: list[dict[str, Any]] = []
    good: list[np.ndarray] = []
    for source in args.images:
        try:
            for name, image in read(source, model, recorded.get("fit", "stretch")):
                rows.append({"file": name})
                good.append(image)
        except MinivitError as error:  # the others may be sound
            rows.append({"file": source, "error": f"{error.what.removeprefix(f'{source}: ')} → {error.remedy}"})
    if good:
        images = standardize(np.stack(good), recorded.get("mean", [0.0]), recorded.get("std", [1.0]))  # (N, C, H, W)
        probabilities = ops.softmax(predict_logits(model, images))  # (N, K)
        classes = class_names(recorded.get("classes") or (), probabilities.shape[1])
        answers = iter(probabilities)
        for row in rows:
            if "error" not in row:
                row |= _answer(next(answers), classes)
    {"table": _print_table, "json": _print_json, "csv": _print_csv}[args.format](rows)
    return BAD_INPUTS if any("error" in row for row in rows) else OK


# ---- images in -------------------------------------------------------------------------------------------------------


def read(source: str, model: ViT, fit: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, image uint8 (C, H, W)) for each image of a file; raise DataError, before the first, if it is bad."""
    import io

    from minivit.data import read_image
    from minivit.data.images import MAX_BYTES

    size, channels = model.patch_embed.image_size, model.patch_embed.in_channels
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
    from minivit.data.files import open_regular
    from minivit.errors import DataError

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


# ---- answers out -----------------------------------------------------------------------------------------------------


def _answer(probabilities: np.ndarray, classes: list[str]) -> dict[str, Any]:
    first, *others = probabilities.argsort()[::-1][: 1 + RUNNERS_UP].tolist()
    return {
        "class": classes[first],
        "probability": round(float(probabilities[first]), 6),
        "runners_up": [{"class": classes[i], "probability": round(float(probabilities[i]), 6)} for i in others],
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    from minivit.cli.report import text_table

    cells = []
    for row in rows:
        others = ", ".join(f"{other['class']} {other['probability']:.1%}" for other in row.get("runners_up", []))
        answer = [row.get("class", "–"), f"{row['probability']:.1%}" if "class" in row else "–"]
        cells.append([row["file"], *answer, others or row.get("error", "")])
    print(text_table(["file", "class", "probability", "runners-up"], cells, right=[2]))


def _print_json(rows: list[dict[str, Any]]) -> None:
    import json

    print(json.dumps(rows, indent=1, ensure_ascii=False))


def _print_csv(rows: list[dict[str, Any]]) -> None:
    import csv

    others = [f"{word}_{n}" for n in range(2, RUNNERS_UP + 2) for word in ("class", "probability")]
    writer = csv.DictWriter(sys.stdout, ["file", "class", "probability", *others, "error"], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        flat = {key: value for key, value in row.items() if key != "runners_up"}
        for n, other in enumerate(row.get("runners_up", []), start=2):
            flat |= {f"class_{n}": other["class"], f"probability_{n}": other["probability"]}
        writer.writerow(flat)
