"""Memory that processes share: one file without a name, which is gone with the last process that has it."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

LINE = 64
"""Bytes of a line of a core's cache: what different processes write begins in different ones."""


class Layout(NamedTuple):
    """Where things lie in the memory: a line of signs of life for each other process, values, frozen ones, gradients.

    ``others`` is how many of those there are: each has a gradient of its own, too.
    """

    dtype: str
    numbers: int  # of the parameters that are trained
    frozen_numbers: int  # of those that are not
    others: int

    @property
    def size(self) -> int:
        """Return the bytes in all."""
        return self._start(2 + self.others)

    def values(self, memory: mmap.mmap) -> np.ndarray:
        """Return the parameters that are trained, as one flat array."""
        return self._array(memory, 0, self.numbers)

    def frozen(self, memory: mmap.mmap) -> np.ndarray:
        """Return the parameters that are not."""
        return self._array(memory, 1, self.frozen_numbers)

    def gradient(self, memory: mmap.mmap, other: int) -> np.ndarray:
        """Return what the other process at this place adds up in."""
        return self._array(memory, 2 + other, self.numbers)

    def _start(self, part: int) -> int:
        itemsize = np.dtype(self.dtype).itemsize
        sizes = [self.numbers, self.frozen_numbers, *[self.numbers] * self.others]
        return LINE * self.others + sum(-(-n * itemsize // LINE) * LINE for n in sizes[:part])

    def _array(self, memory: mmap.mmap, part: int, numbers: int) -> np.ndarray:
        return np.frombuffer(memory, self.dtype, numbers, self._start(part))


def beats_in(memory: mmap.mmap, other: int) -> np.ndarray:
    """Return the number, (1,), that the other process at this place counts up as long as it lives."""
    return np.frombuffer(memory, np.uint64, 1, LINE * other)


@contextlib.contextmanager
def unnamed_memory(size: int) -> Iterator[int]:
    """Yield the descriptor of so many bytes of memory that has no name, and so cannot outlive its processes."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("minivit")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, size)
        yield descriptor
    finally:
        os.close(descriptor)
