"""Where a gradient that was found wrong is wrong: its worst entry, for the message."""

from __future__ import annotations

import math

import numpy as np

from minivit.autograd.judge import Check, Part
from minivit.autograd.orders import Scalar, alike
from minivit.backend import Key, normal
from minivit.errors import NonFiniteError, UndecidedError

__tracebackhide__ = True  # as in orders.py

FEW = 256
"""So many entries are looked at one by one; of more, the half that is off by more is taken, and halved again."""

ROUNDS = 4
"""Where the entries that seem farthest off stand on kinks, the others are searched, so many times at most."""


def locate(scalar: Scalar, check: Check) -> str:
    """Name the entry of the gradient that is farthest off (of many entries, of those among which it seems to be).

    Raises UndecidedError if the entries that are off stand on kinks, where no gradient is right.
    """
    leaf = scalar.leaves[check.name].numpy()
    worst, text, kinks = -1.0, "", []
    for entries, size in alike(leaf):
        left, step = np.flatnonzero(entries), None
        for _ in range(ROUNDS):
            found = []
            for i in _narrowed(scalar, check, left, size):
                part = _part(scalar, check, np.array([i]), size)
                numeric, step = _numeric(part, check, step)  # the step that is best for one is good for the others
                off = abs(part.analytic - numeric)
                if not off > worst:
                    continue
                if off > 1e-3 * abs(part.analytic) and part.stands_on_kink():
                    found.append(i)
                    continue
                index = [int(j) for j in np.unravel_index(i, leaf.shape)]
                worst, text = off, f"worst entry {index}: {part.analytic:.12g}, should be {numeric:.12g}"
            kinks += [[int(j) for j in np.unravel_index(i, leaf.shape)] for i in found]
            left = np.setdiff1d(left, found)
            if not found or not left.size:
                break
    if kinks and worst <= check.tolerance * np.abs(scalar.gradients[check.name]).max():
        raise UndecidedError(
            f"no gradient of order {check.order} for {check.name} {leaf.shape} is right: {len(kinks)} of its entries, "
            f"the first {kinks[0]}, stand{'s' if len(kinks) == 1 else ''} on a kink (a ReLU's 0, two numbers that are "
            "both the largest), where the function has one derivative forwards and another backwards",
            "check beside the kink: move the argument a little",
        )
    return text


def _part(scalar: Scalar, check: Check, entries: np.ndarray, size: float) -> Part:
    """Return the part of an argument that moves just these entries, each by its own random share; a single one by 1."""
    direction = np.zeros(scalar.leaves[check.name].shape)
    direction.reshape(-1)[entries] = 1.0 if entries.size == 1 else normal(Key(0, stream=0x10CA), entries.shape)
    return Part(scalar, check.name, direction, size, scalar.gradients[check.name])


def _numeric(part: Part, check: Check, step: int | None = None) -> tuple[float, int | None]:
    """Return the numerical derivative, NaN if there is none, and the step of a difference, the given or the best."""
    if check.method == "complex":
        return math.nan if part.stepped is None else part.stepped, None
    try:
        step = part.best()[2] if step is None else step
    except NonFiniteError:  # the function refuses what lies around
        return math.nan, None
    return part.values[step] if part.compute(step) else math.nan, step


def _narrowed(scalar: Scalar, check: Check, some: np.ndarray, size: float) -> np.ndarray:
    """Return at most FEW of some entries: always the half that is off by more."""
    while some.size > FEW:
        halves = np.array_split(some, 2)
        parts = [_part(scalar, check, half, size) for half in halves]
        off = [abs(part.analytic - _numeric(part, check)[0]) for part in parts]
        some = halves[1] if off[1] > off[0] else halves[0]
    return some
