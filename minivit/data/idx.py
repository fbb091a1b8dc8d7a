"""The files that MNIST and Fashion-MNIST are published as: idx, plain or gzipped, and sets of others in this format."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from minivit.data.dataset import Dataset
from minivit.data.reading import GET_AGAIN, check_size, fitting_labels, read_exactly, reading
from minivit.errors import DataError
from minivit.files import open_regular

_SPLITS = {"train": "train", "test": "t10k"}
_CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip


def _file(folder: Path, split: str, what: str) -> Path | None:
    """Return the file of a split's "images" or "labels", in any of the spellings that are about."""
    stem = f"{_SPLITS[split]}-{what}"
    rest = "idx3-ubyte" if what == "images" else "idx1-ubyte"
    names = (f"{stem}{dot}{rest}{end}" for dot in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def idx_in(folder: Path) -> str | None:
    """Return the kind of data set whose idx files are in a folder, or None. No file is opened.

    The two sets, whose files are called alike, are told apart by their folder, or the one around it (MNIST/raw).
    """
    if not any(_file(folder, split, "images") for split in _SPLITS):
        return None
    path = folder.resolve()
    for name in (path.name.lower(), path.parent.name.lower()):
        if "fashion" in name:
            return "fashion-mnist"
        if "mnist" in name:
            break
    return "mnist"


def load_idx(kind: str, folder: Path, split: str) -> Dataset:
    """Load a split. Raises DataError, naming the file, if it cannot be used."""
    arrays, paths = {}, {}
    for what, ndim in (("images", 3), ("labels", 1)):
        if (path := _file(folder, split, what)) is None:
            missing = f"{_SPLITS[split]}-{what}-idx{ndim}-ubyte"
            raise DataError(f"{folder}: no file {missing} nor {missing}.gz, needed for the split {split!r}", GET_AGAIN)
        arrays[what], paths[what] = read_idx(path, ndim), path
    images, classes = arrays["images"], _CLASSES[kind]
    labels = fitting_labels(arrays["labels"], len(images), classes, paths["labels"])
    return Dataset(images[:, None], labels, classes, str(folder))  # (N, H, W) → (N, 1, H, W)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an idx file of bytes, plain or gzipped, as uint8 with ``ndim`` axes (yann.lecun.com/exdb/mnist).

    Its header is big-endian: 0, 0, 8 (bytes), ndim, then each axis's length in 32 bits. Raises DataError if it is
    another file, or holds fewer or more bytes than it says.
    """
    with reading(str(path), GET_AGAIN), open_regular(path) as raw:
        size = os.fstat(raw.fileno()).st_size
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw) if packed else raw as f:
            return _read_idx(f, ndim, size, packed)


def _read_idx(f: Any, ndim: int, size: int, packed: bool) -> np.ndarray:
    magic = f.read(4)
    if magic != bytes((0, 0, 8, ndim)):
        raise ValueError(f"no idx file of bytes with {ndim} axes: it starts with {magic.hex(' ') or 'nothing'}")
    shape = tuple(int.from_bytes(f.read(4), "big") for _ in range(ndim))
    needed = math.prod(shape)
    check_size(needed, packed=size) if packed else check_size(needed)
    if not packed and needed != size - 4 - 4 * ndim:
        raise ValueError(f"{shape} needs {needed:,} bytes, there are {size - 4 - 4 * ndim:,}")
    return read_exactly(f, needed).reshape(shape)
