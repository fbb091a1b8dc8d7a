"""The processes that a step shares its batches with, if it is to: started when they are first needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minivit.backend import Team
from minivit.backend.children import CAN_INHERIT
from minivit.backend.planning import is_on_gpu
from minivit.errors import ConfigError, value_text
from minivit.nn.module import Module
from minivit.train.parameters import FlatParameters
from minivit.train.pieces import Batch, Buffer, Piece
from minivit.train.ranks import Ranks, world
from minivit.train.sendable import description
from minivit.train.workers import Workers

MOST = 256  # processes: more are a slip of the hand


class Crew:
    """``count`` processes, this one with them, that work on shares of a batch; on a GPU this one does so alone.

    Where ``mpiexec`` has started the run they are its ranks. ``of`` is the class of the step, which the others must
    know. ``why_alone`` says why there are none although there were to be. Raises ConfigError for a ``count`` that
    cannot be.
    """

    def __init__(self, count: int, of: type) -> None:
        if not (isinstance(count, int | np.integer) and 1 <= count <= MOST):
            remedy = f"give a whole number from 1 to {MOST}: 1 is this process alone"
            raise ConfigError(f"workers={value_text(count)}", remedy)
        self.count = int(count)
        if (ranks := world()) is not None and self.count not in (1, ranks.count):
            raise ConfigError(f"workers={self.count} among {ranks.count} ranks", f"give {ranks.count}, or 1: alone")
        self.why_alone = "" if of.__module__.startswith("minivit.") else f"{of.__name__} is a step of your own"
        self.workers: Workers | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy, or pickle, takes along: not the processes."""
        return vars(self) | {"workers": None}

    def hand_out(
        self, batch: Batch, model: Module, loss: Callable[..., Any], store: FlatParameters, team: Team
    ) -> tuple[Batch, Team]:
        """Give the others their rows of a batch; return this process's own, and the threads to work on them with.

        Where the model or the loss has changed, they are started anew with it.
        """
        if self.count == 1 or self.why_alone or is_on_gpu(store.values):
            return batch, team
        if self.workers is not None:
            own = self.workers.hand_out(batch)  # they begin while it is looked for what has changed
            if self.workers.loss is loss and not self.workers.seen.changed():
                return own, self.workers.team
            self.close()
        try:
            if not CAN_INHERIT:
                raise ValueError("this system has no processes that inherit memory")
            about = description(model, loss)
        except ValueError as error:
            self.why_alone = str(error)
            return batch, team
        kind = Workers if world() is None else Ranks
        self.workers = kind(model, loss, about, store, self.count, team.micro_batch)
        return self.workers.hand_out(batch), self.workers.team

    @property
    def called(self) -> str:
        """What the processes are: "workers", or "ranks", whose gradients are not added up in the same order."""
        return "workers" if world() is None else "ranks"

    @property
    def remark(self) -> str:
        """What a user should know, "" if there is nothing."""
        return f"one process works alone, on threads: {self.why_alone}" if self.why_alone and self.count > 1 else ""

    def collect(self) -> tuple[list[Piece], list[Buffer]]:
        """Wait for the others; return what their pieces came to, in the order of the rows, and their gradients."""
        return ([], []) if self.workers is None else self.workers.collect()

    def close(self) -> None:
        """End the others, if there are any; a next step starts them again."""
        if self.workers is not None:
            self.workers.close()
            self.workers = None
