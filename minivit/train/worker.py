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
from pathlib import Path
from typing import Any

import numpy as np

from minivit.backend import Key, keep_freed_memory
from minivit.errors import MinivitError
from minivit.train.optimizer import Optimizer
from minivit.train.parameters import FlatParameters
from minivit.train.pieces import Batch
from minivit.train.sendable import made
from minivit.train.step import TrainStep
from minivit.train.workers import HEARTBEAT, Layout, receive, send


def main() -> None:
    """Say that the process lives, and answer until the other end is closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they reach the whole group: the first decides
        signal.signal(number, signal.SIG_IGN)
    control, memory, size, rank, parent = map(int, sys.argv[1:])
    shared = mmap.mmap(memory, size)
    os.close(memory)
    beats = np.frombuffer(shared, np.uint64, 1, 64 * rank)
    threading.Thread(target=_live, args=(beats, parent), daemon=True).start()
    keep_freed_memory()
    # an error of the connection: the other process is gone, and nobody waits for an answer
    with socket.socket(fileno=control) as connection, contextlib.suppress(OSError):
        _serve(connection, shared, rank)


def _live(beats: np.ndarray, parent: int) -> None:
    """Count heartbeats as long as the parent lives, and end with it: in the midst of a piece, too."""
    while os.getppid() == parent:
        beats += np.uint64(1)
        time.sleep(HEARTBEAT)
    os.kill(os.getpid(), signal.SIGKILL)  # from this thread, whatever the others do


def _serve(connection: socket.socket, shared: mmap.mmap, rank: int) -> None:
    share: Share | None = None
    while (request := receive(connection)) is not None:
        try:
            if share is None:
                share = Share(json.loads(request["about"]), shared, rank)
                reply: dict[str, Any] = {"names": share.step.opt.names}
            else:
                reply = share.work(**request)
        except MinivitError as error:
            reply = {"error": [type(error).__name__, error.what, error.remedy]}
        except Exception as error:  # whatever it is: the other process is told, and decides
            where = traceback.extract_tb(error.__traceback__)[-1]
            reply = {"error": ["", f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})", ""]}
        send(connection, reply)


class Share:
    """A model whose parameters another process changes, and a step of which only the gradients are worked on."""

    def __init__(self, about: dict[str, Any], shared: mmap.mmap, rank: int) -> None:
        model, loss = made(about["made"])
        model.to(np.dtype(about["dtype"]))
        for path, module in model.named_modules():
            module.training = path not in about["eval"]
        named = dict(model.named_parameters())
        for name in about["frozen"]:
            named[name].requires_grad = False
        layout = Layout(about["dtype"], about["numbers"], about["frozen_numbers"], about["count"])
        store = FlatParameters([(name, named[name]) for name in about["names"]])
        values = layout.values(shared)
        values.flags.writeable = False
        store.rebase(values, layout.gradient(shared, rank))
        for name in about["held"]:  # frozen since the parameters were laid out
            named[name].requires_grad = False
        place, frozen = 0, layout.frozen(shared)
        for p in (named[name] for name in about["frozen"]):
            p.data = frozen[place : place + p.size].reshape(p.shape)
            place += p.size
        self.step = TrainStep(model, Optimizer(store, 1.0, 0.0), loss, threads=1, micro_batch=about["micro_batch"])

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
        """Leave the gradient of some rows of a batch where it is shared; return what they came to."""
        seed, stream, number = map(int, key)
        batch = Batch(images, labels, Key(seed, stream, number), True if all_train else None, counted, first, rows)
        pieces = self.step.gradients(batch)
        return {
            "losses": [float(piece.loss) for piece in pieces],
            "rights": None if any(p.right is None for p in pieces) else [int(p.right) for p in pieces],  # type: ignore
            "written": sorted(self.step.buffers[0].written),
        }


if __name__ == "__main__":
    main()
