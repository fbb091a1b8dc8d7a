"""Looking a data set over before it costs hours: what is in it, what is damaged, what is in it twice."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from minivit.backend import Key, permutation
from minivit.data.catalog import listing, load, splits_of
from minivit.data.dataset import moments
from minivit.data.file_array import ImageFiles, in_threads
from minivit.data.folder import SIZE
from minivit.data.listing import Listing
from minivit.errors import ConfigError, DataError

SAMPLES = 100
"""At most so many images are kept to be shown, as many of each class."""


@dataclass(frozen=True)
class Same:
    """Images with exactly the same pixels: their names, and of each the split and the class."""

    names: tuple[str, ...]
    splits: tuple[str, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Audit:
    """What is in a data set: see :func:`audit`. ``counts[split]`` are its images of each class."""

    name: str
    how: str
    classes: tuple[str, ...]
    counts: dict[str, list[int]]
    sizes: dict[str, tuple[int, int]]
    formats: dict[str, int]
    modes: dict[str, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    measured_at: tuple[int, int]
    same: list[Same]
    corrupt: list[str] = field(default_factory=list)
    several: list[str] = field(default_factory=list)
    note: str = ""
    samples: list[np.ndarray] = field(default_factory=list)
    sample_labels: list[str] = field(default_factory=list)

    @property
    def duplicates(self) -> list[Same]:
        """Images that are in one split more than once."""
        return [same for same in self.same if len(set(same.splits)) < len(same.splits)]

    @property
    def leaked(self) -> list[Same]:
        """Images that are in more than one split: a model may know those of "val" and "test" by heart."""
        return [same for same in self.same if len(set(same.splits)) > 1]

    @property
    def contradictions(self) -> list[Same]:
        """Images that are in more than one class."""
        return [same for same in self.same if len(set(same.classes)) > 1]


def audit(
    name: str | PathLike[str], size: tuple[int, int] | None = None, bar: Callable[..., Any] | None = None
) -> Audit:
    """Look over a data set that :func:`~minivit.data.catalog.load` knows, all its splits, or any folder of images.

    ``sizes`` are (height, width), "smallest", "median" and "largest" by area; ``formats`` and ``modes`` (Pillow's)
    count what the files are. ``corrupt`` are those that cannot be decoded, with the reasons; ``several`` hold more than
    one picture. Images are the ``same`` if the SHA-256 of their decoded pixels is, in their own size. ``mean`` and
    ``std`` are those of each channel of the training images / 255, which in a folder are brought to ``size`` first, by
    default 64 × 64. A ``note`` says what is missing, such as test images, or classes to train on.
    ``bar=tqdm`` shows how far the reading of a folder is.

    Raises DataError for what is not there, or has no images; ConfigError for a ``size`` where images have their own.
    """
    if (found := listing(name)) is not None:
        return _audit_files(name, found, size or SIZE, bar)
    if size is not None:
        raise ConfigError(f"{name}: its images have a size of their own", "give a size for folders of image files only")
    return _audit_arrays(name)


def _audit_arrays(name: str | PathLike[str]) -> Audit:
    parts = {split: load(name, split) for split in splits_of(name)} or {"train": load(name)}
    note = "" if "test" in parts else "no test images"
    if "train" not in parts:
        raise DataError(f"{name}: no training images", "add train_images and train_labels")
    train = parts["train"]
    channels, height, width = train.images.shape[1:]
    digests = [
        (_digest(image), f"{split}[{i}]", split, data.classes[label])
        for split, data in parts.items()
        for i, (image, label) in enumerate(zip(data.images, data.labels, strict=True))
    ]
    shown = _choose(train.labels, len(train.classes))
    mode = {1: "grey", 3: "RGB", 4: "RGBA"}.get(channels, f"{channels} channels")
    return Audit(
        name=str(name),
        how="as the data set has it",
        classes=train.classes,
        counts={split: np.bincount(data.labels, minlength=len(data.classes)).tolist() for split, data in parts.items()},
        sizes=dict.fromkeys(("smallest", "median", "largest"), (height, width)),
        formats={},
        modes={mode: sum(map(len, parts.values()))},
        mean=train.mean,
        std=train.std,
        measured_at=(height, width),
        same=_same(digests),
        note=note,
        samples=[train.images[i] for i in shown],
        sample_labels=[train.classes[train.labels[i]] for i in shown],
    )


def _audit_files(
    name: str | PathLike[str], found: Listing, size: tuple[int, int], bar: Callable[..., Any] | None
) -> Audit:
    files = [
        (file, split, label, own)
        for split, listed in found.files.items()  # "train" first
        for (file, label), own in zip(listed, listed.paths.names, strict=True)
    ]
    if not files:
        raise DataError(f"{name}: no image files", "put them into a folder for each class")
    shown = set(_choose(found.files["train"].labels, len(found.classes)))
    kept: dict[int, np.ndarray] = {}
    facts: dict[int, tuple[str, str, bool, tuple[int, int]]] = {}
    reasons, digests = {}, {}
    sums = np.zeros((len(files), 2, 3), np.int64)
    as_loaded = ImageFiles([file for file, *_ in files], size, 3)

    def look(i: int) -> None:
        _, split, label, own = files[i]
        try:
            picture = as_loaded.picture(i)
            pixels = as_loaded.read(i)[0] if split == "train" else None  # of a large JPEG not quite the same pixels
        except DataError as error:
            reasons[i] = error.what
            return
        page = np.asarray(picture.page)  # (H, W, 3)
        facts[i] = picture.format, picture.mode, picture.animated, page.shape[:2]
        digests[i] = _digest(page), own, split, found.classes[label]
        if pixels is not None:
            x = pixels.astype(np.int64)
            sums[i] = x.sum((1, 2)), (x * x).sum((1, 2))  # (2, 3)
            if i in shown:
                kept[i] = pixels

    in_threads(look, as_loaded.paths, f"reading {name}", bar)
    good = sorted(facts)
    counts = {split: [0] * len(found.classes) for split in found.files}
    for i in good:
        counts[files[i][1]][files[i][2]] += 1
    count = sum(counts["train"]) * size[0] * size[1]
    measured = moments(sums.sum(0), count) if count else []
    problem = found.problem()
    return Audit(
        name=str(name),
        how=found.how,
        classes=found.classes,
        counts=counts,
        sizes=_sizes([facts[i][3] for i in good]),
        formats=_counted(facts[i][0] for i in good),
        modes=_counted(facts[i][1] for i in good),
        mean=tuple(mean for mean, _ in measured),
        std=tuple(std for _, std in measured),
        measured_at=size,
        same=_same([digests[i] for i in good]),
        corrupt=[reasons[i].removeprefix(f"{found.path}/") for i in sorted(reasons)],
        several=[digests[i][1] for i in good if facts[i][2]],
        note=f"{problem.what}: {problem.remedy}" if problem else found.remark,
        samples=[kept[i] for i in sorted(kept)],
        sample_labels=[found.classes[files[i][2]] or Path(files[i][3]).name for i in sorted(kept)],
    )


# ---- the parts -------------------------------------------------------------------------------------------------------


def _digest(pixels: np.ndarray) -> bytes:
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def _same(images: Iterable[tuple[bytes, str, str, str]]) -> list[Same]:
    """Group (digest, name, split, class) by digest; the groups of one are left out."""
    groups: dict[bytes, list[tuple[str, str, str]]] = {}
    for digest, *about in images:
        groups.setdefault(digest, []).append((about[0], about[1], about[2]))
    return [Same(*zip(*group, strict=True)) for group in groups.values() if len(group) > 1]


def _choose(labels: Sequence[int] | np.ndarray, classes: int) -> list[int]:
    """Choose images to show: up to ten of each class, at random, and at most :data:`SAMPLES`."""
    labels = np.asarray(labels, np.int64)
    order = permutation(Key(0), len(labels))
    each = SAMPLES if classes == 1 else min(10, max(1, SAMPLES // classes))
    chosen: Iterator[int] = (i for c in range(classes) for i in order[labels[order] == c][:each].tolist())
    return list(chosen)[:SAMPLES]


def _sizes(sizes: list[tuple[int, int]]) -> dict[str, tuple[int, int]]:
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    named = {"smallest": 0, "median": len(ordered) // 2, "largest": -1}
    return {name: ordered[i] for name, i in named.items()} if ordered else {}


def _counted(words: Iterable[str]) -> dict[str, int]:
    return dict(Counter(words).most_common())
