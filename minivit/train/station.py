"""What the ranks of MPI have in common: how they wait, send and show that they live.

A rank that waits asks again and again, and sleeps between: MPI's own waiting would keep a core busy.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minivit.train.peer import HEARTBEAT

WORK, ANSWER, BEAT = 1, 2, 3  # what a message of MPI's is
ALIVE, LAST = b"\0", b"\1"  # what a sign of life says
LONGEST_NAP = 5e-4  # seconds between two looks at whether something has come

Found = TypeVar("Found")


class Station:
    """A process among the ranks."""

    def __init__(self, mpi: Any) -> None:
        self.mpi, self.comm = mpi, mpi.COMM_WORLD
        self.last, self.parent = time.monotonic(), os.getppid()
        self.about: tuple[int, str] = (os.getpid(), mpi.Get_processor_name())

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
                os.kill(os.getpid(), signal.SIGKILL)
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
