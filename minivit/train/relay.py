"""Rank 0 of MPI: it passes messages on between the process that trains, which it has started, and the other ranks."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from minivit.backend.children import child_environment
from minivit.backend.wire import packed, unpacked, with_length
from minivit.errors import WorkerError
from minivit.train import signals
from minivit.train.peer import HEARTBEAT, SILENCE, frame, framed
from minivit.train.ranks import NAME, rank_failed
from minivit.train.shared_memory import Layout, beats_in
from minivit.train.station import ANSWER, BEAT, LAST, WORK, Found, Station


class Leader:
    """The process that trains, as rank 0 sees it."""

    def __init__(self, command: Sequence[str]) -> None:
        self.connection, theirs = socket.socketpair()
        self.connection.settimeout(HEARTBEAT / 2)
        with theirs:
            self.process = subprocess.Popen(
                [*command], pass_fds=(theirs.fileno(),), start_new_session=True,
                env=child_environment(sys.path) | {NAME: str(theirs.fileno())},
            )  # fmt: skip
        signals.handle(self._pass_on)

    def _pass_on(self, number: int, _: Any) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)


class Relay(Station):
    """Rank 0, between the process that trains and the other ranks."""

    def __init__(self, mpi: Any, leader: Leader, tell: Callable[[str], object]) -> None:
        super().__init__(mpi)
        self.leader, self.tell, self.others = leader, tell, range(1, self.comm.size)
        self.silent = dict.fromkeys(self.others, 0.0)  # seconds without a sign of life
        self.beats = np.zeros(1, np.uint64)

    def serve(self) -> int:
        """Pass messages on until the run ends; return its exit code."""
        self.meet()
        processes = [self.about, *((0, "?") for _ in self.others)]
        try:
            for rank in self.others:
                processes[rank] = unpacked(self.message(rank, ANSWER))
            self._tell(framed({"processes": processes}))
            while (body := frame(self._received)) is not None:
                if body:
                    self._pass_on(body)
                else:
                    self._begin()
        except Hung as hung:
            error = rank_failed(hung.rank, processes, f"has shown no sign of life for {SILENCE} seconds")
            self._tell(framed({"error": [type(error).__name__, error.what, error.remedy]}))
            self.silent.clear()
            while self._received(1 << 20):  # it saves the run, and ends
                pass
            return self._abort(self._code())
        except Gone:
            return self._abort(self._code() or 1)
        code = self._code()
        sent = [self.send(packed({"end": True}), rank, WORK) for rank in self.others]
        self.until(lambda: self.mpi.Request.Testall(sent))
        self.until(self._have_left)  # MPI wants every message to be received
        return code

    def _code(self) -> int:
        """Wait for the end of the process that trains, and return its exit code; say so if a signal has ended it."""
        code = self.leader.process.wait()
        if code < 0:
            what = f"process {self.leader.process.pid}, which trained, was ended by {signal.Signals(-code).name}"
            error = WorkerError(what, "continue the run from its last checkpoint: minivit train --resume RUN")
            self.tell(f"minivit: error: {error}")
            return 128 - code
        return code

    def _abort(self, code: int) -> int:
        """End all ranks, in the midst of whatever they do."""
        self.comm.Abort(code)
        return code

    def beat(self, seconds: float) -> None:
        """Show a sign of life, and look for the others'; raise Hung for one that shows none."""
        self.beats += np.uint64(1)
        for rank in self.silent:
            self.silent[rank] += seconds
        self._have_left()
        for rank, silent in self.silent.items():
            if silent > SILENCE:
                raise Hung(rank)

    def _have_left(self) -> bool:
        """Receive the signs of life that have come; tell whether they were the last ones of all ranks."""
        status, sign = self.mpi.Status(), bytearray(1)
        while self.comm.Iprobe(self.mpi.ANY_SOURCE, BEAT, status):
            self.comm.Recv([sign, self.mpi.BYTE], status.source, BEAT)
            self.silent[status.source] = 0.0
            if sign == LAST:
                del self.silent[status.source]
        return not self.silent

    def _received(self, size: int) -> bytes:
        """Return up to so many bytes of what the process that trains says; none at its end."""
        return self._patiently(lambda: self.leader.connection.recv(size)) or b""

    def _tell(self, body: bytes) -> None:
        """Send it a message; nothing where it has ended."""
        left = memoryview(body)
        while left and (sent := self._patiently(partial(self.leader.connection.send, left))):
            left = left[sent:]

    def _patiently(self, act: Callable[[], Found]) -> Found | None:
        while True:
            try:
                return act()
            except TimeoutError:
                self.tick()
            except OSError:
                return None

    def _begin(self) -> None:
        """Take over where parameters and gradient lie; pass on what the new model is, and the answers."""
        received = self._patiently(lambda: socket.recv_fds(self.leader.connection, 1, 1))
        body = frame(self._received)
        if not received or not received[1] or body is None:
            raise Gone
        layout = Layout(*unpacked(body)["layout"])
        memory = mmap.mmap(received[1][0], layout.size)
        os.close(received[1][0])
        self.beats = beats_in(memory, 0)
        self.values, self.gradient = layout.values(memory), layout.gradient(memory, 0)
        self._ask(self._frame(), layout.frozen(memory))

    def _pass_on(self, body: bytes) -> None:
        """Pass the rows of a batch on, the first of which are in ``body``; give back the sum of the gradients."""
        self.gradient[...] = 0
        self._ask(body, self.values, self.gradient)

    def _ask(self, body: bytes, values: np.ndarray, gradient: np.ndarray | None = None) -> None:
        """Pass a message on to each rank, the first of which is ``body``, and values to all; give back the answers."""
        begun = [self.send(body if rank == 1 else self._frame(), rank, WORK) for rank in self.others]
        begun.append(self.comm.Ibcast(values, 0))
        if gradient is not None:
            begun.append(self.comm.Ireduce(self.mpi.IN_PLACE, gradient, root=0))
        answers = [self.message(rank, ANSWER) for rank in self.others]
        self.until(lambda: self.mpi.Request.Testall(begun))
        self._tell(b"".join(map(with_length, answers)))

    def _frame(self) -> bytes:
        if (body := frame(self._received)) is None:
            raise Gone
        return body


class Hung(Exception):
    """A rank has shown no sign of life for too long."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.rank = rank


class Gone(Exception):
    """The process that trains has ended in the midst of a step."""
