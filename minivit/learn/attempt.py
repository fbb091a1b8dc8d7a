"""A learner's function as tried on samples: what came back beside what is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from minivit.backend import Key
from minivit.learn.calling import Outcome
from minivit.learn.comparing import TOLERANCE, Outputs, Unreadable, agree, named, nudged, read, scales
from minivit.learn.exercise import Asked, Mistake, Sample

NAMING = 1e-10
"""A wrong answer is that of a mistake if they differ by no more than this share of the scale."""

NEAR = 1e-6
"""What is off by no more than this share of the scale, in every sample, comes of right formulas."""

ROUNDINGS, MOST = 16.0, 1e-10
"""An entry may be off by so many times what a rounding of the arguments makes of it, up to a share of the scale."""


@dataclass
class Attempt:
    """One function of an exercise, its samples, and one outcome for each; ``arguments`` are its arguments' names."""

    asked: Asked
    arguments: tuple[str, ...]
    samples: Sequence[Sample]
    outcomes: Sequence[Outcome]
    _moved: dict[int, list[Outputs]] = field(default_factory=dict)

    @cached_property
    def rights(self) -> list[Outputs]:
        """What is right, in each sample."""
        return [named(self.asked.outputs, value) for value in self._right_values]

    @cached_property
    def _right_values(self) -> list[Any]:
        return [self.asked.right(*args) for _, args in self.samples]

    @cached_property
    def scales(self) -> list[dict[str, float]]:
        """The scale of each output, in each sample."""
        return scales(self.rights)

    @cached_property
    def got(self) -> list[Outputs | Unreadable | None]:
        """What came back in each sample: outputs, why they cannot be read, or None where the call was stopped."""
        as_dict = isinstance(self._right_values[0], dict)
        return [
            None if outcome.stopped else read(self.asked.outputs, outcome.value, as_dict) for outcome in self.outcomes
        ]

    @cached_property
    def readable(self) -> list[int]:
        """The samples whose outputs can be compared."""
        return [i for i, got in enumerate(self.got) if isinstance(got, dict)]

    def output(self, i: int, name: str) -> np.ndarray:
        """Return what came back in sample ``i``, one of the readable ones."""
        got = self.got[i]
        assert isinstance(got, dict)
        return got[name]

    @cached_property
    def tolerance(self) -> float:
        """The share of the scale within which two wrong answers are the same one: more in single precision."""
        kept = [self.output(i, name) for i in self.readable for name in self.asked.outputs]
        return max((_digits(x, NAMING) for x in kept), default=NAMING)

    def fits(self, name: str, wanted: Sequence[np.ndarray | None], tolerance: float = 0.0) -> bool:
        """Return whether output ``name`` equals ``wanted``, an array for each sample, in all samples that can be read.

        None stands for what there is not, and equals nothing.
        """
        return bool(self.readable) and all(
            (there := wanted[i]) is not None
            and agree(self.output(i, name), there, self._scale(i, name, there), tolerance or self.tolerance)
            for i in self.readable
        )

    def _scale(self, i: int, name: str, wanted: np.ndarray) -> float:
        """Return the output's scale, or that of a wrong answer if it is larger."""
        with np.errstate(all="ignore"):
            size = np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0)
        return max(self.scales[i][name], float(size))

    def right_in(self, i: int, name: str) -> bool:
        """Return whether output ``name`` is right in sample ``i``, which can be read."""
        got, right, scale = self.output(i, name), self.rights[i][name], self.scales[i][name]
        if agree(got, right, scale):
            return True
        if not agree(got, right, scale, MOST):
            return False
        return agree(got, right, 1.0, TOLERANCE * scale + ROUNDINGS * self._noise(i, name))

    def _noise(self, i: int, name: str) -> float:
        """Return how much the right output moves when every number among the arguments moves by a rounding.

        Where scores are large, or tokens far from 0, that is more than 1e-12: no way of computing is more exact.
        """
        if i not in self._moved:
            args = [nudged(self.samples[i][1], Key(0, 0xE95, step)) for step in range(3)]
            self._moved[i] = [named(self.asked.outputs, self.asked.right(*some)) for some in args]
        return max(float(np.abs(moved[name] - self.rights[i][name]).max(initial=0.0)) for moved in self._moved[i])

    @cached_property
    def wrong(self) -> dict[str, list[int]]:
        """The outputs that are wrong somewhere, and in which samples."""
        found = {name: [i for i in self.readable if not self.right_in(i, name)] for name in self.asked.outputs}
        return {name: places for name, places in found.items() if places}

    @cached_property
    def near(self) -> list[str]:
        """The wrong outputs that are right but for their digits, in every sample."""
        return [name for name in self.wrong if all(self._near(i, name) for i in self.readable)]

    def _near(self, i: int, name: str) -> bool:
        """Return whether the output is right to NEAR, or to what its precision, if that is a lower one, lets it be."""
        got, right, scale = self.output(i, name), self.rights[i][name], self.scales[i][name]
        share = _digits(got, NEAR)
        if agree(got, right, scale, share) or share == NEAR:
            return agree(got, right, scale, share)
        coarser = float(np.finfo(got.dtype).eps) / float(np.finfo(np.float64).eps)
        return agree(got, right, 1.0, share * scale + min(ROUNDINGS * coarser * self._noise(i, name), 1e-2 * scale))

    @cached_property
    def plain(self) -> list[str]:
        """The wrong outputs that are wrong by more than digits: these are a mistake's."""
        return [name for name in self.wrong if name not in self.near]

    def values_of(self, gives: Callable[..., Any]) -> list[Outputs | None]:
        """Return what ``gives`` gives in each sample, None where it cannot."""
        return [self._value_of(gives, args) for _, args in self.samples]

    def _value_of(self, gives: Callable[..., Any], args: tuple[Any, ...]) -> Outputs | None:
        with np.errstate(all="ignore"):
            try:
                return named(self.asked.outputs, gives(*args))
            except (ArithmeticError, ValueError, IndexError):  # a mistake that fits some shapes only
                return None

    def mistakes(self) -> list[tuple[Mistake, list[str], bool]]:
        """Return the listed mistakes that fit: (mistake, the wrong outputs that it explains, whether these are all).

        One that explains all comes alone; else those come that give some of the wrong outputs. A mistake explains an
        output that it changes, and is none of the learner's if it changes one that is right.
        """
        found: list[tuple[Mistake, list[str], bool]] = []
        for mistake in self.asked.mistakes if self.plain else ():
            values = self.values_of(mistake.gives)
            of = {name: [None if one is None else one[name] for one in values] for name in self.asked.outputs}
            names = [name for name in self.plain if self.fits(name, of[name]) and self._changes(name, of[name])]
            if names and all(self._may_change(name, of[name]) for name in of if name not in self.plain):
                found.append((mistake, names, len(names) == len(self.plain)))
        return [one for one in found if one[2]] or found

    def _may_change(self, name: str, wanted: Sequence[np.ndarray | None]) -> bool:
        """Return whether a mistake may give ``wanted`` for an output that is not plainly wrong."""
        return not self._changes(name, wanted) or (name in self.wrong and self.fits(name, wanted))

    def _changes(self, name: str, wanted: Sequence[np.ndarray | None]) -> bool:
        """Return whether ``wanted`` is not what is right, by more than the tolerance, in a sample that can be read."""
        return any(
            (there := wanted[i]) is not None
            and not agree(there, self.rights[i][name], self._scale(i, name, there), 2.0 * self.tolerance)
            for i in self.readable
        )


def _digits(x: np.ndarray, usual: float) -> float:
    """Return the share of the scale to which an array can be right: ``usual`` for float64."""
    return {2: 2e-2, 4: 3e-5}.get(x.dtype.itemsize, usual)
