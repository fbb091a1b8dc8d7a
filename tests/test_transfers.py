"""Batches handed from stream to stream, on a model of a GPU that runs one as far ahead of the other as it may."""

from __future__ import annotations

import sys
import threading
import types
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest

from minivit.backend import Key, SideStream, permutation
from minivit.data import Dataset, Loader
from minivit.data import loader as loader_module

COUNT, BATCH = 60, 5


class Gpu:
    """Streams, events and CuPy's pool: memory that is let go is given to the next array of the stream that made it.

    Nothing runs when it is put on a stream. After each call the stream that is ``ahead`` runs as far as it may; the
    others run in the end.
    """

    def __init__(self) -> None:
        self.ahead: Stream | None = None
        self.lock, self.thread = threading.RLock(), threading.local()
        self.callers = Stream(self)
        self.streams = [self.callers]

    def current(self) -> Stream:
        return getattr(self.thread, "stack", [self.callers])[-1]

    def put(self, work: Callable[[], bool], stream: Stream) -> None:
        with self.lock:
            stream.queue.append(work)
            if self.ahead is not None:
                self.ahead.run()

    def finish(self) -> None:
        with self.lock:
            while any(stream.queue for stream in self.streams):
                assert sum([stream.run() for stream in self.streams]), "streams wait for each other"


class Stream:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.queue, self.free = gpu, deque(), []

    def run(self) -> int:
        """Run what need not wait; return how much that was."""
        done = 0
        while self.queue and self.queue[0]():
            self.queue.popleft()
            done += 1
        return done

    def record(self) -> list:
        event: list = []
        self.gpu.put(lambda: event.append(True) is None, self)
        return event

    def wait_event(self, event: list) -> None:
        self.gpu.put(lambda: bool(event), self)

    def __enter__(self) -> None:
        self.gpu.thread.stack = [self.gpu.current(), self]

    def __exit__(self, *error: object) -> None:
        self.gpu.thread.stack.pop()

    def use(self) -> None:
        self.gpu.thread.stack = [self]


class Memory:
    def __init__(self, stream: Stream) -> None:
        with stream.gpu.lock:
            self.stream, self.numbers = stream, stream.free.pop() if stream.free else np.full(COUNT, -1)

    def __del__(self) -> None:
        with self.stream.gpu.lock:
            self.stream.free.append(self.numbers)


class Array:
    """Some numbers, or a view of some."""

    def __init__(self, gpu: Gpu, size: int, of: tuple[Memory, int] | None = None) -> None:
        self.gpu, self.size = gpu, size
        self.memory, self.start = of or (Memory(gpu.current()), 0)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> Array:
        start, stop, _ = part.indices(self.size)
        return Array(self.gpu, stop - start, (self.memory, self.start + start))

    def numbers(self) -> np.ndarray:
        return self.memory.numbers[self.start : self.start + self.size]

    def set(self, values: Callable[[], np.ndarray]) -> Array:
        """Write values on the current stream, when that gets there."""
        to = self.numbers()

        def work() -> bool:
            to[:] = values()
            return True

        self.gpu.put(work, self.gpu.current())
        return self

    def copy(self) -> Array:
        source = self.numbers()
        return Array(self.gpu, self.size).set(lambda: source)


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    gpu = Gpu()

    def stream(non_blocking: bool) -> Stream:
        gpu.streams.append(Stream(gpu))
        return gpu.streams[-1]

    device = lambda number: threading.RLock()  # any context will do
    cuda = types.SimpleNamespace(Device=device, Stream=stream, get_current_stream=gpu.current)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda, ndarray=Array))
    monkeypatch.setattr(loader_module, "to_device", lambda images, device: images)
    monkeypatch.setattr(loader_module, "packed_to", lambda target, labels: [Array(gpu, len(labels)).set(labels.copy)])
    monkeypatch.setattr(loader_module, "BLOCK_NUMBERS", 3 * BATCH)
    return gpu


class Numbered(Loader):
    """Whose images are their own numbers."""

    def __init__(self, gpu: Gpu) -> None:
        pixels = np.zeros((COUNT, 1, 1, 1), np.uint8)
        super().__init__(Dataset(pixels, np.arange(COUNT), tuple(map(str, range(COUNT))), "numbers"), BATCH, Key(1))
        self.gpu, self._side = gpu, SideStream("cuda:0")

    def _batch(self, index, key, partner):
        return Array(self.gpu, len(index)).set(index.copy), self.dataset.labels[index]


def wrong_batches(gpu: Gpu, ahead: str, keep: int) -> int:
    """Return how many batches of two epochs are not what they should be when the caller's stream reads them.

    Each is read once ``keep`` later ones have been handed over, and then let go.
    """
    loader, found = Numbered(gpu), []
    gpu.ahead = {"side": gpu.streams[1], "callers": gpu.callers}[ahead]
    kept: deque = deque()

    def read(expected: np.ndarray, *batch: Array) -> None:
        views = [array.numbers() for array in batch]
        gpu.put(lambda: found.append(all(np.array_equal(x, expected) for x in views)) is None, gpu.callers)

    for epoch in (0, 1):
        order = permutation(Key(1).at(epoch).child(0), COUNT)
        for i, batch in enumerate(loader.batches(epoch)):
            kept.append((order[i * BATCH : (i + 1) * BATCH], *batch))
            del batch
            if len(kept) > keep:
                read(*kept.popleft())
    while kept:
        read(*kept.popleft())
    gpu.finish()
    assert len(found) == 2 * COUNT // BATCH
    return len(found) - sum(found)


@pytest.mark.parametrize("ahead", ["side", "callers"])
@pytest.mark.parametrize("keep", [0, 2])
def test_no_batch_is_read_too_early_or_written_over(gpu, ahead, keep):
    assert wrong_batches(gpu, ahead, keep) == 0
    made = sum(len(stream.free) for stream in gpu.streams)
    assert made < 60  # memory was used again, of two epochs with 96 arrays


@pytest.mark.parametrize(("ahead", "lacking"), [("callers", "ready"), ("side", "copied")])
def test_a_wait_left_out_is_seen(gpu, monkeypatch, ahead, lacking):
    def copies(self, arrays, ready):
        if lacking != "ready":
            gpu.current().wait_event(ready)
        found = [a.copy() for a in arrays]
        if lacking != "copied":
            self.stream.wait_event(gpu.current().record())
        return found

    monkeypatch.setattr(SideStream, "copies", copies)
    assert wrong_batches(gpu, ahead, 0) > 0
