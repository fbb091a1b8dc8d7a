"""``minivit eval``: loss, accuracy, accuracy of each class and confusions of a checkpoint on a data set."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivit.cli.main import one_of

WORST = 8
"""So many mistakes are listed."""

if TYPE_CHECKING:
    import numpy as np

    from minivit.cli.matching import Matching
    from minivit.data import Dataset
    from minivit.runs.trained import Trained


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = (
        "A class of the data is the model's class of the same name. Images of a class that the model does\n"
        "not know count as wrong."
    )
    parser.add_argument(
        "checkpoint", metavar="CKPT|RUN",
        help="checkpoint, or a run's folder, such as runs/digits-1: its best checkpoint if there is one, else the last",
    )  # fmt: skip
    parser.add_argument(
        "--data", "-d", help="data set: a name, folder or FILE.npz (by default the one it was trained on)"
    )
    parser.add_argument(
        "--split", type=one_of("split", ("train", "val", "test", "all")), default="test",
        help="test (default); train, without the images that the run held out; val, those; or all there are",
    )  # fmt: skip
    parser.add_argument(
        "--by-position", action="store_true", help="the n-th class of the data is the model's n-th, whatever its name"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from minivit.backend import auto_device, keep_freed_memory
    from minivit.cli.matching import match_classes
    from minivit.data import kind_of
    from minivit.data.folder import list_folder
    from minivit.errors import DataError, printable
    from minivit.runs.trained import open_trained
    from minivit.show.text import json_text

    keep_freed_memory()
    trained = open_trained(args.checkpoint)
    name = trained.data.get("name") if args.data is None else args.data
    if not isinstance(name, str):
        raise DataError(f"{trained.path} does not say what it was trained on", "name the data: --data NAME")
    parts = load_parts(trained, name, args.split)
    count = trained.model.config["num_classes"]
    matching = match_classes(trained.classes, parts[0].classes, count, name, args.by_position)
    trained.model.to(auto_device(args.device)[0])
    result = assess(trained, parts, matching, name)
    about = {"checkpoint": trained.path, "data": name, "split": args.split, "classes": matching.rows[:count]}
    if args.json:
        print(json_text(result | about | {"labels": matching.rows, "remark": matching.remark}))
    else:
        print(printable(f"{trained.path} on {parts[0].name}, {args.split}: {result['count']:,} images"))
        if args.data is not None and args.split != "all" and kind_of(name) == "folder":
            print(printable(f"splits: {list_folder(name).how}; --split all takes them together"))
        print(f"\n{report(result, matching)}")
    return 0


# ---- which images ----------------------------------------------------------------------------------------------------


def load_parts(trained: Trained, name: str, split: str) -> list[Dataset]:
    """Return the data sets that make up a split of ``name``, with images as the model takes them.

    Of the data that the model was trained on in a run, "train" and "val" are what the run trained on and held out.
    Raises DataError if there is no such split, or its images do not fit the model.
    """
    from minivit import data
    from minivit.data.datasets import LAYOUT
    from minivit.errors import DataError
    from minivit.show.text import plural

    takes, *size = trained.model.settings.image_shape

    recorded = trained.data.get("name")
    own = isinstance(recorded, str) and (name == recorded or Path(name).resolve() == Path(recorded))
    layout = LAYOUT
    if own and "train" in trained.meta:  # a run is tested as it was before; version 0.1.0 did not say how
        layout = trained.data.get("layout", 1)
    splits = data.datasets.splits_of(name, layout)

    def load(part: str) -> Dataset:
        return data.load(name, part, size, takes, trained.data.get("bad_images", "stop"), layout)

    if own and split in ("train", "val") and (held := run_split(trained, split)) is not None:
        parts = [held]
    elif split == "all":
        parts = [load(part) for part in splits]
    elif split == "val" and split not in splits:
        why = f"{trained.path} is in no run's folder" if own else f"{name} has no such split of its own"
        raise DataError(f"which images were held out to validate with is not known: {why}", "use another --split")
    elif split not in splits and splits:
        known = "val, the images that the run held out, or --split all" if own else "val" if "val" in splits else "all"
        raise DataError(f"{name} has no {split} images of its own", f"measure it on others: --split {known}")
    else:
        parts = [load(split)]
    if any(part.classes != parts[0].classes for part in parts):
        raise DataError(f"{name}: its splits have not the same classes", "evaluate on one of them")
    channels = parts[0].images.shape[1]
    if channels != takes:
        raise DataError(
            f"{name} has images of {plural(channels, 'channel')}, the model takes {takes}",
            "evaluate on data of the kind that it was trained on",
        )
    return parts


def run_split(trained: Trained, split: str) -> Dataset | None:
    """Return the images that the run of a checkpoint trained on or held out, or None if it is in no run's folder."""
    from minivit.errors import DataError
    from minivit.runs.job import Job, settings_of_run
    from minivit.runs.trained import run_of

    if (folder := run_of(trained.path)) is None:
        return None
    job = Job(settings_of_run(folder, trained.meta, {"train.device": "cpu"}), quiet=True, resumed=True)
    now = job.data_meta()
    if changed := [k for k in trained.data if k in now and k != "name" and now[k] != trained.data[k]]:
        what = f"{now['name']} is not as it was when {folder} was trained: other {', '.join(changed)}"
        raise DataError(what, "bring the data back, or name data and another split: --data NAME --split test")
    found = job.train_data if split == "train" else job.valid_data
    if found is None:
        remedy = "evaluate on test images, or train again with --val-fraction 0.1"
        raise DataError(f"the run {folder} held no images out to validate with", remedy)
    return found


# ---- measuring -------------------------------------------------------------------------------------------------------


def assess(trained: Trained, parts: list[Dataset], matching: Matching, name: str) -> dict[str, Any]:
    """Return what :func:`minivit.show.text.measure` finds, and how it treats the classes.

    ``matched`` are the accuracy, interval and count of the images whose class the model knows, ``unknown`` the number
    of images of each other class, ``absent`` the model's classes that no image is of. Raises NonFiniteError if logits
    are not finite, DataError if the model knows the class of no image.
    """
    import numpy as np

    from minivit.errors import DataError
    from minivit.measure.metrics import classification_metrics, wilson_interval

    count = trained.model.config["num_classes"]
    logits = np.concatenate([_logits(trained, part, name) for part in parts])  # (N, K)
    files = [file for part in parts for file in part.files]
    labels = np.concatenate([matching.places[part.labels] for part in parts])  # (N,)
    known = labels < count
    if not known.any():
        raise DataError(f"the model knows the class of none of the images of {name}", "use another --split or --data")
    result = classification_metrics(logits, labels, len(matching.unknown))
    right, images = result["right"], int(known.sum())
    totals = result["confusion"].sum(axis=1).tolist()
    matched = {"accuracy": right / images, "interval": wilson_interval(right, images), "count": images}
    return result | {
        "matched": matched,
        "unknown": dict(zip(matching.unknown, totals[count:], strict=True)),
        "absent": [row for row, total in zip(matching.rows[:count], totals, strict=False) if not total],
        "worst": worst_mistakes(logits, labels, files, matching.rows) if files else [],
    }


def worst_mistakes(
    logits: np.ndarray, labels: np.ndarray, files: Sequence[str], names: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the :data:`WORST` wrongly read images of the highest loss, worst first: their labels may be wrong.

    ``logits`` (N, K); ``labels`` (N,), of which those from K on, of classes that the model does not know, are passed
    over; ``files`` are N paths, ``names`` those of the classes.
    """
    import numpy as np

    from minivit import ops

    log_p, predicted = np.asarray(ops.log_softmax(logits)), logits.argmax(axis=1)  # (N, K), (N,)
    wrong = np.flatnonzero((predicted != labels) & (labels < logits.shape[1]))
    wrong = wrong[np.argsort(log_p[wrong, labels[wrong]], kind="stable")[:WORST]]
    return [
        {
            "file": files[i],
            "label": names[labels[i]],
            "class": names[predicted[i]],
            "probability": round(float(np.exp(log_p[i, predicted[i]])), 6),
        }
        for i in wrong.tolist()
    ]


def _logits(trained: Trained, dataset: Dataset, name: str) -> np.ndarray:
    import numpy as np

    from minivit import data
    from minivit.backend import Key
    from minivit.errors import NonFiniteError
    from minivit.train.step import first_non_finite, predict_logits

    loader = data.Loader(dataset, 512, Key(0), mean=trained.mean, std=trained.std, shuffle=False)
    found: list[np.ndarray] = []
    for images, _ in loader.batches(0):
        logits = predict_logits(trained.model, images)
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            place = first_non_finite(trained.model, images[bad[:1]], Key(0)) or "the logits"
            first = sum(len(one) for one in found) + int(bad[0])
            what = f"image {first} of {name} gives NaN or infinity, first in {place}"
            raise NonFiniteError(what, "its weights are too large: train again with a lower learning rate")
        found.append(logits)
    return np.concatenate(found)


# ---- the report ------------------------------------------------------------------------------------------------------


def report(result: dict[str, Any], matching: Matching) -> str:
    """Return the figures of :func:`assess` as text."""
    from minivit.errors import printable, shortened
    from minivit.show.text import percent_interval, plural, text_table

    confusion, rows = result["confusion"], [*map(printable, matching.rows)]  # (K + U, K): label, prediction
    classes = rows[: confusion.shape[1]]
    totals = confusion.sum(axis=1).tolist()
    rights = [*confusion.diagonal().tolist(), *[0] * len(matching.unknown)]
    lines = [f"loss      {result['loss']:.4f}", f"accuracy  {percent_interval(result)}"]
    if "top5" in result:
        lines.append(f"top-5     {result['top5']:.2%}")
    lines += remarks(result, matching)
    names = [shortened(name, 12) + " (unknown)" * (i >= len(classes)) for i, name in enumerate(rows)]
    if len(classes) <= 20:  # as wide as a page
        head = ["label", "images", "right", *[shortened(name, 5) for name in classes]]
        cells = [["·" if n == 0 else str(n) for n in row] for row in confusion.tolist()]
        lines.append("\nlabel by row, prediction by column:")
    else:
        head, cells = ["label", "images", "right"], [[] for _ in rows]
        lines.append("")
    table = [
        [name, str(total), f"{right / total:.1%}" if total else "", *row]
        for name, total, right, row in zip(names, totals, rights, cells, strict=True)
    ]
    lines.append(text_table(head, table, right=range(1, len(head))))
    wrong = [(n, i, j) for i, row in enumerate(confusion.tolist()) for j, n in enumerate(row) if n and i != j]
    if wrong:
        worst = sorted(wrong, key=lambda w: -w[0])[:5]
        pairs = [f"{rows[i]} as {classes[j]} ({plural(n, 'time')})" for n, i, j in worst]
        lines.append(f"\nmost often mistaken: {', '.join(pairs)}")
    if found := result["worst"]:
        listed = [[one["file"], one["label"], one["class"], f"{one['probability']:.1%}"] for one in found]
        worst_table = text_table(["worst mistakes", "label", "prediction", "probability"], listed, right=[3])
        lines.append(f"\n{worst_table}\n\nLook at these: a label may be wrong.")
    return "\n".join(lines)


def remarks(result: dict[str, Any], matching: Matching) -> list[str]:
    """Return a line on each thing about the classes that makes the accuracy mean something else."""
    from minivit.cli.matching import listed, meant_by
    from minivit.show.text import percent_interval, plural

    lines = [f"remark    {matching.remark}"] if matching.remark else []
    if unknown := result["unknown"]:
        meant = {name: meant_by(name, matching.rows[: result["confusion"].shape[1]]) for name in unknown}
        asked = "".join(f"; {name!r}: did you mean {near!r}?" for name, near in meant.items() if near)
        images, others = plural(sum(unknown.values()), "image"), plural(result["matched"]["count"], "other image")
        lines += [
            f"unknown   {images} of classes that the model does not know: {listed([*unknown])}{asked}",
            f"          they count as wrong, not in the loss; of the {others} {percent_interval(result['matched'])}",
        ]
    if absent := result["absent"]:
        lines.append(f"absent    no image is of {listed(absent)}")
    return lines
