"""Writing .safetensors: the arrays of a model in the format of huggingface/safetensors (its README.md, "Format")."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from minivit.backend import spelled
from minivit.errors import DTypeError
from minivit.weights.stored import DTYPES, Stored

NAMES = {
    "bfloat16" if dtype == "bfloat16" else np.dtype(dtype).name: name for name, dtype in DTYPES.items()
}  # fmt: skip
"""What safetensors calls a dtype, by NumPy's name."""


def write_safetensors(f: BinaryIO, arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
    """Write ``arrays``, by name, to an empty file; ``about`` is its ``__metadata__``.

    The wider dtypes come first and names are in order, without a gap, and the header is filled up with spaces to a
    multiple of 8 bytes: so each array begins at a multiple of its item's size. All numbers are little-endian and in C
    order, whatever the arrays are. Equal arrays give equal bytes. Raises DTypeError for a dtype that the format lacks.
    """
    header: dict[str, object] = {"__metadata__": dict(about)}
    order, at = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name)), 0
    for name in order:
        array = arrays[name]
        if array.dtype.name not in NAMES:
            raise DTypeError(
                f"{name} is {spelled(array.dtype)}, which safetensors has no name for", f"known: {', '.join(NAMES)}"
            )
        place = [at, at + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": place}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    f.write(len(text).to_bytes(8, "little") + text)
    for name in order:
        f.write(raw_bytes(arrays[name]).data)


def raw_bytes(array: np.ndarray) -> np.ndarray:
    """Return an array's numbers as they lie in a file, little-endian in C order: uint8 (n,)."""
    array = np.ascontiguousarray(array).reshape(-1)  # a scalar, too, has an axis then
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.astype(array.dtype.newbyteorder("<"))
    return array.view(np.uint8)


def differing(stored: Stored, arrays: Mapping[str, np.ndarray]) -> str | None:
    """Return the name of an array that a written file does not have bit for bit, or None: it is what was written."""
    if stored.entries.keys() != arrays.keys():
        return min(stored.entries.keys() ^ arrays.keys())
    for name, array in arrays.items():
        entry = stored.entries[name]
        if entry.shape != array.shape or not np.array_equal(raw_bytes(entry.load()), raw_bytes(array)):
            return name
    return None
