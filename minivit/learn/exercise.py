"""What an exercise is: functions that the learner writes, what is right, and the known mistakes.

Right answers and mistakes are computed from minivit's own operations and their gradients, never written out in NumPy:
the package can mark an answer and name a mistake, and holds no solution to be read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minivit.autograd.tensor import Tensor, grad_or_zeros, tensor
from minivit.backend import Key, normal
from minivit.ops.reduce import sum as sum_of

Sample = tuple[str, tuple[Any, ...]]
"""What is special about the arguments, in a few words, and the arguments: NumPy arrays, numbers, None, or dicts, lists
and tuples of these."""


@dataclass(frozen=True)
class Mistake:
    """A mistake that learners make: its ``name`` in short words, of which no two in an exercise are equal.

    ``says`` is what the learner reads: what was forgotten and where to look, without the answer. ``gives`` takes the
    function's arguments and returns what a learner with that mistake does.
    """

    name: str
    says: str
    gives: Callable[..., Any]


@dataclass(frozen=True)
class Limit:
    """A bound on the memory of one call: ``says`` is what the learner reads whose function takes more.

    ``sample`` draws the arguments, and ``peak`` is how many bytes NumPy may hold at once beyond them, what is returned
    included.
    """

    sample: Callable[[Key], Sample]
    peak: int
    name: str
    says: str


@dataclass(frozen=True)
class Asked:
    """A function that the learner writes.

    ``outputs`` names what it returns: an array if there is one name, a tuple if there are several; ``right`` may return
    a dict with these keys instead, and so must the learner then. ``right`` takes the function's arguments, float64, and
    returns the true ones; ``samples`` draws what to try.
    """

    name: str
    outputs: tuple[str, ...]
    right: Callable[..., Any]
    samples: Callable[[Key], list[Sample]]
    mistakes: tuple[Mistake, ...] = ()
    limit: Limit | None = None


@dataclass(frozen=True)
class Exercise:
    """One step of the ladder; ``asked`` in the order of writing, ``hints`` from a nudge to the last step but one.

    ``given`` names what of :mod:`minivit.learn.given` the learner's file may import.
    """

    number: int
    slug: str
    title: str
    asked: tuple[Asked, ...]
    hints: tuple[str, str, str]
    given: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The name of the learner's file."""
        return f"{self.number:02}_{self.slug}.py"


def backward_of(forward: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Return backward(g, *args): the gradients of Σ g·forward(*args) in the first ``count`` arguments, by the engine.

    ``forward`` is made of minivit's operations. The result is an array if ``count`` is 1, else a tuple; float64.
    """

    def backward(g: Any, *args: Any) -> Any:
        leaves = [tensor(np.array(x, np.float64), requires_grad=True) for x in args[:count]]
        total = sum_of(forward(*leaves, *args[count:]) * g)
        found = tuple(d.numpy() for d in grad_or_zeros(total, leaves))
        return found[0] if count == 1 else found

    return backward


def fixed(x: Any) -> Any:
    """Return the value of ``x``, through which no gradient goes: what a learner forgets that x is used there gets."""
    return x.detach() if isinstance(x, Tensor) else x


def with_cotangents(
    samples: Callable[[Key], list[Sample]], forward: Callable[..., Any]
) -> Callable[[Key], list[Sample]]:
    """Return samples for a backward: those of the forward, a random cotangent before each.

    Cotangents are standard normal, to two decimals: a learner may want to copy one.
    """

    def drawn(key: Key) -> list[Sample]:
        return [
            (label, (np.asarray(np.round(normal(key.child(1000 + i), np.shape(forward(*args))), 2)), *args))
            for i, (label, args) in enumerate(samples(key))
        ]

    return drawn
