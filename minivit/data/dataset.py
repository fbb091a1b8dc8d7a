"""A data set: labelled images as bytes, in memory or in files, and the classes' names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np

from minivit.backend import Key, permutation
from minivit.data.file_array import ImageFiles
from minivit.data.fit import OWN_FITS, is_fit
from minivit.data.name_list import Names
from minivit.errors import DataError, unknown_name

SPLITS = ("train", "val", "test")
"""The parts of a data set. Where it has no "val" of its own, hold some of "train" out: :meth:`Dataset.split_off`."""

LAYOUT = 2
"""How a folder or archive is read now; 1 is how version 0.1.0 did (:func:`~minivit.data.catalog.load`)."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images: in memory, or in files that act as an array (:class:`~minivit.data.file_array.ImageFiles`).

    ``images`` uint8 (N, C, H, W), 0 to 255; ``labels`` int64 (N,), each an index into ``classes``, the classes' names.
    ``files`` are the image files that they came from, as paths in the folder ``name``, or () where there are none; of
    files in tar shards, "SHARD/FILE".
    ``fit`` says how other image files are brought to the size of these: :func:`~minivit.data.fit.fitted`.
    Raises DataError if these do not fit each other.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str
    files: Sequence[str] = ()
    fit: str = "stretch"

    def __post_init__(self) -> None:
        images, labels, classes = self.images, self.labels, self.classes
        if not is_fit(self.fit):
            raise unknown_name("fit", self.fit, OWN_FITS, error=DataError)
        if not isinstance(images, np.ndarray | ImageFiles) or images.dtype != np.uint8 or images.ndim != 4:
            what = f"{self.name}: images must be uint8 (N, C, H, W), not {described(images)}"
            raise DataError(what, bytes_remedy(images))
        if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.ndim != 1:
            remedy = "give one class index per image: np.asarray(labels, np.int64)"
            raise DataError(f"{self.name}: labels must be int64 (N,), not {described(labels)}", remedy)
        if images.size == 0:
            raise DataError(f"{self.name}: no images: their shape is {images.shape}", "give at least one image")
        if len(images) != len(labels):
            raise DataError(f"{self.name}: {len(images)} images but {len(labels)} labels", "give one label per image")
        if self.files and len(self.files) != len(images):
            raise DataError(f"{self.name}: {len(images)} images but {len(self.files)} files", "give one per image")
        check_numbers(labels, classes, self.name)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        count, classes = len(self), len(self.classes)
        images = f"{count:,} image{'s' * (count != 1)} uint8 {tuple(self.images.shape[1:])}"
        return f"Dataset({self.name!r}: {images}, {classes} class{'es' * (classes != 1)})"

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel of images / 255."""
        return tuple(mean for mean, _ in self._moments)

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel of images / 255; 1 for a constant channel, so that it can divide."""
        return tuple(std for _, std in self._moments)

    @property
    def fingerprint(self) -> dict[str, str]:
        """The SHA-256 of the ``images`` (their shape and pixels) and of the ``labels``, in hexadecimal."""
        return {"images": self._pass[1], "labels": hashlib.sha256(self.labels.tobytes()).hexdigest()}

    @property
    def _moments(self) -> list[tuple[float, float]]:
        """Mean and standard deviation per channel, from sums of integers: the same bits in any order of the images."""
        return self._pass[0]

    @cached_property
    def _pass(self) -> tuple[list[tuple[float, float]], str]:
        """The moments and the images' SHA-256, found in one pass: image files are decoded for it."""
        sums, digest = np.zeros((2, self.images.shape[1]), np.int64), hashlib.sha256(str(self.images.shape).encode())
        piece = max(1, (4 << 20) * len(self) // self.images.size)  # images: int64 takes eight times the bytes' memory
        for start in range(0, len(self), piece):
            pixels = self.images[start : start + piece]
            digest.update(np.ascontiguousarray(pixels).data)
            x = pixels.astype(np.int64)
            sums += x.sum((0, 2, 3)), (x * x).sum((0, 2, 3))  # (2, C)
        return moments(sums, self.images.size // self.images.shape[1]), digest.hexdigest()

    def subset(self, indices: Sequence[int] | np.ndarray) -> Dataset:
        """Return the images at ``indices``, in that order. Raises DataError for none, or for one that is not there."""
        index = np.asarray(indices)
        if index.size and (index.ndim != 1 or index.dtype.kind not in "iu"):
            raise DataError(f"{self.name}: indices must be integers (n,), not {described(index)}", "see np.flatnonzero")
        if len(wrong := index[(index < 0) | (index >= len(self))]):
            raise DataError(f"{self.name}: there is no image {wrong[0]}", f"indices run from 0 to {len(self) - 1}")
        index = index.astype(np.int64)
        named = self.files if isinstance(self.files, Names) else Names(self.files)
        files = named.take(index) if self.files else ()
        return replace(self, images=self.images.take(index, axis=0), labels=self.labels[index], files=files)

    def split_off(self, fraction: float, key: Key, stratified: bool = True) -> tuple[Dataset, Dataset]:
        """Return (rest, held_out): a random ``fraction`` of the images, chosen by ``key``, held out from the others.

        It is this fraction of every class to within one image, and of all images where the sizes of the classes allow
        it: a class keeps at least one image. With ``stratified`` False, images are chosen whatever their class. Both
        parts keep the data set's order. Raises DataError unless each gets at least one image.
        """
        n = len(self)
        held = round(fraction * n) if 0 < fraction < 1 else 0
        if not 0 < held < n:
            what = f"{self.name}: cannot hold out {fraction:g} of {n} images: both parts need at least one"
            raise DataError(what, "choose a fraction between 0 and 1, or use more images")
        order = permutation(key, n)
        chosen = self._of_each_class(order, fraction, held) if stratified else order[:held]
        if not len(chosen):
            raise DataError(f"{self.name}: cannot hold any out: no class has two images", "use more images")
        return self.subset(np.setdiff1d(order, chosen)), self.subset(np.sort(chosen))

    def _of_each_class(self, order: np.ndarray, fraction: float, held: int) -> np.ndarray:
        """Return the first of every class in ``order``, ``fraction`` of it: ``held`` in all, by largest remainders."""
        labels = self.labels[order]
        quotas = fraction * np.bincount(labels, minlength=len(self.classes))  # (K,)
        most = np.maximum(np.bincount(labels, minlength=len(self.classes)) - 1, 0)
        counts = np.minimum(quotas.astype(np.int64), most)
        # each class's first place in the order, which decides where remainders are equal
        first = dict(zip(*(x.tolist() for x in np.unique(labels, return_index=True)), strict=True))
        for label in sorted(first, key=lambda label: (counts[label] - quotas[label], first[label])):
            if counts.sum() < held and counts[label] < most[label]:
                counts[label] += 1
        return np.concatenate([order[labels == label][: counts[label]] for label in first])


def moments(sums: np.ndarray, count: int) -> list[tuple[float, float]]:
    """Return mean and standard deviation of images / 255 per channel: see :class:`Dataset`.

    ``sums`` int64 (2, C): those of the bytes and of their squares, over ``count`` pixels of each channel.
    """
    found = []
    for total, squares in sums.T.tolist():  # Python's integers: exact
        variance = (count * squares - total * total) / (255 * count) ** 2
        found.append((total / (255 * count), variance**0.5 or 1.0))
    return found


def bytes_remedy(images: Any, name: str = "images") -> str:
    """Return the call that makes bytes of ``images``."""
    if not isinstance(images, np.ndarray) or images.dtype == np.uint8 or images.dtype.kind not in "biuf":
        return f"give pixels 0 to 255 as np.uint8; for channels last: {name}.transpose(0, 3, 1, 2)"
    low, high = (images.min(), images.max()) if images.size else (0, 0)
    if not (low >= 0 and high <= 255):  # NaN, too
        return f"bring the pixels, now from {low:g} to {high:g}, to 0 … 255, then: {name}.astype(np.uint8)"
    if images.dtype.kind in "bf" and high <= 1:
        return f"they run from 0 to 1: np.rint(255 * {name}).astype(np.uint8)"
    return f"{f'np.rint({name})' if images.dtype.kind == 'f' else name}.astype(np.uint8)"


def check_numbers(labels: np.ndarray, classes: Sequence[str], where: str) -> None:
    """Raise DataError for the first label that is not a place among the classes."""
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        what = f"{where}: label {labels[wrong[0]]} of image {wrong[0]} is not a class: there are {len(classes)}"
        raise DataError(what, f"labels run from 0 to {len(classes) - 1}; name every class in `classes`")


def described(x: Any) -> str:
    """Return an array's dtype and shape, or the type of what is none, for an error."""
    return f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__


def class_names(classes: Sequence[str], count: int) -> list[str]:
    """Return names for ``count`` classes: a model may have room for more than its data have, and these have none."""
    return [*map(str, classes[:count]), *(f"class {i}" for i in range(len(classes), count))]


def no_split(name: str | PathLike[str], split: str) -> DataError:
    """Return the error for a split that a data set does not have."""
    if split == "val":
        return DataError(f"{name}: it has no split 'val'", "hold some of 'train' out: dataset.split_off(0.1, Key(0))")
    return DataError(f"{name}: it has no split {split!r}", "add a folder test/ with a folder for each class")
