"""What a Trainer tells while it works: an Observer's methods, of which a subclass writes those that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minivit.errors import ConfigError, value_text
from minivit.train.progress import Row


class Observer:
    """Is told what a Trainer does: ``Trainer(…, observers=[Mine()])``. Each method does nothing unless overridden.

    ``trainer`` is the :class:`~minivit.train.trainer.Trainer` that tells: an observer may look at all that it has, such
    as ``trainer.model``, ``opt``, ``step`` (the last gradient's norm is ``trainer.step.grad_norm``), ``progress`` and
    ``epochs``. Rows are the run's own, and not to be changed.

    A run's events, in this order: ``begin``; for each epoch ``epoch_begins``, a ``step`` for each batch, ``epoch``;
    ``end``. Observers are told in the order given, but of the ``end`` in reverse. If the run has a folder, its own
    :class:`~minivit.train.keeper.Keeper` comes before them: what they are told of is already recorded, and saved where
    it is to be saved. An observer that raises ends the run with its error: what was saved stays, and the run can be
    resumed from there.
    """

    def begin(self, trainer: Any) -> None:
        """``fit`` begins or continues the run: the data are checked, and the folder is held."""

    def epoch_begins(self, trainer: Any) -> None:
        """An epoch begins; or it continues, where a run is resumed, after ``trainer.progress.batch`` batches."""

    def step(self, trainer: Any, row: Row) -> None:
        """A batch has been trained on.

        The row has epoch, step, lr, images_per_second, seconds and, over the epoch's images so far, loss and accuracy;
        of the batch alone ``batch``, its number from 1, batch_loss and grad_norm. That of a batch which was left out,
        because its loss or gradient was not finite, has epoch, step, batch and ``left_out``, the reason.

        On a GPU the next batch is under way by then: the row, ``trainer.opt.steps`` and ``trainer.step.grad_norm`` are
        this batch's, but whoever looks at the parameters may see the next update made, and a learning rate that is set
        here holds from the batch after the next on. Only where the run saves after this step it has waited.
        """

    def epoch(self, trainer: Any, row: Row) -> None:
        """An epoch has ended, and has been evaluated: its row is as ``fit`` returns it."""

    def saved(self, trainer: Any, path: Path) -> None:
        """A checkpoint has been written: last.npz, best.npz, or epoch.npz, to which a run is rolled back."""

    def remark(self, trainer: Any, text: str) -> None:
        """Something about the run that its user should know; also said by ``resume``."""

    def stopped(self, trainer: Any, why: str) -> None:
        """A signal, such as SIGINT, has ended the run between two steps: ``fit`` will raise Stopped."""

    def end(self, trainer: Any) -> None:
        """``fit`` ends, by whatever cause; each observer whose ``begin`` went through is told: close files here."""


def check_observers(observers: Sequence[Observer]) -> None:
    """Raise ConfigError if one of the ``observers`` is none."""
    if wrong := [value_text(observer) for observer in observers if not isinstance(observer, Observer)]:
        raise ConfigError(f"observers={', '.join(wrong)}", "give objects of a class that is derived from Observer")
