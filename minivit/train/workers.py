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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import IO, Any

import numpy as np

from minivit import __version__
from minivit.backend import Team
from minivit.backend.children import child_environment
from minivit.errors import WorkerError, printable
from minivit.nn.module import Module, Parameter
from minivit.train.parameters import FlatParameters
from minivit.train.peer import Peer
from minivit.train.pieces import Batch, Buffer, Piece
from minivit.train.seen import Seen
from minivit.train.shared_memory import Layout, beats_in, unnamed_memory


class Follower(Peer):
    """A worker as the first process sees it: what it was started as, and the connection to it."""

    def __init__(self, rank: int, layout: Layout, descriptor: int, memory: mmap.mmap) -> None:
        self.rank, self.count = rank, layout.others + 1
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        connection, theirs = socket.socketpair()
        super().__init__(connection, beats_in(memory, rank - 1))
        words = [theirs.fileno(), descriptor, layout.size, rank, os.getpid()]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "minivit.train.worker", *map(str, words)],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=self.errors,
                pass_fds=(theirs.fileno(), descriptor), env=child_environment(sys.path),
            )  # fmt: skip

    def has_ended(self) -> bool:
        """Tell whether the process is gone."""
        return self.process.poll() is not None

    def dead(self) -> WorkerError:
        """Return the error of a worker that is gone."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2.0)
        code = self.process.returncode
        if code is not None and code < 0:
            memory = ", as the system does where memory runs out" if -code == signal.SIGKILL else ""
            return self.failed(f"was ended by {signal.Signals(-code).name}{memory}")
        return self.failed("closed its connection" if code is None else f"ended with exit code {code}")

    def hung(self, how: str) -> WorkerError:
        """End the worker, and return the error."""
        self.process.kill()
        return self.failed(how)

    def failed(self, how: str) -> WorkerError:
        """Return the error that names the worker, with the last line that it wrote."""
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        said = f": {printable(lines[-1])}" if lines and lines[-1] not in how else ""
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
        self.waiting: list[Any] = []  # those that work on a share
        own = set(store.names)
        frozen = {name: p for name, p in model.named_parameters() if name not in own}
        numbers = store.values.size, sum(p.size for p in frozen.values())
        self.layout = Layout(store.values.dtype.str, *numbers, self._gradients())
        with unnamed_memory(self.layout.size) as descriptor:
            memory = mmap.mmap(descriptor, self.layout.size)
            self.followers = self._followers(descriptor, memory)
        self._end = weakref.finalize(self, _close, self.followers)
        self._share_values(memory, frozen.values())
        self.buffers = [Buffer(store, self.layout.gradient(memory, i)) for i in range(self.layout.others)]
        self._tell(about, list(frozen))
        self.seen = Seen(model, lambda: {"parameters": store.parameters})

    def _gradients(self) -> int:
        """Return how many gradients there are to be in the memory, besides this process's own."""
        return self.count - 1

    def _followers(self, descriptor: int, memory: mmap.mmap) -> Sequence[Any]:
        """Return the other processes, which have the memory by its descriptor."""
        return [Follower(rank, self.layout, descriptor, memory) for rank in range(1, self.count)]

    def _share_values(self, memory: mmap.mmap, frozen: Iterable[Parameter]) -> None:
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
            "frozen": frozen, "frozen_numbers": self.layout.frozen_numbers, "others": self.layout.others,
            "micro_batch": self.team.micro_batch, "held": held, "version": __version__,
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
            follower.send({
                "images": batch.images[start:stop], "labels": batch.labels[start:stop], "first": start,
                "rows": rows, "key": key, "all_train": bool(batch.training), "counted": batch.counted,
            })  # fmt: skip
            self.waiting.append(follower)
        return replace(batch, images=batch.images[: edges[1]], labels=batch.labels[: edges[1]], rows=rows)

    def collect(self) -> tuple[list[Piece], list[Buffer]]:
        """Wait for the workers; return what their pieces came to, in the order of the rows, and their gradients."""
        pieces, written = list[Piece](), list[list[int]]()
        while self.waiting:
            reply = self.waiting.pop(0).receive()
            dtype, rights = self.layout.dtype, reply["rights"] or [None] * len(reply["losses"])
            losses = [np.asarray(loss, dtype) for loss in reply["losses"]]
            pieces += [Piece(loss, right) for loss, right in zip(losses, rights, strict=True)]
            written.append(reply["written"])
        return pieces, self._marked(written)

    def _marked(self, written: Sequence[list[int]]) -> list[Buffer]:
        """Return the gradients in the memory, marked with the parameters that the others have a part for."""
        for buffer, places in zip(self.buffers, written, strict=True):
            buffer.mark(places)
        return self.buffers

    def close(self) -> None:
        """End the workers."""
        self._end()


def _close(followers: Sequence[Any]) -> None:
    for follower in followers:
        follower.close()
