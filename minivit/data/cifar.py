"""The files that CIFAR-10 and CIFAR-100 are published as: binary records, and Python batches."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minivit.data.dataset import Dataset
from minivit.data.plain_pickle import array_of, expect, read_plain_pickle, short_text
from minivit.data.reading import GET_AGAIN, check_size, fitting_labels, reading
from minivit.files import open_regular

_PIXELS = 3 * 32 * 32  # of an image: red, green, blue, each row by row


@dataclass(frozen=True)
class Cifar:
    """One of the layouts that CIFAR is published in (Krizhevsky 2009; cs.toronto.edu/~kriz/cifar.html).

    ``labels``: in the binary layout, how many bytes of labels come before an image's pixels, the last of which counts;
    in the Python batches, what the labels are called. ``meta`` holds the classes' names. Where all files of one of
    ``marks`` are, it is this layout.
    """

    kind: str
    train: tuple[str, ...]
    test: str
    marks: tuple[tuple[str, ...], ...]
    labels: int | str
    meta: str

    def load(self, folder: Path, split: str) -> Dataset:
        """Load a split, all of its files."""
        paths = [folder / name for name in (self.train if split == "train" else (self.test,))]
        with reading(str(folder), GET_AGAIN):
            check_size(2 * sum(path.stat().st_size for path in paths if path.exists()))  # the files, and the images
        classes = self._classes(folder / self.meta)
        batches = [self._batch(path, classes) for path in paths]
        images = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 32, 32)  # (N, 3072) → (N, 3, 32, 32)
        return Dataset(images, np.concatenate([labels for _, labels in batches]), classes, str(folder))

    def _batch(self, path: Path, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return a file's pixels, uint8 (n, 3072), and its labels, int64 (n,)."""
        with reading(str(path), GET_AGAIN):
            if isinstance(self.labels, str):
                pixels, labels = _read_batch(path, self.labels)
            else:
                data = np.frombuffer(_whole(path), np.uint8)
                record = self.labels + _PIXELS
                if not data.size or data.size % record:
                    raise ValueError(f"{data.size:,} bytes are not a whole number of records of {record:,}")
                records = data.reshape(-1, record)
                pixels, labels = records[:, self.labels :], records[:, self.labels - 1]
        return pixels, fitting_labels(labels, len(pixels), classes, path)

    def _classes(self, path: Path) -> tuple[str, ...]:
        """Return the classes' names: a line each, or a list in a Python batch."""
        count = 10 if self.kind == "cifar-10" else 100
        with reading(str(path), GET_AGAIN):
            if isinstance(self.labels, str):
                found = read_plain_pickle(_whole(path)).get(self.labels.removesuffix("s") + "_names")
                names = expect(found, list)
            else:
                names = _whole(path).split()
            if len(names) != count:
                raise ValueError(f"{len(names)} names of classes, not {count}")
            return tuple(map(short_text, names))


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFARS = (
    Cifar("cifar-10", tuple(f"{name}.bin" for name in _BATCHES), "test_batch.bin",
           (("data_batch_1.bin",), ("test_batch.bin",)), 1, "batches.meta.txt"),
    Cifar("cifar-100", ("train.bin",), "test.bin", (("train.bin",), ("test.bin",)), 2, "fine_label_names.txt"),
    Cifar("cifar-10", _BATCHES, "test_batch", (("data_batch_1",), ("test_batch",)), "labels", "batches.meta"),
    Cifar("cifar-100", ("train",), "test", (("meta", "train"), ("meta", "test")), "fine_labels", "meta"),
)  # fmt: skip


def cifar_in(folder: Path) -> Cifar | None:
    """Return the layout of the files in a folder, or None if they are no CIFAR's. No file is opened."""
    files = {name for c in _CIFARS for mark in c.marks for name in mark if (folder / name).is_file()}
    return next((c for c in _CIFARS if any(files.issuperset(mark) for mark in c.marks)), None)


def _whole(path: Path) -> bytes:
    """Return the file's bytes, if they fit the memory."""
    with open_regular(path) as f:
        check_size(os.fstat(f.fileno()).st_size)
        return f.read()


def _read_batch(path: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels, uint8 (n, 3072), and the labels of a Python batch."""
    batch = read_plain_pickle(_whole(path))
    pixels, labels = array_of(batch.get("data")), expect(batch.get(key), list)
    if pixels.shape[1:] != (_PIXELS,):
        raise ValueError(f"its array has the shape {pixels.shape}, not (n, {_PIXELS})")
    if not all(type(label) is int for label in labels):
        raise ValueError("labels that are not whole numbers")
    return pixels, np.array(labels, np.int64)
