"""A process that works on its share of each batch, for a step in another one (workers.py), until that one ends.

``python -m minivit.train.worker SOCKET MEMORY SIZE RANK PARENT``: descriptors that it inherits, the bytes of the
memory that it shares, the place of its share, and the process that it ends with.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from minivit import __version__
from minivit.backend import Key, blas_threads, keep_freed_memory
from minivit.errors import MinivitError, WorkerError
from minivit.train import signals
from minivit.train.optimizer import Optimizer
from minivit.train.parameters import FlatParameters
from minivit.train.peer import HEARTBEAT, receive, send
from minivit.train.pieces import Batch
from minivit.train.sendable import made
from minivit.train.shared_memory import Layout, beats_in
from minivit.train.step import TrainStep


def main() -> None:
    """Say that the process lives, and answer until the other end is closed."""
    signals.handle(signal.SIG_IGN)  # they reach the whole group: the first decides
    control, memory, size, rank, parent = map(int, sys.argv[1:])
    shared = mmap.mmap(memory, size)
    os.close(memory)
    beats = beats_in(shared, rank - 1)
    threading.Thread(target=_live, args=(beats, parent), daemon=True).start()
    keep_freed_memory()
    # an error of the connection: the other process is gone, and nobody waits for an answer
    with socket.socket(fileno=control) as connection, contextlib.suppress(OSError), blas_threads(1):
        _serve(connection, shared, rank)


def _live(beats: np.ndarray, parent: int) -> None:
    """Count heartbeats as long as the parent lives, and end with it: in the midst of a piece, too."""
    while os.getppid() == parent:
        beats += np.uint64(1)
        time.sleep(HEARTBEAT)
    os.kill(os.getpid(), signal.SIGKILL)  # from this thread, whatever the others do


def _serve(connection: socket.socket, shared: mmap.mmap, rank: int) -> None:
    share: Share | None = None

    def begin(about: dict[str, Any]) -> dict[str, Any]:
        nonlocal share
        layout = Layout(about["dtype"], about["numbers"], about["frozen_numbers"], about["others"])
        share = Share(about, layout.values(shared), layout.frozen(shared), layout.gradient(shared, rank - 1))
        return share.about

    while (request := receive(connection)) is not None:
        if share is None:
            send(connection, answered(partial(begin, json.loads(request["about"]))))
        else:
            send(connection, answered(partial(share.work, **request)))


def answered(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what ``work`` returns, or the error that it meets: :meth:`minivit.train.peer.Peer.receive` raises it."""
    try:
        return work()
    except MinivitError as error:
        return {"error": [type(error).__name__, error.what, error.remedy]}
    except Exception as error:  # whatever it is: the other process is told, and decides
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {"error": ["", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})", ""]}


class Share:
    """A model whose parameters another process changes, and a step of which only the gradients are worked on.

    ``values``, those of the parameters that are trained, ``frozen``, those of the others, and ``gradient`` are flat.
    """

    def __init__(self, about: dict[str, Any], values: np.ndarray, frozen: np.ndarray, gradient: np.ndarray) -> None:
        if about["version"] != __version__:
            what = f"the run is of minivit {about['version']}, and a process that is to work for it of {__version__}"
            raise WorkerError(what, "install the same on all machines")
        model, loss = made(about["made"])
        model.to(np.dtype(about["dtype"]))
        for path, module in model.named_modules():
            module.training = path not in about["eval"]
        named = dict(model.named_parameters())
        for name in about["frozen"]:
            named[name].requires_grad = False
        store = FlatParameters([(name, named[name]) for name in about["names"]])
        values, frozen = values.view(), frozen.view()
        values.flags.writeable = frozen.flags.writeable = False
        store.rebase(values, gradient)
        for name in about["held"]:  # frozen since the parameters were laid out
            named[name].requires_grad = False
        place = 0
        for p in (named[name] for name in about["frozen"]):
            p.data = frozen[place : place + p.size].reshape(p.shape)
            place += p.size
        self.step = TrainStep(model, Optimizer(store, 1.0, 0.0), loss, threads=1, micro_batch=about["micro_batch"])

    @property
    def about(self) -> dict[str, Any]:
        """What the process that hands out work compares."""
        return {"names": self.step.opt.names}

    def work(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        first: int,
        rows: int,
        key: list[str],
        all_train: bool,
        counted: bool,
    ) -> dict[str, Any]:
        """Leave the gradient of some rows of a batch, or of none, where it is shared; return what they came to."""
        seed, stream, number = map(int, key)
        batch = Batch(images, labels, Key(seed, stream, number), True if all_train else None, counted, first, rows)
        if not len(images):
            self.step.buffers[0].mark(())
        pieces = self.step.gradients(batch) if len(images) else []
        return {
            "losses": [float(piece.loss) for piece in pieces],
            "rights": None if any(p.right is None for p in pieces) else [int(p.right) for p in pieces],  # type: ignore
            "written": sorted(self.step.buffers[0].written),
        }


if __name__ == "__main__":
    main()
