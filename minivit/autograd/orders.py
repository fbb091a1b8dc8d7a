"""What a gradient check differentiates: a number s made of the function's output, and the gradient of s.

At order 1 s is the output, weighed with a random cotangent; at each order above it is the gradient of the order below,
weighed with random numbers. The cotangent is random for a reason: seeded with ones, the true gradient of a softmax is
zero, and so are many wrong ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from minivit.autograd.graph import no_grad
from minivit.autograd.tensor import Tensor, grad, grad_or_zeros, tensor
from minivit.backend import Key, normal
from minivit.errors import ConfigError, GraphError, NonFiniteError

__tracebackhide__ = True  # pytest then ends its traceback at the line that called the check

DECADES = 6
"""Entries of an argument whose sizes lie more decades apart are moved apart, each group by steps of its own size."""

BESIDE = 0x0FF
"""The stream of the keys by which other arguments are drawn."""

SMALLEST = 1e-270  # of an argument: its complex step must be a number


class Scalar:
    """Order 1: the scalar s = Σ weight · fn() and its gradient in every leaf."""

    order = 1
    least = 0.0  # of a higher order: the size that gradients usually have for such an output
    function = backward_function = "the function to check"  # what errors call the two
    steadier = "module.eval(), or the same random key in every call"
    remedy = "mend the gradient under that operation's forward; to narrow it down, check its parts alone"

    def __init__(self, fn: Callable[[], Tensor], leaves: Mapping[str, Tensor], key: Key) -> None:
        self.fn, self.leaves = fn, dict(leaves)
        with np.errstate(all="ignore"):  # what is not finite is said below
            output = fn()
        if not isinstance(output, Tensor):
            raise GraphError(f"the function to check returned {type(output).__name__}", "return one Tensor")
        self.begin([output.numpy()], [key.child(1)])

    def begin(self, found: Sequence[np.ndarray], keys: Sequence[Key]) -> None:
        """Weigh what was ``found``, with numbers drawn by the keys; have the gradient of that, and s term by term."""
        for values in found:
            check_finite(values, f"the output of {self.function}", "choose arguments at which it is finite")
        self.found = found
        self.gradients: dict[str, np.ndarray] = {}
        self.check_repeats()
        self.weights = [self.weight(key, values) for key, values in zip(keys, found, strict=True)]
        with np.errstate(all="ignore"):
            self.gradients = self.differentiate()
            self.here = self.terms()
        for name, g in self.gradients.items():
            check_finite(
                g,
                f"the function is finite, but its gradient of order {self.order} for {name}",
                "keep away from points where there is no derivative (√x at 0), or mend the gradient",
            )
        self.size = max(float(np.abs(self.here).sum()), self.least)  # the size that s has

    def weight(self, key: Key, values: np.ndarray) -> np.ndarray:
        """Draw the weights of such values."""
        return normal(key, values.shape)

    def check_repeats(self) -> None:
        """Raise unless the function, and its gradient if known, come out as before (but for the last bits)."""
        with np.errstate(all="ignore"):
            again = self.values()
            gradients = self.differentiate() if self.gradients else {}
        same = len(again) == len(self.found) and all(map(close, again, self.found))
        if not (same and all(close(g, self.gradients[n]) for n, g in gradients.items())):
            raise ConfigError(
                f"{self.backward_function if same else self.function} gives another result each time it is called with "
                "the same arguments",
                f"take the randomness out: {self.steadier}; and let it keep no state from call to call",
            )

    def values(self) -> Sequence[np.ndarray]:
        """Return what s weighs, the output, with the leaves as they are now."""
        with no_grad():
            return [self.fn().numpy()]

    def terms(self) -> np.ndarray:
        """Return the terms of s, with the leaves as they are now."""
        return np.concatenate([np.ravel(v * w) for v, w in zip(self.values(), self.weights, strict=True)])

    def gradient(self, weights: Sequence[Any], create_graph: bool = False) -> tuple[Tensor, ...]:
        """Return the gradient of s in every leaf, with these weights."""
        return grad_or_zeros(self.fn(), list(self.leaves.values()), weights[0], create_graph)

    def differentiate(self) -> dict[str, np.ndarray]:
        """Return the gradient of s in every leaf, by name."""
        return {name: g.numpy() for name, g in zip(self.leaves, self.gradient(self.weights), strict=True)}

    def unreached(self) -> list[str]:
        """Return the names of the leaves to which no graph leads from the output."""
        found = grad(self.fn(), list(self.leaves.values()), self.weights[0], allow_unused=True)
        return [name for name, g in zip(self.leaves, found, strict=True) if g is None]

    def hints(self, name: str) -> list[str]:
        """Return what may explain a wrong gradient for ``name``."""
        if name not in self.unreached():
            return []
        return [f"no graph leads to {name}: look for detach(), no_grad, .data or .numpy() on its way"]

    def moved(self, steps: Mapping[Tensor, np.ndarray]) -> np.ndarray:
        """Return the terms of s with some leaves moved, each by its step."""
        with holding({x: np.asarray(x.data + step) for x, step in steps.items()}), np.errstate(all="ignore"):
            return self.terms()


class Derived(Scalar):
    """An order n > 1: the scalar s = Σ u · ∇(the s of order n-1), for random u, and its gradient.

    The weights of the order below, which were constants there, are leaves here: the cotangent at order 2, and at each
    order above the directions along which the order below was taken.
    """

    def __init__(self, below: Scalar, key: Key) -> None:
        self.below, self.order = below, below.order + 1
        self.seeds = [tensor(w, requires_grad=True) for w in below.weights]
        names = ["the cotangent"]
        if isinstance(below, Derived):
            names = [f"the direction of {name}, order {below.order}" for name in below.below.leaves]
        self.leaves = {**below.leaves, **dict(zip(names, self.seeds, strict=True))}
        self.least = max(below.size / size for x in below.leaves.values() for _, size in alike(x.numpy()))
        self.begin(list(below.gradients.values()), [key.child(self.order).child(i) for i in range(len(below.leaves))])

    def values(self) -> Sequence[np.ndarray]:
        """Return what s weighs, the gradients of the order below, with the leaves as they are now."""
        return [g.data for g in self.below.gradient(self.seeds)]

    def gradient(self, weights: Sequence[Any], create_graph: bool = False) -> tuple[Tensor, ...]:
        """Return the gradient of s in every leaf, with these weights."""
        try:
            firsts = self.below.gradient(self.seeds, create_graph=True)
        except GraphError as error:  # shown without the engine's walk back, which is none of the reader's business
            raise error.with_traceback(None) from error.__cause__
        s: Any = sum((g * w).sum() for g, w in zip(firsts, weights, strict=True))
        leaves = list(self.leaves.values())
        if not s.requires_grad:
            return tuple(Tensor(np.zeros(x.shape, x.dtype)) for x in leaves)
        return grad_or_zeros(s, leaves, create_graph=create_graph)

    def unreached(self) -> list[str]:
        """Return no names: what is linear in an argument leaves nothing to differentiate, and may."""
        return []


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


def nearby(leaves: Iterable[Tensor], by: float) -> dict[Tensor, np.ndarray]:
    """Return other arrays for these leaves, each entry changed by about ``by`` of its size (a zero: of the largest)."""
    moved = {}
    for i, x in enumerate(leaves):
        sizes = np.abs(x.data) + np.where(x.data == 0.0, np.abs(x.data).max(initial=0.0) or 1.0, 0.0)
        moved[x] = np.asarray(x.data + by * sizes * normal(Key(i, stream=BESIDE), x.shape))
    return moved


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


def close(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two results of one computation are equal, but for the last bits."""
    return a.shape == b.shape and bool(np.all(np.abs(a - b) <= 1e-10 * np.abs(b).max(initial=0.0)))
