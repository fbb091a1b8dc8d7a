"""The data sets that there are: by name, or by what lies at a path. What knows all the formats."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from minivit.data.dataset import LAYOUT, SPLITS, Dataset, no_split
from minivit.data.formats import find_files, load_files
from minivit.data.listing import Listing, list_folder
from minivit.data.npz import load_npz, splits_in
from minivit.data.reading import NPZ_REMEDY, reading
from minivit.data.shards import list_shards, shards_in
from minivit.data.tar import is_tar
from minivit.errors import DataError, unknown_name
from minivit.files import open_regular, user_cache

NAMES = ("digits", "mnist", "fashion-mnist", "cifar-10", "cifar-100")
"""The data sets that have a name. All but the digits are looked for in the data home: see :func:`data_home`."""


def load(
    name: str | PathLike[str],
    split: str = "train",
    size: tuple[int, int] | None = None,
    channels: int = 3,
    bad_images: str = "stop",
    layout: int = LAYOUT,
    bar: Callable[..., Any] | None = None,
    fit: str = "crop",
    stream: bool = False,
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
      is warned of, and of those to train on no two may have one name;
    - a folder of the four idx files of MNIST or of sets like it, .gz or plain;
    - a folder of CIFAR's binary files or of its Python batches, or a folder whose only subfolder is such a one;
    - a tar archive, or a folder of some, in WebDataset's layout: :func:`~minivit.data.shards.list_shards`;
    - any other folder is one of image files: :func:`~minivit.data.folder.load_folder`.

    Image files, in archives or not, are brought to ``size``, (height, width), as ``fit`` says
    (:func:`~minivit.data.fit.fitted`), and ``channels``; one that cannot be read makes it "stop" or is left out, by
    ``bad_images`` "skip". With ``stream`` they are decoded when wanted, even if all would fit into a quarter of the
    memory. ``bar=tqdm`` shows how far the reading is. All other sets have a size of their own and leave these alone.

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
        from minivit.data.folder import load_folder  # late: most data sets are none

        return load_folder(path, split, size, channels, bad_images, layout, bar, fit, stream)
    if kind == "shards":
        from minivit.data.folder import load_shards

        return load_shards(path, split, size, channels, bad_images, bar, fit, stream)
    if split == "val":
        raise no_split(name, split)
    return replace(load_files(kind, path, split), name=str(name))


def splits_of(name: str | PathLike[str], layout: int = LAYOUT) -> tuple[str, ...]:
    """Return which of :data:`SPLITS` a data set has: see :func:`load`. No pixel is read."""
    kind, path = _find(name)
    if kind == "npz":
        return splits_in(path, layout)
    if (found := listing(name, layout)) is not None:
        return tuple(found.files)
    return "train", "test"


def listing(name: str | PathLike[str], layout: int = LAYOUT) -> Listing | None:
    """Return which files of a folder or of shards are its images, None for other data sets. None is decoded."""
    kind, path = _find(name)
    return list_folder(path, layout) if kind == "folder" else list_shards(path) if kind == "shards" else None


def kind_of(name: str | PathLike[str]) -> str:
    """Return what :func:`load` finds at ``name``: one of :data:`NAMES`, "npz", "shards", or "folder" (of images).

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
    return user_cache()


def _find(name: str | PathLike[str]) -> tuple[str, Path]:
    """Return the kind of a data set, and its file or the folder that holds its files."""
    if not str(name):
        raise DataError("the data set has no name", f"name a folder, FILE.npz or one of {', '.join(NAMES)}")
    if name == "digits":
        return name, Path(__file__).parent / "digits" / "digits.npz"
    if isinstance(name, str) and name in NAMES:
        folder = data_home() / name
        with reading(str(folder), "check its permissions"):
            missing = not folder.is_dir() or all(path.name.startswith(".") for path in folder.iterdir())
        if missing:  # or a download has been broken off
            remedy = f"download it: minivit data get {name}; or give its folder instead"
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
            return find_files(path) or ("shards" if shards_in(path) else "folder", path)
        if path.exists():
            with open_regular(path) as file:
                if is_zipfile(file):
                    return "npz", path
            if is_tar(path):
                return "shards", path
            remedy = f"{NPZ_REMEDY}; or give a folder: of images, of tar shards, or of files of MNIST or CIFAR"
            raise DataError(f"{path}: not a NumPy archive, and no tar archive", remedy)
    if path.suffix or len(path.parts) > 1 or not isinstance(name, str):
        raise DataError(f"{path}: no such file or folder", "check the path")
    raise unknown_name("data set", name, NAMES, error=DataError)
