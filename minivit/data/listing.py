"""Which files of a folder are its images, and of which split and class each is. None is decoded."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from minivit.data.dataset import LAYOUT, SPLITS
from minivit.data.images import is_image
from minivit.data.name_list import Names, Paths
from minivit.data.reading import reading
from minivit.data.tar import Member, Members
from minivit.errors import DataError

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


@dataclass(frozen=True)
class Listed(Sequence[tuple[Path | Member, int]]):
    """Image files, each with its class: ``paths`` and ``labels``, int64 (N,)."""

    paths: Paths | Members
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: Any) -> Any:
        return self.paths[i], int(self.labels[i])

    def take(self, indices: np.ndarray) -> Listed:
        """Return those at ``indices``, in that order."""
        return Listed(self.paths.take(indices), self.labels[indices])


@dataclass(frozen=True)
class Listing:
    """The image files of a folder: ``files[split]``, of each split it has, are (path, index into ``classes``).

    ``how`` says which folders are which; ``remark``, what in there is not read, or may not be what was meant. Of a
    folder of shards the paths are members of these: :func:`~minivit.data.shards.list_shards`.
    """

    path: Path
    classes: tuple[str, ...]
    files: dict[str, Listed]
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
        trained = set(self.files["train"].labels.tolist())
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
    """Find the image files of a folder, split and class: see :func:`~minivit.data.folder.load_folder`. None is decoded.

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
    trees = {split: {f.name: _below(path, f) for f in _subfolders(root)} for split, root in roots.items()}
    classes = tuple(sorted(set().union(*trees.values())))
    if not classes:
        files = _below(path, path)
        return Listing(path, ("",), {"train": Listed(files, np.zeros(len(files), np.int64))}, "")
    how = " and ".join(f"{root.name}/" for root in roots.values())
    if len(roots) == 1:
        parts = {name: _parted(files, roots["train"], tested) for name, files in trees["train"].items()}
        trees = {split: {name: part[i] for name, part in parts.items()} for i, split in enumerate(("train", "test"))}
        how = f"test: {TEST_SHARE:.0%} of each class, by a hash of the files' names"
    elif "test" not in roots:
        how += ": no test images"
    return Listing(path, classes, {split: _listed(path, tree, classes) for split, tree in trees.items()}, how, remark)


def _below(path: Path, folder: Path) -> Paths:
    """Return the image files of ``folder`` by their names below ``path``."""
    start = len(str(path / "x")) - 1
    return Paths(path, (str(file)[start:] for file in image_files(folder)))


def _listed(path: Path, tree: dict[str, Paths], classes: tuple[str, ...]) -> Listed:
    """Return the files of all classes, those of the first one first."""
    counts = [len(tree.get(name, ())) for name in classes]
    names = Names(chain.from_iterable(tree[name].names for name in classes if name in tree))
    return Listed(Paths(path, names), np.repeat(np.arange(len(classes)), counts))


def _parted(files: Paths, root: Path, tested: Callable[[list[int]], int]) -> tuple[Paths, Paths]:
    """Part a class's files, below ``root``, into those of "train" and those of "test": see :func:`lowest`."""
    start = len((root / "x").as_posix()) - 1
    held = lowest((file.as_posix()[start:] for file in files), tested)
    return files.take(np.flatnonzero(~held)), files.take(np.flatnonzero(held))


def lowest(names: Iterable[str], tested: Callable[[list[int]], int] | None = None) -> np.ndarray:
    """Return which of the ``names`` of a class are "test", bool (N,): a fifth, or ``tested``, of the lowest hashes."""
    hashes = [int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") for name in names]
    # a single file is one to train on
    count = min(max((tested or _a_fifth)(hashes), 1), len(hashes) - 1) if hashes else 0
    found = np.zeros(len(hashes), bool)
    found[sorted(range(len(hashes)), key=hashes.__getitem__)[:count]] = True
    return found


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
