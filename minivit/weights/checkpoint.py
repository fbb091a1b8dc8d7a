"""Checkpoints: one .npz of plain arrays, written so that a crash at any moment leaves a whole file.

``np.load(path)`` opens a checkpoint without minivit: arrays are called ``model/<parameter>``, ``optimizer/<state>`` and
``meta``, UTF-8 JSON as bytes. Nothing in it is run when it is read: no pickle. The SHA-256 of all bytes
before it stands at the end, as the archive's comment, so that every flipped bit and every missing byte is found; each
array has its own CRC-32, the archive's, which tells the damaged one and which ``np.load`` checks, too.

Equal content gives equal bytes: the archive carries no time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from minivit.errors import CheckpointError
from minivit.files import open_regular, replacing, unfinished
from minivit.nn.module import Module

FORMAT = 1
"""Version of the layout, kept in the meta; raised when an older minivit could not read the file any more."""

_NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENXIO, errno.ENAMETOOLONG, errno.ELOOP)
"""The errors of opening what is no regular file, such as a folder or a pipe, or a name that no file has."""

_SEAL = b"minivit sha256 "
_SEAL_SIZE = len(_SEAL) + 64  # the digest in hexadecimal


@dataclass
class Checkpoint:
    """What a checkpoint holds: arrays by name, and what describes them."""

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """Return the arrays called ``prefix/…``, without the prefix: ``under("model")`` fits load_state_dict."""
        return {name.removeprefix(f"{prefix}/"): a for name, a in self.arrays.items() if name.startswith(f"{prefix}/")}


# ---- writing ---------------------------------------------------------------------------------------------------------


def save_checkpoint(path: str | Path, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write ``arrays`` and ``meta`` (what JSON can hold) to ``path``; the file is whole at every moment.

    Raises CheckpointError if it cannot be written: a file that was there is then as it was, or, where only its lasting
    through a power cut is uncertain, the new one.
    """
    path = Path(path)
    if not path.name or "\0" in str(path):
        raise CheckpointError(f"{str(path)!r} is no name of a file", "give the path of the file to write")
    text = json.dumps({"format": FORMAT, **meta})  # in ASCII: a class's name may hold bytes that are no UTF-8
    entries = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    entries["meta"] = np.frombuffer(text.encode(), np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as f:
            _write(f, entries)
    except OSError as error:
        needed = sum(a.nbytes for a in entries.values())
        raise CheckpointError(
            f"cannot save {path}: {error.strerror or error} ({needed:,} bytes needed, {_free(path)} free)",
            "make room or name another folder; a checkpoint that was there before is whole",
        ) from error


def sweep(folder: str | Path) -> None:
    """Remove what a killed process left half written where a run writes: in its ``folder`` and in checkpoints there.

    Only files that minivit made, by their names. Hold the folder's :class:`~minivit.train.lock.RunLock` meanwhile.
    Raises CheckpointError if one cannot be removed.
    """
    for place in (Path(folder), Path(folder) / "checkpoints"):
        for path in unfinished(place):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                what = f"cannot remove {path}, left by a process that was killed: {error.strerror or error}"
                raise CheckpointError(what, "mend the folder, or remove the file yourself") from error


def _write(f: BinaryIO, entries: Mapping[str, np.ndarray]) -> None:
    with zipfile.ZipFile(f, "w", zipfile.ZIP_STORED) as archive:
        write_arrays(archive, entries)
        archive.comment = bytes(_SEAL_SIZE)  # its place: the comment ends the file
    size = f.tell() - _SEAL_SIZE
    digest = _digest(f, size)
    f.seek(size)
    f.write(_SEAL + digest)


def write_arrays(archive: zipfile.ZipFile, entries: Mapping[str, np.ndarray]) -> None:
    """Write arrays into an open archive as NumPy's savez does, but for the time: equal arrays give equal bytes."""
    for name, array in entries.items():
        # a ZipInfo's time is 1980 unless set
        with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array(member, array, version=(1, 0), allow_pickle=False)


# ---- reading ---------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint, all of it checked; memory stays within twice the file's size, whatever sizes it declares.

    Raises CheckpointError, with what to do, if it is missing, damaged, cut short or no checkpoint of this version.
    """
    path = Path(path)
    try:
        with open_regular(path) as f:
            size = os.fstat(f.fileno()).st_size
            f.seek(max(size - _SEAL_SIZE, 0))
            seal = f.read()
            if not seal.startswith(_SEAL):
                raise _unusable(path, "it is cut short, or minivit did not write it")
            if _digest(f, size - _SEAL_SIZE) != seal.removeprefix(_SEAL):
                raise _unusable(path, f"it is damaged, in {_first_damage(f, size)}")
            arrays = _read(f, size)
        meta = json.loads(arrays.pop("meta").tobytes().decode())
        version = meta.get("format")
    except (CheckpointError, MemoryError):  # the latter is no fault of the file's
        raise
    except OSError as error:
        if error.errno in _NO_FILE:
            remedy = "a run keeps its own as checkpoints/last.npz and best.npz in its folder"
            raise CheckpointError(f"there is no checkpoint {path}", remedy) from error
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}", "check its permissions") from error
    except Exception as error:  # a file made to mislead, seal and all, can make the parsers raise anything
        raise _unusable(path, f"its contents make no sense ({type(error).__name__}: {error})") from error
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version}, this minivit reads {FORMAT}", "use a matching minivit")
    return Checkpoint(arrays, meta)


def is_sealed(f: BinaryIO) -> bool:
    """Tell whether a file ends as every checkpoint of minivit's does."""
    f.seek(max(f.seek(0, os.SEEK_END) - _SEAL_SIZE, 0))
    return f.read(len(_SEAL)) == _SEAL


def _unusable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a usable checkpoint: {why}", "use another: best.npz beside last.npz, a copy")


def _members(archive: zipfile.ZipFile, size: int) -> list[zipfile.ZipInfo]:
    """Return the archive's members, once they cannot unpack to more than the file's own size."""
    members = archive.infolist()
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise ValueError("compressed, or longer than the file")
    return members


def _read(f: BinaryIO, size: int) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(f) as archive:
        return {m.filename.removesuffix(".npy"): _array(archive, m) for m in _members(archive, size)}


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as f:
        if np.lib.format.read_magic(f) != (1, 0):
            raise ValueError(f"{member.filename} has an unknown version")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
        data = f.read()
    # compared before anything of the declared shape is allocated
    if fortran or dtype.kind not in "fiub" or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{member.filename} declares {dtype}{shape} and has {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape).copy()  # a copy, because bytes cannot be written to


def _first_damage(f: BinaryIO, size: int) -> str:
    """Return the name of the first array whose bytes are not those that were written."""
    try:
        with zipfile.ZipFile(f) as archive:
            for member in _members(archive, size):
                with archive.open(member) as data:  # fails if the name, which would be told, is not the same twice
                    try:
                        while data.read(1 << 20):  # to the end, where the CRC-32 is compared
                            pass
                    except Exception:
                        return member.filename.removesuffix(".npy")
    except Exception:  # damaged where the archive lists its members
        pass
    return "what surrounds the arrays"


# ---- digests and sizes -----------------------------------------------------------------------------------------------


def parameters_hash(model: Module) -> str:
    """Return the SHA-256, in hexadecimal, of all parameters: names, dtypes, shapes and bits."""
    digest = hashlib.sha256()
    for name, array in model.state_dict().items():
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _digest(f: BinaryIO, length: int) -> bytes:
    """Return the SHA-256 in hexadecimal of the first ``length`` bytes."""
    digest = hashlib.sha256()
    f.seek(0)
    while length > 0 and (block := f.read(min(length, 1 << 20))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest().encode()


def _free(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path.parent).free:,}"
    except OSError:
        return "an unknown number"
