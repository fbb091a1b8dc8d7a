"""Gradient checking: is the gradient that the engine computes the derivative of the function that it ran?

Every argument is moved along a random direction and the change of the output, weighed with a random cotangent, is held
against the gradient. Where the function is analytic the derivative comes from a complex step, f(x + ih·v) with
h = 1e-20: nothing is subtracted, so it is exact to the last bits (Squire and Trapp 1998, "Using complex variables to
estimate derivatives of real functions", SIAM Review 40(1)). Elsewhere it comes from a central difference.

The cotangent is random for a reason: seeded with ones, the true gradient of a softmax is zero, and so are many wrong
ones.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minivit.autograd.graph import no_grad
from minivit.autograd.tensor import Tensor, tensor
from minivit.autograd.tensor import grad_or_zeros as grad
from minivit.backend import Key, is_array, normal, random_bits
from minivit.errors import ConfigError, DTypeError, GradientError, GraphError

COMPLEX_STEP = 1e-20
DIFFERENCE_STEP = 1e-5
TOLERANCE = {("complex", 1): 1e-12, ("complex", 2): 1e-12, ("central", 1): 1e-7, ("central", 2): 1e-6}
"""Largest relative error allowed, by method and order."""


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


@dataclass
class GradientReport:
    """The results of a check; ``str(report)`` is a table."""

    checks: list[Check] = field(default_factory=list)

    @property
    def worst(self) -> Check:
        """The check that came nearest to its tolerance, or went farthest over it."""
        return max(self.checks, key=lambda c: np.inf if np.isnan(c.error) else c.error / c.tolerance)

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(c.passed for c in self.checks)

    def __str__(self) -> str:
        width = max(len(c.name) for c in self.checks)
        head = f"{'argument':{width}}  order  method   relative error  tolerance"
        rows = [
            f"{c.name:{width}}  {c.order:5d}  {c.method:7}  {c.error:14.1e}  {c.tolerance:9.0e}"
            + ("" if c.passed else "  WRONG")
            for c in self.checks
        ]
        return "\n".join([head, *rows])


def check_grads(
    fn: Callable[..., Tensor], args: Sequence[Any], order: int = 2, method: str = "auto", seed: int = 0
) -> GradientReport:
    """Check the gradient of ``fn`` in every floating argument; raise GradientError if one is wrong.

    ``fn`` takes Tensors and returns one Tensor of any shape. ``args`` are arrays, Tensors or other values; those that
    hold floating numbers are checked, as float64, the others are passed on as they are. ``order=2`` also checks the
    gradient of the gradient, in the arguments and in the cotangent. ``method`` is ``"complex"``, ``"central"`` or
    ``"auto"``: the complex step, and the central difference where ``fn`` turns out not to be analytic.
    """
    leaves: dict[str, Tensor] = {}
    values, names = list(args), _argument_names(fn, len(args))
    for i, a in enumerate(args):
        data = a.data if isinstance(a, Tensor) else a
        if isinstance(data, float) or (is_array(data) and data.dtype.kind == "f"):
            values[i] = leaves[names[i]] = tensor(np.array(data, np.float64), requires_grad=True)
    if not leaves:
        raise GraphError("check_grads: no argument holds floating numbers", "pass float arrays")
    return _check(lambda: fn(*values), leaves, order, method, seed)


def check_module(module: Any, *inputs: Any, order: int = 1, method: str = "auto", seed: int = 0) -> GradientReport:
    """Check the gradient of ``module(*inputs)`` in every unfrozen parameter; raise GradientError if one is wrong.

    The module must be float64 (``module.to(np.float64)``) and must give equal outputs for equal inputs: call
    ``eval()``, or fix the random key inside. Parameters that are all zero, like a fresh head, hide what lies before
    them: give them other values first.
    """
    leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not leaves:
        raise GraphError("check_module: no parameter requires a gradient", "unfreeze one: p.requires_grad = True")
    for name, p in leaves.items():
        if p.dtype != np.float64:
            raise DTypeError(f"check_module: {name} is {p.dtype}", "check in float64: module.to(np.float64)")
    return _check(lambda: module(*inputs), leaves, order, method, seed)


def _argument_names(fn: Callable[..., Any], count: int) -> list[str]:
    """Return the names of ``fn``'s first ``count`` arguments; "argument i" for those without."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a function written in C may have no signature
        parameters = {}.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    return names + [f"argument {i}" for i in range(len(names), count)]


# ---- one check -------------------------------------------------------------------------------------------------------


def _check(
    fn: Callable[[], Tensor], leaves: Mapping[str, Tensor], order: int, method: str, seed: int
) -> GradientReport:
    if method not in ("auto", "complex", "central") or order not in (1, 2):
        raise ConfigError(f"method={method!r}, order={order}", "method is auto, complex or central; order 1 or 2")
    key = Key(seed, stream=0xC4EC)
    report = GradientReport()
    for k in range(1, order + 1):
        problem = _First(fn, leaves, key) if k == 1 else _Second(fn, leaves, key)
        for i, (name, leaf) in enumerate(problem.leaves.items()):
            direction = normal(key.child(1000 + i), leaf.shape)
            check = problem.check(name, leaf, direction, method)
            report.checks.append(check)
            if not check.passed:
                raise GradientError(
                    f"wrong gradient of order {k} for {name} {leaf.shape}: along a random direction it gives "
                    f"{check.analytic:.12g}, the {check.method} step {check.numeric:.12g} "
                    f"(relative error {check.error:.1e}, allowed {check.tolerance:.0e}); {problem.locate(leaf, check)}",
                    "mend the gradient under that operation's forward; to narrow it down, check its parts alone",
                )
    return report


class _First:
    """Order 1: the scalar s = Σ cotangent · fn() and its gradient in every leaf."""

    order = 1

    def __init__(self, fn: Callable[[], Tensor], leaves: Mapping[str, Tensor], key: Key) -> None:
        self.fn, self.leaves = fn, dict(leaves)
        output = fn()
        if not isinstance(output, Tensor):
            raise GraphError(f"the function to check returned {type(output).__name__}", "return one Tensor")
        self.cotangent = normal(key.child(1), output.shape)
        self.norm = float(np.linalg.norm(self.cotangent))
        self.gradients = self._gradients(output)

    def _gradients(self, output: Tensor) -> dict[str, np.ndarray]:
        return dict(zip(self.leaves, _values(grad(output, list(self.leaves.values()), self.cotangent)), strict=True))

    def scalar(self) -> complex:
        """Return s with the leaves as they are now."""
        with no_grad():
            return (self.fn().data * self.cotangent).sum()

    def check(self, name: str, leaf: Tensor, direction: np.ndarray, method: str) -> Check:
        """Return the check of one leaf along ``direction``."""
        products = self.gradients[name] * direction
        analytic = float(products.sum())
        # an error is relative to the sum's terms, not to a sum that may cancel, nor to a gradient that is truly zero
        floor = max(float(np.abs(products).sum()), 1e-3 * self.norm * float(np.linalg.norm(direction)), 1e-300)

        def result(numeric: float, how: str) -> Check:
            error = abs(analytic - numeric) / max(floor, abs(numeric))
            return Check(name, self.order, how, analytic, numeric, error, TOLERANCE[how, self.order])

        if method == "central":
            return result(self.central(leaf, direction), "central")
        numeric = self.complex(leaf, direction)
        exact = result(numeric, "complex") if numeric is not None else None
        if exact is not None and (exact.passed or method == "complex"):
            return exact
        if method == "complex":
            raise GradientError(f"{name}: the function cannot run on complex numbers", 'use method="central"')
        central = result(self.central(leaf, direction), "central")
        # the complex step's verdict stands, unless the difference shows that the function is not analytic
        agree = exact is not None and abs(exact.numeric - central.numeric) <= 1e-5 * max(floor, abs(central.numeric))
        return exact if agree and exact is not None else central

    def complex(self, leaf: Tensor, direction: np.ndarray) -> float | None:
        """Return ds/dh by a complex step, or None if the function cannot run on complex numbers."""
        with _Moved(self.leaves, leaf, 1j * COMPLEX_STEP * direction), warnings.catch_warnings():
            warnings.simplefilter("error", np.exceptions.ComplexWarning)  # an imaginary part thrown away
            try:
                return float(np.imag(self.scalar()) / COMPLEX_STEP)
            except (TypeError, np.exceptions.ComplexWarning):
                return None

    def central(self, leaf: Tensor, direction: np.ndarray) -> float:
        """Return ds/dh by a central difference."""
        with _Moved(self.leaves, leaf, DIFFERENCE_STEP * direction):
            up = self.scalar()
        with _Moved(self.leaves, leaf, -DIFFERENCE_STEP * direction):
            down = self.scalar()
        return float(np.real(up - down) / (2 * DIFFERENCE_STEP))

    def locate(self, leaf: Tensor, check: Check) -> str:
        """Name the entry of the gradient that is farthest off (of 256 entries, if there are more)."""
        name = next(n for n, x in self.leaves.items() if x is leaf)
        some = np.arange(leaf.size)
        if leaf.size > 256:
            some = np.unique(random_bits(Key(0), (256,)) % leaf.size)
        worst, text = -1.0, ""
        for i in some:
            unit = np.zeros(leaf.shape)
            unit.reshape(-1)[i] = 1.0
            numeric = self.complex(leaf, unit) if check.method == "complex" else self.central(leaf, unit)
            analytic = float(self.gradients[name].reshape(-1)[i])
            off = abs(analytic - (numeric if numeric is not None else np.nan))
            if not off <= worst:
                index = tuple(int(j) for j in np.unravel_index(i, leaf.shape))
                worst, text = off, f"worst entry {list(index)}: {analytic:.12g}, should be {numeric:.12g}"
        return text


class _Second(_First):
    """Order 2: the scalar s = Σ u · gradient, for random u, as a function of the leaves and of the cotangent."""

    order = 2

    def __init__(self, fn: Callable[[], Tensor], leaves: Mapping[str, Tensor], key: Key) -> None:
        self.inner = list(leaves.values())
        output = fn()
        self.seed = tensor(normal(key.child(1), output.shape), requires_grad=True)
        self.weights = [normal(key.child(2).child(i), x.shape) for i, x in enumerate(self.inner)]
        self.fn, self.leaves = fn, {**leaves, "the cotangent": self.seed}
        self.norm = float(np.sqrt(sum(float((w * w).sum()) for w in self.weights)))
        firsts = grad(output, self.inner, self.seed, create_graph=True)
        s: Any = sum((g * w).sum() for g, w in zip(firsts, self.weights, strict=True))
        if s.requires_grad:
            self.gradients = dict(zip(self.leaves, _values(grad(s, list(self.leaves.values()))), strict=True))
        else:
            self.gradients = {n: np.zeros(x.shape) for n, x in self.leaves.items()}

    def scalar(self) -> complex:
        """Return s with the leaves and the cotangent as they are now."""
        firsts = grad(self.fn(), self.inner, self.seed.data)
        return sum((g.data * w).sum() for g, w in zip(firsts, self.weights, strict=True))


class _Moved:
    """Holds one leaf moved by ``step``; if that is complex, all leaves are complex meanwhile."""

    def __init__(self, leaves: Mapping[str, Tensor], leaf: Tensor, step: np.ndarray) -> None:
        self.leaves, self.leaf, self.step = list(leaves.values()), leaf, np.asarray(step)

    def __enter__(self) -> None:
        self.before = [(x, x.data) for x in self.leaves]
        for x in self.leaves:
            self._set(x, x.data.astype(self.step.dtype) + (self.step if x is self.leaf else 0))

    def __exit__(self, *_: Any) -> None:
        for x, data in self.before:
            self._set(x, data)

    def _set(self, x: Tensor, data: np.ndarray) -> None:
        x.data = np.asarray(data)
        x.requires_grad = False  # a new leaf node, with the new dtype
        x.requires_grad = True


def _values(gradients: Sequence[Tensor]) -> list[np.ndarray]:
    return [g.numpy() for g in gradients]
