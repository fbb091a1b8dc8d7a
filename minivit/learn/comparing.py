"""Holds what a learner's function returned against what is right: shapes, kinds of numbers, values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivit.backend import Key, random_bits
from minivit.backend.wire import Thing

TOLERANCE = 1e-12
"""An entry may be off by this share of its output's scale."""

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Unreadable:
    """What was returned cannot be compared: ``says`` why, as a learner reads it; ``name`` is the mistake's."""

    name: str
    says: str


def named(outputs: Sequence[str], value: Any) -> Outputs:
    """Return what ``right`` or a mistake gives, as arrays by the outputs' names."""
    if isinstance(value, Mapping):
        return {name: np.asarray(value[name]) for name in outputs}
    values = (value,) if len(outputs) == 1 else value
    return {name: np.asarray(x) for name, x in zip(outputs, values, strict=True)}


def read(outputs: Sequence[str], value: Any, as_dict: bool) -> Outputs | Unreadable:
    """Return what a learner's function returned as arrays by the outputs' names, or why that cannot be.

    A Python number or NumPy's will do for an array of no axes. Several outputs are a tuple or a list, or a dict where
    ``as_dict``. Whole numbers count as floating ones.
    """
    if value is None:
        return Unreadable("nothing returned", "it returns None: is there a return at its end?")
    if as_dict:
        if not isinstance(value, dict):
            return Unreadable("not a dict", f"it returns {_a(value)}, and should return a dict with the keys of the "
                              "parameters")  # fmt: skip
        missing = [name for name in outputs if name not in value]
        extra = [str(name) for name in value if name not in outputs]
        if missing or extra:
            what = f"there is no {missing[0]!r}" if missing else f"{extra[0]!r} is none of the parameters"
            return Unreadable("other keys", f"the keys of the dict that it returns are not right: {what}")
        values: Sequence[Any] = [value[name] for name in outputs]
    elif len(outputs) == 1:
        if isinstance(value, tuple):
            ask = "is there a comma behind it?" if len(value) == 1 else "how are they joined into one array?"
            what = f"it returns a tuple of {len(value)}, and should return {outputs[0]} alone: {ask}"
            return Unreadable("a tuple", what)
        values = [value]
    else:
        if not isinstance(value, tuple | list) or len(value) != len(outputs):
            got = f"{len(value)} values" if isinstance(value, tuple | list) else _a(value)
            what = f"it returns {got}, and should return {len(outputs)} values: return {', '.join(outputs)}"
            return Unreadable("number of outputs", what)
        values = value
    found: Outputs = {}
    for name, x in zip(outputs, values, strict=True):
        array = _array(name, x)
        if isinstance(array, Unreadable):
            return array
        found[name] = array
    return found


def _array(name: str, x: Any) -> np.ndarray | Unreadable:
    if x is None:
        return Unreadable("nothing returned", f"{name} is None")
    if not isinstance(x, np.ndarray | np.number | np.bool_ | float | int | complex):
        return Unreadable("not an array", f"{name} is {_a(x)}, and should be a NumPy array")
    if isinstance(x, np.ma.MaskedArray):
        return Unreadable("not an array", f"{name} is a masked array, and should be a plain one")
    array = np.asarray(x)
    if array.dtype.kind == "c":
        return Unreadable("complex", f"{name} is complex, and should be real (float64)")
    if array.dtype.kind not in "fiub":
        return Unreadable("not numbers", f"{name} is an array of {array.dtype}, and should be float64")
    return array if array.dtype.kind == "f" else array.astype(np.float64)


def _a(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"one array, of shape {value.shape}"
    kind = value.kind if isinstance(value, Thing) else type(value).__name__
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


def scales(rights: Sequence[Outputs]) -> list[dict[str, float]]:
    """Return the scale of each output in each sample: what an error is a share of.

    It is the largest entry in that sample, or the median over all samples of these largest entries if that is more. A
    gradient that is 0, or 1e-80 because a softmax is saturated, is what is left after terms of ordinary size have
    cancelled: rounding leaves some 1e-16 of those terms, in whatever order they are added. Samples are drawn such that
    ordinary is the size of most. A mistake that shows nowhere but in such a remainder is none.
    """
    largest = [{name: float(np.abs(x).max(initial=0.0)) for name, x in right.items()} for right in rights]
    usual = {name: float(np.median([one[name] for one in largest])) for name in rights[0]}
    return [{name: max(size, usual[name]) for name, size in one.items()} for one in largest]


def agree(got: np.ndarray, wanted: np.ndarray, scale: float, tolerance: float = TOLERANCE) -> bool:
    """Return whether shapes are equal, and values to ``tolerance`` of the scale.

    For mistakes' sake NaN and infinity are alike: which of them an overflow leaves depends on the way of writing.
    """
    if got.shape != wanted.shape:
        return False
    with np.errstate(all="ignore"):
        off = np.abs(got.astype(np.float64) - wanted)
    return bool(np.all((off <= tolerance * scale) | (got == wanted) | ~(np.isfinite(got) | np.isfinite(wanted))))


def worst_entry(got: np.ndarray, wanted: np.ndarray) -> tuple[int, ...]:
    """Return the index of the entry that is farthest off; one that is not finite is farther than any."""
    with np.errstate(all="ignore"):
        off = np.abs(got.astype(np.float64) - wanted)
    off = np.where(np.isnan(off), np.inf, off)
    return tuple(int(i) for i in np.unravel_index(int(off.argmax()), off.shape))


def nudged(value: Any, key: Key) -> Any:
    """Return arrays of floating numbers, or tuples, lists and dicts of them, each number moved by a rounding."""
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        up = random_bits(key, value.shape) % 2
        return value * (1.0 + np.finfo(np.float64).eps * (2.0 * up - 1.0))
    if isinstance(value, tuple | list):
        return type(value)(nudged(x, key.child(i)) for i, x in enumerate(value))
    if isinstance(value, dict):
        return {name: nudged(x, key.child(i)) for i, (name, x) in enumerate(value.items())}
    return value
