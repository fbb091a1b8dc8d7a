"""Data sets: images as bytes, with labels and class names, held in memory."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, is_zipfile

import numpy as np

from minivit.backend import Key, permutation, total_memory
from minivit.errors import DataError, unknown_name

SPLITS = ("train", "test")
"""The parts of a data set. What is used for validation is held out of "train": see :meth:`Dataset.split_off`."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images: in memory, or in files that act as an array (:class:`~minivit.data.folder.ImageFiles`).

    ``images`` uint8 (N, C, H, W), 0 to 255; ``labels`` int64 (N,), each an index into ``classes``, the classes' names.
    Raises DataError if these do not fit each other.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str

    def __post_init__(self) -> None:
        images, labels, classes = self.images, self.labels, self.classes
        from minivit.data.folder import ImageFiles  # late: it needs this module

        if not isinstance(images, np.ndarray | ImageFiles) or images.dtype != np.uint8 or images.ndim != 4:
            raise DataError(f"{self.name}: images must be uint8 (N, C, H, W), not {_describe(images)}", _IMAGES_REMEDY)
        if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.ndim != 1:
            remedy = "give one class index per image: np.asarray(labels, np.int64)"
            raise DataError(f"{self.name}: labels must be int64 (N,), not {_describe(labels)}", remedy)
        if images.size == 0:
            raise DataError(f"{self.name}: no images: their shape is {images.shape}", "give at least one image")
        if len(images) != len(labels):
            raise DataError(f"{self.name}: {len(images)} images but {len(labels)} labels", "give one label per image")
        wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
        if len(wrong):
            what = f"{self.name}: label {labels[wrong[0]]} of image {wrong[0]} is not a class: there are {len(classes)}"
            raise DataError(what, f"labels run from 0 to {len(classes) - 1}; name every class in `classes`")

    def __len__(self) -> int:
        return len(self.images)

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
            raise DataError(f"{self.name}: indices must be integers (n,), not {_describe(index)}", "see np.flatnonzero")
        if len(wrong := index[(index < 0) | (index >= len(self))]):
            raise DataError(f"{self.name}: there is no image {wrong[0]}", f"indices run from 0 to {len(self) - 1}")
        index = index.astype(np.int64)
        return replace(self, images=self.images.take(index, axis=0), labels=self.labels[index])

    def split_off(self, fraction: float, key: Key, stratified: bool = True) -> tuple[Dataset, Dataset]:
        """Return (rest, held_out): a random ``fraction`` of the images, chosen by ``key``, held out from the others.

        Both keep the data set's order. Raises DataError unless each gets at least one image.
        """
        n = len(self)
        held = round(fraction * n) if 0 < fraction < 1 else 0
        if not 0 < held < n:
            what = f"{self.name}: cannot hold out {fraction:g} of {n} images: both parts need at least one"
            raise DataError(what, "choose a fraction between 0 and 1, or use more images")
        order = permutation(key, n)
        return self.subset(np.sort(order[held:])), self.subset(np.sort(order[:held]))


def moments(sums: np.ndarray, count: int) -> list[tuple[float, float]]:
    """Return mean and standard deviation of images / 255 per channel: see :class:`Dataset`.

    ``sums`` int64 (2, C): those of the bytes and of their squares, over ``count`` pixels of each channel.
    """
    found = []
    for total, squares in sums.T.tolist():  # Python's integers: exact
        variance = (count * squares - total * total) / (255 * count) ** 2
        found.append((total / (255 * count), variance**0.5 or 1.0))
    return found


_IMAGES_REMEDY = "give pixels 0 to 255 as np.uint8; for channels last: images.transpose(0, 3, 1, 2)"


def _describe(x: Any) -> str:
    return f"{x.dtype} {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__


# ---- loading ---------------------------------------------------------------------------------------------------------

NAMES = ("digits", "mnist", "fashion-mnist", "cifar-10", "cifar-100")
"""The data sets that have a name. All but the digits are looked for in the data home: see :func:`data_home`."""


def load(
    name: str | PathLike[str],
    split: str = "train",
    size: tuple[int, int] | None = None,
    channels: int = 3,
    bad_images: str = "stop",
    layout: int = 2,
) -> Dataset:
    """Load a data set by its name, or from a file or folder of your own.

    Names: ``"digits"``, the UCI optical digits that come with minivit: 8 × 8 grey, light strokes on black, 3,823 images
    to train on and 1,797 by other writers to test with (Alpaydin and Kaynak 1998, CC BY 4.0). ``"mnist"``,
    ``"fashion-mnist"``, ``"cifar-10"`` and ``"cifar-100"`` (its 100 fine classes) are looked for in the data home: see
    :func:`data_home`. Nothing is downloaded here.

    Paths are recognised by what lies there, whatever it is called:

    - a NumPy archive (.npz) with arrays ``train_images``, ``train_labels``, ``test_images`` and ``test_labels``, or
      only ``images`` and ``labels``, which are the split "train". Images are uint8 (N, H, W), (N, C, H, W) or
      (N, H, W, C) with 1, 3 or 4 channels; labels are integers (N,) from 0; ``classes``, an array of strings, may name
      them;
    - a folder of the four idx files of MNIST or of sets like it, .gz or plain;
    - a folder of CIFAR's binary files or of its Python batches, or a folder whose only subfolder is such a one;
    - any other folder is one of image files, which are brought to ``size``, (height, width), and ``channels``; a file
      that cannot be read makes it "stop" or is left out, by ``bad_images`` "skip". All other sets have a size and
      channels of their own, and leave these three alone.

    A text that is one of the names is that name; for a folder which is called so, write ``./mnist`` or a Path. Raises
    DataError for a name, split, file or folder that cannot be used.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS, error=DataError)
    kind, path = _find(name)
    if kind == "digits":
        return replace(load_npz(path, split), name=kind)
    if kind == "npz":
        return load_npz(path, split)
    if kind == "folder":
        from minivit.data.folder import load_folder

        return load_folder(path, split, size, channels, bad_images)
    from minivit.data.formats import load_files

    return replace(load_files(kind, path, split), name=str(name))


def splits_of(name: str | PathLike[str], layout: int = 2) -> tuple[str, ...]:
    """Return which of :data:`SPLITS` a data set has. No pixel is read."""
    if kind_of(name) == "npz":
        with np.load(name, allow_pickle=False) as archive:
            return SPLITS if "test_images" in archive else SPLITS[:1]
    return SPLITS


def class_names(classes: Sequence[str], count: int) -> list[str]:
    """Return names for ``count`` classes: a model may have room for more than its data have, and these have none."""
    return [*map(str, classes[:count]), *(f"class {i}" for i in range(len(classes), count))]


def kind_of(name: str | PathLike[str]) -> str:
    """Return what :func:`load` finds at ``name``: one of the :data:`NAMES`, ``"npz"`` or ``"folder"`` (of image files).

    A folder of idx files is ``"fashion-mnist"`` if it, or the folder around it, is called so, else ``"mnist"``. No
    pixel is read. Raises DataError for what is not there or not known.
    """
    return name if isinstance(name, str) and name in NAMES else _find(name)[0]


def data_home() -> Path:
    """Return the folder that holds the data sets that have names, each in a folder called by its name.

    It is the environment variable MINIVIT_DATA or else ``minivit`` in the user's cache (XDG_CACHE_HOME, ~/.cache).
    """
    if home := os.environ.get("MINIVIT_DATA"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "minivit"


def _find(name: str | PathLike[str]) -> tuple[str, Path]:
    """Return the kind of a data set, and its file or the folder that holds its files."""
    from minivit.data.formats import find_files

    if name == "digits":
        return name, Path(__file__).parent / "digits" / "digits.npz"
    if isinstance(name, str) and name in NAMES:
        folder = data_home() / name
        with reading(str(folder), "check its permissions"):
            missing = not folder.is_dir() or all(path.name.startswith(".") for path in folder.iterdir())
        if missing:  # or a download has been broken off
            remedy = f"download it: minivit data get {name}; or name its folder: --data FOLDER"
            why = f"{folder} is empty" if folder.is_dir() else f"there is no folder {folder}"
            raise DataError(f"{name} is not on this machine: {why}", remedy)
        kind, path = find_files(folder) or ("other files", folder)
        if "mnist" in kind and "mnist" in name:
            kind = name  # the files of both are called alike
        if kind != name:
            raise DataError(f"{folder} holds {kind}, not {name}", f"empty it, then: minivit data get {name}")
        return kind, path
    with reading(str(name), "check the path and its permissions"):
        path = Path(name)
        if path.is_dir():
            return find_files(path) or ("folder", path)
        if path.is_file():
            if is_zipfile(path):
                return "npz", path
            remedy = f"{_NPZ_REMEDY}; or give a folder: of images, or of files of MNIST or CIFAR"
            raise DataError(f"{path}: not a NumPy archive", remedy)
    if path.suffix or len(path.parts) > 1 or not isinstance(name, str):
        raise DataError(f"{path}: no such file or folder", "check the path")
    raise unknown_name("data set", name, NAMES, error=DataError)


def load_npz(path: str | PathLike[str], split: str) -> Dataset:
    """Load a NumPy archive: see :func:`load`. Raises DataError, with path and reason, if it cannot be used."""
    path = Path(path)
    arrays = read_npz(path, lambda held: _names_for(split, held, path))
    images, labels = arrays["images"], arrays["labels"]
    if labels.dtype.kind not in "iu":
        raise DataError(f"{path}: labels must be integers, not {labels.dtype}", "number the classes from 0")
    if labels.dtype == np.uint64 and labels.size and labels.max() > np.iinfo(np.int64).max:
        raise DataError(f"{path}: label {labels.max()} is too large", "number the classes from 0")
    if "classes" in arrays:
        names = arrays["classes"].reshape(-1)
        classes = tuple(n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in names)
    else:  # by number, up to the largest label of either split: both then agree on the number of classes
        numbers = [a for k, a in arrays.items() if k.endswith("labels") and a.dtype.kind in "iu" and a.size]
        largest = max((int(a.max()) for a in numbers), default=-1)
        if largest >= _MOST_CLASSES:
            raise DataError(f"{path}: label {largest} makes more than {_MOST_CLASSES:,} classes", "number them from 0")
        classes = tuple(str(i) for i in range(largest + 1))
    return Dataset(channels_first(images, path), labels.astype(np.int64), classes, str(path))


_MOST_CLASSES = 1_000_000  # a label beyond it is a mistake, and naming so many classes would fill the memory


def _names_for(split: str, held: Collection[str], path: Path) -> dict[str, str]:
    """Name "images" and "labels" of a split, and "classes" and the other split's labels where the archive has them."""
    prefix = "" if split == "train" and "train_images" not in held else f"{split}_"
    wanted = {"images": f"{prefix}images", "labels": f"{prefix}labels"}
    if missing := [name for name in wanted.values() if name not in held]:
        what = f"{path}: no array {missing[0]!r}, needed for the split {split!r}; it holds"
        remedy = f"save it with {wanted['images']}=… and {wanted['labels']}=…"
        raise DataError(f"{what} {', '.join(sorted(held)) or 'nothing'}", remedy)
    return {name: name for name in ("train_labels", "test_labels", "classes") if name in held} | wanted


def channels_first(images: np.ndarray, path: Path, channels: tuple[int, ...] = (1, 3, 4)) -> np.ndarray:
    """Return images as (N, C, H, W), where C may be one of ``channels``; the second axis before the last one."""
    if images.ndim == 3:
        return images[:, None]  # (N, 1, H, W)
    if images.ndim == 4 and images.shape[1] in channels:
        return images
    if images.ndim == 4 and images.shape[3] in channels:
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))  # (N, H, W, C) → (N, C, H, W)
    what = f"{path}: images of shape {images.shape} have no axis of {' or '.join(map(str, channels))} channels"
    raise DataError(what, "save them as (N, H, W), (N, C, H, W) or (N, H, W, C)")


# ---- reading files that may be damaged, or made to mislead -----------------------------------------------------------


@contextlib.contextmanager
def reading(name: str, remedy: str) -> Iterator[None]:
    """Turn whatever reading a missing or damaged file raises into a DataError: it is not of one kind."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name}: no such file", "check the path") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise DataError(f"{name}: cannot be read: {reason}", remedy) from error


def read_npz(path: Path, choose: Callable[[Collection[str]], dict[str, str]]) -> dict[str, np.ndarray]:
    """Read the arrays that ``choose`` names: it gets the names of all, and returns those to read by what to call them.

    Nothing is allocated that the file could not fill. Raises DataError, with path and reason, if they cannot be read.
    """
    with reading(str(path), _NPZ_REMEDY), open(path, "rb") as file:
        if not is_zipfile(file):
            raise DataError(f"{path}: not a NumPy archive", _NPZ_REMEDY)
        with ZipFile(file) as archive:
            members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
            chosen = choose(list(members))
            wanted = {stored: members[stored] for stored in chosen.values()}
            # NumPy writes no other methods, and zipfile unpacks the others without a limit
            if any(m.compress_type not in (ZIP_STORED, ZIP_DEFLATED) for m in wanted.values()):
                raise ValueError("an unknown method of compression")
            check_size(sum(m.file_size for m in wanted.values()), packed=file.seek(0, os.SEEK_END))
            arrays = {}
            for stored, member in wanted.items():
                with archive.open(member) as f:
                    arrays[stored] = read_npy(f, member.file_size)
            return {name: arrays[stored] for name, stored in chosen.items()}


_NPZ_REMEDY = "make it again: np.savez_compressed('data.npz', images=images, labels=labels)"


def read_npy(f: Any, size: int) -> np.ndarray:
    """Read an .npy file of ``size`` bytes from ``f``. Raises ValueError, before it allocates, if the header lies."""
    version = np.lib.format.read_magic(f)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"unknown version {version} of .npy")
    shape, fortran, dtype = readers[version](f)
    if dtype.hasobject:
        raise ValueError("Python objects, not numbers: they are never read")
    if (needed := math.prod(shape) * dtype.itemsize) != size - f.tell():
        raise ValueError(f"{dtype} {shape} needs {needed:,} bytes, there are {size - f.tell():,}")
    return read_exactly(f, needed).view(dtype).reshape(shape, order="F" if fortran else "C")


def read_exactly(f: Any, size: int) -> np.ndarray:
    """Read the last ``size`` bytes of ``f`` as uint8 (size,). Raises ValueError if it has fewer, or more."""
    out, at = np.empty(size, np.uint8), 0
    while at < size and (piece := f.read(min(size - at, 1 << 20))):  # in pieces: some readers hold all they are asked
        out[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    if at < size or f.read(1):
        raise ValueError(f"{size:,} bytes expected, it has {'more' if at == size else f'{at:,}'}")
    return out


def check_size(size: int, packed: int | None = None) -> None:
    """Raise ValueError if ``size`` bytes do not fit the memory, or cannot come out of ``packed`` bytes by DEFLATE."""
    if size > total_memory() // 2:
        raise ValueError(f"{size:,} bytes are more than half of this machine's memory")
    if packed is not None and size > packed * _MOST_INFLATED:
        raise ValueError(f"{packed:,} packed bytes cannot hold the {size:,} declared")


_MOST_INFLATED = 1032  # RFC 1951: a match of 258 bytes takes two bits at least
