"""Image files, in a folder for each class or in tar shards: held in memory if they fit, else decoded when wanted."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np

from minivit.backend import available_memory
from minivit.data.dataset import LAYOUT, SPLITS, Dataset, no_split
from minivit.data.file_array import FIT, ImageFiles, in_threads
from minivit.data.listing import Listing, list_folder
from minivit.data.shards import list_shards
from minivit.data.tar import Member
from minivit.errors import ConfigError, DataError, unknown_name

SIZE = (64, 64)
"""The height and width that pictures are brought to unless others are asked for."""


def load_folder(
    path: str | PathLike[str],
    split: str,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    bad: str = "stop",
    layout: int = LAYOUT,
    bar: Callable[..., Any] | None = None,
    fit: str = FIT,
    stream: bool = False,
) -> Dataset:
    """Load a folder of image files, such as ``path/train/cat/1.jpg`` and ``path/test/cat/2.jpg``.

    The folders' names are the classes, in the order of the alphabet. Folders called as in
    :data:`~minivit.data.listing.SPLIT_FOLDERS` are the splits: beside ``train`` may be "val", to validate with, and
    "test". Where there is neither, or only ``path/cat``, ``path/dog`` and so on, a fifth of each class is "test", to
    within one image: the files whose names have the lowest hashes (SHA-256), so that few change sides when others come
    or go. A single file is one to train on. Images are recognised by what they hold; hidden files and files that are no
    pictures are passed over. A warning says which folders and pictures beside those read are not read.

    With ``layout`` 1, as in version 0.1.0, the split "test" is ``test``, ``val`` or ``valid``, or the files whose hash
    is in the lowest fifth of all hashes there are; there is no "val".

    Each becomes uint8 (channels, height, width) of ``size``, by default 64 × 64: the largest part of these proportions
    is cut from its middle and scaled, or what else ``fit`` says (:func:`~minivit.data.fit.fitted`); see
    :func:`~minivit.data.images.read_image` for its colours. That comes before
    any augmentation: what lies outside that part is never seen, and random crops of it are enlarged, with no more
    detail than ``size`` has. The images are held in memory if they take less than a quarter of it, else, or with
    ``stream``, decoded whenever they are asked for, to the same bits: :class:`~minivit.data.file_array.ImageFiles`.

    Every file is decoded once here; ``bar=tqdm`` shows how far that is. If some cannot be, ``bad="stop"`` raises
    DataError, and ``"skip"`` leaves them out with a warning that lists them. Raises DataError also for a folder with
    fewer than two classes, or with one that has no images to train on; for a split that it does not have, or several
    folders for one; for class folders called like splits; and where for :data:`~minivit.data.file_array.DEADLINE`
    seconds nothing comes from the disk.
    """
    _check_arguments(split, size, bad)
    found = list_folder(path, layout)
    if problem := found.problem():
        raise problem
    return _load_listed(found, split, size or SIZE, channels, bad, bar, fit, stream)


def load_shards(
    path: str | PathLike[str],
    split: str,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    bad: str = "stop",
    bar: Callable[..., Any] | None = None,
    fit: str = FIT,
    stream: bool = False,
) -> Dataset:
    """Load tar shards: what is in them, see :func:`~minivit.data.shards.list_shards`; the rest, :func:`load_folder`."""
    _check_arguments(split, size, bad)
    found = list_shards(path)
    if problem := found.problem():
        raise problem
    return _load_listed(found, split, size or SIZE, channels, bad, bar, fit, stream)


def _load_listed(
    found: Listing,
    split: str,
    size: tuple[int, int],
    channels: int,
    bad: str,
    bar: Callable[..., Any] | None,
    fit: str,
    stream: bool,
) -> Dataset:
    path = found.path
    if split not in found.files:
        raise no_split(path, split)
    if found.remark:
        warnings.warn(f"{path}: {found.how}; {found.remark}", stacklevel=3)
    listed = found.files[split]
    files, labels = ImageFiles(listed.paths, size, channels, fit), listed.labels
    if not len(files):
        raise DataError(f"{path}: no image files for the split {split!r}", "add some")
    held = None if stream or files.nbytes > available_memory() // 4 else np.empty(files.shape, np.uint8)
    reasons, animated = _decode(files, held, f"reading {path}", bar)
    if reasons and bad == "stop":
        raise _unreadable(path, split, len(files), reasons)
    _warn_of(path, [reasons[i] for i in sorted(reasons)], [files.paths[i] for i in sorted(animated)])
    good = np.setdiff1d(np.arange(len(files)), np.array([*reasons], np.int64))
    if split == "train" and (lost := set(labels.tolist()) - set(labels[good].tolist())):
        what = f"{path}: no image of the class {found.classes[min(lost)]!r} can be read"
        raise DataError(what, "repair some, or remove the class")
    images = files.take(good) if held is None else held if len(good) == len(held) else held[good]
    names = listed.paths.names.take(good)
    return Dataset(cast(np.ndarray, images), labels[good], found.classes, str(path), names, fit=fit)


def _check_arguments(split: str, size: tuple[int, int] | None, bad: str) -> None:
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS, error=DataError)
    if bad not in ("stop", "skip"):
        raise ConfigError(f"bad images can be left out or not, not {bad!r}", "use bad='stop' or 'skip'")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ConfigError(f"images cannot be of size {size}", "give (height, width), at least 1 each")


def _decode(
    files: ImageFiles, held: np.ndarray | None, title: str, bar: Callable[..., Any] | None
) -> tuple[dict[int, str], set[int]]:
    """Decode every file once, into ``held`` if given: return why some cannot be, and which hold further pictures."""
    reasons: dict[int, str] = {}
    animated: set[int] = set()

    def read(i: int) -> None:
        try:
            pixels, more = files.read(i)
        except DataError as error:
            reasons[i] = error.what
            return
        if more:
            animated.add(i)
        if held is not None:
            held[i] = pixels

    in_threads(read, files.paths, title, bar)
    return reasons, animated


def _unreadable(path: str | PathLike[str], split: str, total: int, reasons: dict[int, str]) -> DataError:
    what = f"{path}: in the split {split!r} {len(reasons):,} of {total:,} image files cannot be read"
    remedy = f"see all: minivit data {path}; repair, convert or remove them, or leave them out: --bad-images skip"
    return DataError(f"{what}; the first: {reasons[min(reasons)]}", remedy)


def _warn_of(path: str | PathLike[str], left_out: list[str], animated: list[Path | Member]) -> None:
    if left_out:
        listed = "\n  ".join(left_out)
        warnings.warn(f"{path}: {len(left_out):,} image files are left out:\n  {listed}", stacklevel=4)
    if animated:
        some = f"{len(animated):,} files hold more than one picture, such as {animated[0]}"
        warnings.warn(f"{path}: {some}: the first one is read", stacklevel=4)
