"""Processes of one machine that share the rows of a batch: threads hold each other up at every call of NumPy's.

The parameters lie in memory that all share, once; this process alone changes them, between two steps. So a worker that
dies, whenever it does, leaves parameters and optimizer as they were after the last whole step. Each worker leaves its
gradient in that memory, beside the others', and they are added up as those of threads are (step.py).

The memory is a file without a name, and what is said goes through pairs of sockets: both are inherited, both are gone
with the last process that has them. A worker whose other end is closed ends; one that ends is noticed at once.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import IO, Any, NamedTuple

import numpy as np

from minivit import errors
from minivit.backend import Team
from minivit.backend.children import child_environment
from minivit.backend.wire import packed, unpacked
from minivit.errors import MinivitError, WorkerError
from minivit.nn.module import Module
from minivit.train.parameters import FlatParameters
from minivit.train.pieces import Batch, Buffer, Piece
from minivit.train.seen import Seen

HEARTBEAT = 0.5
"""Seconds between two signs of a worker's life."""

SILENCE = 7
"""So many seconds without one, and it counts as hung."""


class Layout(NamedTuple):
    """Where things lie in the memory: a line of signs of life for each worker, values, frozen ones, gradients."""

    dtype: str
    numbers: int  # of the parameters that are trained
    frozen_numbers: int  # of the others
    processes: int

    @property
    def size(self) -> int:
        """Return the bytes in all."""
        return self._start(1 + self.processes)

    def values(self, memory: mmap.mmap) -> np.ndarray:
        """Return the parameters that are trained, as one flat array."""
        return self._array(memory, 0, self.numbers)

    def frozen(self, memory: mmap.mmap) -> np.ndarray:
        """Return the others."""
        return self._array(memory, 1, self.frozen_numbers)

    def gradient(self, memory: mmap.mmap, rank: int) -> np.ndarray:
        """Return what a worker adds up in."""
        return self._array(memory, 1 + rank, self.numbers)

    def _start(self, part: int) -> int:
        line, itemsize = 64 * self.processes, np.dtype(self.dtype).itemsize
        sizes = [self.numbers, self.frozen_numbers, *[self.numbers] * (self.processes - 1)]
        return line + sum(-(-n * itemsize // 64) * 64 for n in sizes[:part])

    def _array(self, memory: mmap.mmap, part: int, numbers: int) -> np.ndarray:
        return np.frombuffer(memory, self.dtype, numbers, self._start(part))


def send(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a message, as :mod:`minivit.backend.wire` packs it, with its length before it."""
    connection.sendall(_framed(message))


def _framed(message: dict[str, Any]) -> bytes:
    body = packed(message, sys.maxsize)
    return len(body).to_bytes(8, "big") + body


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """Return the next message; None if the other end is closed."""
    return _message(connection.recv)


def _message(some: Callable[[int], bytes]) -> dict[str, Any] | None:
    """Return the next message of which ``some`` returns up to so many bytes; None where there are no more."""
    head = _read(some, 8)
    body = None if head is None else _read(some, int.from_bytes(head, "big"))
    return None if body is None else unpacked(body)


def _read(some: Callable[[int], bytes], size: int) -> bytes | None:
    parts, left = [], size
    while left:
        if not (part := some(min(left, 1 << 20))):
            return None
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


class Follower:
    """A worker as the first process sees it: what it was started as, and the connection to it."""

    def __init__(self, rank: int, layout: Layout, descriptor: int, memory: mmap.mmap) -> None:
        self.rank, self.count = rank, layout.processes
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self.connection, theirs = socket.socketpair()
        self.connection.settimeout(1.0)
        self.beats = np.frombuffer(memory, np.uint64, 1, 64 * rank)
        words = [theirs.fileno(), descriptor, layout.size, rank, os.getpid()]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "minivit.train.worker", *map(str, words)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.errors,
                pass_fds=(theirs.fileno(), descriptor), env=child_environment(sys.path),
            )  # fmt: skip

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; raise WorkerError if the worker is dead or hung."""
        left = memoryview(_framed(message))
        while left:
            left = left[self._patiently(lambda: self.connection.send(left)) :]  # noqa: B023 - called at once

    def receive(self) -> dict[str, Any]:
        """Return the worker's answer; raise the error that it met, or WorkerError if it is dead or hung."""
        reply = self.reply()
        if "error" in reply:
            kind, what, remedy = reply["error"]
            known = getattr(errors, kind, None) if kind else None
            if isinstance(known, type) and issubclass(known, MinivitError):
                raise known(what, remedy)
            raise self._failed(f"met an error: {what}")
        return reply

    def reply(self) -> dict[str, Any]:
        """Return the worker's answer, an error that it met among them; raise WorkerError if it is dead or hung."""
        reply = _message(lambda size: self._patiently(lambda: self.connection.recv(size)))
        if reply is None:
            raise self._dead()
        return reply

    def _patiently(self, act: Any) -> Any:
        """Do what may wait for the worker, as long as that shows signs of life."""
        silent, before = 0, -1
        while True:
            try:
                return act()
            except TimeoutError:  # after a second of this process's own: it may have been stopped, too
                now = int(self.beats[0])
                silent, before = (silent + 1 if now == before else 0), now
                if self.process.poll() is not None:
                    raise self._dead() from None
                if silent >= SILENCE:
                    self.process.kill()
                    raise self._failed(f"has shown no sign of life for {SILENCE} seconds") from None
            except OSError:
                raise self._dead() from None

    def _dead(self) -> WorkerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2.0)
        code = self.process.returncode
        if code is not None and code < 0:
            memory = ", as the system does where memory runs out" if -code == signal.SIGKILL else ""
            return self._failed(f"was ended by {signal.Signals(-code).name}{memory}")
        return self._failed("closed its connection" if code is None else f"ended with exit code {code}")

    def _failed(self, how: str) -> WorkerError:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        said = f": {errors.printable(lines[-1])}" if lines and lines[-1] not in how else ""
        what = f"worker {self.rank + 1} of {self.count}, process {self.process.pid}, {how}{said}"
        return WorkerError(what, "continue the run with fewer workers, or with one: --workers 1")

    def close(self) -> None:
        """End the worker."""
        self.connection.close()
        try:
            self.process.wait(2.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()


class Workers:
    """Other processes that work on shares of the batches of a step: ``count`` with this one, whose share is the first.

    ``about`` is the model and the loss, as :func:`~minivit.train.sendable.description` gives them. The store's values
    lie in the shared memory from now on.
    """

    def __init__(
        self,
        model: Module,
        loss: Callable[..., Any],
        about: dict[str, Any],
        store: FlatParameters,
        count: int,
        micro_batch: int | None,
    ) -> None:
        self.model, self.loss, self.store, self.count = model, loss, store, count
        self.team = Team(1, micro_batch)
        self.waiting: list[Follower] = []  # those that work on a share
        own = set(store.names)
        frozen = {name: p for name, p in model.named_parameters() if name not in own}
        dtype = store.values.dtype.str
        self.layout = Layout(dtype, store.values.size, sum(p.size for p in frozen.values()), count)
        with _unnamed_memory(self.layout.size) as descriptor:
            memory = mmap.mmap(descriptor, self.layout.size)
            self.followers = [Follower(rank, self.layout, descriptor, memory) for rank in range(1, count)]
        self._end = weakref.finalize(self, _close, self.followers)
        self._share_values(memory, frozen.values())
        self.buffers = [Buffer(store, self.layout.gradient(memory, rank)) for rank in range(1, count)]
        self._tell(about, list(frozen))
        self.seen = Seen(model, lambda: {"parameters": store.parameters})

    def _share_values(self, memory: mmap.mmap, frozen: Any) -> None:
        values = self.layout.values(memory)
        values[...] = self.store.values
        self.store.rebase(values)
        place, others = 0, self.layout.frozen(memory)
        for p in frozen:
            view = others[place : place + p.size].reshape(p.shape)
            view[...] = p.data
            p.data = view
            place += p.size

    def _tell(self, about: dict[str, Any], frozen: Sequence[str]) -> None:
        """Tell the workers what to work on, and compare what they made of it."""
        pairs = zip(self.store.names, self.store.parameters, strict=True)
        held = [name for name, p in pairs if not p.requires_grad]
        told = {
            "made": about, "dtype": self.layout.dtype, "numbers": self.layout.numbers, "names": self.store.names,
            "frozen": frozen, "frozen_numbers": self.layout.frozen_numbers, "count": self.count,
            "micro_batch": self.team.micro_batch,
            "held": held,
            "eval": [path for path, module in self.model.named_modules() if not module.training],
        }  # fmt: skip
        for follower in self.followers:
            follower.send({"about": json.dumps(told)})
        for follower in self.followers:
            if (names := follower.receive()["names"]) != self.store.names:
                raise WorkerError(
                    f"worker {follower.rank + 1} laid the parameters out otherwise: {names[:3]} …",
                    "use one worker, and report this",
                )

    def hand_out(self, batch: Batch) -> Batch:
        """Give the workers their rows of a batch; return this process's own."""
        while self.waiting:  # of a step that ended by an error, which has been told: they may have met it, too
            self.waiting.pop(0).reply()
        rows = len(batch.images)
        edges = [-(-rows * i // self.count) for i in range(self.count + 1)]  # of few rows the first process has one
        key = [str(batch.key.seed), str(batch.key.stream), str(batch.key.step)]
        for follower in self.followers:
            start, stop = edges[follower.rank : follower.rank + 2]
            if start < stop:
                follower.send({
                    "images": batch.images[start:stop], "labels": batch.labels[start:stop], "first": start,
                    "rows": rows, "key": key, "all_train": bool(batch.training), "counted": batch.counted,
                })  # fmt: skip
                self.waiting.append(follower)
        return replace(batch, images=batch.images[: edges[1]], labels=batch.labels[: edges[1]], rows=rows)

    def collect(self) -> tuple[list[Piece], list[Buffer]]:
        """Wait for the workers; return what their pieces came to, in the order of the rows, and their gradients."""
        pieces, buffers = list[Piece](), list[Buffer]()
        while self.waiting:
            follower = self.waiting.pop(0)
            reply = follower.receive()
            dtype, rights = self.layout.dtype, reply["rights"] or [None] * len(reply["losses"])
            losses = [np.asarray(loss, dtype) for loss in reply["losses"]]
            pieces += [Piece(loss, right) for loss, right in zip(losses, rights, strict=True)]
            buffer = self.buffers[follower.rank - 1]
            buffer.mark(reply["written"])
            buffers.append(buffer)
        return pieces, buffers

    def close(self) -> None:
        """End the workers."""
        self._end()


def _close(followers: Sequence[Follower]) -> None:
    for follower in followers:
        follower.close()


@contextlib.contextmanager
def _unnamed_memory(size: int) -> Any:
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
