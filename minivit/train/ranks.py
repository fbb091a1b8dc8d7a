"""Ranks, which ``mpiexec`` has started, share the rows of a batch with this process as workers do (workers.py).

This process is none of them: rank 0 has started it, and passes on what it says (mpi.py). What it shares with rank 0 is
the memory that it would share with one worker: the gradient in it is the sum of all the ranks'.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from minivit.backend.wire import with_length
from minivit.errors import WorkerError
from minivit.train.peer import Peer, receive, send
from minivit.train.pieces import Buffer
from minivit.train.shared_memory import beats_in
from minivit.train.workers import Workers

NAME = "MINIVIT_RANKS"
"""The environment variable that holds the descriptor of the connection to rank 0, in the process that it starts."""

GO_ON = "continue the run, with as many ranks or another number"
"""What to do when ranks have failed."""

WAIT = 0.3
"""So many seconds may go by between the end of all ranks and the knowledge of which one ended first."""


_SIZES = {"PMI_RANK": "PMI_SIZE", "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE"}


def place_among_ranks(environ: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Return rank and number of ranks, if ``mpiexec`` has started this process as one of several, by its environment.

    MPICH, Intel MPI and Open MPI are known. None in the process that rank 0 starts, which is no rank.
    """
    for rank, size in _SIZES.items():
        place, count = environ.get(rank, ""), environ.get(size, "")
        if NAME not in environ and place.isdecimal() and count.isdecimal() and int(count) > 1:
            return int(place), int(count)
    return None


def rank_failed(rank: int, processes: Sequence[tuple[int, str]], how: str) -> WorkerError:
    """Return the error of a rank, one of these ``processes`` (numbers and hosts), that names it and says how."""
    pid, host = processes[rank]
    return WorkerError(f"rank {rank} of {len(processes)}, process {pid} on {host}, {how}", GO_ON)


class World:
    """The ranks as the process sees them that rank 0 has started: the connection to it, and what all of them are."""

    def __init__(self, connection: socket.socket) -> None:
        hello = receive(connection)
        if hello is None:
            raise WorkerError("the ranks ended before the run began", "see what mpiexec says of them")
        self.connection = connection
        self.processes: list[tuple[int, str]] = [(pid, host) for pid, host in hello["processes"]]
        self.owed = 0  # answers that have not been read
        self.user: Ranks | None = None
        self.first: list[int] = []  # the ranks that ended before the others
        self.has_seen = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def count(self) -> int:
        """The number of ranks: the share of rank 0 is this process's."""
        return len(self.processes)

    def _watch(self) -> None:
        """Wait for the end of a rank of this machine: MPI ends the others at once, and does not always say which."""
        if not hasattr(os, "pidfd_open"):
            return
        poll, ranks = select.poll(), dict[int, int]()
        for rank, (pid, host) in enumerate(self.processes):
            if host == self.processes[0][1]:
                try:
                    descriptor = os.pidfd_open(pid)
                except OSError:  # ended already, or not to be seen from here
                    continue
                poll.register(descriptor, select.POLLIN)
                ranks[descriptor] = rank
        self.first = [ranks[descriptor] for descriptor, _ in poll.poll()] if ranks else []
        self.has_seen.set()

    def ended(self) -> str:
        """Return what is known of the end of the ranks."""
        self.has_seen.wait(WAIT)
        if len(self.first) != 1:
            return "the processes of mpiexec have ended"
        rank = self.first[0]
        return f"rank {rank} of {self.count}, process {self.processes[rank][0]}, has ended, and with it the others"


@cache
def world() -> World | None:
    """Return the connection to the ranks, if this process was started to have some work for it."""
    descriptor = os.environ.pop(NAME, "")
    return World(socket.socket(fileno=int(descriptor))) if descriptor else None


class Rank(Peer):
    """A rank as this process sees it, by the connection to rank 0: questions and answers are in the ranks' order."""

    def __init__(self, rank: int, world: World, beats: np.ndarray) -> None:
        super().__init__(world.connection, beats)
        self.rank, self.world = rank, world

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to the rank; raise WorkerError if rank 0 is dead or hung."""
        super().send(message)
        self.world.owed += 1

    def reply(self) -> dict[str, Any]:
        """Return the rank's answer; raise WorkerError if it, or rank 0, is dead or hung."""
        reply = super().reply()
        self.world.owed -= 1
        return reply

    def dead(self) -> WorkerError:
        """Return the error of ranks that are gone."""
        return WorkerError(self.world.ended(), GO_ON)

    def hung(self, how: str) -> WorkerError:
        """Return the error of a rank 0 that does not pass anything on."""
        return rank_failed(0, self.world.processes, how)

    def failed(self, how: str) -> WorkerError:
        """Return the error of a rank that has met one."""
        return rank_failed(self.rank, self.world.processes, how)

    def close(self) -> None:
        """Leave the ranks as they are: a next step may have work for them."""


class Ranks(Workers):
    """The ranks that work on shares of the batches of a step; the share of rank 0 is this process's own."""

    def _gradients(self) -> int:
        return 1

    def _followers(self, descriptor: int, memory: mmap.mmap) -> Sequence[Rank]:
        found = world()
        assert found is not None
        self.world = found
        ranks = [Rank(rank, found, beats_in(memory, 0)) for rank in range(1, self.count)]
        while found.owed:  # of a step that ended by an error
            ranks[0].reply()
        found.connection.sendall(with_length(b""))  # a new model comes, and where it lies in memory
        socket.send_fds(found.connection, [b"\0"], [descriptor])
        send(found.connection, {"layout": list(self.layout)})
        found.user = self
        return ranks

    def hand_out(self, batch: Any) -> Any:
        """Give the ranks their rows of a batch; return this process's own."""
        if self.world.user is not self:
            raise WorkerError("the ranks work for another step by now", "make one TrainStep for each run of mpiexec")
        return super().hand_out(batch)

    def _marked(self, written: Sequence[list[int]]) -> list[Buffer]:
        """Return the sum of the ranks' gradients, marked with the parameters that any of them has a part for."""
        self.buffers[0].mark(place for places in written for place in places)
        return self.buffers
