"""What is wanted of a gradient: its shape and dtype; and what an entry of ``needs`` may be but a bool, a place for it.

``propagate(…, slots=…)`` hands them to the gradients of twins. Both are true, so whoever knows nothing of them returns
an array, as ever. It saves a twin's result a copy, or a sum its own pass over memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minivit.backend import Array, is_bfloat16, is_half


class Slot:
    """The place where a leaf's gradient is added up: ``array``, of the leaf's shape, maybe of a wider dtype.

    Who writes a part into it adds to what is there if it is ``filled``, writes over it otherwise, and returns
    :meth:`done`.
    """

    __slots__ = ("array", "filled")

    def __init__(self, array: Array) -> None:
        self.array, self.filled = array, False

    def done(self) -> Slot:
        """Note that ``array`` holds the gradient so far; return the slot, in the place of the part."""
        self.filled = True
        return self

    def add(self, part: Array) -> None:
        """Add a part; the first is copied, so that nothing need be cleared before."""
        if self.filled:
            total = self.array
            total += part
        else:
            self.array[...] = part
            self.filled = True


class SoFar:
    """The sum of the gradients that have reached an input before; ``array`` is not to be written over.

    Who has added it to its own part returns :meth:`total`.
    """

    __slots__ = ("array",)

    def __init__(self, array: Array) -> None:
        self.array = array

    def total(self, array: Array) -> Total:
        """Return the gradient of the input with what had reached it before."""
        return Total(array)


class Total:
    """A gradient that has the sum so far in it: see :class:`SoFar`."""

    __slots__ = ("array",)

    def __init__(self, array: Array) -> None:
        self.array = array


def places(
    parents: Sequence[Any], needs: tuple[bool, ...], slots: Mapping[Any, Slot], grads: Mapping[Any, Array]
) -> tuple[Any, ...]:
    """Return ``needs`` with a Slot for each leaf that has one, and a SoFar for each input that has a sum already.

    An input that is there twice has none: neither part could know of the other.
    """
    return tuple(
        slots.get(parent) or (SoFar(grads[parent]) if parent in grads and parents.count(parent) == 1 else True)
        if need
        else False
        for parent, need in zip(parents, needs, strict=True)
    )


def unbroadcast(grad: Any, shape: tuple[int, ...]) -> Any:
    """Sum ``grad`` over the axes along which an input of ``shape`` was broadcast. Works on arrays and on Tensors."""
    extra = len(grad.shape) - len(shape)
    if grad.shape == shape or extra < 0:
        return grad
    stretched = [i + extra for i, n in enumerate(shape) if n == 1 and grad.shape[i + extra] != 1]
    axes = (*range(extra), *stretched)
    if axes and is_half(grad.dtype):  # a sum of ones stops at 2048 in float16, at 256 in bfloat16
        return unbroadcast(grad.astype(np.float32), shape).astype(grad.dtype)
    summed = grad.sum(axis=axes, keepdims=True) if axes else grad
    return summed.reshape(shape) if summed.shape[extra:] == shape else summed  # else it is wrong: the caller says so


def rounded(x: Any, dtype: Any) -> Any:
    """Return what was made of arrays of ``dtype``, as bfloat16 if that is theirs; arrays or Tensors.

    Beside a Python float NumPy and CuPy make float32 of bfloat16, or float64, as they do of no other dtype.
    """
    return x.astype(dtype) if is_bfloat16(dtype) and x.dtype.kind == "f" else x
