"""What is shown of a tape: the operations that a computation recorded, in their order, and the parts they belong to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Weight:
    """A parameter that an operation reads; ``gradient`` is its gradient's norm, None where there is none."""

    name: str
    shape: tuple[int, ...]
    gradient: float | None = None


@dataclass(frozen=True)
class Operation:
    """One recorded operation.

    ``name`` is the operation's, ``place`` the path of the module that ran it ("" for the model itself, and for what
    comes after it), ``part`` the path of the part that it is folded into, and ``kind`` what that part is.
    ``shape`` and ``dtype`` are its result's, ``kept`` the bytes that it holds for the backward pass, ``inputs`` the
    places, on the tape, of the operations whose results it reads, ``gradient`` the norm of the gradient of its result.
    """

    name: str
    place: str
    part: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    kept: int
    inputs: tuple[int, ...]
    weights: tuple[Weight, ...] = ()
    gradient: float | None = None


def runs_of_parts(tape: Sequence[Operation]) -> list[range]:
    """Return which operations follow each other in one part, in order; one that is in no part stands alone."""
    runs, start = [], 0
    for part, group in itertools.groupby(tape, lambda operation: operation.part):
        stop = start + len(list(group))
        runs += [range(start, stop)] if part else [range(i, i + 1) for i in range(start, stop)]
        start = stop
    return runs


def shape_text(shape: Sequence[int]) -> str:
    """Return a shape as text: ``1 × 65 × 192``; that of a single number is "one number"."""
    return " × ".join(map(str, shape)) or "one number"
