"""Work on a GPU that is recorded once and replayed many times, and numbers that are on their way from there.

A CUDA graph is a list of kernels with the addresses that they work on. It is recorded by doing the work once on a
stream that captures, which runs nothing; to replay it the host needs a few microseconds, however many kernels there
are. NVIDIA, CUDA C++ Programming Guide, "CUDA Graphs".
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from minivit.backend.devices import Array


class Aside:
    """A stream on the current GPU, on which work is recorded, with a memory pool of its own."""

    def __init__(self, stream: Any = None) -> None:
        """Take a stream, on which others may record as well, or make one."""
        import cupy

        # one that waits for the default stream cannot capture
        self.stream: Any = cupy.cuda.Stream(non_blocking=True) if stream is None else stream
        self.pool = cupy.cuda.MemoryPool(functools.partial(_taken, self.stream))

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Work on this stream and in this pool in the block; the caller's stream has its place before and after it."""
        import cupy

        outer = cupy.cuda.get_current_stream()
        self.stream.wait_event(outer.record())
        try:
            with self.stream, cupy.cuda.using_allocator(self.pool.malloc):
                yield
        finally:
            outer.use()  # where the caller had chosen it by the same, the block's end has gone back past it
            outer.wait_event(self.stream.record())

    def record(self, work: Callable[[], None]) -> Graph:
        """Return what ``work`` does, recorded; nothing of it is run.

        Raises what ``work`` raises, and CuPy's errors where it does what cannot be recorded: it waits for the GPU,
        copies from or to the host, or calls a library that cannot be recorded. The stream can be used again then.
        """
        with self.entered():
            self.stream.begin_capture()
            try:
                work()
            except BaseException:
                with contextlib.suppress(Exception):  # it is void, or it is not wanted
                    self.stream.end_capture()
                raise
            return Graph(self.stream.end_capture(), self.pool)


def _taken(stream: Any, size: int) -> Any:
    """Return so much of the GPU's memory for the pool of a stream's work, which has none of the size itself."""
    import cupy

    try:
        return cupy.cuda.MemoryPointer(cupy.cuda.Memory(size), 0)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        if stream.is_capturing():  # the pool would answer CuPy's error by giving back what the graph has used before
            raise MemoryError(f"the GPU has no {size:,} bytes left to record a step in") from error
        cupy.get_default_memory_pool().free_all_blocks()
        return cupy.cuda.MemoryPointer(cupy.cuda.Memory(size), 0)


class Graph:
    """Recorded work. It keeps the memory that it took while it was recorded."""

    def __init__(self, graph: Any, pool: Any) -> None:
        self._graph, self._pool = graph, pool

    def replay(self) -> None:
        """Do the work again, on the caller's stream, on what lies in the same arrays now."""
        self._graph.launch()

    @property
    def nodes(self) -> int:
        """How many kernels, copies and fillings it is."""
        return len(set(re.findall(r'"graph_\d+_node_\d+"', self._graph.debug_dot_str())))  # edges name them again


class Arriving:
    """A copy of an array on its way from the GPU."""

    def __init__(self, array: Array) -> None:
        import cupy
        import cupyx

        self._host = cupyx.empty_pinned(array.shape, array.dtype)  # only to such memory a copy is not waited for
        array.get(out=self._host, blocking=False)
        self._event = cupy.cuda.Event(disable_timing=True)
        self._event.record()

    def read(self) -> np.ndarray:
        """Return the copy; wait until it is there."""
        self._event.synchronize()
        return self._host
