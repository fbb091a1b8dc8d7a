"""``mpiexec -n N minivit train …``: N ranks share the rows of each batch, on one machine or on several.

MPI ends all ranks as soon as one of them dies, whatever they do. So the process that trains and saves is none of them:
rank 0 starts it, with the same command line, in a session of its own. It hands out work as it would to workers of its
own (workers.py, ranks.py); rank 0 passes that on to the other ranks, by MPI (relay.py), and gives back the sum of what
they leave.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from minivit.backend import blas_threads, keep_freed_memory
from minivit.backend.wire import packed, unpacked
from minivit.errors import ConfigError
from minivit.train import signals
from minivit.train.peer import HEARTBEAT
from minivit.train.relay import Leader, Relay
from minivit.train.station import ALIVE, ANSWER, BEAT, LAST, WORK, Station
from minivit.train.worker import Share, answered


def take_part(rank: int, count: int, command: Sequence[str], tell: Callable[[str], object]) -> int:
    """Work as a rank until the run ends, and return the exit code; ``command`` is what rank 0 starts the run by.

    ``tell`` is given what cannot be raised, because all ranks end by it.
    Raises ConfigError where mpi4py is missing, or belongs to another MPI than ``mpiexec``.
    """
    if find_spec("mpi4py") is None:
        raise ConfigError("mpiexec needs the package mpi4py", "pip install 'minivit[mpi]' on all machines")
    leader = Leader(command) if rank == 0 else None
    if leader is None:
        signals.handle(signal.SIG_DFL)  # while it waits for the others, which may have been ended by one
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
        signals.handle(signal.SIG_IGN)  # they reach all ranks: rank 0 passes them on
    keep_freed_memory()
    try:
        return WorkingRank(MPI).serve() if leader is None else Relay(MPI, leader, tell).serve()
    except BaseException:
        tell(traceback.format_exc())
        MPI.COMM_WORLD.Abort(1)
        raise


class WorkingRank(Station):
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

        def begin(*about: Any) -> dict[str, Any]:
            nonlocal share
            share = Share(*about)
            return share.about

        with ThreadPoolExecutor(1) as thread, blas_threads(1):
            while "end" not in (request := unpacked(self.message(0, WORK))):
                if "about" in request:
                    about, share = json.loads(request["about"]), None
                    values, gradient = (np.zeros(about["numbers"], about["dtype"]) for _ in range(2))
                    frozen = np.zeros(about["frozen_numbers"], about["dtype"])
                    self.until(self.comm.Ibcast(frozen, 0).Test)
                    self._answer(thread.submit(answered, partial(begin, about, values, frozen, gradient)))
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


def _work(share: Share, request: dict[str, Any]) -> dict[str, Any]:
    """Return a share's answer; what it has no gradient for adds nothing to the sum."""
    try:
        return share.work(**request)
    finally:
        share.step.buffers[0].clear_the_rest()
