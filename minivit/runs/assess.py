"""A trained model measured on a split of its data, or on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minivit import data, ops
from minivit.backend import Key
from minivit.data import Dataset
from minivit.data.dataset import LAYOUT
from minivit.errors import DataError, NonFiniteError
from minivit.measure.metrics import classification_metrics, wilson_interval
from minivit.runs.changes import read_config, settings_of_run
from minivit.runs.folder import run_of
from minivit.runs.job import Job
from minivit.runs.matching import Matching
from minivit.runs.trained import Trained
from minivit.show.text import plural
from minivit.train.inference import predict_logits
from minivit.train.nonfinite import first_non_finite

WORST = 8
"""So many mistakes are listed."""

# ---- which images ----------------------------------------------------------------------------------------------------


def load_split(trained: Trained, name: str, split: str, bar: Callable[..., Any] | None = None) -> list[Dataset]:
    """Return the data sets that make up a split of ``name``, with images as the model takes them.

    Of the data that the model was trained on in a run, "train" and "val" are what the run trained on and held out.
    ``bar`` as :func:`minivit.data.load` has it. Raises DataError if there is no such split, or its images do not fit
    the model.
    """
    takes, height, width = trained.image_shape
    recorded = trained.data.get("name")
    own = isinstance(recorded, str) and (name == recorded or Path(name).resolve() == Path(recorded))
    layout = LAYOUT
    if own and "train" in trained.meta:  # a run is tested as it was before; version 0.1.0 did not say how
        layout = trained.data.get("layout", 1)
    splits = data.splits_of(name, layout)

    def load(part: str) -> Dataset:
        return data.load(name, part, (height, width), takes, trained.data.get("bad_images", "stop"), layout, bar)

    if own and split in ("train", "val") and (held := run_split(trained, split, bar)) is not None:
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


def run_split(trained: Trained, split: str, bar: Callable[..., Any] | None = None) -> Dataset | None:
    """Return the images that the run of a checkpoint trained on or held out, or None if it is in no run's folder."""
    if (folder := run_of(trained.path)) is None:
        return None
    config = read_config(folder / "config.toml")
    here = {"train.device": "cpu", "train.dtype": "float32"}  # whose images they are does not depend on either
    job = Job(settings_of_run(config, trained.meta, here), resumed=True, bar=bar)
    now = job.data_meta()
    if changed := [k for k in trained.data if k in now and k != "name" and now[k] != trained.data[k]]:
        what = f"{now['name']} is not as it was when {folder} was trained: other {', '.join(changed)}"
        raise DataError(what, "bring the data back, or name other data, and --split test")
    found = job.parts.train if split == "train" else job.parts.valid
    if found is None:
        remedy = "evaluate on test images, or train again with --val-fraction 0.1"
        raise DataError(f"the run {folder} held no images out to validate with", remedy)
    return found


# ---- measuring -------------------------------------------------------------------------------------------------------


def assess(trained: Trained, parts: list[Dataset], matching: Matching, name: str) -> dict[str, Any]:
    """Return what :func:`~minivit.measure.metrics.classification_metrics` finds, and how it treats the classes.

    ``matched`` are the accuracy, interval and count of the images whose class the model knows, ``unknown`` the number
    of images of each other class, ``absent`` the model's classes that no image is of. Raises NonFiniteError if logits
    are not finite, DataError if the model knows the class of no image.
    """
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
