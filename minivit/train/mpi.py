"""``mpiexec -n N minivit train …``: N ranks share the rows of each batch, on one machine or on several.

MPI ends all ranks as soon as one of them dies, whatever they do. So the process that trains and saves is none of them:
rank 0 starts it, with the same command line, in a session of its own. It hands out work as it would to workers of its
own (workers.py, ranks.py); rank 0 passes that on to the other ranks, by MPI, and gives back the sum of what they leave.

A rank that waits asks again and again, and sleeps between: MPI's own waiting would keep a core busy.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np

from minivit.backend import keep_freed_memory
from minivit.backend.children import child_environment
from minivit.backend.wire import packed, unpacked
from minivit.errors import ConfigError, WorkerError
from minivit.train.memory import Layout
from minivit.train.peer import HEARTBEAT, SILENCE, frame, framed, measured
from minivit.train.ranks import NAME
from minivit.train.worker import Share, answered

WORK, ANSWER, BEAT = 1, 2, 3  # what a message of MPI's is
ALIVE, LAST = b"\0", b"\1"  # what a sign of life says
LONGEST_NAP = 5e-4  # seconds between two looks at whether something has come

_SIZES = {"PMI_RANK": "PMI_SIZE", "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE"}

Found = TypeVar("Found")


def place_among_ranks(environ: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Return rank and number of ranks, if ``mpiexec`` has started this process as one of several, by its environment.

    MPICH, Intel MPI and Open MPI are known. None in the process that rank 0 starts, which is no rank.
    """
    for rank, size in _SIZES.items():
        place, count = environ.get(rank, ""), environ.get(size, "")
        if NAME not in environ and place.isdecimal() and count.isdecimal() and int(count) > 1:
            return int(place), int(count)
    return None


def take_part(rank: int, count: int, command: Sequence[str]) -> int:
    """Work as a rank until the run ends, and return the exit code; ``command`` is what rank 0 starts the run by.

    Raises ConfigError where mpi4py is missing, or belongs to another MPI than ``mpiexec``.
    """
    if find_spec("mpi4py") is None:
        raise ConfigError("mpiexec needs the package mpi4py", "pip install 'minivit[mpi]' on all machines")
    leader = Leader(command) if rank == 0 else None
    if leader is None:
        _heed_signals(signal.SIG_DFL)  # while it waits for the others, which may have been ended by one
    try:
        from mpi4py import MPI

        if (size := MPI.COMM_WORLD.size) != count:
            what = f"mpiexec started {count} processes, and mpi4py's MPI knows of {size}"
            raise ConfigError(what, "use the mpiexec of the MPI that mpi4py was built for")
    except BaseException:
        if leader is not None:
            leader.process.kill()
        raise
    if leader is None:
        _heed_signals(signal.SIG_IGN)  # they reach all ranks: rank 0 passes them on
    keep_freed_memory()
    try:
        return Follower(MPI).serve() if leader is None else Relay(MPI, leader).serve()
    except BaseException:
        traceback.print_exc()
        MPI.COMM_WORLD.Abort(1)
        raise


def _heed_signals(handler: Any) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, handler)


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
        _heed_signals(self._pass_on)

    def _pass_on(self, number: int, _: Any) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)


class Station:
    """A process among the ranks."""

    def __init__(self, mpi: Any) -> None:
        self.mpi, self.comm = mpi, mpi.COMM_WORLD
        self.last, self.parent = time.monotonic(), os.getppid()
        self.about = [os.getpid(), mpi.Get_processor_name()]

    def meet(self) -> None:
        """Wait until all ranks are here."""
        self.until(self.comm.Ibarrier().Test)
        _unlink_memory_of_mpich()

    def until(self, ready: Callable[[], Found]) -> Found:
        """Wait for what is no longer false, or None: what takes longer is looked for less often."""
        begun = time.monotonic()
        while not (found := ready()):
            self.tick()
            time.sleep(min(LONGEST_NAP, (time.monotonic() - begun) / 16))
        return found

    def tick(self) -> None:
        """Do what is to be done about twice in a heartbeat."""
        now = time.monotonic()
        if now - self.last >= HEARTBEAT / 2:
            if os.getppid() != self.parent:  # whoever started this process is gone
                os._exit(1)
            # while this process was stopped itself nothing is known of the others
            self.beat(min(now - self.last, HEARTBEAT))
            self.last = now

    def beat(self, seconds: float) -> None:
        """Show a sign of life, or look for others'; so many seconds have gone by since the last time."""
        raise NotImplementedError

    def message(self, source: int, tag: int) -> bytes:
        """Return the next message of its kind from a rank."""
        status = self.mpi.Status()
        found = self.until(lambda: self.comm.Improbe(source, tag, status))
        body = np.empty(status.Get_count(self.mpi.BYTE), np.uint8)
        self.until(found.Irecv([body, self.mpi.BYTE]).Test)
        return body.tobytes()

    def send(self, body: bytes, to: int, tag: int) -> Any:
        """Begin to send a message, and return the request."""
        return self.comm.Isend([body, self.mpi.BYTE], to, tag)


def _unlink_memory_of_mpich() -> None:
    """Take its name from the memory that MPICH shares among the ranks of a machine: it stays there if they are killed.

    All of them have it mapped by now, and MPICH does without the name.
    """
    with contextlib.suppress(OSError):
        for path in set(re.findall(r"/dev/shm/mpich_shm_\w+", Path("/proc/self/maps").read_text())):
            os.unlink(path)


class Follower(Station):
    """A rank that works on its share of each batch."""

    def __init__(self, mpi: Any) -> None:
        super().__init__(mpi)
        self.sign = mpi.REQUEST_NULL

    def beat(self, seconds: float) -> None:
        """Show a sign of life."""
        if self.sign.Test():
            self.sign = self.send(ALIVE, 0, BEAT)

    def serve(self) -> int:
        """Answer until the run ends; return the exit code."""
        self.meet()
        self.until(self.send(packed(self.about), 0, ANSWER).Test)
        share: Share | None = None
        with ThreadPoolExecutor(1) as thread:
            while "end" not in (request := unpacked(self.message(0, WORK))):
                if "about" in request:
                    about, made = json.loads(request["about"]), list[Share]()
                    values, gradient = (np.zeros(about["numbers"], about["dtype"]) for _ in range(2))
                    frozen = np.zeros(about["frozen_numbers"], about["dtype"])
                    self.until(self.comm.Ibcast(frozen, 0).Test)
                    self._answer(thread.submit(answered, partial(_begin, made, about, values, frozen, gradient)))
                    share = made[0] if made else None
                elif share is not None:  # where it could not be made nobody asks
                    self.until(self.comm.Ibcast(values, 0).Test)
                    self._answer(thread.submit(answered, partial(_work, share, request)))
                    self.until(self.comm.Ireduce(gradient, None, root=0).Test)
        self.until(self.sign.Test)
        self.until(self.send(LAST, 0, BEAT).Test)
        return 0

    def _answer(self, work: Future[dict[str, Any]]) -> None:
        while not wait([work], HEARTBEAT / 2).done:
            self.tick()
        self.until(self.send(packed(work.result(), sys.maxsize), 0, ANSWER).Test)


def _begin(made: list[Share], *about: Any) -> dict[str, Any]:
    made.append(Share(*about))
    return made[0].about


def _work(share: Share, request: dict[str, Any]) -> dict[str, Any]:
    """Return a share's answer; what it has no gradient for adds nothing to the sum."""
    try:
        return share.work(**request)
    finally:
        share.step.buffers[0].clear_the_rest()


class Relay(Station):
    """Rank 0, between the process that trains and the other ranks."""

    def __init__(self, mpi: Any, leader: Leader) -> None:
        super().__init__(mpi)
        self.leader, self.others = leader, range(1, self.comm.size)
        self.silent = dict.fromkeys(self.others, 0.0)  # seconds without a sign of life
        self.beats = np.zeros(1, np.uint64)

    def serve(self) -> int:
        """Pass messages on until the run ends; return its exit code."""
        self.meet()
        processes = [self.about]
        try:
            processes += [unpacked(self.message(rank, ANSWER)) for rank in self.others]
            self._tell(framed({"processes": processes}))
            while (body := frame(self._received)) is not None:
                if body:
                    self._pass_on(body)
                else:
                    self._begin()
        except Hung as hung:
            rank = hung.rank
            pid, host = processes[rank] if rank < len(processes) else ("?", "?")
            what = f"rank {rank} of {self.comm.size}, process {pid} on {host}, has shown no sign of life"
            remedy = "continue the run, with as many ranks or another number"
            self._tell(framed({"error": ["WorkerError", f"{what} for {SILENCE} seconds", remedy]}))
            self.silent.clear()
            while self._received(1 << 20):  # it saves the run, and ends
                pass
            self._end(self._code())
        except Gone:
            self._end(self._code() or 1)
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
            print(f"minivit: error: {error}", file=sys.stderr, flush=True)
            return 128 - code
        return code

    def _end(self, code: int) -> NoReturn:
        """End all ranks, in the midst of whatever they do."""
        sys.stdout.flush()
        self.comm.Abort(code)
        raise SystemExit(code)

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
        self.beats = layout.beats(memory, 0)
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
        self._tell(b"".join(map(measured, answers)))

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
