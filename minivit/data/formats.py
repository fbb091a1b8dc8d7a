"""The files that MNIST, Fashion-MNIST, CIFAR-10 and CIFAR-100 are published as, and sets of others in the same formats.

A file may be damaged, or made to mislead: sizes are checked before memory is taken, and nothing in a file is run.
"""

from __future__ import annotations

import gzip
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minivit.data.datasets import Dataset, check_size, read_exactly, reading
from minivit.errors import DataError
from minivit.files import open_regular

_REMEDY = "get the file again: minivit data get NAME, or from where it came"


def find_files(folder: Path, depth: int = 2) -> tuple[str, Path] | None:
    """Return the kind of data set ("mnist", …) and the folder that holds its files, or None for any other folder.

    It is ``folder`` itself, or its only subfolder, ``depth`` levels down at most. No file is opened.
    """
    if any(_idx_file(folder, split, "images") for split in _IDX_SPLITS):
        return _idx_kind(folder), folder
    if cifar := _cifar_in(folder):
        return cifar.kind, folder
    with reading(str(folder), "check its permissions"):
        below = [sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith(".")]
    return find_files(below[0], depth - 1) if depth and len(below) == 1 else None


def load_files(kind: str, folder: Path, split: str) -> Dataset:
    """Load a split of what :func:`find_files` has found. Raises DataError, naming the file, if it cannot be used."""
    cifar = _cifar_in(folder)
    return cifar.load(folder, split) if cifar else _load_idx(kind, folder, split)


def _checked(labels: np.ndarray, count: int, classes: tuple[str, ...], path: Path) -> np.ndarray:
    """Return ``labels`` as int64 (N,), once they fit ``count`` images and the classes."""
    if len(labels) != count:
        raise DataError(f"{path}: {len(labels)} labels for {count} images", _REMEDY)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        what = f"{path}: label {labels[wrong[0]]} of image {wrong[0]} is not one of {len(classes)} classes"
        raise DataError(what, _REMEDY)
    return labels.astype(np.int64)


# ---- idx: MNIST ------------------------------------------------------------------------------------------------------

_IDX_SPLITS = {"train": "train", "test": "t10k"}
_IDX_CLASSES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip


def _idx_file(folder: Path, split: str, what: str) -> Path | None:
    """Return the file of a split's "images" or "labels", in any of the spellings that are about."""
    stem = f"{_IDX_SPLITS[split]}-{what}"
    rest = "idx3-ubyte" if what == "images" else "idx1-ubyte"
    names = (f"{stem}{dot}{rest}{end}" for dot in "-." for end in ("", ".gz"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _idx_kind(folder: Path) -> str:
    """Tell the two sets apart, whose files are called alike: by their folder, or the one around it (MNIST/raw)."""
    path = folder.resolve()
    for name in (path.name.lower(), path.parent.name.lower()):
        if "fashion" in name:
            return "fashion-mnist"
        if "mnist" in name:
            break
    return "mnist"


def _load_idx(kind: str, folder: Path, split: str) -> Dataset:
    arrays, paths = {}, {}
    for what, ndim in (("images", 3), ("labels", 1)):
        if (path := _idx_file(folder, split, what)) is None:
            missing = f"{_IDX_SPLITS[split]}-{what}-idx{ndim}-ubyte"
            raise DataError(f"{folder}: no file {missing} nor {missing}.gz, needed for the split {split!r}", _REMEDY)
        arrays[what], paths[what] = read_idx(path, ndim), path
    images, classes = arrays["images"], _IDX_CLASSES[kind]
    labels = _checked(arrays["labels"], len(images), classes, paths["labels"])
    return Dataset(images[:, None], labels, classes, str(folder))  # (N, H, W) → (N, 1, H, W)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """Read an idx file of bytes, plain or gzipped, as uint8 with ``ndim`` axes (yann.lecun.com/exdb/mnist).

    Its header is big-endian: 0, 0, 8 (bytes), ndim, then each axis's length in 32 bits. Raises DataError if it is
    another file, or holds fewer or more bytes than it says.
    """
    with reading(str(path), _REMEDY), open_regular(path) as raw:
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


# ---- CIFAR -----------------------------------------------------------------------------------------------------------

_PIXELS = 3 * 32 * 32  # of an image: red, green, blue, each row by row


@dataclass(frozen=True)
class _Cifar:
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
        with reading(str(folder), _REMEDY):
            check_size(2 * sum(path.stat().st_size for path in paths if path.exists()))  # the files, and the images
        classes = self._classes(folder / self.meta)
        batches = [self._batch(path, classes) for path in paths]
        images = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 32, 32)  # (N, 3072) → (N, 3, 32, 32)
        return Dataset(images, np.concatenate([labels for _, labels in batches]), classes, str(folder))

    def _batch(self, path: Path, classes: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Return a file's pixels, uint8 (n, 3072), and its labels, int64 (n,)."""
        with reading(str(path), _REMEDY):
            if isinstance(self.labels, str):
                pixels, labels = _read_batch(path, self.labels)
            else:
                data = np.frombuffer(_whole(path), np.uint8)
                record = self.labels + _PIXELS
                if not data.size or data.size % record:
                    raise ValueError(f"{data.size:,} bytes are not a whole number of records of {record:,}")
                records = data.reshape(-1, record)
                pixels, labels = records[:, self.labels :], records[:, self.labels - 1]
        return pixels, _checked(labels, len(pixels), classes, path)

    def _classes(self, path: Path) -> tuple[str, ...]:
        """Return the classes' names: a line each, or a list in a Python batch."""
        count = 10 if self.kind == "cifar-10" else 100
        with reading(str(path), _REMEDY):
            if isinstance(self.labels, str):
                found = read_plain_pickle(_whole(path)).get(self.labels.removesuffix("s") + "_names")
                names = _expect(found, list)
            else:
                names = _whole(path).split()
            if len(names) != count:
                raise ValueError(f"{len(names)} names of classes, not {count}")
            return tuple(map(_text, names))


_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
_CIFARS = (
    _Cifar("cifar-10", tuple(f"{name}.bin" for name in _BATCHES), "test_batch.bin",
           (("data_batch_1.bin",), ("test_batch.bin",)), 1, "batches.meta.txt"),
    _Cifar("cifar-100", ("train.bin",), "test.bin", (("train.bin",), ("test.bin",)), 2, "fine_label_names.txt"),
    _Cifar("cifar-10", _BATCHES, "test_batch", (("data_batch_1",), ("test_batch",)), "labels", "batches.meta"),
    _Cifar("cifar-100", ("train",), "test", (("meta", "train"), ("meta", "test")), "fine_labels", "meta"),
)  # fmt: skip


def _cifar_in(folder: Path) -> _Cifar | None:
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
    pixels, labels = _expect(batch.get("data"), _Array).values(), _expect(batch.get(key), list)
    if pixels.shape[1:] != (_PIXELS,):
        raise ValueError(f"its array has the shape {pixels.shape}, not (n, {_PIXELS})")
    if not all(type(label) is int for label in labels):
        raise ValueError("labels that are not whole numbers")
    return pixels, np.array(labels, np.int64)


# ---- Python batches --------------------------------------------------------------------------------------------------
#
# They are pickles, which can run anything when they are loaded as such. What follows reads the few instructions that
# these files need (CPython's Lib/pickletools.py documents them), makes plain values and arrays of bytes, and knows no
# way to do anything else.

_STRINGS = {  # instruction: bytes of its length, and whether it is text
    b"U": (1, False), b"T": (4, False), b"C": (1, False), b"B": (4, False), b"\x8e": (8, False), b"\x96": (8, False),
    b"\x8c": (1, True), b"X": (4, True), b"\x8d": (8, True),
}  # fmt: skip
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
_UNSIGNED = {b"K": 1, b"M": 2}
_PUT, _GET = {b"q": 1, b"r": 4}, {b"h": 1, b"j": 4}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_IGNORED = {b"\x80": 1, b"\x95": 8}  # the protocol's number, and the length of what follows
_MOST_INSTRUCTIONS = 1_000_000  # CIFAR-100 takes 0.3 million; each may make an object of 64 bytes

_RECONSTRUCT, _DTYPE, _ENCODE, _FROMBUFFER = "multiarray._reconstruct", "numpy.dtype", "_codecs.encode", "_frombuffer"
_ADMITTED = {
    "numpy.ndarray": "numpy.ndarray",
    "numpy.dtype": _DTYPE,
    "_codecs.encode": _ENCODE,  # how Python 3 writes the bytes of a Python 2 string
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy.core.numeric._frombuffer": _FROMBUFFER,
    "numpy._core.numeric._frombuffer": _FROMBUFFER,
}


@dataclass(eq=False)
class _Name:
    """A name that the file asks for. It stands for what minivit does instead; nothing is looked up."""

    name: str


@dataclass(eq=False)
class _Array:
    """An array of bytes: its dtype, shape, order and content, once the file has told them."""

    state: tuple[Any, ...] = ()

    def values(self) -> np.ndarray:
        """Return the array, once what was told makes sense."""
        dtype, shape, order, raw = self.state
        if _expect(dtype, _Name).name != "uint8":
            raise ValueError("an array that is not of bytes")
        raw = raw.encode("latin-1") if type(raw) is str else _expect(raw, bytes)
        return np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(shape, order=order))


def read_plain_pickle(data: bytes) -> dict[str, Any]:
    """Return the dictionary that a pickle holds, without unpickling: plain values, and arrays of bytes as _Array.

    Reads dicts, lists, tuples, text, bytes, whole numbers, truth values, None and uint8 arrays, of the protocols 2 to
    5. Time and memory grow with the file's size only. Raises ValueError (or what plain Python does with nonsense:
    KeyError, IndexError, …) for all else.
    """
    at, marks, memo = 0, list[int](), dict[int, Any]()
    stack: list[Any] = []

    def take(size: int) -> bytes:
        nonlocal at
        if size > len(data) - at:
            raise ValueError("it is cut short")
        at += size
        return data[at - size : at]

    def number(size: int) -> int:
        return int.from_bytes(take(size), "little")

    def line() -> str:
        return take(data.index(b"\n", at) + 1 - at)[:-1].decode()

    def since_mark() -> list[Any]:
        values = stack[(start := marks.pop()) :]
        del stack[start:]
        return values

    for _ in range(_MOST_INSTRUCTIONS):
        code = take(1)
        if code in _UNSIGNED:
            stack.append(number(_UNSIGNED[code]))
        elif code in _STRINGS:
            width, is_text = _STRINGS[code]
            string = take(number(width))
            stack.append(string.decode() if is_text else string)
        elif code in _PUT:
            memo[number(_PUT[code])] = stack[-1]
        elif code == b"\x94":
            memo[len(memo)] = stack[-1]
        elif code in _GET:
            stack.append(memo[number(_GET[code])])
        elif code == b"(":
            marks.append(len(stack))
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code == b"J":
            stack.append(int.from_bytes(take(4), "little", signed=True))
        elif code == b"\x8a":
            stack.append(int.from_bytes(take(number(1)), "little", signed=True))
        elif code in b"]})":
            stack.append({b"]": list, b"}": dict, b")": tuple}[code]())
        elif code in _TUPLES:
            values = stack[-_TUPLES[code] :]
            del stack[-_TUPLES[code] :]
            stack.append(tuple(values))
        elif code == b"t":
            stack.append(tuple(since_mark()))
        elif code in b"ae":
            values = since_mark() if code == b"e" else [stack.pop()]
            _expect(stack[-1], list).extend(values)
        elif code in b"su":
            values = since_mark() if code == b"u" else [stack.pop(-2), stack.pop()]
            _expect(stack[-1], dict).update(zip(map(_text, values[::2]), values[1::2], strict=True))
        elif code in b"c\x93":
            name = f"{line()}.{line()}" if code == b"c" else ".".join(map(_text, (stack.pop(-2), stack.pop())))
            if name not in _ADMITTED:
                raise ValueError(f"it asks for {name[:80]!r}, which no data set needs: it was not run")
            stack.append(_Name(_ADMITTED[name]))
        elif code == b"R":
            function, arguments = _expect(stack.pop(-2), _Name), stack.pop()
            stack.append(_made(function.name, _expect(arguments, tuple)))
        elif code == b"b":
            _set_state(stack[-2], stack.pop())
        elif code in _IGNORED:
            take(_IGNORED[code])
        elif code == b".":
            return _expect(stack.pop(), dict)
        else:
            raise ValueError(f"unknown instruction {code!r}")
    raise ValueError(f"more than {_MOST_INSTRUCTIONS:,} instructions")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _text(value: Any) -> str:
    """Return a short text; Python 2 wrote it as bytes."""
    if type(value) not in (str, bytes) or len(value) > 1000:
        raise ValueError(f"a {type(value).__name__} where a short text belongs")
    return value.decode("latin-1") if type(value) is bytes else value


def _made(name: str, arguments: tuple[Any, ...]) -> Any:
    """Return what calling ``name`` would return, for the calls that make an array of bytes."""
    if name == _ENCODE and arguments[1:] == ("latin1",):
        return _expect(arguments[0], str)  # encoded once it is used: a short file could ask for it without end
    if name == _DTYPE and _text(arguments[0]) == "u1":
        return _Name("uint8")
    if name == _RECONSTRUCT:
        return _Array()
    if name == _FROMBUFFER:
        raw, dtype, shape, order = arguments
        return _Array((dtype, shape, order, raw))
    raise ValueError(f"it calls {name} in a way that no data set needs: it was not run")


def _set_state(target: Any, state: Any) -> None:
    if type(target) is _Name and target.name == "uint8":
        return  # byte order and the like, which bytes do not have
    _, shape, dtype, fortran, raw = _expect(state, tuple)
    _expect(target, _Array).state = dtype, shape, "F" if fortran else "C", raw
