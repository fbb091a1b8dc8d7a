"""What a gradient check differentiates: a number s made of the function's output, and the gradient of s.

At order 1 s is the output, weighed with a random cotangent; at order 2 it is the gradient, weighed with random numbers.
The cotangent is random for a reason: seeded with ones, the true gradient of a softmax is zero, and so are many wrong
ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from minivit.autograd.graph import no_grad
from minivit.autograd.tensor import Tensor, grad_or_zeros, tensor
from minivit.backend import Key, normal
from minivit.errors import ConfigError, GraphError, NonFiniteError

__tracebackhide__ = True  # pytest then ends its traceback at the line that called the check

DECADES = 6
"""Entries of an argument whose sizes lie more decades apart are moved apart, each group by steps of its own size."""

SMALLEST = 1e-270  # of an argument: its complex step must be a number


class FirstOrder:
    """Order 1: the scalar s = Σ weight · fn() and its gradient in every leaf."""

    order = 1

    def __init__(self, fn: Callable[[], Tensor], leaves: Mapping[str, Tensor], key: Key) -> None:
        self.fn, self.leaves = fn, dict(leaves)
        with np.errstate(all="ignore"):  # what is not finite is said below
            output = fn()
        if not isinstance(output, Tensor):
            raise GraphError(f"the function to check returned {type(output).__name__}", "return one Tensor")
        check_finite(output.numpy(), "the output of the function to check", "choose arguments at which it is finite")
        self.output = output.numpy()
        self.gradients: dict[str, np.ndarray] = {}
        self.check_repeats()
        self.prepare(output, key)
        with np.errstate(all="ignore"):
            self.gradients = self.differentiate()
        for name, g in self.gradients.items():
            check_finite(
                g,
                f"the function is finite, but its gradient of order {self.order} for {name}",
                "keep away from points where there is no derivative (√x at 0), or mend the gradient",
            )
        self.here = self.terms()
        self.least = 0.0  # of order 2: the size that gradients usually have for such an output
        self.size = float(np.abs(self.here).sum())  # the size that s has, at least ``least``

    def prepare(self, output: Tensor, key: Key) -> None:
        """Draw the weights."""
        self.weights = [normal(key.child(1), output.shape)]

    def check_repeats(self) -> None:
        """Raise unless the function, and its gradient if known, come out as before (but for the last bits)."""
        with no_grad():
            again = self.fn().numpy()
        gradients = self.differentiate() if self.gradients else {}
        if not (_close(again, self.output) and all(_close(g, self.gradients[n]) for n, g in gradients.items())):
            raise ConfigError(
                "the function to check gives another result each time it is called with the same arguments",
                "take the randomness out: module.eval(), or the same random key in every call; and let it keep no "
                "state from call to call",
            )

    def differentiate(self) -> dict[str, np.ndarray]:
        """Return the gradient of s in every leaf."""
        gradients = grad_or_zeros(self.fn(), list(self.leaves.values()), self.weights[0])
        return {name: g.numpy() for name, g in zip(self.leaves, gradients, strict=True)}

    def terms(self) -> np.ndarray:
        """Return the terms of s, with the leaves as they are now."""
        with no_grad():
            return np.ravel(self.fn().data * self.weights[0])

    def moved(self, steps: Mapping[Tensor, np.ndarray]) -> np.ndarray:
        """Return the terms of s with some leaves moved, each by its step."""
        with holding({x: np.asarray(x.data + step) for x, step in steps.items()}), np.errstate(all="ignore"):
            return self.terms()


class SecondOrder(FirstOrder):
    """Order 2: the scalar s = Σ u · gradient, for random u, as a function of the leaves and of the cotangent."""

    order = 2

    def __init__(self, fn: Callable[[], Tensor], leaves: Mapping[str, Tensor], key: Key) -> None:
        super().__init__(fn, leaves, key)
        output = float(np.abs(self.output * self.seed.numpy()).sum())
        self.least = max(output / size for x in self.inner for _, size in alike(x.numpy()))
        self.size = max(self.size, self.least)

    def prepare(self, output: Tensor, key: Key) -> None:
        """Draw the weights, and make the cotangent a leaf."""
        self.inner = list(self.leaves.values())
        self.seed = tensor(normal(key.child(1), output.shape), requires_grad=True)
        self.weights = [normal(key.child(2).child(i), x.shape) for i, x in enumerate(self.inner)]
        self.leaves["the cotangent"] = self.seed

    def differentiate(self) -> dict[str, np.ndarray]:
        """Return the gradient of s in every leaf and in the cotangent."""
        output = self.fn()
        try:
            firsts = grad_or_zeros(output, self.inner, self.seed, create_graph=True)
        except GraphError as error:  # shown without the engine's walk back, which is none of the reader's business
            raise error.with_traceback(None) from error.__cause__
        s: Any = sum((g * w).sum() for g, w in zip(firsts, self.weights, strict=True))
        if not s.requires_grad:
            return {name: np.zeros(x.shape) for name, x in self.leaves.items()}
        gradients = grad_or_zeros(s, list(self.leaves.values()))
        return {name: g.numpy() for name, g in zip(self.leaves, gradients, strict=True)}

    def terms(self) -> np.ndarray:
        """Return the terms of s, with the leaves and the cotangent as they are now."""
        firsts = grad_or_zeros(self.fn(), self.inner, self.seed.data)
        return np.concatenate([np.ravel(g.data * w) for g, w in zip(firsts, self.weights, strict=True)])


# ---- moving leaves ---------------------------------------------------------------------------------------------------


def alike(x: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Return groups of entries of about the same size: (which entries, their mean size, 1 if all are zero)."""
    sizes = np.abs(x)
    some = sizes > 0.0
    if not some.any():
        return [(np.ones(x.shape, bool), 1.0)]
    logs = np.log10(sizes, out=np.full(x.shape, np.log10(sizes.max())), where=some)  # zeros go with the largest
    groups = (logs.max() - logs) // DECADES
    parts = [groups == g for g in np.unique(groups)]
    return [(part, max(float(sizes[part & some].mean()), SMALLEST)) for part in parts]


@contextlib.contextmanager
def holding(arrays: Mapping[Tensor, np.ndarray]) -> Iterator[None]:
    """Let these leaves hold other arrays meanwhile."""
    before = {x: x.data for x in arrays}
    try:
        for x, data in arrays.items():
            _put(x, data)
        yield
    finally:
        for x, data in before.items():
            _put(x, data)


def _put(x: Tensor, data: np.ndarray) -> None:
    x.data = data
    x.requires_grad = False  # a new leaf node, with the new dtype
    x.requires_grad = True


# ---- looking at results ----------------------------------------------------------------------------------------------


def check_finite(x: np.ndarray, what: str, remedy: str) -> None:
    """Raise NonFiniteError if there is a NaN or infinity in ``x``, and say where."""
    bad = np.flatnonzero(~np.isfinite(x))
    if bad.size:
        index = [int(i) for i in np.unravel_index(bad[0], x.shape)]
        raise NonFiniteError(
            f"{what} has {bad.size} of {x.size} entries that are NaN or infinite, the first at {index}: "
            f"{x.reshape(-1)[bad[0]]}",
            remedy,
        )


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two results of one computation are equal, but for the last bits."""
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= 1e-10 * np.abs(b).max(initial=0.0)))
