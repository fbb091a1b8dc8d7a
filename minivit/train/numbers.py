"""What changes from one training step to the next, kept on the GPU, so that the host need not wait for it.

A step that is recorded once and run many times reads its learning rate, its number and the factor of clipping from
device memory, and leaves its loss and its norm there. What is not finite must not reach a parameter, although no host
looks before the update: a flag on the device suppresses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from minivit.backend import Array, array_module, is_array, on_device_of
from minivit.errors import GraphError
from minivit.ops.cuda import verdict
from minivit.train.parameters import FlatParameters
from minivit.train.precision import LossScale

REPORT = 6
"""Numbers in a report: loss, norm, right, made, running, count."""


class Report(NamedTuple):
    """What a step came to, read on the host."""

    loss: float
    grad_norm: float  # before it was clipped
    right: int  # -1 where nobody knows
    made: bool  # whether the update was made
    halted: bool  # this step, or one before it, was not finite: no update is made until the host has cleared that


class DeviceNumbers:
    """The numbers of a training step on the GPU that ``store`` lies on, each in a 0-d array.

    ``lr`` float64; ``steps`` uint64, the updates made, and ``count`` the same as float64; ``ok``, whether this step's
    update is made; ``running``, false from the first step on that was not finite until :meth:`clear`; ``factor``, in
    the values' dtype, by which the gradient is multiplied. ``report`` float64 (REPORT,) is what the host reads when it
    likes, by :meth:`read`. ``scale`` is the scale of the loss, or None.

    A step: :meth:`begin` on the host; on the device the gradients, then :meth:`finish` and, if wanted, :meth:`clip`,
    then the update and the averages within :meth:`leading`; at last :meth:`read` on the host, steps later if it likes,
    one after the other.
    """

    def __init__(self, store: FlatParameters, scale: LossScale | None = None) -> None:
        self.store, self.scale = store, scale
        xp = array_module(store.values)
        with on_device_of(store.values):
            self.lr = xp.zeros((), np.float64)
            self.steps = xp.zeros((), np.uint64)
            self.running = xp.ones((), np.bool_)
            self.ok = self.running if scale is None else xp.ones((), np.bool_)
            self.factor = xp.ones((), store.values.dtype)
            self._one = xp.ones((), store.values.dtype)
            self.report = xp.zeros(REPORT, np.float64)
        self.loss, self.norm, self.right, self.count = (self.report[i : i + 1].reshape(()) for i in (0, 1, 2, 5))
        self.has_factor = scale is not None  # whether `factor` may be another than 1
        self._lr, self._known = 0.0, 0  # what the device holds, as far as the host has read

    # ---- on the host ----

    def begin(self, lr: float) -> None:
        """Take the rate of the next step over, and the store's ``steps`` if they were set since the last report.

        What has not changed is not sent. What is sent travels with the launch, so no memory of the host's is read
        later.
        """
        with on_device_of(self.report):
            if lr != self._lr:
                self.lr.fill(lr)
                self._lr = lr
            if self.store.steps != self._known:
                self.steps.fill(self.store.steps)
                self._known = self.store.steps

    def read(self, report: np.ndarray) -> Report:
        """Return what a step came to, given a copy of its ``report`` on the host, and count it there if it was made."""
        loss, norm, right, made, running, _ = report.tolist()
        if made:
            self.store.steps += 1
            self._known += 1
        return Report(loss, norm, int(right), bool(made), not running)

    def clear(self) -> None:
        """Let updates be made again, after a step that was not finite."""
        with on_device_of(self.report):
            self.running.fill(True)

    # ---- on the device ----

    def finish(self, loss: Any, norm: Any, right: Any = None) -> None:
        """Take in what a batch came to, find whether the update is to be made, and count it.

        ``loss`` is the batch's mean loss, ``norm`` that of the whole flat gradient, ``right`` how many rows were right:
        0-d arrays on the device, or numbers. With a loss scale the gradient is that many times too large.
        """
        xp, self.has_factor = array_module(self.report), self.scale is not None
        if not self.has_factor and verdict.finish(loss, norm, right, self.running, self.steps, self.report):
            return
        self.loss[...] = loss
        self.norm[...] = norm
        self.right[...] = -1.0 if right is None else right
        finite = xp.isfinite(self.report[:2])
        if self.scale is None:
            self.running &= finite.all()
        else:
            self.norm /= self.scale.value
            self.factor.fill(1.0)
            self.factor /= self.scale.value  # before it changes
            xp.logical_and(finite.all(), self.running, out=self.ok)
            self.scale.advance(finite, self.ok, self.running)
        self.report[3] = self.ok
        self.report[4] = self.running
        self.steps += self.ok
        self.count[...] = self.steps

    def clip(self, limit: float) -> None:
        """Have the update scale the gradient down to the norm ``limit`` if its own, by :meth:`finish`, is larger."""
        if not self.has_factor and verdict.clip(self.norm, self.factor, limit):
            self.has_factor = True
            return
        down = array_module(self.norm).where(self.norm > limit, limit / (self.norm + 1e-6), 1.0)
        if self.has_factor:
            self.factor *= down
        else:
            self.factor[...] = down
        self.has_factor = True

    @contextlib.contextmanager
    def leading(self) -> Iterator[None]:
        """Let the updates of the store in this block, and averages, be made by these numbers, not by the host's."""
        if self.store.numbers is not None:
            raise GraphError("an update is led by two sets of numbers", "leave the block of the first before")
        self.store.numbers = self
        try:
            yield
        finally:
            self.store.numbers = None

    @property
    def multiplier(self) -> Array:
        """By what the gradient is to be multiplied: ``factor``, or 1 where nothing is scaled."""
        return self.factor if self.has_factor else self._one

    def rate(self, scale: float) -> Array:
        """Return the learning rate, times ``scale``, in the values' dtype."""
        return array_module(self.lr).multiply(self.lr, scale, dtype=self.store.values.dtype)


def lesser(a: Any, b: Any) -> Any:
    """Return the lesser of two numbers, of which the second may lie on the GPU."""
    return array_module(b).minimum(a, b) if is_array(b) else min(a, b)


def scaled_gradient(store: FlatParameters, grad: Array) -> Array:
    """Return ``grad``, a view of the store's, once in an update: on the GPU clipping has left its factor to do."""
    if store.numbers is not None and store.numbers.has_factor:
        grad *= store.numbers.factor
    return grad


def unless_stopped(store: FlatParameters, arrays: Sequence[Array]) -> contextlib.AbstractContextManager[None]:
    """Give the arrays their values back after this block, bit for bit, if the step on the GPU is not to be made."""
    return _HERE if store.numbers is None else _restored(arrays, store.numbers.ok)


_HERE = contextlib.nullcontext()


@contextlib.contextmanager
def _restored(arrays: Sequence[Array], ok: Array) -> Iterator[None]:
    before = [a.copy() for a in arrays]
    yield
    for a, old in zip(arrays, before, strict=True):
        a[...] = array_module(a).where(ok, a, old)
