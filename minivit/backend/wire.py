"""Values between two processes, as frames of JSON and raw arrays: what comes back is data, and can run nothing."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

LARGEST = 1 << 27
"""The most bytes in a frame; no exercise comes near it."""

_MOST_ITEMS, _MOST_DEPTH = 4096, 3
_NUMBERS = re.compile(r"[<>]f(2|4|8|16)|[<>]c(8|16|32)|[<>][iu][248]|\|[iub]1")  # the dtypes that are passed on


@dataclass(frozen=True)
class Thing:
    """Stands for a value that is not passed on: ``kind`` says what it was."""

    kind: str


def packed(value: Any, most: int = LARGEST // 2) -> bytes:
    """Return a frame's body: the length of the JSON, the JSON, the bytes of the arrays one behind the other.

    An array with which they are more than ``most`` bytes is not passed on.
    """
    arrays: list[np.ndarray] = []
    text = json.dumps(_tree(value, arrays, 0, most)).encode()
    return b"".join([len(text).to_bytes(8, "big"), text, *(a.tobytes() for a in arrays)])


def with_length(body: bytes) -> bytes:
    """Return a frame: its body with the length of that before it, in 8 bytes, the largest first."""
    return len(body).to_bytes(8, "big") + body


def unpacked(body: bytes) -> Any:
    """Return the value of a frame's body; ValueError for one that :func:`packed` does not make."""
    end = 8 + int.from_bytes(body[:8], "big")
    try:
        tree = json.loads(body[8:end])
    except RecursionError:
        raise ValueError("a frame of lists in lists without end") from None
    value, rest = _value(tree, body[end:], 0)
    if rest:
        raise ValueError("a frame that is too long")
    return value


def _tree(value: Any, arrays: list[np.ndarray], depth: int, most: int) -> Any:
    if value is None or type(value) in (bool, str):
        return value
    if (type(value) in (int, float) and abs(value) < 1 << 62) or type(value) is float:
        return {"number": repr(value)}
    if isinstance(value, np.ndarray | np.generic) and not isinstance(value, np.ma.MaskedArray):
        array = np.asarray(value)
        if _NUMBERS.fullmatch(array.dtype.str) is None:
            return {"thing": f"array of {array.dtype}"[:60]}
        if sum(a.nbytes for a in arrays) + array.nbytes > most:
            return {"thing": f"array of {array.nbytes / 1e6:.0f} MB"}
        arrays.append(array)
        return {"array": array.dtype.str, "shape": array.shape}
    if depth < _MOST_DEPTH and len(value) <= _MOST_ITEMS if type(value) in (list, tuple, dict) else False:
        if type(value) is dict:
            pairs = [[_tree(k, arrays, depth + 1, most), _tree(x, arrays, depth + 1, most)] for k, x in value.items()]
            return {"dict": pairs}
        return {type(value).__name__: [_tree(x, arrays, depth + 1, most) for x in value]}
    return {"thing": type(value).__name__[:60]}


def _value(tree: Any, data: bytes, depth: int) -> tuple[Any, bytes]:
    """Return the value of a tree, and the bytes that its arrays have left."""
    if tree is None or type(tree) in (bool, str):
        return tree, data
    if type(tree) is not dict or depth > _MOST_DEPTH + 1:
        raise ValueError("no value")
    match tree:
        case {"number": str(text)}:
            return (float(text) if set(text) & set(".enai") else int(text)), data
        case {"thing": str(kind)}:
            return Thing(kind), data
        case {"array": str(dtype), "shape": list(shape)} if _NUMBERS.fullmatch(dtype):
            if not all(type(n) is int and n >= 0 for n in shape):
                raise ValueError("no shape")
            size = math.prod(shape) * int(dtype[2:])
            if size > len(data):
                raise ValueError("an array that is not there")
            return np.frombuffer(data[:size], dtype).reshape(shape).copy(), data[size:]
        case {"dict": list(pairs)}:
            found: dict[Any, Any] = {}
            for pair in pairs:
                (key, data), (value, data) = _pair(pair, data, depth)
                found[key if isinstance(key, str | int | float) else str(key)] = value
            return found, data
        case {"list": list(items)} | {"tuple": list(items)}:
            values = []
            for item in items:
                value, data = _value(item, data, depth + 1)
                values.append(value)
            return (tuple(values) if "tuple" in tree else values), data
    raise ValueError("no value")


def _pair(pair: Any, data: bytes, depth: int) -> tuple[tuple[Any, bytes], tuple[Any, bytes]]:
    if type(pair) is not list or len(pair) != 2:
        raise ValueError("no pair")
    key = _value(pair[0], data, depth + 1)
    return key, _value(pair[1], key[1], depth + 1)
