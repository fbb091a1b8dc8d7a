"""Tar archives read in place: where each file in one lies, found from the headers alone, and its bytes when wanted.

Nothing is unpacked to the disk, no link is followed, and a name in an archive is a text and never a path. The layout is
that of POSIX.1-2001 (pax, "ustar Interchange Format" and "pax Interchange Format") with GNU tar's long names.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from minivit.data.images import MAX_BYTES
from minivit.data.name_list import Names
from minivit.data.reading import reading
from minivit.errors import DataError, value_text
from minivit.files import open_regular

BLOCK = 512
_MOST_EXTENDED = 1 << 16  # bytes of a long name or of pax records: and owners, times, …
_MOST_NAME = 4096  # bytes
_NEAR = 1 << 16  # bytes between two files: less is read along with them
_SPARSE = "GNU.sparse"
_MOST_PADDING = 1 << 20  # bytes behind the end mark: tar fills up to a multiple of 10,240
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
REMEDY = "make it again: tar -cf SHARD.tar --dereference --hard-dereference FILES; or tar.TarFile.addfile in Python"


class Entry(NamedTuple):
    """A file in an archive: its name, where its bytes begin, and how many they are."""

    name: str
    offset: int
    size: int


class Stamp(NamedTuple):
    """What a file is known by between its being indexed and being read."""

    size: int
    modified: int  # nanoseconds


def stamp(path: Path) -> Stamp:
    """Return a file's size and the time of its last change."""
    about = path.stat()
    return Stamp(about.st_size, about.st_mtime_ns)


def is_tar(path: Path) -> bool:
    """Tell whether a file begins like a tar archive, also one that is empty or compressed and called so."""
    with open_regular(path) as file:
        head = file.read(BLOCK)
    named = ".tar" in path.suffixes or path.suffix == ".tgz"
    return _is_header(head) or (named and (head == bytes(BLOCK) or _compression(head) != ""))


def entries(path: Path) -> Iterator[tuple[Entry, BinaryIO]]:
    """Yield the regular files of an archive in their order, each with the open archive; folders are passed over.

    Only headers are read. Raises DataError, naming archive and member, for what is damaged, cut off or compressed, for
    links and devices, and for files with holes (sparse).
    """
    with reading(str(path), REMEDY), open_regular(path) as file:
        end = file.seek(0, os.SEEK_END)
        at, extended = 0, dict[str, bytes]()
        while True:
            file.seek(at)
            head = file.read(BLOCK)
            if head == bytes(BLOCK):
                return _check_end(file, path, end - at)
            if not _is_header(head):
                raise _no_header(path, head, at)
            kind = head[156:157].replace(b"\0", b"0")
            is_file = kind not in b"xgLK"
            name, size = _described(head, extended if is_file else {}, path)
            data = at + BLOCK
            if data + size > end:
                what = f"{path}: {value_text(name)} is said to have {size:,} bytes, {max(end - data, 0):,} are left"
                raise DataError(what, "the archive is cut off or damaged: get it again")
            at = data + -(-size // BLOCK) * BLOCK
            if not is_file:
                extended |= _extended(file, kind, size, f"{path}: {value_text(name)}")
                continue
            extended = {}
            if kind in b"07" and not name.endswith("/"):
                yield Entry(name, data, size), file
            elif kind not in b"057" or size:  # of the others, whether bytes follow is read in more than one way
                raise _no_file(path, name, kind)


def _is_header(head: bytes) -> bool:
    """Tell whether a block's checksum is right: the sum of its bytes, its own eight taken for spaces."""
    if len(head) < BLOCK or head == bytes(BLOCK):
        return False
    digits = head[148:156].strip(b" \0")
    return digits.isdigit() and len(digits) < 8 and int(digits) > 0 and _octal(digits) == _checksum(head)


def _checksum(head: bytes) -> int:
    return sum(head) - sum(head[148:156]) + 8 * ord(" ")


def _octal(digits: bytes) -> int:
    return int(digits, 8) if digits and not digits.strip(b"01234567") else -1


def _described(head: bytes, extended: dict[str, bytes], path: Path) -> tuple[str, int]:
    """Return a header's name and size; what those before it say ("path", "size") counts first."""
    name = head[:100].partition(b"\0")[0]
    if head[257:265] == b"ustar\x0000" and (prefix := head[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    name = extended.get("path", name)
    text = name.decode("utf-8", "surrogateescape")
    if len(name) > _MOST_NAME:
        raise DataError(f"{path}: {value_text(text)} is a name of {len(text):,} letters", REMEDY)
    if _SPARSE in extended:
        raise _no_file(path, text, b"S")
    field = head[124:136]
    if field[0] & 0x80:  # GNU: a binary number, of which the first byte's other bits are sign and highest digits
        size = int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    else:
        size = _octal(field.strip(b" \0") or b"0")
    if "size" in extended:
        digits = extended["size"]
        size = int(digits) if digits.isdigit() and len(digits) < 20 else -1
    if size < 0:
        raise DataError(f"{path}: {value_text(text)} has no size that can be read", REMEDY)
    return text, size


def _extended(file: BinaryIO, kind: bytes, size: int, where: str) -> dict[str, bytes]:
    """Return what an extended header says of the next member; what it says of links, owners and times is passed over.

    The file stands behind its header.
    """
    if size > _MOST_EXTENDED:
        raise DataError(f"{where}: {size:,} bytes of extended header are too many", REMEDY)
    data = file.read(size)
    if kind == b"K":
        return {}
    if kind == b"L":
        return {"path": data.partition(b"\0")[0]}
    records = _records(data, where)
    if kind == b"g":  # for all that follow
        if records:
            raise DataError(f"{where}: one path or size for all members", REMEDY)
        return {}
    return records


def _records(data: bytes, where: str) -> dict[str, bytes]:
    """Return the pax records that count here; each is b"LENGTH KEY=VALUE\\n", and LENGTH counts all of it."""
    found, at = {}, 0
    while at < len(data):
        digits = data[at : at + 8].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        record = data[at : at + length]
        key, equals, value = record[len(digits) + 1 : -1].partition(b"=")
        if len(record) < length or record[-1:] != b"\n" or not key or not equals:
            raise DataError(f"{where}: its extended header is damaged", REMEDY)
        if key in (b"path", b"size"):
            found[key.decode()] = value
        elif key.startswith(_SPARSE.encode()):
            found[_SPARSE] = value
        at += length
    return found


def _check_end(file: BinaryIO, path: Path, left: int) -> None:
    """Raise DataError if something follows the mark of an archive's end, of which ``left`` bytes are left."""
    file.seek(-left, os.SEEK_END)
    if left > _MOST_PADDING or file.read(left).strip(b"\0"):
        remedy = "archives are not joined by cat: keep them as files of their own, or join them by tar -A"
        raise DataError(f"{path}: something follows the mark of its end", remedy)


def _compression(head: bytes) -> str:
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), "")


def _no_header(path: Path, head: bytes, at: int) -> DataError:
    if at == 0 and (how := _compression(head)):
        what = f"{path}: compressed by {how}; samples in the middle cannot be reached"
        return DataError(what, "unpack it once, to a .tar: gunzip FILE.tar.gz (bunzip2, unxz, unzstd)")
    if len(head) < BLOCK:
        remedy = "it is cut off: get it again; or whatever wrote it did not close it"
        return DataError(f"{path}: it stops at byte {at + len(head):,} without the mark of its end", remedy)
    return DataError(f"{path}: no tar archive" if at == 0 else f"{path}: damaged at byte {at:,}", REMEDY)


def _no_file(path: Path, name: str, kind: bytes) -> DataError:
    kinds = {
        b"0": "a folder with content",
        b"1": "a hard link",
        b"2": "a link",
        b"3": "a device",
        b"4": "a device",
        b"5": "a folder with content",
    }
    kinds |= {b"6": "a pipe", b"S": "a file with holes (sparse)"}
    what = kinds.get(kind, f"of the unknown kind {kind!r}")
    return DataError(f"{path}: {value_text(name)} is {what}; only files are read, and nothing is followed", REMEDY)


# ---- files in archives -----------------------------------------------------------------------------------------------


class _Named(BytesIO):
    """Bytes that say where they are from, as an open file does."""

    name: str


@dataclass(frozen=True)
class Member:
    """A file in an archive: ``name`` is what it is called there. As a text it is "ARCHIVE/NAME"."""

    archive: Path
    stamp: Stamp
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def open(self) -> BinaryIO:
        """Return its bytes as an open file. Raises DataError if they are too many, or the archive has changed since."""
        if self.size > MAX_BYTES:
            raise DataError(f"{self}: {self.size:,} bytes are more than a picture takes", "scale it down")
        with reading(str(self.archive), "check that it is there still"), open_regular(self.archive) as file:
            about = os.fstat(file.fileno())
            if Stamp(about.st_size, about.st_mtime_ns) != self.stamp:
                raise DataError(f"{self.archive}: it has changed since it was opened", "begin again")
            file.seek(self.offset)
            held = _Named(file.read(self.size))
        held.name = str(self)
        return held


class Members(Sequence[Member]):
    """Files in some archives, 20 bytes for each beside its name. ``names`` are "ARCHIVE/NAME", below ``root``.

    ``places`` are (archive's index, offset, size) of each.
    """

    def __init__(
        self, root: Path, archives: Sequence[tuple[str, Stamp]], names: Names, places: Sequence[np.ndarray | array[int]]
    ) -> None:
        self.root, self.archives, self.names = root, archives, names
        dtypes = (np.int32, np.int64, np.int64)
        self.places = tuple(np.asarray(x, dtype) for x, dtype in zip(places, dtypes, strict=True))  # (N,) each

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: Any) -> Any:
        which, offset, size = (int(x[i]) for x in self.places)
        archive, known = self.archives[which]
        name = self.names[i].removeprefix(f"{archive}/")
        return Member(self.root / archive, known, name, offset, size)

    def take(self, indices: np.ndarray) -> Members:
        """Return the files at ``indices``, in that order."""
        return Members(self.root, self.archives, self.names.take(indices), [x[indices] for x in self.places])

    def soon(self, indices: np.ndarray) -> None:
        """Ask the system to read the files at ``indices`` ahead, neighbours in one go (posix_fadvise, WILLNEED).

        It does so while others are in use, in the memory that it keeps for files, or not at all: nothing is promised.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        which, offset, size = (x[indices] for x in self.places)
        for archive in np.unique(which).tolist():
            here = which == archive
            begins, ends = np.sort(offset[here]), np.sort(offset[here] + size[here])
            far = np.flatnonzero(begins[1:] - ends[:-1] > _NEAR)
            begins, ends = begins[np.r_[0, far + 1]], ends[np.r_[far, len(ends) - 1]]
            with contextlib.suppress(OSError), open_regular(self.root / self.archives[archive][0]) as file:
                for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
                    os.posix_fadvise(file.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)
