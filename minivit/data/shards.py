"""Tar shards as WebDataset lays them out: files that follow each other and share a key are a sample.

``a/17.jpg`` and ``a/17.cls`` are the sample ``a/17``: the key goes to the first dot of the file's name, what is behind
that says what the file holds (Aizman, Maltby and Breuel 2019, "High Performance I/O For Large Scale Deep Learning";
the webdataset package's ``base_plus_ext`` and ``group_by_keys``). The archives are read where they lie: all headers
once, in order, which says where each sample is, and then any sample at once. So an epoch is shuffled as a whole and by
key, as of any other data set: there is no buffer of samples to shuffle within, whose content a resumed run would have
to restore.
"""

from __future__ import annotations

import functools
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minivit.data.listing import SPLIT_FOLDERS, SUFFIXES, TEST_SHARE, Listed, Listing, lowest
from minivit.data.name_list import Names
from minivit.data.reading import reading
from minivit.data.tar import Entry, Members, Stamp, entries, stamp
from minivit.errors import DataError, value_text
from minivit.files import open_regular

CLASS_FILES = ("classes.txt", "classes.json")
"""Files beside the shards that may name the classes: a line each, or a list, or a table of names and numbers."""

MOST_CLASSES = 1_000_000
LABEL_KEYS = ("label", "cls", "class")
_MOST_LABEL = 1 << 20  # bytes of a .cls or .json
_MOST_NAMES = 1 << 26  # bytes of a file of classes
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_AGAIN = "write the files of a sample one after the other: KEY.jpg, then KEY.cls, as webdataset's TarWriter does"


class ShardListing(Listing):
    """The samples of some shards: a subset of them may lack a class, which is remarked on."""

    def problem(self) -> DataError | None:
        """Return why no model can be trained on this, or None."""
        if len(self.classes) > 1:
            return None
        return DataError(f"{self.path}: there is only one class, {self.classes[0]!r}", "give samples of two, at least")


def shards_in(folder: Path) -> list[str]:
    """Return the archives of a folder of shards by their names below it, or [] for any other folder.

    They lie in it, or in folders called like splits; it has no other folders, which would be classes. Compressed ones
    count: who opens them is told to unpack them.
    """
    with reading(str(folder), "check its permissions"):
        below = [sub for sub in sorted(folder.iterdir()) if sub.is_dir() and not sub.name.startswith(".")]
        if any(not _split_folder(sub.name) or _has_folders(sub) for sub in below):
            return []
        places = [folder, *below]
        return [
            str(file.relative_to(folder)) for place in places for file in sorted(place.iterdir()) if _is_shard(file)
        ]


def list_shards(path: str | PathLike[str]) -> Listing:
    """Find the samples of a folder of shards, or of a single one, split and class. No picture is decoded.

    The split is what the folder around a shard is called, or a word in its name, such as ``imagenet-train-000017.tar``:
    see :data:`~minivit.data.listing.SPLIT_FOLDERS`. Shards without such a word are "train", and so is one that
    is given alone. Where there is neither "val" nor "test", a fifth of each class is "test": the samples whose names
    have the lowest hashes.

    A label is what ``KEY.cls`` holds, or "label", "cls" or "class" in ``KEY.json``: a number from 0, or the name of a
    class. One of the :data:`CLASS_FILES` beside the shards names the classes in order; without it they are numbers, or
    the names in the order of the alphabet.

    Raises DataError, with archive and member, for a damaged or compressed archive, for what
    :func:`~minivit.data.tar.entries` refuses, and for samples without a picture, with several, or without a label.
    """
    path = Path(path)
    with reading(str(path), "check the path"):
        root = path if path.is_dir() else path.parent
        names = shards_in(path) if path.is_dir() else [path.name]
        return _indexed(path, root, tuple((name, stamp(root / name)) for name in names), _class_file(root))


def _split_folder(name: str) -> str:
    return next((split for split, names in SPLIT_FOLDERS.items() if name.lower() in names), "")


def _split_called(name: str) -> str:
    """Return the split that a word in a shard's name stands for, or "". Raises DataError for two."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    found = [split for split, names in SPLIT_FOLDERS.items() if words & set(names)]
    if len(found) > 1:
        raise DataError(f"{name} is called like the splits {found[0]!r} and {found[1]!r}", "rename it")
    return found[0] if found else ""


def _has_folders(folder: Path) -> bool:
    return any(sub.is_dir() and not sub.name.startswith(".") for sub in folder.iterdir())


def _is_shard(file: Path) -> bool:
    name = file.name.lower()
    return name.endswith((".tar", *_PACKED)) and not name.startswith(".") and file.is_file()


def _class_file(root: Path) -> tuple[str, Stamp] | None:
    return next(((name, stamp(root / name)) for name in CLASS_FILES if (root / name).is_file()), None)


# ---- the index -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # a run asks for each split, and which there are
def _indexed(
    path: Path, root: Path, archives: tuple[tuple[str, Stamp], ...], class_file: tuple[str, Stamp] | None
) -> Listing:
    """Read all headers and labels. What was read counts as long as files have the same sizes and times."""
    places = array("i"), array("q"), array("q")  # archive, offset, size
    labels = _Labels(root / class_file[0] if class_file else None)

    def found() -> Iterator[str]:
        for which, (name, _) in enumerate(archives):
            for key, picture, label in _samples(root / name):
                labels.add(label, f"{root / name}/{key}")
                for held, value in zip(places, (which, picture.offset, picture.size), strict=True):
                    held.append(value)
                yield f"{name}/{picture.name}"

    names = Names(found())
    if not names:
        raise DataError(f"{path}: no samples: no KEY.jpg, .png or .webp with KEY.cls or KEY.json", _AGAIN)
    classes, numbers = labels.settled()
    whole = Listed(Members(root, archives, names, places), numbers)
    splits = [_split_of(name) for name, _ in archives] if path == root else ["train"]
    files, how = _divided(whole, splits, len(classes))
    lacking = np.setdiff1d(np.arange(len(classes)), files["train"].labels)
    some = ", ".join(classes[i] for i in lacking[:3]) + (", …" if len(lacking) > 3 else "")
    remarks = {"not there": _gaps([name for name, _ in archives]), "no images to train on": some}
    remark = "; ".join(f"{what}: {which}" for what, which in remarks.items() if which)
    return ShardListing(path, classes, files, how, remark)


def _split_of(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return _split_folder(folder) or _split_called(file.partition(".")[0]) or "train"


def _divided(whole: Listed, splits: list[str], classes: int) -> tuple[dict[str, Listed], str]:
    """Return the samples of each split, and how they came there. ``splits`` are those of the archives."""
    assert isinstance(whole.paths, Members)
    of_archive = whole.paths.places[0]
    at = {split: np.flatnonzero(np.array([s == split for s in splits])[of_archive]) for split in SPLIT_FOLDERS}
    files = {split: whole.take(index) for split, index in at.items() if len(index)}
    if set(files) != {"train"}:
        if "train" not in files:
            what = f"{whole.paths.root}: {' and '.join(files)} shards, but none to train on"
            raise DataError(what, "call them as their splits: train-000000.tar")
        counts = ", ".join(f"{splits.count(split)} {split}" for split in files)
        return files, f"shards by their names: {counts}{'' if 'test' in files else ': no test images'}"
    held = np.zeros(len(whole), bool)
    order = np.argsort(whole.labels, kind="stable")  # the classes one after the other
    for index in np.split(order, np.cumsum(np.bincount(whole.labels, minlength=classes))[:-1]):
        # the shard does not count: samples stay on their side when they are put into others
        held[index] = lowest(whole.paths[i].name for i in index)
    how = f"test: {TEST_SHARE:.0%} of each class, by a hash of the samples' names"
    return {"train": whole.take(np.flatnonzero(~held)), "test": whole.take(np.flatnonzero(held))}, how


def _gaps(names: list[str]) -> str:
    """Name the first of the shards that seem to be missing among numbered ones, as after a download broke off."""
    runs: dict[tuple[str, str], dict[int, int]] = {}
    for name in names:
        if parts := re.fullmatch(r"(.*?)(\d{1,9})(\D*)", name, re.DOTALL):
            runs.setdefault((parts[1], parts[3]), {})[int(parts[2])] = len(parts[2])
    lacking = [
        f"{before}{number:0{min(known.values())}d}{after}"
        for (before, after), known in runs.items()
        if max(known) - min(known) < 10 * len(known)  # else they are no numbers in a row
        for number in range(min(known), max(known))
        if number not in known
    ]
    return f"{lacking[0]}{f' and {len(lacking) - 1:,} more' if len(lacking) > 1 else ''}" if lacking else ""


# ---- samples ---------------------------------------------------------------------------------------------------------


def _samples(archive: Path) -> Iterator[tuple[str, Entry, Any]]:
    """Yield the samples of an archive: key, picture, and label as it is written, an int or a str."""
    key, files, label = "", dict[str, Entry](), dict[str, Any]()
    for entry, file in entries(archive):
        folder, slash, base = entry.name.rpartition("/")
        stem, dot, kind = base.partition(".")
        if not stem or not dot:  # hidden files, such as macOS adds, and what has no suffix
            continue
        kind = kind.lower()
        if (own := folder + slash + stem) != key:
            yield from _sample(archive, key, files, label)
            key, files, label = own, {}, {}
        if kind in files:
            raise DataError(f"{archive}: {value_text(entry.name)} is there twice", _AGAIN)
        files[kind] = entry
        if kind in ("cls", "json"):
            label[kind] = _label(file, entry, archive)
    yield from _sample(archive, key, files, label)


def _sample(
    archive: Path, key: str, files: dict[str, Entry], label: dict[str, Any]
) -> Iterator[tuple[str, Entry, Any]]:
    """Yield what :func:`_samples` does of a sample, nothing if its files are neither pictures nor labels."""
    pictures = [entry for kind, entry in files.items() if f".{kind}" in SUFFIXES]
    labels = [label[kind] for kind in ("cls", "json") if label.get(kind) is not None]
    where = f"{archive}: the sample {value_text(key)}"
    if len(pictures) > 1:
        raise DataError(f"{where} has {len(pictures)} pictures", "keep the one to learn from")
    if pictures and labels:
        yield key, pictures[0], labels[0]
    elif pictures:
        what = f"{where} has no label: no .cls, and no {', '.join(LABEL_KEYS)} in a .json"
        raise DataError(what, f"{_AGAIN}; if this is an archived folder of classes, unpack it: tar -xf")
    elif labels:
        raise DataError(f"{where} has no picture, only {', '.join(map(value_text, files))}", _AGAIN)


def _label(file: BinaryIO, entry: Entry, archive: Path) -> int | str | None:
    """Return the label in a .cls or .json file, None if a .json holds none."""
    where = f"{archive}: {value_text(entry.name)}"
    if entry.size > _MOST_LABEL:
        raise DataError(f"{where}: {entry.size:,} bytes are more than a label takes", _AGAIN)
    file.seek(entry.offset)
    with reading(where, "write a number or the name of a class"):
        value: Any = file.read(entry.size).decode()
        if entry.name.lower().endswith(".json"):
            table = json.loads(value)
            value = next((table[k] for k in LABEL_KEYS if k in table), None) if isinstance(table, dict) else None
            if value is None:
                return None
        if isinstance(value, str):
            value = value.strip()
            value.encode()  # JSON can hold halves of letters, which no file can
            if re.fullmatch(r"-?[0-9]+", value):
                value = int(value)
        if isinstance(value, bool) or not isinstance(value, int | str) or value == "" or len(str(value)) > 1000:
            raise DataError(f"{where}: {value_text(value)} is no label", "write a number or the name of a class")
        return value


class _Labels:
    """Labels while they are gathered: numbers, or names."""

    def __init__(self, class_file: Path | None) -> None:
        self.classes = _read_classes(class_file) if class_file else ()
        self.numbers = array("q")
        self.known = {name: i for i, name in enumerate(self.classes)}
        self.first: dict[type, str] = {}  # where the first number, or name, is

    def add(self, label: int | str, where: str) -> None:
        """Take in one more. Raises DataError for one that is no class."""
        if not self.classes:
            self.first.setdefault(type(label), where)
            if len(self.first) > 1:
                what = f"{self.first[int]} has a number for a label, {self.first[str]} a name"
                raise DataError(what, f"label all in one way, or name the classes in {CLASS_FILES[0]}")
        elif isinstance(label, str) and label not in self.known:
            raise DataError(f"{where}: its label {value_text(label)} is not one of the classes", "name it there, too")
        number = self.known.setdefault(label, len(self.known)) if isinstance(label, str) else label
        if not 0 <= number < (len(self.classes) or MOST_CLASSES):
            most = f"there are {len(self.classes)}" if self.classes else "number them from 0"
            raise DataError(f"{where}: its label {value_text(label)} is not a class: {most}", "repair the label")
        if len(self.known) > MOST_CLASSES:
            raise DataError(f"{where}: more than {MOST_CLASSES:,} classes", "write the class, not the sample's name")
        self.numbers.append(number)

    def settled(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the classes' names and the labels, int64 (N,)."""
        labels = np.array(self.numbers, np.int64)
        if self.classes:
            return self.classes, labels
        if not self.known:
            return tuple(map(str, range(int(labels.max()) + 1))), labels
        names = sorted(self.known)
        ranks = np.empty(len(names), np.int64)
        ranks[[self.known[name] for name in names]] = np.arange(len(names))
        return tuple(names), ranks[labels]


def _read_classes(file: Path) -> tuple[str, ...]:
    """Read the names of the classes in order."""
    remedy = 'write a name a line; or as JSON a list of names, or {"name": 0, …}'
    with reading(str(file), remedy), open_regular(file) as f:
        data = f.read(_MOST_NAMES + 1)
        if len(data) > _MOST_NAMES:
            raise ValueError(f"more than {_MOST_NAMES:,} bytes")
        found: Any = data.decode("utf-8-sig")
        if file.suffix == ".txt":
            found = [line.strip() for line in found.splitlines() if line.strip()]
        else:
            found = json.loads(found)
            if isinstance(found, dict):
                found, numbers = sorted(found, key=found.__getitem__), sorted(found.values())
                if numbers != list(range(len(found))):
                    raise ValueError("the numbers are not 0, 1, …")
        if not isinstance(found, list) or not found or not all(isinstance(name, str) and name for name in found):
            raise ValueError("no list of names")
        if len(found) > MOST_CLASSES:
            raise ValueError(f"more than {MOST_CLASSES:,} classes")
        if (twice := Counter(found).most_common(1)[0])[1] > 1:
            raise ValueError(f"{value_text(twice[0])} is there twice")
        "".join(found).encode()  # JSON can hold halves of letters, which no file can
    return tuple(found)
