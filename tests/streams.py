"""Streams, events, graphs, memory pools and pinned memory for the strict stand-in for CuPy (strict.py).

Outside a capture everything runs at once, in the order of the program. While a stream captures, what is put on it does
not run: the stand-in notes each operation as a call without arguments, and :meth:`Graph.launch` makes these calls. So
a replay sees what a graph sees on a GPU: the arrays that it was captured with, as they are at the time of the launch.

What goes wrong on a GPU without a word fails here:

- what waits for the GPU, and what crosses between host and device, is refused in a capture, with CuPy's errors;
- memory that a graph has taken holds NaN before each launch, and again from where its last array dies in the capture:
  the pool may then have handed it out once more;
- a graph that works on an array which was there before the capture, and is freed since, cannot be launched;
- a copy to or from pinned memory is done when it is waited for, and not before: until then the host reads NaN, and
  whoever overwrites what is still to be copied from is told so.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_thread = threading.local()


class CUDARuntimeError(RuntimeError):
    """As in cupy.cuda.runtime."""


def current_device() -> int:
    return getattr(_thread, "device", 0)


def use_device(number: int) -> None:
    _thread.device = number


def poison(host: np.ndarray) -> None:
    """Fill an array with what nobody takes for a result: NaN, the largest integer, True."""
    kind = host.dtype.kind
    with np.errstate(all="ignore"):
        host.fill(True if kind == "b" else np.iinfo(host.dtype).max if kind in "iu" else np.nan)


# ---- memory ----------------------------------------------------------------------------------------------------------


class Block:
    """A piece of the GPU's memory: the NumPy array that stands for it, and how many CuPy arrays lie in it."""

    def __init__(self, owner: np.ndarray, device: int) -> None:
        self.owner = weakref.ref(owner)
        self.device, self.nbytes, self.arrays = device, owner.nbytes, 0
        self.pool = getattr(_thread, "pool", None) or default_pool
        self.capture = capture_now()  # in which it was taken, if any

    def enter(self) -> None:
        """Count an array that lies in it."""
        if self.arrays == 0:
            self.pool.count(self.device, self.nbytes)
        self.arrays += 1

    def leave(self) -> None:
        """Count an array in it as gone. The memory of the last may be handed out again from there on."""
        self.arrays -= 1
        if self.arrays == 0:
            self.pool.count(self.device, -self.nbytes)
            owner, capture = self.owner(), self.capture
            if owner is not None and capture is not None and capture.running and capture is capture_now():
                capture.calls.append(lambda: poison(owner))


class MemoryPool:
    """Counts what is in use. Nothing is handed out twice: what would be is poisoned instead."""

    def __init__(self, allocator: Any = None) -> None:
        self.allocator = allocator  # which a test may ask
        self.used = Counter({0: 0, 1: 0})  # bytes by device
        self.most: Counter[int] = Counter()  # at a time, by device

    def count(self, device: int, nbytes: int) -> None:
        """Count a block of so many bytes as taken; less than none: as given back."""
        self.used[device] += nbytes
        if self.used[device] > self.most[device]:
            self.most[device] = self.used[device]

    def malloc(self, size: int) -> None:
        raise NotImplementedError("the stand-in has no memory without an array: make an array under the pool")

    def used_bytes(self) -> int:
        return self.used[current_device()]

    def total_bytes(self) -> int:
        return self.used_bytes() if self is default_pool else self.most[current_device()]

    def free_all_blocks(self, stream: Any = None) -> None:
        self.most[current_device()] = self.used_bytes()


default_pool = MemoryPool()


@contextlib.contextmanager
def using_allocator(allocator: Any = None) -> Iterator[None]:
    before = getattr(_thread, "pool", None)
    _thread.pool = getattr(allocator, "__self__", None)
    try:
        yield
    finally:
        _thread.pool = before


# ---- captures and graphs ---------------------------------------------------------------------------------------------


class Capture:
    """What a stream has captured so far."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] = []
        self.nodes: Counter[str] = Counter()  # by name, as counters.launched
        self.taken: list[np.ndarray] = []  # the memory that it took
        self.used: set[Block] = set()  # what it works on
        self.running, self.broken = True, False

    def add(self, name: str, call: Callable[[], Any], blocks: Any) -> None:
        """Note an operation instead of running it."""
        self.calls.append(call)
        self.nodes[name] += 1
        self.used.update(blocks)


def capture_now() -> Capture | None:
    """Return the capture that this thread's current stream is in."""
    return get_current_stream().capture


def refuse_transfer(what: str) -> None:
    """Raise CuPy's error for a copy between host and device, if it is in a capture."""
    if capture_now() is not None:
        raise RuntimeError(f"the current stream is capturing, so {what} transfers are disallowed")


def refuse_sync() -> None:
    """Raise CUDA's error for waiting, if it is in a capture, which is void from there on."""
    if (capture := capture_now()) is not None:
        capture.broken = True
        raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported: operation not permitted when stream is capturing")


class Graph:
    """What was captured."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self.nodes = capture.nodes  # not CuPy's: for tests

    def launch(self, stream: Stream | None = None) -> None:
        outer = (stream or get_current_stream()).capture
        assert outer is None, "the stand-in captures no launch of a graph"
        for block in self._capture.used:
            if block.arrays == 0 and block.capture is not self._capture:
                raise AssertionError("a graph works on an array that was there before it, and is freed since")
        for host in self._capture.taken:
            poison(host)
        for call in self._capture.calls:
            call()

    def upload(self, stream: Stream | None = None) -> None:
        """Do nothing: a GPU would get the graph, which a first launch brings along otherwise."""

    def debug_dot_str(self, flags: int = 0) -> str:
        names = list(self.nodes.elements())
        lines = ["subgraph cluster_1 {", 'label="graph_1" graph[style="dashed"];']
        lines += [f'"graph_1_node_{i}"[style="bold" shape="octagon" label="{i}\n{n}\n"];' for i, n in enumerate(names)]
        lines += [f'"graph_1_node_{i}" -> "graph_1_node_{i + 1}" [headlabel=0];' for i in range(len(names) - 1)]
        return "\n".join(["digraph dot {", *lines, "}", "}"])


# ---- streams and events ----------------------------------------------------------------------------------------------


class Stream:
    """A queue of work; as a context, this thread's current one."""

    null: Stream
    waited: Callable[[], None] = staticmethod(lambda: None)  # the counter, set by strict.py

    def __init__(
        self, null: bool = False, non_blocking: bool = False, ptds: bool = False, priority: int | None = None
    ) -> None:
        self.ptr = 0 if null else id(self)
        self.is_non_blocking = non_blocking
        self.device_id = -1 if null else current_device()
        self.capture: Capture | None = None

    def __enter__(self) -> Stream:
        if self.device_id not in (-1, current_device()):
            raise RuntimeError("The device that the stream is created on does not match with the current device")
        _stack().append(self)
        _thread.current = self
        return self

    def __exit__(self, *error: object) -> None:
        _stack().pop()
        _thread.current = _stack()[-1]  # not what use() had made current: as in CuPy

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return self.ptr

    def use(self) -> Stream:
        _thread.current = self
        return self

    @property
    def done(self) -> bool:
        with self:
            refuse_sync()
        return True

    def synchronize(self) -> None:
        with self:
            Stream.waited()
        deliver()

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        if event.capture is not self.capture:
            raise NotImplementedError("the stand-in captures on one stream only")

    def begin_capture(self, mode: int | None = None) -> None:
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self.capture is not None:
            raise CUDARuntimeError("cudaErrorIllegalState: the operation cannot be performed in the present state")
        self.capture = Capture()

    def end_capture(self) -> Graph:
        capture, self.capture = self.capture, None
        if capture is None:
            raise CUDARuntimeError("cudaErrorIllegalState: the operation cannot be performed in the present state")
        capture.running = False
        if capture.broken:
            raise CUDARuntimeError("cudaErrorStreamCaptureInvalidated: operation failed due to a previous error")
        return Graph(capture)

    def is_capturing(self) -> bool:
        return self.capture is not None


Stream.null = Stream(null=True)


def _stack() -> list[Stream]:
    if not hasattr(_thread, "streams"):
        _thread.streams = [Stream.null]
    return _thread.streams


def get_current_stream(device_id: int = -1) -> Stream:
    return getattr(_thread, "current", Stream.null)


class Event:
    """A place in a stream's work, to wait for."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.place, self.capture = 0, None

    def record(self, stream: Stream | None = None) -> None:
        self.capture = (stream or get_current_stream()).capture
        self.place = len(_pinned.events)

    def synchronize(self) -> None:
        Stream.waited()
        deliver(self.place)

    @property
    def done(self) -> bool:
        refuse_sync()
        deliver(self.place)
        return True


# ---- pinned memory ---------------------------------------------------------------------------------------------------


class _Pinned:
    """Which arrays are pinned, and the copies to and from them that nobody has waited for yet, in their order."""

    def __init__(self) -> None:
        self.owners: dict[int, weakref.ref] = {}
        self.events: list[Callable[[], None] | None] = []  # None: done


_pinned = _Pinned()


def empty_pinned(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
    """Return page-locked host memory, as cupyx.empty_pinned does; here it is poisoned."""
    host = np.empty(shape, dtype, order)
    poison(host)
    key = id(host)
    _pinned.owners[key] = weakref.ref(host, lambda _: _pinned.owners.pop(key))
    return host


def is_pinned(host: np.ndarray) -> bool:
    owner = host
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    return id(owner) in _pinned.owners


def copy_out(host: np.ndarray, out: np.ndarray) -> None:
    """Begin a copy from the GPU into pinned memory, which has it once the copy was waited for."""
    value, place = host.copy(), weakref.ref(out)

    def arrive() -> None:
        if (there := place()) is None:
            raise AssertionError("pinned memory was let go before the copy to it was waited for: another may have it")
        there[...] = value

    poison(out)
    _pinned.events.append(arrive)


def copy_in(pinned: np.ndarray) -> None:
    """Begin a copy from pinned memory, which has to stay as it is until the copy was waited for."""
    value = pinned.copy()

    def check() -> None:
        if not (pinned.tobytes() == value.tobytes()):
            raise AssertionError("pinned memory was overwritten before the copy from it was waited for")

    _pinned.events.append(check)


def deliver(place: int | None = None) -> None:
    """End the copies that were begun before the given place, or all."""
    for i in range(len(_pinned.events) if place is None else place):
        if (end := _pinned.events[i]) is not None:
            _pinned.events[i] = None
            end()


def forget() -> None:
    """Begin anew: no stream but the default one is current, no copy is under way."""
    _thread.device, _thread.pool, _thread.streams, _thread.current = 0, None, [Stream.null], Stream.null
    _pinned.events.clear()
