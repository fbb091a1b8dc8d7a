"""What a kernel is promised of its arguments: read off the arrays of each launch, so that all of it holds.

Of an array: its dtype and number of axes; a last axis without gaps; which strides, and whether the length of the last
axis, are whole multiples of 16 bytes, and if all strides are, whether it starts at one; which other arguments it
overlaps; whether it lies over itself (a broadcast axis). The lengths themselves are not among them: one cubin serves
all batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minivit.backend.devices import Array, address_of, is_array
from minivit.errors import ConfigError

LIMIT = 2**31 - 1
"""Shapes, strides and offsets are int32."""


class Like(NamedTuple):
    """Stands for an array that is still to be made by ``empty(shape, dtype)``."""

    dtype: Any
    shape: tuple[int, ...]


class Loose(NamedTuple):
    """An array, or a :class:`Like`, of whose alignment, strides and length nothing is promised.

    For one that is read or written little, and lies differently from batch to batch: one kernel serves all of them.
    """

    array: Any


class ArrayPromise(NamedTuple):
    """What is promised of an array; divisors are counted in elements, but for ``base``, in bytes."""

    dtype: str
    strides: tuple[int, ...]  # of all axes but the last, whose stride is 1
    length: int  # of the last axis
    base: int
    over_itself: bool
    overlaps: tuple[str, ...]  # a name for each pair of arguments that it is one of


Promise = ArrayPromise | str  # of a number: "int32" or "float32"


class Layout(NamedTuple):
    """How arrays of one dtype, shape and strides lie; ``unfit`` says why no kernel can take one, "" if one can."""

    unfit: str
    promise: ArrayPromise  # of one that starts at a multiple of 16 bytes
    reach: int  # bytes from the first to one past the last
    numbers: tuple[np.int32, ...]  # shape and strides in elements, as they are passed


class Place(NamedTuple):
    """Where an array lies; of one that is still to be made the address is 0."""

    address: int
    layout: Layout


def addresses(array: Array) -> tuple[int, int]:
    """Return an array's address, and the one whose alignment counts.

    On a GPU they are the same. NumPy's arrays, met while planning only, stand for CuPy's, whose memory starts at
    multiples of 512 bytes: the distance from the start of their memory counts.
    """
    address = address_of(array)
    if not isinstance(array, np.ndarray):
        return address, address
    owner = array
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return address, address - address_of(owner)


def _strides(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> tuple[int, ...]:
    """Return strides in elements; an axis of one place, which may have any, gets the one of a contiguous array."""
    found: list[int] = []
    within = 1  # the stride that the axis would have
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        found.append(within if n <= 1 else stride // size)
        within = found[-1] * n
    return tuple(reversed(found))


@functools.lru_cache(maxsize=4096)
def _layout(dtype: np.dtype, shape: tuple[int, ...], given: tuple[int, ...] | None) -> Layout:
    """Return the layout of arrays with the ``given`` strides in bytes, or without gaps."""
    if not shape:
        raise ConfigError("a kernel's argument is an array without axes", "give it one: reshape(1)")
    size = dtype.itemsize
    contiguous = tuple([size * math.prod(shape[i + 1 :]) for i in range(len(shape))])
    strides = _strides(shape, contiguous if given is None else given, size)
    reach = sum([(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]) + 1 if 0 not in shape else 0
    unfit = ""
    if strides[-1] != 1 or any(stride % size for stride in given or ()):
        unfit = f"the last axis of an array of shape {shape} has gaps"
    elif min(strides) < 0:
        unfit = f"an array of shape {shape} runs backwards"
    elif reach > LIMIT or max(shape) > LIMIT:
        unfit = f"an array of shape {shape} spans more than 2³¹ elements"
    even = max(16 // size, 1)
    outer = tuple([even if stride % even == 0 else 1 for stride in strides[:-1]])
    promise = ArrayPromise(
        dtype.name,
        outer,
        even if shape[-1] % even == 0 else 1,
        16 if all(stride == even for stride in outer) else size,
        any(n > 1 and stride == 0 for n, stride in zip(shape, strides, strict=True)),
        (),
    )
    numbers = () if unfit else tuple(map(np.int32, shape + strides))
    return Layout(unfit, promise, reach * size, numbers)


def promises(args: Sequence[Any]) -> tuple[tuple[Promise, ...], list[Place | None], str]:
    """Return what is promised of each argument, where each array lies, and why no kernel can take them ("" if one can).

    Arguments are arrays (or :class:`Like`, :class:`Loose`), integers and floats. Raises ConfigError for others, and
    for an array without axes.
    """
    found: list[Promise] = []
    places: list[Place | None] = []
    why_not = ""
    for given in args:
        x = given.array if isinstance(given, Loose) else given
        if isinstance(x, int | float) and not isinstance(x, bool):
            if isinstance(x, int) and not -LIMIT <= x <= LIMIT:
                why_not = why_not or f"{x} is no int32"
            found.append("int32" if isinstance(x, int) else "float32")
            places.append(None)
            continue
        address, aligned, strides = 0, 0, None
        if not isinstance(x, Like):
            if not is_array(x):
                raise ConfigError(f"a kernel's argument is a {type(x).__name__}", "give arrays, integers and floats")
            strides = x.strides
            address, aligned = addresses(x)
        layout = _layout(np.dtype(x.dtype), tuple(x.shape), strides)
        why_not = why_not or layout.unfit
        promise, size = layout.promise, np.dtype(x.dtype).itemsize
        if isinstance(given, Loose):
            promise = promise._replace(strides=(1,) * len(promise.strides), length=1)
        if isinstance(given, Loose) or aligned % 16:
            promise = promise._replace(base=1 if aligned % size else size)
        found.append(promise)
        places.append(Place(address, layout))
    return _with_overlaps(found, places), places, why_not


def _with_overlaps(found: list[Promise], places: list[Place | None]) -> tuple[Promise, ...]:
    """Note which arrays overlap: seldom any do."""
    spans = [(p.address, p.address + p.layout.reach, i) for i, p in enumerate(places) if p is not None and p.address]
    spans.sort()
    for n, (_, end, i) in enumerate(spans):
        for start, _, j in spans[n + 1 :]:
            if start >= end:
                break
            for k in (i, j):
                one = found[k]
                assert isinstance(one, ArrayPromise)
                pair = f"{min(i, j)}-{max(i, j)}"
                found[k] = one._replace(overlaps=tuple(sorted((*one.overlaps, pair))))
    return tuple(found)


def flat(args: Sequence[Any], places: Sequence[Place | None]) -> list[Any]:
    """Return the arguments as the calling convention of cuTile 1.7 has them, as NumPy scalars.

    Of an array its address (uint64), its shape and its strides in elements (int32); a number as int32 or float32.
    """
    out: list[Any] = []
    for x, place in zip(args, places, strict=True):
        if place is None:
            out.append(np.int32(x) if isinstance(x, int) else np.float32(x))
        else:
            out.append(np.uint64(place.address))
            out += place.layout.numbers
    return out
