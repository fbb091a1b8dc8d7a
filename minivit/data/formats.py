"""The formats that published data sets come in, recognised by the files that a folder holds."""

from __future__ import annotations

from pathlib import Path

from minivit.data.cifar import cifar_in
from minivit.data.dataset import Dataset
from minivit.data.idx import idx_in, load_idx
from minivit.data.reading import reading


def find_files(folder: Path, depth: int = 2) -> tuple[str, Path] | None:
    """Return the kind of data set ("mnist", …) and the folder that holds its files, or None for any other folder.

    It is ``folder`` itself, or its only subfolder, ``depth`` levels down at most. No file is opened.
    """
    if kind := idx_in(folder):
        return kind, folder
    if cifar := cifar_in(folder):
        return cifar.kind, folder
    with reading(str(folder), "check its permissions"):
        below = [sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith(".")]
    return find_files(below[0], depth - 1) if depth and len(below) == 1 else None


def load_files(kind: str, folder: Path, split: str) -> Dataset:
    """Load a split of what :func:`find_files` has found. Raises DataError, naming the file, if it cannot be used."""
    cifar = cifar_in(folder)
    return cifar.load(folder, split) if cifar else load_idx(kind, folder, split)
