"""Data sets: images as bytes, with labels and class names, held in memory."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, is_zipfile

import numpy as np

from minivit.backend import Key, available_memory, permutation
from minivit.errors import DataError, unknown_name
from minivit.files import open_regular

SPLITS = ("train", "val", "test")
"""The parts of a data set. Where it has no "val" of its own, hold some of "train" out: :meth:`Dataset.split_off`."""

LAYOUT = 2
"""How a folder or archive is read now. 1 is how version 0.1.0 read it, for what was trained then: see :func:`load`."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images: in memory, or in files that act as an array (:class:`~minivit.data.folder.ImageFiles`).

    ``images`` uint8 (N, C, H, W), 0 to 255; ``labels`` int64 (N,), each an index into ``classes``, the classes' names.
    ``files`` are the image files that they came from, as paths in the folder ``name``, or () where there are none.
    ``fit`` says how other image files are brought to the size of these: :func:`~minivit.data.images.read_image`.
    Raises DataError if these do not fit each other.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    name: str
    files: tuple[str, ...] = ()
    fit: str = "stretch"

    def __post_init__(self) -> None:
        from minivit.data.folder import ImageFiles  # late: they need this module
        from minivit.data.images import FITS

        images, labels, classes = self.images, self.labels, self.classes
        if self.fit not in FITS:
            raise unknown_name("fit", self.fit, FITS, error=DataError)
        if not isinstance(images, np.ndarray | ImageFiles) or images.dtype != np.uint8 or images.ndim != 4:
            what = f"{self.name}: images must be uint8 (N, C, H, W), not {_describe(images)}"
            raise DataError(what, bytes_remedy(images))
        if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.ndim != 1:
            remedy = "give one class index per image: np.asarray(labels, np.int64)"
            raise DataError(f"{self.name}: labels must be int64 (N,), not {_describe(labels)}", remedy)
        if images.size == 0:
            raise DataError(f"{self.name}: no images: their shape is {images.shape}", "give at least one image")
        if len(images) != len(labels):
            raise DataError(f"{self.name}: {len(images)} images but {len(labels)} labels", "give one label per image")
        if self.files and len(self.files) != len(images):
            raise DataError(f"{self.name}: {len(images)} images but {len(self.files)} files", "give one per image")
        _check_labels(labels, classes, self.name)

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
            raise DataError(f"{self.name}: indices must be integers (n,), not {_describe(index)}", "see np.flatnonzero")
        if len(wrong := index[(index < 0) | (index >= len(self))]):
            raise DataError(f"{self.name}: there is no image {wrong[0]}", f"indices run from 0 to {len(self) - 1}")
        index = index.astype(np.int64)
        files = tuple(self.files[i] for i in index) if self.files else ()
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
        first = {label: place for place, label in reversed([*enumerate(labels.tolist())])}
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


def _check_labels(labels: np.ndarray, classes: Sequence[str], where: str) -> None:
    """Raise DataError for the first label that is not a place among the classes."""
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        what = f"{where}: label {labels[wrong[0]]} of image {wrong[0]} is not a class: there are {len(classes)}"
        raise DataError(what, f"labels run from 0 to {len(classes) - 1}; name every class in `classes`")


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
    layout: int = LAYOUT,
) -> Dataset:
    """Load a data set by its name, or from a file or folder of your own.

    Names: ``"digits"``, the UCI optical digits that come with minivit: 8 × 8 grey, light strokes on black, 3,823 images
    to train on and 1,797 by other writers to test with (Alpaydin and Kaynak 1998, CC BY 4.0). ``"mnist"``,
    ``"fashion-mnist"``, ``"cifar-10"`` and ``"cifar-100"`` (its 100 fine classes) are looked for in the data home: see
    :func:`data_home`. Nothing is downloaded here.

    Paths are recognised by what lies there, whatever it is called:

    - a NumPy archive (.npz) with arrays ``train_images`` and ``train_labels`` (or ``x_train`` and ``y_train``), the
      same for "test" and, where it has one, for "val"; or only ``images`` and ``labels``, which are the split "train".
      Images are uint8 (N, H, W), (N, C, H, W) or (N, H, W, C) with 1, 3 or 4 channels. Labels are integers (N,) from 0,
      one-hot rows (N, K), or strings (N,). ``classes`` (or ``class_names``), an array of strings, names the classes in
      order; without it, they are numbers, or the strings in the order of the alphabet. A class without training images
      is warned of;
    - a folder of the four idx files of MNIST or of sets like it, .gz or plain;
    - a folder of CIFAR's binary files or of its Python batches, or a folder whose only subfolder is such a one;
    - any other folder is one of image files, which are brought to ``size``, (height, width), and ``channels``; a file
      that cannot be read makes it "stop" or is left out, by ``bad_images`` "skip". All other sets have a size and
      channels of their own, and leave these three alone. See :func:`~minivit.data.folder.load_folder`.

    ``layout`` 1 reads folders and archives as version 0.1.0 did, for what was trained then: other folders are "test",
    which is there always, and ``class_names`` are not known.

    A text that is one of the names is that name; for a folder which is called so, write ``./mnist`` or a Path. Raises
    DataError for a name, split, file or folder that cannot be used.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS, error=DataError)
    kind, path = _find(name)
    if kind == "digits":
        return replace(load_npz(path, split), name=kind)
    if kind == "npz":
        return load_npz(path, split, layout)
    if kind == "folder":
        from minivit.data.folder import load_folder

        return load_folder(path, split, size, channels, bad_images, layout)
    from minivit.data.formats import load_files

    if split == "val":
        raise no_split(name, split)
    return replace(load_files(kind, path, split), name=str(name))


def splits_of(name: str | PathLike[str], layout: int = LAYOUT) -> tuple[str, ...]:
    """Return which of :data:`SPLITS` a data set has: see :func:`load`. No pixel is read."""
    kind, path = _find(name)
    if kind == "npz":
        held: list[str] = []

        def look(names: Collection[str]) -> dict[str, str]:
            held.extend(names)
            return {}

        read_npz(path, look)
        known = SPLITS if layout > 1 else ("train", "test")
        return tuple(split for split in known if any(images in held for images, _ in _pairs(split)))
    if kind == "folder":
        from minivit.data.folder import list_folder

        return tuple(list_folder(path, layout).files)
    return "train", "test"


def no_split(name: str | PathLike[str], split: str) -> DataError:
    """Return the error for a split that a data set does not have."""
    if split == "val":
        return DataError(f"{name}: it has no split 'val'", "hold some of 'train' out: dataset.split_off(0.1, Key(0))")
    return DataError(f"{name}: it has no split {split!r}", "add a folder test/ with a folder for each class")


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

    if not str(name):
        raise DataError("the data set has no name", f"name a folder, FILE.npz or one of {', '.join(NAMES)}")
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
        if path.exists():
            with open_regular(path) as file:
                if is_zipfile(file):
                    return "npz", path
            remedy = f"{_NPZ_REMEDY}; or give a folder: of images, or of files of MNIST or CIFAR"
            raise DataError(f"{path}: not a NumPy archive", remedy)
    if path.suffix or len(path.parts) > 1 or not isinstance(name, str):
        raise DataError(f"{path}: no such file or folder", "check the path")
    raise unknown_name("data set", name, NAMES, error=DataError)


def load_npz(path: str | PathLike[str], split: str, layout: int = LAYOUT) -> Dataset:
    """Load a NumPy archive: see :func:`load`. Raises DataError, with path, array and reason, if it cannot be used."""
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
    else:
        classes = _classes_of({f"{path}: {names[key]}": arrays[key] for key in names if key.startswith("labels")})
    if labels.dtype.kind == "U":
        numbers = {name: i for i, name in enumerate(classes)}
        if unknown := set(labels.tolist()) - numbers.keys():
            raise DataError(f"{where}: {min(unknown)!r} is not one of the classes", f"name it in {names['classes']!r}")
        labels = np.array([numbers[name] for name in labels.tolist()], np.int64)
    _check_labels(labels, classes, where)
    dataset = Dataset(channels_first(images, path), labels.astype(np.int64), classes, str(path))
    if split == "train":
        _announce_gaps(dataset, where)
    return dataset


_MOST_CLASSES = 1_000_000  # a label beyond it is a mistake, and naming so many classes would fill the memory


def _text(name: Any) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else str(name)


def _flat_labels(labels: np.ndarray, where: str) -> np.ndarray:
    """Return labels, integers or strings (N,), from any of the forms that :func:`load` knows."""
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
        raise DataError(f"{where} must be integers (N,), one-hot (N, K) or strings, not {_describe(labels)}", remedy)
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
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror  # without the path, which the name is or says better
        raise DataError(f"{name}: cannot be read: {reason}", remedy) from error


def read_npz(path: Path, choose: Callable[[Collection[str]], dict[str, str]]) -> dict[str, np.ndarray]:
    """Read the arrays that ``choose`` names: it gets the names of all, and returns those to read by what to call them.

    Nothing is allocated that the file could not fill. Raises DataError, with path and reason, if they cannot be read.
    """
    with reading(str(path), _NPZ_REMEDY), open_regular(path) as file:
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
                with reading(f"{path}: {stored}", _NPZ_REMEDY), archive.open(member) as f:
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
        raise ValueError("Python objects are never read; save numbers, or strings: np.asarray(labels, np.str_)")
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
    """Raise ValueError if ``size`` bytes do not fit the free memory, or cannot be ``packed`` bytes of DEFLATE."""
    if size > (free := available_memory()) // 2:  # the rest is for what is computed with them
        raise ValueError(f"it needs {size:,} bytes of memory, more than half of the {free:,} that are free")
    if packed is not None and size > packed * _MOST_INFLATED:
        raise ValueError(f"{packed:,} packed bytes cannot hold the {size:,} declared")


_MOST_INFLATED = 1032  # RFC 1951: a match of 258 bytes takes two bits at least
