"""The verdict on one argument's gradient: what the engine says of it, held against numerical derivatives.

An error is relative to the derivative that is checked, never to a fixed number: a gradient of 1e-9 is checked as
sharply as one of 1e9. What rounding leaves in doubt is then measured, by other steps and by changes in the last bits of
all that goes in: an error that it explains is not blamed on the gradient, and does not pass either, unless the
derivative is zero to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minivit.autograd.derivative import DOUBT, EPSILON, Derivative, tolerance
from minivit.autograd.orders import BESIDE, Scalar, alike, holding
from minivit.backend import Key, normal
from minivit.errors import GradientError, UndecidedError

__tracebackhide__ = True  # as in orders.py

ZERO = 1e-7
"""Rounding that leaves a derivative in doubt may be at most this much of the function's size over its argument's."""

ROUNDED = 100 * EPSILON
"""An error of this much of the function's size over its argument's is none: the gradient of a saturated softmax is a
difference of numbers near 1, and a few times 2⁻⁵³ off, where the complex step knows that it is e⁻³⁰⁰."""

TINY = float(np.finfo(np.float64).tiny)  # numbers below it lose digits, or are 0

NEAR = 1e-3
"""Up to here a very small argument may be moved to see what it changes: see ``Part.usual``."""


@dataclass(frozen=True)
class Check:
    """One argument's result: the derivative along a random direction, by the engine and numerically."""

    name: str
    order: int
    method: str
    analytic: float
    numeric: float
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the relative error is within the tolerance (NaN is not)."""
        return self.error <= self.tolerance


def parts_of(scalar: Scalar, name: str, direction: np.ndarray) -> list[Part]:
    """Return the parts of one argument, each of entries of about one size, to be moved along ``direction``."""
    gradient = scalar.gradients[name]
    return [Part(scalar, name, direction * some, size, gradient) for some, size in alike(scalar.leaves[name].numpy())]


def judged_parts(parts: Sequence[Part], method: str, rtol: float | None, atol: float) -> Check:
    """Return the check of an argument: that of its worst part."""
    if method != "central" and not all(part.takes_complex(method) for part in parts):
        method = "central"
    whole = sum(part.terms for part in parts)
    checks = [part.judge(method, rtol, atol, whole) for part in parts]
    return max(checks, key=lambda c: (not c.passed, c.error))


class Part(Derivative):
    """Entries of one leaf that are of about one size and move together: whether their gradient is right."""

    def takes_complex(self, method: str) -> bool:
        """Return whether differences leave the complex step standing; raise if ``method`` allows no other."""
        if self.stepped is None:
            what = "the function cannot run on complex numbers"
        elif self.is_analytic is False:
            what = f"the complex step gives {self.stepped:.12g}, differences {self.best()[0]:.12g}: it is not analytic"
        else:
            return True
        if method == "complex":
            raise GradientError(f"{self.name}: {what}", 'use method="central"')
        return False

    def judge(self, method: str, rtol: float | None, atol: float, whole: float, may_be_zero: bool = True) -> Check:
        """Return the check. ``whole`` is the sum over all entries that are moved, of which these may be some.

        With ``may_be_zero``, derivatives that are zero but for rounding are compared with what is usual here.
        """
        how = "central" if method == "central" else "complex"
        allowed = tolerance(how, self.scalar.order) if rtol is None else rtol

        def result(value: float, scale: float) -> Check:
            error = max(abs(self.analytic - value) - atol, 0.0)
            error = error / scale if error else 0.0
            return Check(self.name, self.scalar.order, how, self.analytic, value, error, allowed)

        # an error is relative to the sum's terms, not to a sum that may cancel
        if how == "central":
            close = self.near(self.analytic, allowed, atol)
            if close is not None:
                return result(close, max(self.terms, abs(close)))
            numeric, noise, _ = self.best()
        else:
            assert self.stepped is not None
            numeric, noise = self.stepped, 0.0
        scale = max(self.terms, abs(numeric))
        check = result(numeric, scale)
        if check.passed and noise <= allowed * scale + atol:
            return check
        excess = abs(self.analytic - numeric) - atol
        if excess > 0.0:
            if max(self.terms, abs(numeric)) * self.size < TINY:
                raise self.undecided(check, TINY / self.size)  # what moving it changes is too small for a number
            usual, own = self.usual()
            if excess <= ROUNDED * own or (excess <= ROUNDED * usual and self.wavers(how, self.analytic - numeric)):
                return result(numeric, usual)
        if may_be_zero and self.is_zero(how, numeric, noise, usual := self.usual_at_most()):
            check = result(numeric, usual)
            if check.passed:
                return check
        if method == "auto" and self.is_analytic is None:
            return self.judge("central", rtol, atol, whole, may_be_zero=False)  # the complex step alone proves no fault
        if how == "complex":
            finest = tolerance("central", self.scalar.order)
            confirmed = self.agrees(finest)
            if confirmed and excess > 0.1 * scale:
                return result(numeric, scale)  # wrong: rounding cannot do that where a difference confirms the step
            if not confirmed and method == "auto" and self.near(self.analytic, finest) is not None:
                # at a kink: the complex step is of one side
                return self.judge("central", rtol, atol, whole, may_be_zero=False)
        own, of_step = self.shaken(EPSILON, how, excess)
        noise = DOUBT * (own + of_step + noise)
        if excess > allowed * scale + noise:
            return result(numeric, scale)  # wrong
        if max(excess, noise) <= allowed * whole:
            return result(numeric, whole)  # too small a part of the argument's derivative to count
        if method == "auto":  # a difference is coarser, and rounding may leave no doubt of it
            return self.judge("central", rtol, atol, whole, may_be_zero=False)
        raise self.undecided(check, noise)

    def usual(self) -> tuple[float, float]:
        """Return the size of what these entries change in s, and by how much, over the distance on which they do.

        It is what a derivative usually is like. The distance is their own size or, where these entries are so small
        that the function hardly sees them, like exp(1e-12), up to ``NEAR``.

        What they change is seen at other arguments, because here a saturated function may change nothing; and so is
        by how much, because s may be as large as it is by what other arguments do.
        """
        changed, most = np.zeros(self.here.shape, bool), 0.0
        for scale in (1e-3, 1.0):
            moved = {
                x: np.asarray(scale * (np.abs(x.data).mean() or 1.0) * normal(Key(i, stream=BESIDE), x.shape))
                for i, x in enumerate(self.scalar.leaves.values())
            }
            try:
                with holding(moved):
                    before, after = self.moved(0.0), self.moved(scale * self.size)
                changed |= before != after  # NaN, too
                by = float(np.abs(after - before).sum()) / scale
                most = max(most, by) if math.isfinite(by) else most
            except (ArithmeticError, ValueError):  # the function refuses these arguments, or returns another shape
                changed[:] = True
        size, distance = float(np.abs(self.here).sum(where=changed)), self.size
        while distance < NEAR:
            try:
                further = self.moved(distance)
            except (ArithmeticError, ValueError):  # the function refuses what lies so far away
                break
            if further.shape != changed.shape or not np.abs(further - self.here).sum(where=changed) < 0.1 * size:
                break
            distance *= 10.0
        usual = max(size, self.scalar.least) / distance
        return usual, min(usual, most / self.size)

    def usual_at_most(self) -> float:
        """Return the size of all of s, here and around, over the entries' own: no less than :meth:`usual`."""
        try:
            around = float(np.abs(self.moved(self.size)).sum())
        except (ArithmeticError, ValueError):  # the function refuses what lies so far away
            around = math.nan
        return max(self.scalar.size, around if math.isfinite(around) else 0.0) / self.size

    def is_zero(self, how: str, numeric: float, noise: float, usual: float) -> bool:
        """Return whether both derivatives are zero but for rounding, which made what there is of them.

        They are small beside what is ``usual`` then and, if not 0, a change of the 6th digit of what goes in makes
        other numbers of them. A derivative that is only small keeps its first digits.
        """
        if max(self.terms, abs(numeric)) > ZERO * usual:
            return False
        own, of_step = self.shaken(1e-6, how)
        return self.terms <= DOUBT * own and abs(self.analytic - numeric) <= DOUBT * (own + of_step + noise)

    def stands_on_kink(self) -> bool:
        """Return whether s has another derivative forwards than backwards, however small the steps.

        Of a smooth function both come together as the steps do, and rounding drives them apart.
        """
        apart = []
        for k in (-4, -5, -6):
            h = 10.0**k * self.size
            try:
                apart.append(float((self.moved(h) + self.moved(-h) - 2.0 * self.here).sum() / h))
            except (ArithmeticError, ValueError):  # the function refuses what lies there
                return False
        return abs(apart[0]) > 0.0 and all(abs(a - apart[0]) <= 0.1 * abs(apart[0]) for a in apart)

    def shaken(self, by: float, how: str, excess: float = 0.0) -> tuple[float, float]:
        """Return how much the gradient's derivative, and the complex step's, change if all that goes in does ``by``.

        Of five changes the largest; of one, if that leaves no doubt about an ``excess``.
        """
        own = of_step = 0.0
        for again in self.others(by):
            own = max(own, abs(again.analytic - self.analytic))
            if how == "complex" and again.stepped is not None and self.stepped is not None:
                of_step = max(of_step, abs(again.stepped - self.stepped))
            if excess > 1e3 * DOUBT * (own + of_step):
                break
        return own, of_step

    def wavers(self, how: str, error: float) -> bool:
        """Return whether rounding made an ``error``: a change of the 4th digit of what goes in makes another of it.

        A wrong gradient's keeps its first digits, however small it is beside what other arguments do to s. Of a
        difference, which rounds more than the gradient, only the first three digits are looked at.
        """
        if how == "central" and abs(error) <= 1e-3 * self.terms:
            return True
        for again in self.others(1e-4):
            numeric = again.stepped if how == "complex" else again.best()[0]
            if numeric is None or abs(again.analytic - numeric - error) >= abs(error) / DOUBT:
                return True
        return False

    def others(self, by: float) -> Iterator[Derivative]:
        """Yield this derivative at five other places, all that goes in changed by ``by``; each while s is there."""
        scalar, weights = self.scalar, self.scalar.weights
        for j in range(5):
            key = Key(j, stream=0x0B17)
            moved = {x: _nudged(x.data, by, key.child(i)) for i, x in enumerate(scalar.leaves.values())}
            direction = _nudged(self.direction, by, key.child(2000))
            try:
                scalar.weights = [_nudged(w, by, key.child(1000 + i)) for i, w in enumerate(weights)]
                with holding(moved):
                    again = Derivative(scalar, self.name, direction, self.size, scalar.differentiate()[self.name])
                    again.here = again.moved(0.0)
                    yield again
            finally:
                scalar.weights = weights

    def undecided(self, check: Check, noise: float) -> UndecidedError:
        """Return the error for a gradient of which rounding hides whether it is right."""
        derivative = max(abs(check.analytic), abs(check.numeric))
        share = f"rtol={_up(noise / derivative)} or " if derivative else ""
        return UndecidedError(
            f"cannot tell whether the gradient of order {check.order} for {check.name} {self.leaf.shape} is right: "
            f"along a random direction it gives {check.analytic:.12g}, the {check.method} step {check.numeric:.12g}; "
            f"an error of {check.tolerance:.0e} · {derivative:.1e} is allowed, but rounding alone may make {noise:.1e}",
            "check at arguments where the function changes more or cancels less, and off its kinks; or allow as much: "
            f"{share}atol={_up(noise)}",
        )


def _nudged(x: np.ndarray, by: float, key: Key) -> np.ndarray:
    """Return ``x`` with a random relative change of each entry, some 2 · ``by``."""
    return np.asarray(x * (1.0 + 2.0 * by * normal(key, x.shape)))


def _up(x: float) -> str:
    """Return a power of ten, not less than ``x``."""
    return f"1e{math.ceil(math.log10(x))}" if x > 0.0 else "0"
