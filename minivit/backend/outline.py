"""Outlines: arrays that have a shape and a dtype, and no numbers. What is computed of them is an outline again.

A model's own forward pass, run on the outline of an image, tells every shape and every array that is kept, in
milliseconds and without the memory. An outline is a NumPy array and takes the CPU's way through every operation. Its
strides are those that a real array would have: so a view of it is a view, and a copy has ``memory`` of its own. Behind
it lie zeros that nobody writes to, for which the system therefore sets no memory aside.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

_VIEWS = frozenset(
    {np.reshape, np.transpose, np.swapaxes, np.moveaxis, np.squeeze, np.expand_dims, np.atleast_1d, np.broadcast_to,
     np.split, np.array_split, np.shape, np.ndim, np.size, np.result_type, np.may_share_memory}
)  # fmt: skip
"""Functions of NumPy's that move no numbers: they do with an outline what they do with any array."""

_WRITES = frozenset({np.copyto, np.put, np.place, np.putmask, np.put_along_axis, np.fill_diagonal})
"""Functions of NumPy's that write to their first argument, and return nothing."""


class Memory:
    """The memory that an outline, and every view of it, stands for."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


@functools.lru_cache(maxsize=64)
def _zeros(size: int) -> np.ndarray:
    """Return bytes of zeros, read-only: all outlines look at the same."""
    zeros = np.zeros(size, np.uint8)  # not touched, and so not provided
    zeros.flags.writeable = False
    return zeros


class Outline(np.ndarray):
    """An array without numbers; make one with :func:`outline` or :func:`stretched`. As a truth value it is True.

    So a twin that asks whether all numbers are small enough takes its usual way. A NumPy function that is not foreseen
    here runs on zeros: it gives the right shape, and takes its time and memory.
    """

    memory: Memory

    def __array_finalize__(self, other: Any) -> None:
        self.memory = other.memory if isinstance(other, Outline) else Memory(self.nbytes)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, out: Any = None, **settings: Any) -> Any:
        if out is not None:
            return out[0] if len(out) == 1 else out  # as it was: there are no numbers to write
        arrays = [x if isinstance(x, np.ndarray) else _number(x) for x in inputs]
        if method == "reduce":
            axes = settings.get("axis", 0)
            kept = {"dtype": settings["dtype"]} if settings.get("dtype") is not None else {}
            dtype = np.asarray(ufunc.reduce(np.ones(1, self.dtype), **kept)).dtype
            return self._like(_reduced(self.shape, axes, settings.get("keepdims", False)), dtype)
        if method == "at":
            return None  # as above
        if method != "__call__" or (ufunc not in (np.matmul, np.vecdot) and ufunc.signature is not None):
            return self._real(getattr(ufunc, method), inputs, settings)
        dtype = settings.get("dtype") or _result_dtype(ufunc, arrays)
        shapes = [np.shape(x) for x in arrays]
        if ufunc is np.matmul:
            return self._like(product_shape(*shapes), dtype)
        if ufunc is np.vecdot:
            return self._like(np.broadcast_shapes(*shapes)[:-1], dtype)
        shape = np.broadcast_shapes(*shapes)
        model = next((x for x in arrays if np.shape(x) == shape and isinstance(x, np.ndarray)), None)
        order = "C" if model is None or settings.get("order") == "C" else model
        made = [self._like(shape, dtype, order) for _ in range(ufunc.nout)]
        return made[0] if ufunc.nout == 1 else tuple(made)

    def __array_function__(self, function: Any, types: Any, args: Any, settings: Any) -> Any:
        if function is np.broadcast_to:
            settings = {**settings, "subok": True}
        if function in _VIEWS:
            return super().__array_function__(function, types, args, settings)
        if function in _WRITES and isinstance(args[0], Outline):
            return None
        if function is np.empty_like and args and isinstance(args[0], Outline):
            return args[0]._like(settings.get("shape", args[0].shape), settings.get("dtype", args[0].dtype), args[0])
        return self._real(function, args, settings)

    def _real(self, function: Any, args: Any, settings: Any) -> Any:
        """Return the outline of what a function gives on zeros."""

        def outlined(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(map(outlined, value))
            return self._like(value.shape, value.dtype) if isinstance(value, np.ndarray) else value

        return outlined(function(*_plain(args), **_plain(settings)))

    def _like(self, shape: Any, dtype: Any, order: Any = "C") -> Outline:
        """Return another outline, laid out in rows, or with its axes as those of the array ``order`` lie in memory."""
        shape, dtype = (shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype)
        axes = list(range(len(shape)))
        if isinstance(order, np.ndarray) and order.ndim == len(shape):
            axes.sort(key=lambda i: -abs(order.strides[i]))
        size = math.prod(shape) * dtype.itemsize
        zeros = _zeros(1 << max(20, size.bit_length()))[:size].view(dtype)
        laid = zeros.reshape([shape[i] for i in axes]).transpose(np.argsort(axes))
        return laid.view(Outline)

    # ---- methods that would compute, or copy ----

    def reshape(self, *shape: Any, **settings: Any) -> Any:
        """Return a view of another shape, or where the strides do not allow one, what would be a copy."""
        try:
            return super().reshape(*shape, **settings, copy=False)
        except ValueError:
            wanted = shape[0] if len(shape) == 1 else shape
            # of as many numbers, one length may be -1; raises what NumPy does where they are not as many
            return self._like(np.broadcast_to(np.uint8(0), self.size).reshape(wanted).shape, self.dtype)

    def astype(self, dtype: Any, *args: Any, copy: Any = True, **settings: Any) -> Any:
        """Return an outline of another dtype."""
        same = self.dtype == np.dtype(dtype)
        return self if same and not copy else self._like(self.shape, dtype, self)

    def copy(self, order: Any = "C") -> Outline:
        """Return an outline with memory of its own."""
        return self._like(self.shape, self.dtype)

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        found = super().__getitem__(_plain(index))
        if any(isinstance(part, (np.ndarray, list)) for part in parts) and isinstance(found, Outline):
            return self._like(found.shape, found.dtype)  # a copy, as of any array
        return found

    def __setitem__(self, index: Any, value: Any) -> None:
        pass  # there are no numbers to write

    def fill(self, value: Any) -> None:
        """Write nothing."""

    def __bool__(self) -> bool:
        return True


def outline(shape: Sequence[int], dtype: Any = np.float32) -> Outline:
    """Return an array of this shape without numbers, whose strides are those of any other's."""
    like = np.zeros((), np.uint8).view(Outline)
    return like._like(tuple(shape), dtype)


def stretched(shape: Sequence[int], dtype: Any = np.float32) -> Outline:
    """Return an outline of any size, of one number that is stretched: for a parameter, which is only ever read.

    Raises ValueError for a shape that NumPy's arrays cannot have.
    """
    made = np.broadcast_to(np.zeros((), dtype), tuple(shape)).view(Outline)
    made.memory = Memory(math.prod(shape) * made.itemsize)
    return made


def _plain(value: Any) -> Any:
    """Return arguments with the zeros that an outline looks at in its place."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.view(np.ndarray) if isinstance(value, Outline) else value


def _number(x: Any) -> Any:
    return x if type(x) in (bool, int, float, complex) else np.asarray(x)  # NumPy's own have a dtype


def _result_dtype(ufunc: np.ufunc, arrays: Sequence[Any]) -> np.dtype:
    kinds: list[Any] = [x.dtype if isinstance(x, np.ndarray) else type(x) for x in arrays]
    kinds = [np.dtype(bool) if kind is bool else kind for kind in kinds]  # not weak, as Python's numbers are
    return ufunc.resolve_dtypes((*kinds, *[None] * ufunc.nout))[-1]


def _reduced(shape: tuple[int, ...], axis: Any, keepdims: bool) -> tuple[int, ...]:
    given = range(len(shape)) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = {a % len(shape) for a in given}
    return tuple(1 if i in axes else n for i, n in enumerate(shape) if keepdims or i not in axes)


def product_shape(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a @ b; raise ValueError if they do not fit."""
    left, right = (a if len(a) > 1 else (1, *a)), (b if len(b) > 1 else (*b, 1))
    if left[-1] != right[-2]:
        raise ValueError(f"matmul: {a} @ {b}")
    lead, rows, columns = np.broadcast_shapes(left[:-2], right[:-2]), left[-2:-1], right[-1:]
    return (*lead, *(rows if len(a) > 1 else ()), *(columns if len(b) > 1 else ()))
