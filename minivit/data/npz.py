"""NumPy archives (.npz) of images and labels, in the forms that people save them in."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Collection
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from minivit.data.dataset import LAYOUT, SPLITS, Dataset, bytes_remedy, check_numbers, described
from minivit.data.reading import read_npz
from minivit.errors import DataError

_MOST_CLASSES = 1_000_000  # a label beyond it is a mistake, and naming so many classes would fill the memory


def load_npz(path: str | PathLike[str], split: str, layout: int = LAYOUT) -> Dataset:
    """Load a NumPy archive: see :func:`~minivit.data.catalog.load`.

    Raises DataError, with path, array and reason, if it cannot be used.
    """
    path = Path(path)
    names: dict[str, str] = {}  # what the arrays are called in the archive

    def choose(held: Collection[str]) -> dict[str, str]:
        names.update(_names_for(split, held, path, layout))
        return names

    arrays = read_npz(path, choose)
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8:
        what = f"{path}: {names['images']} must be uint8, 0 to 255, not {images.dtype}"
        raise DataError(what, bytes_remedy(images, names["images"]))
    where = f"{path}: {names['labels']}"
    labels = _flat_labels(labels, where)
    if "classes" in arrays:
        classes = tuple(map(_text, arrays["classes"].reshape(-1)))
        if "other classes" in arrays and classes != tuple(map(_text, arrays["other classes"].reshape(-1))):
            raise DataError(f"{path}: classes and class_names do not name the same", "leave one of them out")
        if split == "train" and layout > 1:
            _check_names(classes, path)
    else:
        classes = _classes_of({f"{path}: {names[key]}": arrays[key] for key in names if key.startswith("labels")})
    if labels.dtype.kind == "U":
        numbers = {name: i for i, name in enumerate(classes)}
        if unknown := set(labels.tolist()) - numbers.keys():
            raise DataError(f"{where}: {min(unknown)!r} is not one of the classes", f"name it in {names['classes']!r}")
        labels = np.array([numbers[name] for name in labels.tolist()], np.int64)
    check_numbers(labels, classes, where)
    dataset = Dataset(channels_first(images, path), labels.astype(np.int64), classes, str(path))
    if split == "train":
        _announce_gaps(dataset, where)
    return dataset


def _check_names(classes: tuple[str, ...], path: Path) -> None:
    """Raise DataError for a name that two classes have: a model would tell them apart, and nobody its answers."""
    name, count = Counter(classes).most_common(1)[0] if classes else ("", 0)
    if count > 1:
        remedy = "give every class a name of its own, or one number to those that are the same"
        raise DataError(f"{path} has more than one class called {name!r}", remedy)


def splits_in(path: Path, layout: int = LAYOUT) -> tuple[str, ...]:
    """Return which of :data:`SPLITS` an archive has. No array is read."""
    held: list[str] = []

    def look(names: Collection[str]) -> dict[str, str]:
        held.extend(names)
        return {}

    read_npz(path, look)
    known = SPLITS if layout > 1 else ("train", "test")
    return tuple(split for split in known if any(images in held for images, _ in _pairs(split)))


def _pairs(split: str) -> list[tuple[str, str]]:
    """Return what the images and labels of a split may be called."""
    bare = [("images", "labels")] if split == "train" else []
    return [(f"{split}_images", f"{split}_labels"), *((f"{x}_{split}", f"y_{split}") for x in "xX"), *bare]


def _names_for(split: str, held: Collection[str], path: Path, layout: int) -> dict[str, str]:
    """Name "images", "labels" and, where the archive has them, "labels of" the other splits and the classes' names.

    Two arrays may hold these, "classes" and "other classes"; version 0.1.0, of layout 1, knew one.
    """
    pairs = _pairs(split)
    images, labels = next((pair for pair in pairs if pair[0] in held), pairs[0 if split != "train" else -1])
    if missing := [name for name in (images, labels) if name not in held]:
        what = f"{path}: no array {missing[0]!r}, needed for the split {split!r}; it holds"
        raise DataError(f"{what} {', '.join(sorted(held)) or 'nothing'}", f"save it with {images}=… and {labels}=…")
    others = {f"labels of {other}": y for other in SPLITS if other != split for x, y in _pairs(other) if y in held}
    known = [name for name in ("classes", "class_names")[:layout] if name in held]
    named = dict(zip(("classes", "other classes"), known, strict=False))
    return {"images": images, "labels": labels} | others | named


def _text(name: Any) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def _flat_labels(labels: np.ndarray, where: str) -> np.ndarray:
    """Return labels, integers or strings (N,), from any of the forms that :func:`~minivit.data.catalog.load` knows."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.dtype.kind in "biuf":  # (N, K)
        wrong = np.flatnonzero(((labels != 0) & (labels != 1)).any(1) | (labels.sum(1) != 1))
        if len(wrong):
            raise DataError(
                f"{where}: row {wrong[0]} is not one-hot: a single 1, and else 0",
                "an image is of one class: give its number, such as labels.argmax(1)",
            )
        return labels.argmax(1)  # (N,)
    if labels.ndim == 1 and labels.dtype.kind in "SU":
        return np.array([*map(_text, labels.tolist())], np.str_)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        remedy = "number the classes from 0: labels.astype(np.int64)"
        raise DataError(f"{where} must be integers (N,), one-hot (N, K) or strings, not {described(labels)}", remedy)
    if labels.dtype == np.uint64 and labels.size and labels.max() > np.iinfo(np.int64).max:
        raise DataError(f"{where}: label {labels.max()} is too large", "number the classes from 0")
    return labels


def _classes_of(labels: dict[str, np.ndarray]) -> tuple[str, ...]:
    """Name the classes of all splits, which then agree on them: by the strings that labels are, or by number."""
    flat = {where: _flat_labels(a, where) for where, a in labels.items()}
    strings = {where: a.tolist() for where, a in flat.items() if a.dtype.kind == "U"}
    if strings and len(strings) < len(flat):
        numbers = min(flat.keys() - strings.keys())
        raise DataError(f"{numbers} are numbers, those of another split strings", "give both as strings")
    if strings:
        return tuple(sorted({name for names in strings.values() for name in names}))
    one_hot = max((a.shape[1] for a in labels.values() if a.ndim == 2 and a.shape[1] > 1), default=0)
    for where, a in flat.items():
        if a.size and a.max() >= _MOST_CLASSES:
            raise DataError(f"{where}: label {a.max()} makes more than {_MOST_CLASSES:,} classes", "number them from 0")
    count = max([one_hot, *(int(a.max()) + 1 for a in flat.values() if a.size)])
    return tuple(str(i) for i in range(count))


def _announce_gaps(dataset: Dataset, where: str) -> None:
    """Warn of classes without training images: often a label that was meant to start at 0."""
    labels, classes = dataset.labels, dataset.classes
    empty = np.flatnonzero(np.bincount(labels, minlength=len(classes)) == 0).tolist()
    if not empty:
        return
    some = ", ".join(classes[i] for i in empty[:3]) + (", …" if len(empty) > 3 else "")
    lacking = f"class {some} has" if len(empty) == 1 else f"{len(empty):,} of {len(classes):,} classes ({some}) have"
    hint = f"; to number the classes from 0: {where.rpartition(' ')[2]} - 1" if empty == [0] else ""
    what = f"{where} run from {labels.min()} to {labels.max()}: {lacking} no training images{hint}"
    warnings.warn(what, stacklevel=4)


def channels_first(images: np.ndarray, path: Path, channels: tuple[int, ...] = (1, 3, 4)) -> np.ndarray:
    """Return images as (N, C, H, W), where C may be one of ``channels``; the second axis before the last one.

    What has been handed in may be changed: it is turned where it lies.
    """
    if images.ndim == 3:
        return images[:, None]  # (N, 1, H, W)
    if images.ndim == 4 and images.shape[1] in channels:
        return images
    if images.ndim == 4 and images.shape[3] in channels:
        if not images.flags.carray:
            return np.ascontiguousarray(images.transpose(0, 3, 1, 2))  # (N, H, W, C) → (N, C, H, W)
        n, h, w, c = images.shape
        turned = images.reshape(n, c, h, w)  # the same memory: two copies of all images might not fit
        step = max(1, (4 << 20) // max(1, images[:1].nbytes))
        for i in range(0, n, step):
            turned[i : i + step] = images[i : i + step].transpose(0, 3, 1, 2).copy()
        return turned
    what = f"{path}: images of shape {images.shape} have no axis of {' or '.join(map(str, channels))} channels"
    remedy = "save them as (N, H, W), (N, C, H, W) or (N, H, W, C)"
    if images.ndim == 2 and (side := math.isqrt(images.shape[1])) ** 2 == images.shape[1]:
        remedy += f", such as images.reshape(-1, {side}, {side})"
    raise DataError(what, remedy)
