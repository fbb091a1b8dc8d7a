"""Reading files that may be damaged, or made to mislead: sizes are checked before memory is taken, nothing is run."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, is_zipfile

import numpy as np

from minivit.backend import available_memory
from minivit.errors import DataError
from minivit.files import open_regular

NPZ_REMEDY = "make it again: np.savez_compressed('data.npz', images=images, labels=labels)"
GET_AGAIN = "get the file again: minivit data get NAME, or from where it came"
_MOST_INFLATED = 1032  # RFC 1951: a match of 258 bytes takes two bits at least


@contextlib.contextmanager
def reading(name: str, remedy: str) -> Iterator[None]:
    """Turn whatever reading a missing or damaged file raises into a DataError: it is not of one kind."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{name}: no such file", "check the path") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror  # without the path, which the name is or says better
        raise DataError(f"{name}: cannot be read: {reason}", remedy) from error


def read_npz(path: Path, choose: Callable[[Collection[str]], dict[str, str]]) -> dict[str, np.ndarray]:
    """Read the arrays that ``choose`` names: it gets the names of all, and returns those to read by what to call them.

    Nothing is allocated that the file could not fill. Raises DataError, with path and reason, if they cannot be read.
    """
    with reading(str(path), NPZ_REMEDY), open_regular(path) as file:
        if not is_zipfile(file):
            raise DataError(f"{path}: not a NumPy archive", NPZ_REMEDY)
        with ZipFile(file) as archive:
            members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
            chosen = choose(list(members))
            wanted = {stored: members[stored] for stored in chosen.values()}
            # NumPy writes no other methods, and zipfile unpacks the others without a limit
            if any(m.compress_type not in (ZIP_STORED, ZIP_DEFLATED) for m in wanted.values()):
                raise ValueError("an unknown method of compression")
            check_size(sum(m.file_size for m in wanted.values()), packed=file.seek(0, os.SEEK_END))
            arrays = {}
            for stored, member in wanted.items():
                with reading(f"{path}: {stored}", NPZ_REMEDY), archive.open(member) as f:
                    arrays[stored] = read_npy(f, member.file_size)
            return {name: arrays[stored] for name, stored in chosen.items()}


def read_npy(f: Any, size: int) -> np.ndarray:
    """Read an .npy file of ``size`` bytes from ``f``. Raises ValueError, before it allocates, if the header lies."""
    version = np.lib.format.read_magic(f)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"unknown version {version} of .npy")
    shape, fortran, dtype = readers[version](f)
    if dtype.hasobject:
        raise ValueError("Python objects are never read; save numbers, or strings: np.asarray(labels, np.str_)")
    if (needed := math.prod(shape) * dtype.itemsize) != size - f.tell():
        raise ValueError(f"{dtype} {shape} needs {needed:,} bytes, there are {size - f.tell():,}")
    return read_exactly(f, needed).view(dtype).reshape(shape, order="F" if fortran else "C")


def read_exactly(f: Any, size: int) -> np.ndarray:
    """Read the last ``size`` bytes of ``f`` as uint8 (size,). Raises ValueError if it has fewer, or more."""
    out, at = np.empty(size, np.uint8), 0
    while at < size and (piece := f.read(min(size - at, 1 << 20))):  # in pieces: some readers hold all they are asked
        out[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
        at += len(piece)
    if at < size or f.read(1):
        raise ValueError(f"{size:,} bytes expected, it has {'more' if at == size else f'{at:,}'}")
    return out


def check_size(size: int, packed: int | None = None) -> None:
    """Raise ValueError if ``size`` bytes do not fit the free memory, or cannot be ``packed`` bytes of DEFLATE."""
    if size > (free := available_memory()) // 2:  # the rest is for what is computed with them
        raise ValueError(f"it needs {size:,} bytes of memory, more than half of the {free:,} that are free")
    if packed is not None and size > packed * _MOST_INFLATED:
        raise ValueError(f"{packed:,} packed bytes cannot hold the {size:,} declared")


def fitting_labels(labels: np.ndarray, count: int, classes: tuple[str, ...], path: Path) -> np.ndarray:
    """Return ``labels``, read from ``path``, as int64 (N,), once they fit ``count`` images and the classes."""
    if len(labels) != count:
        raise DataError(f"{path}: {len(labels)} labels for {count} images", GET_AGAIN)
    wrong = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(wrong):
        what = f"{path}: label {labels[wrong[0]]} of image {wrong[0]} is not one of {len(classes)} classes"
        raise DataError(what, GET_AGAIN)
    return labels.astype(np.int64)
