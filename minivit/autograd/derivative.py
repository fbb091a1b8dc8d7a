"""Numerical derivatives: how fast a number changes when some entries of a Tensor move along a direction.

Where the function is analytic a complex step gives the derivative, Im f(x + ih·v) / h with h = 1e-20: nothing is
subtracted, so it is exact to the last bits (Squire and Trapp 1998, "Using complex variables to estimate derivatives of
real functions", SIAM Review 40(1)). Elsewhere a central difference does. A function that is not analytic still gives a
number for a complex step, a wrong one: a difference has to confirm it, roughly.

Steps follow the size of what is moved, so that a derivative of 1e-9 is found as sharply as one of 1e9.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minivit.autograd.orders import BESIDE, Scalar, holding, nearby
from minivit.autograd.tensor import Tensor
from minivit.backend import Key, normal
from minivit.errors import NonFiniteError

__tracebackhide__ = True  # as in orders.py

COMPLEX_STEP = 1e-20
"""The complex step, as a share of the argument's size."""

NEAR_STEPS = (-5, -6, -4, -7, -3)
"""Exponents of ten: steps of a central difference, as shares of the argument's size, in the order of trying."""

LEAST_STEP = -10
FLAT = -1  # a step as large as this that changes nothing shows that the function is constant here

ROUGHLY = 1e-5
"""A difference that is this near the complex step confirms it."""

DOUBT = 10.0
"""An error counts as one when it is this many times the noise that was measured."""

EPSILON = float(np.finfo(np.float64).eps)


def tolerance(method: str, order: int) -> float:
    """Return the largest relative error allowed."""
    if method == "complex":
        return 1e-12
    return 1e-7 if order == 1 else 1e-6


class Derivative:
    """The derivative of s when entries of the leaf ``name``, which are of about one ``size``, move along ``direction``.

    ``analytic`` is what the ``gradient`` says of it. The numerical ones are a complex step and central differences,
    D(h) = (s(x + h·v) - s(x - h·v)) / 2h; they are computed when asked for.
    """

    def __init__(self, scalar: Scalar, name: str, direction: np.ndarray, size: float, gradient: np.ndarray) -> None:
        self.scalar, self.name, self.direction, self.size = scalar, name, direction, size
        self.leaf, self.here = scalar.leaves[name], scalar.here
        products = gradient * direction
        self.analytic, self.terms = float(products.sum()), float(np.abs(products).sum())
        self.values: dict[int, float] = {}  # D by the exponent of its step, h = 10ᵏ · size
        self.changed: dict[int, np.ndarray] = {}  # which terms of s the step changes
        self.confirmed = False  # the complex step, by a difference: see confirm_together

    def moved(self, distance: float) -> np.ndarray:
        """Return the terms of s with the entries moved that far along the direction."""
        return self.scalar.moved({self.leaf: distance * self.direction})

    # ---- the complex step ----

    @functools.cached_property
    def stepped(self) -> float | None:
        """ds/dh by a complex step, or None if the function cannot run on complex numbers."""
        h = COMPLEX_STEP * self.size
        whole = [x for x in self.scalar.leaves.values() if x is not self.leaf]
        for others in (whole, []):  # some functions want all complex, some the others as they are
            moved = {x: x.data.astype(np.complex128) for x in others}
            moved[self.leaf] = np.asarray(self.leaf.data + 1j * h * self.direction)
            with holding(moved), np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("error", np.exceptions.ComplexWarning)  # an imaginary part thrown away
                try:
                    value = float(np.imag(self.scalar.terms()).sum() / h)
                except Exception:  # whatever it says of complex numbers
                    continue
            return value if math.isfinite(value) else None
        return None

    @functools.cached_property
    def is_analytic(self) -> bool | None:
        """Whether the function is analytic, as differences that agree with the complex step show; None if unknown."""
        if self.confirmed or self.agrees() or self.agrees_beside(1.0, 1e-3):  # it may have a kink just here
            return True
        value, noise, _ = self.best()
        if self.stepped is None or abs(self.stepped - value) > DOUBT * noise:
            return False
        # it may change too little just here
        if self.agrees_beside(1.0, 0.3) or self.agrees_beside(0.1, 0.3) or self.agrees_beside(0.0, 1.0):
            return True
        return False if self.agrees_beside(0.0, 1.0, contradicted=True) else None

    def agrees(self, rtol: float = ROUGHLY) -> bool:
        """Return whether a difference is equal to the complex step."""
        if self.stepped is None:
            return False
        if self.stepped == 0.0 and all(self.compute(k) and not self.changed[k].any() for k in (-5, -1)):
            return True
        return self.near(self.stepped, rtol) is not None

    def agrees_beside(self, scale: float, by: float, contradicted: bool = False) -> bool:
        """Return whether a difference agrees at other arguments: ``scale`` times these, each changed by about ``by``.

        ``by`` is a share of their size. With ``scale`` 0 the arguments are standard normal instead. With
        ``contradicted`` it is asked whether a difference contradicts the complex step there.
        """
        leaves = self.scalar.leaves.values()
        if scale:
            moved = {x: np.asarray(scale * data) for x, data in nearby(leaves, by).items()}
        else:
            moved = {x: np.asarray(normal(Key(i, stream=BESIDE), x.shape)) for i, x in enumerate(leaves)}
        size = self.size * scale if scale else 1.0
        with holding(moved):
            beside = Derivative(self.scalar, self.name, self.direction, size, self.scalar.gradients[self.name])
            try:
                beside.here = self.moved(0.0)
                if contradicted:
                    value, rounding, _ = beside.best()
                    return beside.stepped is not None and abs(beside.stepped - value) > DOUBT * rounding
            except (ArithmeticError, ValueError):  # the function refuses them
                return False
            return beside.agrees()

    # ---- central differences ----

    def compute(self, k: int) -> bool:
        """Compute D for a step of 10ᵏ · size, and return whether it says anything about the derivative here."""
        if k not in self.values:
            h, here = 10.0**k * self.size, self.here
            try:
                up, down = self.moved(h), self.moved(-h)
            except (ArithmeticError, ValueError):  # the function refuses what lies so far away
                return False
            if not up.shape == down.shape == here.shape:
                return False
            with np.errstate(all="ignore"):
                value = float((up - down).sum() / (2.0 * h))
                bent = float(np.abs(up + down - 2.0 * here).sum()) > 0.1 * float(np.abs(here).sum())
            if math.isfinite(value) and not (bent and k >= 0):
                self.values[k], self.changed[k] = value, (up != here) | (down != here)
        return k in self.values

    def both_agree(self) -> bool:
        """Return whether the gradient and the complex step, which know nothing of each other, say the same."""
        step = self.stepped
        return step is not None and self.analytic != 0.0 and abs(self.analytic - step) <= 1e-3 * abs(self.analytic)

    def quantum(self, d: Mapping[int, float]) -> float:
        """Return the least change of s, over ``size``, that differences ``d`` can show.

        Where rounding inside of the function swallows the smallest steps (1 - sigmoid(30), 1e8 + x), they change
        nothing, and the first step that does shows about one unit of it. It is rounding, and not a function of steps
        like floor, if the complex step comes to what the gradient says.
        """
        if all(self.changed[k].any() for k in d) or not self.both_agree():
            return 0.0
        first = next((k for k in d if self.changed[k].any()), None)
        if first is None:  # none do: as in exp(1e-24), they may be too small for the whole function
            return EPSILON * float(np.abs(self.here).sum()) / self.size
        return abs(d[first]) * 10.0**first if first <= FLAT else 0.0

    def refined(self, k: int) -> float:
        """Return (100·D(h) - D(10h)) / 99: it has no error in h² (Richardson 1911, doi:10.1098/rsta.1911.0009)."""
        return self.values[k] + (self.values[k] - self.values[k + 1]) / 99.0

    def near(self, derivative: float, rtol: float, atol: float = 0.0) -> float | None:
        """Return a difference, of a small step, that is equal to ``derivative`` while rounding is far less."""
        for k in NEAR_STEPS:
            rounding = EPSILON * float(np.abs(self.here).sum()) / (10.0**k * self.size)
            most = rtol * max(self.terms, 2.0 * abs(derivative)) + atol
            if DOUBT * rounding <= most and self.compute(k):
                refined = [self.refined(i) for i in (k, k - 1) if i in self.values and i + 1 in self.values]
                for value in [self.values[k], *refined]:
                    allowed = rtol * max(self.terms, abs(value)) + atol
                    if abs(derivative - value) <= allowed and DOUBT * rounding <= allowed:
                        return value
        return None

    def best(self) -> tuple[float, float, int]:
        """Return the difference with the least noise, this noise and the exponent of its step.

        Noise is how far two neighbours are apart; to have a meaning, that is little beside them or what rounding does.
        From afar a function may look flat: a larger step that contradicts a smaller one does not count.
        """
        reach = math.ceil(math.log10(max(float(np.abs(self.leaf.data).max(initial=0.0)) / self.size, 1.0)))
        end = 0 if self.both_agree() else reach + 7  # what is far away has no say against two that agree
        d = {k: self.values[k] for k in range(LEAST_STEP, end) if self.compute(k)}
        quantum = self.quantum(d)
        changed = np.any([self.changed[k] for k in d], axis=0) if d else False
        least = self.scalar.least if np.any(changed) else 0.0
        rounding = EPSILON * max(float(np.abs(self.here).sum(where=changed)), least) / self.size
        noise: dict[int, float] = {}
        for k in (k for k in d if k + 1 in d):
            apart, least = abs(d[k] - d[k + 1]), max(rounding, quantum) / 10.0**k
            below = abs(d[k - 1] - d[k]) / 10.0 if k - 1 in d else 0.0  # a step of a tenth: ten times the rounding
            settled = k < -1 or apart <= max(0.1 * abs(d[k]), DOUBT * least)
            if settled and all(abs(d[k] - d[j]) <= DOUBT * noise[j] for j in noise):
                noise[k] = max(apart, below, least)
        if not noise:
            raise NonFiniteError(
                f"the function to check is finite, but not around {self.name}: it has no derivative there",
                "choose arguments inside the function's domain, not on its edge",
            )
        k = min(noise, key=lambda k: noise[k])
        return self.refined(k), noise[k], k


def confirm_together(derivatives: Sequence[Derivative]) -> None:
    """Let a difference confirm the complex steps of many derivatives of one s at once, where it can.

    All entries move together, each along its direction and by a step of its own size. The difference has to equal the
    sum of the complex steps to within what is allowed of the least of them alone, so that none hides behind a larger
    one; and errors of several do not cancel along random directions. Those so small that rounding hides them go into
    the next difference, of larger steps. What is not confirmed in the end is left to differences of its own.
    """
    scalar = derivatives[0].scalar
    steps = [
        (d, d.stepped, ROUGHLY * max(d.terms, abs(d.stepped)) * d.size) for d in derivatives if d.stepped is not None
    ]
    for h in (1e-5, 1e-4, 1e-3):  # the first of NEAR_STEPS, and the larger ones
        rounding = EPSILON * float(np.abs(scalar.here).sum()) / h
        together = [(d, stepped, allowed) for d, stepped, allowed in steps if DOUBT * rounding <= allowed]
        if not together:
            continue
        moves: dict[Tensor, Any] = {}
        for d, _, _ in together:
            moves[d.leaf] = moves.get(d.leaf, 0.0) + h * d.size * d.direction
        try:
            up, down = (scalar.moved({x: sign * move for x, move in moves.items()}) for sign in (1.0, -1.0))
            off = float((up - down).sum()) / (2.0 * h) - sum(stepped * d.size for d, stepped, _ in together)
        except (ArithmeticError, ValueError):  # the function refuses what lies so far away, or returns another shape
            continue
        if abs(off) <= min(allowed for _, _, allowed in together):
            for d, _, _ in together:
                d.confirmed = True
            steps = [step for step in steps if not step[0].confirmed]
