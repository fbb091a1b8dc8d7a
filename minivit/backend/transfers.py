"""What goes from the CPU to a GPU, in few pieces and not waited for, and a queue of work beside the caller's own."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from minivit.backend.devices import Array, array_module, gpu


def packed_to(target: Array, *arrays: np.ndarray) -> Sequence[Array]:
    """Return NumPy ``arrays`` where ``target`` lies: themselves on the CPU; on a GPU copies, made by one transfer.

    A transfer costs some 10 µs however little it carries, so what goes together is asked for together.
    """
    if array_module(target) is np:
        return arrays
    import cupy

    starts = [0, *itertools.accumulate(-(-a.nbytes // 16) * 16 for a in arrays)]  # aligned for any dtype
    packed = np.zeros(starts[-1], np.uint8)
    for a, start in zip(arrays, starts, strict=False):
        packed[start : start + a.nbytes] = np.ascontiguousarray(a).reshape(-1).view(np.uint8)
    with target.device:
        there = cupy.asarray(packed)  # by way of page-locked memory of CuPy's: it does not wait
    return [
        there[start : start + a.nbytes].view(a.dtype).reshape(a.shape) for a, start in zip(arrays, starts, strict=False)
    ]


class SideStream:
    """A GPU's second queue of work, beside the one that the caller's work is in.

    CuPy keeps the memory of arrays that nobody refers to any more for the next arrays *of the stream that they were
    made on*: it asks no other stream whether that has read them. So arrays that are made here never leave: the caller
    gets :meth:`copies`, which belong to its own stream, and this stream goes on only after they are made.
    """

    def __init__(self, device: str) -> None:
        import cupy

        self.device = device
        with gpu(device):
            self.stream = cupy.cuda.Stream(non_blocking=True)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Put what the calling thread does in this block in the queue, on any thread; nothing is waited for."""
        import cupy

        with gpu(self.device):
            outer = cupy.cuda.get_current_stream()
            try:
                with self.stream:
                    yield
            finally:
                outer.use()  # where the caller had chosen it by the same, the block's end has gone back past it

    def mark(self) -> Any:
        """Return the place in the queue where all that was put there so far is done, to give to :meth:`copies`."""
        return self.stream.record()

    def copies(self, arrays: Sequence[Array], ready: Any) -> list[Array]:
        """Return copies of ``arrays``, made after the place ``ready`` in the caller's current stream.

        Only the GPU waits: the caller's stream for the arrays, and this one, which may write over their memory as soon
        as they are let go, for the copies.
        """
        import cupy

        with gpu(self.device):
            callers = cupy.cuda.get_current_stream()
            callers.wait_event(ready)
            found = [a.copy() for a in arrays]
            self.stream.wait_event(callers.record())
        return found


def side_stream(device: str) -> SideStream:
    """Return the one side stream of the GPU ``"cuda:N"``, and with it the memory that CuPy keeps for its arrays."""
    import cupy

    return _side_stream(cupy, device)


@functools.cache  # by the module, because a stand-in for CuPy has streams of its own
def _side_stream(cupy: Any, device: str) -> SideStream:
    return SideStream(device)


def through_pinned(fill: Callable[[np.ndarray], Any], shape: tuple[int, ...], dtype: Any) -> Array:
    """Return an array on the current device and stream that ``fill`` has written in page-locked memory of the CPU.

    The copy is begun, not waited for. CuPy keeps the page-locked memory until it is done, and then uses it again: two
    pieces take turns where one is filled while the other is on its way.
    """
    import cupy
    import cupyx

    pinned = cupyx.empty_pinned(shape, dtype)
    fill(pinned)
    return cupy.asarray(pinned)


def resident(array: np.ndarray) -> Array:
    """Return a copy of a large array on the current device, without page-locked memory of its size on the CPU."""
    import cupy

    there = cupy.empty(array.shape, array.dtype)
    there.set(array)
    return there
