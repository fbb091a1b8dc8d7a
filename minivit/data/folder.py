"""Folders of image files, a folder for each class: held in memory where they fit, else decoded when they are wanted."""

from __future__ import annotations

import hashlib
import math
import os
import threading
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np

from minivit.backend import available_memory, cpu_cores
from minivit.data.datasets import LAYOUT, SPLITS, Dataset, no_split, reading
from minivit.data.images import decode, fitted, is_image
from minivit.errors import ConfigError, DataError, unknown_name

SIZE = (64, 64)
"""The height and width that pictures are brought to unless others are asked for."""

FIT = "crop"
"""How they are brought to it: see :func:`~minivit.data.images.read_image`."""

TEST_SHARE = 0.2
"""This share of each class is the split "test" where a folder does not part its files itself."""

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
"""What a split's folder may be called, in capitals or not."""

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".bmp", ".dib", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".apng", ".heic", ".heif", ".avif", ".jp2", ".tga", ".ico", ".svg"),
)
"""A file called so is meant to be a picture: if it cannot be read as one, that is said and not passed over."""

DEADLINE = 60.0
"""Seconds without a file done after which reading gives up: a disk that is gone keeps whoever reads from it waiting."""


def load_folder(
    path: str | PathLike[str],
    split: str,
    size: tuple[int, int] | None = None,
    channels: int = 3,
    bad: str = "stop",
    layout: int = LAYOUT,
) -> Dataset:
    """Load a folder of image files, such as ``path/train/cat/1.jpg`` and ``path/test/cat/2.jpg``.

    The folders' names are the classes, in the order of the alphabet. Folders called as in :data:`SPLIT_FOLDERS` are the
    splits: beside ``train`` may be "val", to validate with, and "test". Where there is neither, or only ``path/cat``,
    ``path/dog`` and so on, a fifth of each class is "test", to within one image: the files whose names have the lowest
    hashes (SHA-256), so that few change sides when others come or go. A single file is one to train on. Images are
    recognised by what they hold; hidden files and files that are no pictures are passed over. A warning says which
    folders and pictures beside those read are not read.

    With ``layout`` 1, as in version 0.1.0, the split "test" is ``test``, ``val`` or ``valid``, or the files whose hash
    is in the lowest fifth of all hashes there are; there is no "val".

    Each becomes uint8 (channels, height, width) of ``size``, by default 64 × 64: the largest part of these proportions
    is cut from its middle and scaled; see :func:`~minivit.data.images.read_image` for its colours. That comes before
    any augmentation: what lies outside that part is never seen, and random crops of it are enlarged, with no more
    detail than ``size`` has. The images are held in memory if they take less than a quarter of it, else decoded
    whenever they are asked for: :class:`ImageFiles`.

    Every file is decoded once here. If some cannot be, ``bad="stop"`` raises DataError, and ``"skip"`` leaves them out
    with a warning that lists them. Raises DataError also for a folder with fewer than two classes, or with one that has
    no images to train on; for a split that it does not have, or several folders for one; for class folders called like
    splits; and where for :data:`DEADLINE` seconds nothing comes from the disk.
    """
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS, error=DataError)
    if bad not in ("stop", "skip"):
        raise ConfigError(f"bad images can be left out or not, not {bad!r}", "use bad='stop' or 'skip'")
    size = SIZE if size is None else size
    if len(size) != 2 or min(size) < 1:
        raise ConfigError(f"images cannot be of size {size}", "give (height, width), at least 1 each")
    found = list_folder(path, layout)
    if problem := found.problem():
        raise problem
    if split not in found.files:
        raise no_split(path, split)
    if found.remark:
        warnings.warn(f"{path}: {found.how}; {found.remark}", stacklevel=2)
    files = ImageFiles([file for file, _ in found.files[split]], size, channels)
    labels = np.array([label for _, label in found.files[split]], np.int64)
    if not len(files):
        raise DataError(f"{path}: no image files for the split {split!r}", "add some")
    held = np.empty(files.shape, np.uint8) if files.nbytes <= available_memory() // 4 else None
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

    in_threads(read, files.paths, f"reading {path}")
    if reasons and bad == "stop":
        count = f"{len(reasons):,} of {len(files):,} image files"
        remedy = f"see all: minivit data {path}; repair or remove them, or leave them out: --bad-images skip"
        raise DataError(f"{path}: {count} cannot be read; the first: {reasons[min(reasons)]}", remedy)
    if reasons:
        listed = "\n  ".join(reasons[i] for i in sorted(reasons))
        warnings.warn(f"{path}: {len(reasons):,} image files are left out:\n  {listed}", stacklevel=2)
    if animated:
        first = files.paths[min(animated)]
        what = f"{path}: {len(animated):,} files hold more than one picture, such as {first}: the first one is read"
        warnings.warn(what, stacklevel=2)
    good = np.array([i for i in range(len(files)) if i not in reasons], np.int64)
    if split == "train" and (lost := set(range(len(found.classes))) - set(labels[good].tolist())):
        what = f"{path}: no image of the class {found.classes[min(lost)]!r} can be read"
        raise DataError(what, "repair some, or remove the class")
    images = files.take(good) if held is None else held if len(good) == len(held) else held[good]
    return Dataset(cast(np.ndarray, images), labels[good], found.classes, str(path), fit=FIT)


# ---- which files -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The image files of a folder: ``files[split]``, of each split it has, are (path, index into ``classes``).

    ``how`` says which folders are which; ``remark``, what in there is not read, or may not be what was meant.
    """

    path: Path
    classes: tuple[str, ...]
    files: dict[str, list[tuple[Path, int]]]
    how: str
    remark: str = ""

    def problem(self) -> DataError | None:
        """Return why no model can be trained on this, or None."""
        if not any(self.files.values()):
            return DataError(f"{self.path}: no image files", "put them into a folder for each class")
        if self.classes == ("",):
            return DataError(f"{self.path}: the images are in no class", "put them into a folder for each class")
        if len(self.classes) == 1:
            what = f"{self.path}: there is only one class, {self.classes[0]!r}"
            inside = _root_of_classes(self.path / self.classes[0])
            remedy = "make a folder for each class, with images in it"
            return DataError(what, f"give the folder that the classes are in: {inside}" if inside else remedy)
        trained = {label for _, label in self.files["train"]}
        if without := set(range(len(self.classes))) - trained:
            name = self.classes[min(without)]
            what, remedy = (
                f"{self.path}: the class {name!r} has no images to train on",
                "add some, or remove its folder",
            )
            alike = [c for i, c in enumerate(self.classes) if i in trained and _folded(c) == _folded(name)]
            if alike:
                what, remedy = f"{what}, but {alike[0]!r} has", "call the class the same in all splits"
            return DataError(what, remedy)
        return None


def list_folder(path: str | PathLike[str], layout: int = LAYOUT) -> Listing:
    """Find the image files of a folder, split and class: see :func:`load_folder`. None is decoded.

    Images that lie in the folder itself are all in "train", and of the one class "". Raises DataError if there is no
    such folder, one cannot be listed, or its folders could be splits as well as classes.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError(f"{path}: {'not a' if path.exists() else 'no such'} folder", "check the path")
    with reading(str(path), "check its permissions"):
        roots, remark = _roots(path) if layout > 1 else _roots_of_version_1(path)
        return _list(path, roots, remark, _a_fifth if layout > 1 else _the_lowest_fifth)


def _roots(path: Path) -> tuple[dict[str, Path], str]:
    """Return the folder of each split, which holds its class folders, and a remark on what else is there."""
    named = {split: [f for f in _subfolders(path) if f.name.lower() in SPLIT_FOLDERS[split]] for split in SPLITS}
    roots = {split: [f for f in folders if _subfolders(f)] for split, folders in named.items()}
    if several := next((folders for folders in roots.values() if len(folders) > 1), None):
        what = f"{path}: {several[0].name}/ and {several[1].name}/ are called like the same split"
        raise DataError(what, "put their images together, or rename one")
    if not roots["train"]:
        _refuse_split_names(path, [f for folders in named.values() for f in folders])
        return {"train": path}, _not_read([_loose(path)] if _subfolders(path) else []) or _nested(path)
    found = {split: folders[0] for split, folders in roots.items() if folders}
    unread = [f"{f.name}/" for f in _subfolders(path) if f not in found.values() and image_files(f)]
    return found, _not_read([*unread, *map(_loose, (path, *found.values()))])


def _not_read(parts: list[str]) -> str:
    return f"not read: {', '.join(filter(None, parts))}" if any(parts) else ""


def _nested(path: Path) -> str:
    """Say so if all classes hold only folders: they may be those of several data sets, and not classes."""
    folders = [folder for folder in _subfolders(path) if image_files(folder)]
    if len(folders) < 2 or any(_loose(folder) for folder in folders):
        return ""
    inside = _root_of_classes(folders[0])
    return f"its classes hold only folders; if these are the classes, give {inside}" if inside else ""


def _refuse_split_names(path: Path, folders: list[Path]) -> None:
    """Raise DataError for folders beside the classes, or instead of them, that are called like splits."""
    if not (folders := [folder for folder in folders if image_files(folder)]):
        return
    names = " and ".join(f"{folder.name}/" for folder in folders)
    if others := [f.name for f in _subfolders(path) if f not in folders]:
        what = f"{path}: {names} could be a split, or a class like {others[0]}/"
        remedy = f"put the classes to train on into {path / 'train'}, a folder each; or rename what is no split"
    elif loose := next(filter(None, map(_loose, folders)), ""):
        what = f"{path}: {names} {'is a split' if len(folders) == 1 else 'are splits'}, but there are {loose}"
        remedy = f"put them into a folder for each class, such as {folders[0] / 'cat'}"
    else:
        what, remedy = f"{path}: {names}, but no folder to train on", f"call it {path / 'train'}"
    raise DataError(what, remedy)


def _loose(folder: Path) -> str:
    """Say which images lie in ``folder`` itself and so in no class; "" if none do."""
    with os.scandir(folder) as entries:
        files = sorted(Path(e.path) for e in entries if not e.name.startswith(".") and not e.is_dir())
    found = [file for file in files if is_image_file(file)]
    return f"{len(found):,} image{'s' * (len(found) > 1)} in no class, such as {found[0]}" if found else ""


def _root_of_classes(path: Path) -> Path | None:
    """Return the folder, ``path`` or one in it, where the class folders or splits seem to be, or None."""
    while len(below := _subfolders(path)) == 1 and not _loose(path) and not _named_like_splits(below):
        path = below[0]
    return path if below else None


def _named_like_splits(folders: list[Path]) -> bool:
    return any(f.name.lower() in names for f in folders for names in SPLIT_FOLDERS.values())


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()  # macOS writes the letters of some names in two parts


def _roots_of_version_1(path: Path) -> tuple[dict[str, Path], str]:
    """Return what :func:`_roots` does, as version 0.1.0 did."""
    if not _subfolders(path / "train"):
        return {"train": path}, ""
    tests = [path / name for name in ("test", "val", "valid") if _subfolders(path / name)][:1]
    roots = dict(zip(("train", "test"), [path / "train", *tests], strict=False))
    return roots, _not_read([f"{f.name}/" for f in _subfolders(path) if f not in roots.values() and _subfolders(f)])


def _list(path: Path, roots: dict[str, Path], remark: str, tested: Callable[[list[int]], int]) -> Listing:
    trees = {split: {f.name: image_files(f) for f in _subfolders(root)} for split, root in roots.items()}
    classes = tuple(sorted(set().union(*trees.values())))
    if not classes:
        return Listing(path, ("",), {"train": [(file, 0) for file in image_files(path)]}, "")
    how = " and ".join(f"{root.name}/" for root in roots.values())
    if len(roots) == 1:
        parts = {name: _parted(files, roots["train"], tested) for name, files in trees["train"].items()}
        trees = {split: {name: part[i] for name, part in parts.items()} for i, split in enumerate(("train", "test"))}
        how = f"test: {TEST_SHARE:.0%} of each class, by a hash of the files' names"
    elif "test" not in roots:
        how += ": no test images"
    files = {
        split: [(file, i) for i, name in enumerate(classes) for file in tree.get(name, [])]
        for split, tree in trees.items()
    }
    return Listing(path, classes, files, how, remark)


def _parted(files: list[Path], root: Path, tested: Callable[[list[int]], int]) -> tuple[list[Path], list[Path]]:
    """Part a class's files, below ``root``, into those of "train" and those, with the lowest hashes, of "test"."""
    names = {file: os.fsencode(file.relative_to(root).as_posix()) for file in files}
    hashes = {file: int.from_bytes(hashlib.sha256(name).digest()[:8], "big") for file, name in names.items()}
    count = min(max(tested([*hashes.values()]), 1), len(files) - 1) if files else 0  # a single file is one to train on
    lowest = set(sorted(files, key=lambda file: hashes[file])[:count])
    return [file for file in files if file not in lowest], [file for file in files if file in lowest]


def _a_fifth(hashes: list[int]) -> int:
    return round(TEST_SHARE * len(hashes))


def _the_lowest_fifth(hashes: list[int]) -> int:
    """Count what version 0.1.0 tested with: about a fifth, but of few files often none or many."""
    return sum(value < TEST_SHARE * 2**64 for value in hashes)


def _subfolders(path: Path | None) -> list[Path]:
    if path is None or not path.is_dir():
        return []
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def visible_files(folder: Path) -> list[Path]:
    """Return the files in a folder and in those below it, in order, but for hidden ones."""

    def refuse(error: OSError) -> None:
        raise error

    found, seen = [], set()
    for root, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(root)) in seen:  # links may lead in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(root, name) for name in sorted(names) if not name.startswith(".")]
    return found


def image_files(folder: Path) -> list[Path]:
    """Return those of the :func:`visible_files` that are image files."""
    return [file for file in visible_files(folder) if is_image_file(file)]


def is_image_file(file: Path) -> bool:
    """Tell whether a file is a picture, or is called like one: see :data:`SUFFIXES`."""
    if file.exists() and not file.is_file():  # to open a pipe would wait for its writer for ever
        return False
    return file.suffix.lower() in SUFFIXES or is_image(file)


# ---- files as an array -----------------------------------------------------------------------------------------------


class ImageFiles:
    """Image files as if they were an array, uint8 (N, C, H, W): what is indexed is decoded then, by several threads.

    An index is an integer, a slice, or an array of integers. Raises DataError, naming the file, for one that has gone
    or been damaged since.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, paths: Sequence[Path], size: tuple[int, int], channels: int) -> None:
        self.paths = paths
        self.shape = (len(paths), channels, *size)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that all images would take."""
        return self.size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> np.ndarray:
        chosen = np.arange(len(self))[index]
        out = np.empty((chosen.size, *self.shape[1:]), np.uint8)

        def read(i: int) -> None:
            out[i] = self.read(int(chosen.flat[i]))[0]

        in_threads(read, [self.paths[i] for i in chosen.flat])
        return out.reshape(*chosen.shape, *self.shape[1:])  # (n, C, H, W), or (C, H, W) for an integer

    def take(self, indices: np.ndarray, axis: int = 0) -> ImageFiles:
        """Return the files at ``indices``, in that order; none is decoded. There is no other ``axis`` than 0."""
        return ImageFiles([self.paths[i] for i in indices], self.shape[2:], self.shape[1])

    def read(self, i: int) -> tuple[np.ndarray, bool]:
        """Decode a file: (uint8 (C, H, W), whether it holds further pictures)."""
        picture = decode(self.paths[i], self.shape[1], at_least=self.shape[2:])
        return fitted(picture.page, self.shape[2:], FIT), picture.animated


def in_threads(work: Callable[[int], None], paths: Sequence[Path], title: str = "") -> None:
    """Call ``work(i)`` for the place of every path, on a thread for each core; raise the first error that one meets.

    A thread takes the next number when it is done with its last: there is no queue to fill up or to wait on. After an
    error, or Ctrl-C, no further number is taken. A ``title`` shows a bar where it takes more than a second.

    Raises DataError, naming the files that are being read, if none is done within :data:`DEADLINE` seconds. A thread
    that waits for a disk cannot be stopped: it is left behind, and does not keep Python from ending.
    """
    numbers, lock, stop = iter(range(len(paths))), threading.Lock(), threading.Event()
    errors: list[BaseException] = []
    busy: set[int] = set()
    done = 0
    bar = _bar(title, len(paths)) if title else None

    def run() -> None:
        nonlocal done
        while not stop.is_set():
            with lock:
                i = next(numbers, None)
                if i is None:
                    return
                busy.add(i)
            try:
                work(i)
            except BaseException as error:  # it belongs to whoever waits for the threads
                errors.append(error)
                stop.set()
            with lock:
                busy.remove(i)
                done += 1
                if bar is not None:
                    bar.update()

    threads = [threading.Thread(target=run, daemon=True) for _ in range(min(cpu_cores(), len(paths)))]
    waits, seen = 0, 0
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive() and waits < _WAITS:
                thread.join(DEADLINE / _WAITS)
                waits, seen = (waits + 1 if done == seen else 0), done
    finally:
        stop.set()
        if bar is not None:
            bar.close()
    if errors:
        raise errors[0]
    with lock:
        stalled = ", ".join(str(paths[i]) for i in sorted(busy))
    if stalled:
        what = f"no file could be read for {DEADLINE:g} seconds; they wait for {stalled}"
        raise DataError(what, "check the disk or the network that they are on, then try again")


_WAITS = 60  # many short ones: while the process itself is suspended, no more than one of them goes by


def _bar(title: str, total: int) -> Any:
    from tqdm import tqdm  # late: to import it takes a while

    return tqdm(total=total, desc=title, delay=1, leave=False, disable=None)  # None: where nobody looks
