"""Steps that were handed in, and what they came to, for which a GPU is waited for later."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from minivit.backend import Array, on_device_of
from minivit.backend.cuda import Arriving
from minivit.errors import NonFiniteError
from minivit.train.capture import Capture
from minivit.train.numbers import DeviceNumbers
from minivit.train.pieces import Batch, Totals


class Submitted:
    """A step that was handed in."""

    def __init__(self, batch: Batch, settle: Callable[[Submitted], Totals]) -> None:
        self.batch = batch
        self.report: Any = None  # on its way from a GPU
        self.found: Totals | None = None
        self._settle = settle

    def totals(self) -> Totals:
        """Return what its batch came to; wait for it, and for the steps before it.

        Raises :class:`NonFiniteError` for the first of them whose loss or gradient is not finite. It has updated
        nothing, and nor have those after it.
        """
        return self._settle(self) if self.found is None else self.found


class HandedIn(NamedTuple):
    """A batch of a run that was handed in, the learning rate of its update, and whether that is the run's first."""

    images: Array
    labels: Array
    lr: float
    is_first: bool
    submitted: Submitted


class Underway:
    """The steps that a GPU is given, in their order, until somebody asks for what they came to.

    ``check(totals, batch)`` returns the totals of a batch, or raises for what is not finite.
    """

    def __init__(self, numbers: DeviceNumbers, capture: Capture, check: Callable[[Totals, Batch], Totals]) -> None:
        self.numbers, self.capture, self.check = numbers, capture, check
        self.waiting: deque[Submitted] = deque()

    def begin(self, batch: Batch, lr: float) -> Submitted:
        """Have a step made, at a learning rate."""
        submitted = Submitted(batch, self.settle)
        self.numbers.begin(lr)
        self._run(submitted)
        self.waiting.append(submitted)
        return submitted

    def _run(self, submitted: Submitted) -> None:
        self.capture.run(submitted.batch)
        submitted.report = Arriving(self.numbers.report)

    def settle(self, submitted: Submitted) -> Totals:
        """Wait for a step; return what its batch came to, or raise NonFiniteError for the first one that has to."""
        with on_device_of(self.numbers.report):
            self._settle(submitted)
        if submitted.found is None:
            what = "a step was not made, because one before it was not finite"
            raise NonFiniteError(what, "hand its batch in again")
        return submitted.found

    def _settle(self, submitted: Submitted) -> None:
        while submitted in self.waiting:
            first = self.waiting[0]
            loss, grad_norm, right, made, halted = self.numbers.read(first.report.read())
            totals = Totals(loss, grad_norm, right if right >= 0 else None)
            if not (made or halted):  # the gradient has overflowed at the scale of the loss, which is less now
                self._run(first)
                continue
            self.waiting.popleft()
            if halted:
                for (
                    later
                ) in self.waiting:  # page-locked memory that is let go has its next user before the copy is there
                    later.report.read()
                self.waiting.clear()
                self.numbers.clear()
            first.found = self.check(totals, first.batch)
