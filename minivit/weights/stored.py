"""Files of named arrays, opened by what they contain: safetensors and NumPy archives. Nothing in them is ever run.

Names, shapes and dtypes are read and checked first, whatever sizes a file declares; an array is read when it is asked
for, one at a time, so that no more memory is taken than the arrays that are wanted.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo, is_zipfile

import numpy as np

from minivit.data.reading import check_size, read_npy
from minivit.errors import CheckpointError, value_text
from minivit.files import open_regular
from minivit.weights.checkpoint import is_sealed

BROKEN = "get the file again, and compare its size, or its SHA-256, with what its source says"
_LONGEST_TABLE = 8 << 20  # a config.json with names for thousands of classes is shorter
_LONGEST_HEADER = 4 << 20  # the list of what a safetensors file holds: some 100 bytes for each array
_MOST_ARRAYS = 1 << 16
_LARGEST = 1 << 48  # bytes of an array; beyond it sizes are made to mislead
_BFLOAT16 = "bfloat16"

DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": _BFLOAT16, "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip
"""The dtypes of safetensors that can be read, by their names there."""


@dataclass(frozen=True)
class Entry:
    """An array in a file: its name there, its shape, its dtype as text, and how it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]

    @property
    def is_double(self) -> bool:
        """Whether it holds float64."""
        return self.dtype != _BFLOAT16 and np.dtype(self.dtype) in (np.dtype("<f8"), np.dtype(">f8"))

    @property
    def is_half(self) -> bool:
        """Whether it holds numbers of 16 bits."""
        return self.dtype == _BFLOAT16 or np.dtype(self.dtype).itemsize == 2

    def read(self) -> np.ndarray:
        """Return the array: float64 if it is that, else float32. Half precision fits float32 exactly.

        Raises CheckpointError if it is damaged or holds no floating-point numbers.
        """
        array = self.load()
        if self.dtype == _BFLOAT16:  # the upper half of a float32
            array = (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        if array.dtype.kind != "f" or array.dtype.itemsize > 8:
            raise ValueError(f"{value_text(self.name)} holds {array.dtype}, which no weights are made of")
        return array.astype(np.float64 if array.dtype.itemsize == 8 else np.float32, copy=False)


class Stored:
    """A file of named arrays: ``entries`` by name, and what is said of them, ``about``."""

    def __init__(self, path: Path, is_archive: bool = False) -> None:
        self.path, self.is_archive = path, is_archive
        self.entries: dict[str, Entry] = {}
        self.about: dict[str, str] = {}
        self._now: Any = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        """Open the file, or the archive that it is, for all that is read in this block."""
        if self._now is not None:
            yield self._now
            return
        with open_regular(self.path) as f, ZipFile(f) if self.is_archive else contextlib.nullcontext(f) as found:
            self._now = found
            try:
                yield found
            finally:
                self._now = None

    def reader(self, name: str, load: Callable[[Any], np.ndarray]) -> Callable[[], np.ndarray]:
        """Return what reads an array from the opened file, and tells its name where it is damaged."""

        def read() -> np.ndarray:
            try:
                with self.opened() as file:
                    return load(file)
            except (CheckpointError, MemoryError):
                raise
            except Exception as error:
                raise unusable(self.path, error, name) from error

        return read


def open_stored(path: str | os.PathLike[str]) -> Stored | None:
    """Read the names, shapes and dtypes of all arrays in a file that another system wrote.

    Returns None for one that is neither safetensors nor an archive, or a checkpoint of minivit's. Raises
    CheckpointError for a file that is one and is damaged or made to mislead, and for a pickle, which is never opened;
    OSError if the file cannot be opened.
    """
    path = Path(path)
    with open_regular(path) as f:
        size = os.fstat(f.fileno()).st_size
        if is_sealed(f):
            return None
        f.seek(0)
        start = f.read(9)
        try:
            if is_zipfile(f):
                return _archive(path, f, size)
            if start[8:] == b"{" or path.suffix == ".safetensors":
                return _safetensors(path, f, size)
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:
            raise unusable(path, error) from error
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise _pickled(path)
    return None


def unusable(path: Path, error: Exception, name: str = "") -> CheckpointError:
    """Return the error for a file, or its array ``name``, that cannot be read."""
    where = f"{path}: {value_text(name)}" if name else str(path)
    reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return CheckpointError(f"{where} cannot be read: {reason}", BROKEN)


def _pickled(path: Path) -> CheckpointError:
    what = f"{path} is a pickle, as torch.save writes it: opening it may run anything, so minivit never does"
    remedy = "get the .safetensors, or where you trust the file, in PyTorch: "
    return CheckpointError(what, remedy + "safetensors.torch.save_file(state_dict, 'model.safetensors')")


def table_beside(path: Path, name: str) -> dict[str, Any]:
    """Return a JSON table that lies beside a file, {} if there is none; CheckpointError for what is no such."""
    place = path.with_name(name)
    try:
        with open_regular(place) as f:
            text = f.read(_LONGEST_TABLE + 1)
        found = json.loads(text) if len(text) <= _LONGEST_TABLE else None
    except OSError:
        return {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place} is no JSON: {error}", "mend it, or take it away") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{place} is no table of settings", "mend it, or take it away")
    return found


# ---- safetensors -----------------------------------------------------------------------------------------------------


def _safetensors(path: Path, f: BinaryIO, size: int) -> Stored:
    """Read the header: the length of a JSON table, 8 bytes little-endian, the table, and the arrays' bytes after it.

    The table must say where each array begins and ends, and they must fill the file without gap or overlap, which the
    format asks for: so no more is read than the file has.
    """
    f.seek(0)
    length = int.from_bytes(f.read(8), "little")
    if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
        raise ValueError(f"its header has {length:,} bytes, the file {size:,}")
    header = json.loads(f.read(length).decode(), object_pairs_hook=_without_twins)
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError("its __metadata__ is no table of texts")
    if len(header) > _MOST_ARRAYS:
        raise ValueError(f"it has {len(header):,} arrays, more than any model")
    stored, places = Stored(path), []
    stored.about = about
    for name, value in header.items():
        shape, dtype, begin, end = _tensor(name, value)
        places.append((begin, end, name))
        load = stored.reader(name, _raw(shape, dtype, 8 + length + begin))
        stored.entries[name] = Entry(name, shape, dtype, load)
    at = 0
    for begin, end, name in sorted(places):
        if begin != at:
            raise ValueError(f"{value_text(name)} begins at byte {begin:,}, where byte {at:,} is next")
        at = end
    if 8 + length + at != size:
        raise ValueError(f"it has {size:,} bytes and says {8 + length + at:,}: it is cut short, or not as it was")
    return stored


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{value_text(name)} is there more than once")
    return found


def _tensor(name: str, value: Any) -> tuple[tuple[int, ...], str, int, int]:
    """Return shape, dtype, begin and end of an array in the header's words, once they agree."""
    whole = lambda x: type(x) is int and 0 <= x <= _LARGEST
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{value_text(name)} is not described by dtype, shape and data_offsets")
    shape, place, kind = value["shape"], value["data_offsets"], value["dtype"]
    if not isinstance(shape, list) or len(shape) > 32 or not all(map(whole, shape)):
        raise ValueError(f"{value_text(name)} has the shape {value_text(shape)}")
    if not isinstance(place, list) or len(place) != 2 or not all(map(whole, place)) or place[0] > place[1]:
        raise ValueError(f"{value_text(name)} has the data_offsets {value_text(place)}")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{value_text(name)} has the dtype {value_text(kind)}; known are {', '.join(DTYPES)}")
    needed = math.prod(shape) * _itemsize(DTYPES[kind])
    if needed != place[1] - place[0]:
        raise ValueError(f"{value_text(name)}, {kind} {shape}, has {place[1] - place[0]:,} bytes and needs {needed:,}")
    return tuple(shape), DTYPES[kind], place[0], place[1]


def _itemsize(dtype: str) -> int:
    return 2 if dtype == _BFLOAT16 else np.dtype(dtype).itemsize


def _raw(shape: tuple[int, ...], dtype: str, begin: int) -> Callable[[BinaryIO], np.ndarray]:
    def load(f: BinaryIO) -> np.ndarray:
        f.seek(begin)
        size = math.prod(shape) * _itemsize(dtype)
        check_size(size)
        out = np.empty(size, np.uint8)
        if f.readinto(out) != size:  # type: ignore[attr-defined]
            raise ValueError("it is cut short")
        return out if dtype == _BFLOAT16 else out.view(dtype).reshape(shape)

    return load


# ---- NumPy archives --------------------------------------------------------------------------------------------------


def _archive(path: Path, f: BinaryIO, size: int) -> Stored:
    """Read the header of each .npy in an archive."""
    with ZipFile(f) as archive:
        members = archive.infolist()
        if any(m.filename.endswith("data.pkl") for m in members):
            raise _pickled(path)
        if len(members) > _MOST_ARRAYS:
            raise ValueError(f"it has {len(members):,} arrays, more than any model")
        _without_twins([(m.filename.removesuffix(".npy"), None) for m in members])
        # NumPy writes no other methods, and zipfile unpacks the others without a limit
        if any(m.compress_type not in (ZIP_STORED, ZIP_DEFLATED) for m in members):
            raise ValueError("an unknown method of compression")
        check_size(sum(m.file_size for m in members), packed=size)
        stored = Stored(path, is_archive=True)
        stored.entries = {m.filename.removesuffix(".npy"): _member(stored, archive, m) for m in members}
        return stored


def _member(stored: Stored, archive: ZipFile, member: ZipInfo) -> Entry:
    """Return what a member of an archive holds, by its header."""
    with archive.open(member) as f:
        if np.lib.format.read_magic(f) != (1, 0):
            raise ValueError(f"{value_text(member.filename)} has an unknown version of .npy")
        shape, _, dtype = np.lib.format.read_array_header_1_0(f)
    if not dtype.hasobject and math.prod(shape) * dtype.itemsize > member.file_size:
        raise ValueError(f"{value_text(member.filename)} declares {dtype} {shape} and has {member.file_size:,} bytes")
    text = _BFLOAT16 if dtype == np.dtype("V2") else dtype.str  # NumPy's save of JAX's bfloat16

    def load(again: ZipFile) -> np.ndarray:
        with again.open(member.filename) as content:
            array = read_npy(content, member.file_size)
        return np.ascontiguousarray(array) if text == _BFLOAT16 else array

    name = member.filename.removesuffix(".npy")
    return Entry(name, tuple(shape), text, stored.reader(name, load))
