"""Gradient checking: is the gradient that the engine computes the derivative of the function that it ran?

Every argument is moved along a random direction and the change of the output, weighed with a random cotangent, is held
against the gradient: :mod:`minivit.autograd.derivative` says how the change is found.

The cotangent is random for a reason: seeded with ones, the true gradient of a softmax is zero, and so are many wrong
ones.

An error is relative to the derivative that is checked, never to a fixed number: a gradient of 1e-9 is checked as
sharply as one of 1e9. What rounding leaves in doubt is then measured, by other steps and by changes in the last bits of
all that goes in: an error that it explains is not blamed on the gradient, and does not pass either, unless the
derivative is zero to rounding.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minivit.autograd.derivative import DOUBT, EPSILON, TOLERANCE, Derivative, alike, holding
from minivit.autograd.graph import no_grad
from minivit.autograd.tensor import Tensor, tensor
from minivit.autograd.tensor import grad_or_zeros as grad
from minivit.backend import Key, is_array, normal, random_bits
from minivit.errors import ConfigError, DTypeError, GradientError, GraphError, NonFiniteError, UndecidedError

__tracebackhide__ = True  # pytest then ends its traceback at the line that called the check

ZERO = 1e-7
"""Rounding that leaves a derivative in doubt may be at most this much of the function's size over its argument's."""

ROUNDED = 100 * EPSILON
"""An error of this much of the function's size over its argument's is none: the gradient of a saturated softmax is a
difference of numbers near 1, and a few times 2⁻⁵³ off, where the complex step knows that it is e⁻³⁰⁰."""

NEAR = 1e-3
"""Up to here a very small argument may be moved to see what it changes: see ``_Part.usual``."""


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
    fn: Callable[..., Tensor],
    args: Sequence[Any],
    order: int = 2,
    method: str = "auto",
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
) -> GradientReport:
    """Check the gradient of ``fn`` in every floating argument; raise GradientError if one is wrong.

    ``fn`` takes Tensors and returns one Tensor of any shape. ``args`` are arrays, Tensors or other values; those that
    hold floating numbers are checked, as float64, the others are passed on as they are. ``order=2`` also checks the
    gradient of the gradient, in the arguments and in the cotangent. ``method`` is ``"complex"``, ``"central"`` or
    ``"auto"``: the complex step, and the central difference where ``fn`` turns out not to be analytic.

    A derivative along a random direction (standard normal, as is the cotangent) may be off by
    ``rtol·|derivative| + atol``. By default ``rtol`` is 1e-12 for the complex step and 1e-7 (order 2: 1e-6) for the
    central difference, and ``atol`` 0.

    Raises GradientError where a gradient is wrong, UndecidedError where rounding hides whether it is, NonFiniteError
    for NaN or infinity, ConfigError for a function that does not repeat itself, GraphError for a gradient that cannot
    be differentiated again.
    """
    leaves: dict[str, Tensor] = {}
    values, names = list(args), _argument_names(fn, len(args))
    for i, a in enumerate(args):
        data = a.data if isinstance(a, Tensor) else a
        if isinstance(data, float) or (is_array(data) and data.dtype.kind == "f"):
            values[i] = leaves[names[i]] = tensor(np.array(data, np.float64), requires_grad=True)
    if not leaves:
        raise GraphError("check_grads: no argument holds floating numbers", "pass float arrays")
    return _check(lambda: fn(*values), leaves, order, method, seed, rtol, atol)


def check_module(
    module: Any,
    *inputs: Any,
    order: int = 1,
    method: str = "auto",
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
) -> GradientReport:
    """Check the gradient of ``module(*inputs)`` in every unfrozen parameter; raise GradientError if one is wrong.

    The module must be float64 (``module.to(np.float64)``) and must give equal outputs for equal inputs: call
    ``eval()``, or fix the random key inside. Parameters that are all zero, like a fresh head, hide what lies before
    them: give them other values first. Settings and errors are those of :func:`check_grads`.
    """
    leaves = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not leaves:
        raise GraphError("check_module: no parameter requires a gradient", "unfreeze one: p.requires_grad = True")
    for name, p in leaves.items():
        if p.dtype != np.float64:
            raise DTypeError(f"check_module: {name} is {p.dtype}", "check in float64: module.to(np.float64)")
    return _check(lambda: module(*inputs), leaves, order, method, seed, rtol, atol)


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
    fn: Callable[[], Tensor],
    leaves: Mapping[str, Tensor],
    order: int,
    method: str,
    seed: int,
    rtol: float | None,
    atol: float | None,
) -> GradientReport:
    report = GradientReport()
    for problem, leaf, check in judged(fn, leaves, order, method, seed, rtol, atol):
        report.checks.append(check)
        if not check.passed:
            problem.check_repeats()  # blame nobody for a function that changes from call to call
            raise GradientError(
                f"wrong gradient of order {check.order} for {check.name} {leaf.shape}: along a random direction it "
                f"gives {check.analytic:.12g}, the {check.method} step {check.numeric:.12g} "
                f"(relative error {check.error:.1e}, allowed {check.tolerance:.0e}); {problem.locate(leaf, check)}",
                "mend the gradient under that operation's forward; to narrow it down, check its parts alone",
            )
    return report


def judged(
    fn: Callable[[], Tensor],
    leaves: Mapping[str, Tensor],
    order: int = 2,
    method: str = "auto",
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
) -> Iterator[tuple[_First, Tensor, Check]]:
    """Yield (what is differentiated, the argument, its check) for every order and argument, passed or not."""
    if method not in ("auto", "complex", "central") or order not in (1, 2):
        raise ConfigError(f"method={method!r}, order={order}", "method is auto, complex or central; order 1 or 2")
    for name, value in {"rtol": rtol, "atol": atol}.items():
        if value is not None and not 0.0 <= value < math.inf:
            raise ConfigError(f"{name}={value!r}", f"{name} is a number from 0 up, or None for the built-in tolerance")
    for name, leaf in leaves.items():
        _finite(leaf.numpy(), f"the argument {name}", "check at finite numbers")
    key = Key(seed, stream=0xC4EC)
    for k in range(1, order + 1):
        problem = _First(fn, leaves, key) if k == 1 else _Second(fn, leaves, key)
        for i, (name, leaf) in enumerate(problem.leaves.items()):
            direction = normal(key.child(1000 + i), leaf.shape)
            try:
                check = problem.check(name, direction, method, rtol, atol or 0.0)
            except UndecidedError:
                problem.check_repeats()
                raise
            yield problem, leaf, check


class _First:
    """Order 1: the scalar s = Σ weight · fn() and its gradient in every leaf."""

    order = 1

    def __init__(self, fn: Callable[[], Tensor], leaves: Mapping[str, Tensor], key: Key) -> None:
        self.fn, self.leaves = fn, dict(leaves)
        with np.errstate(all="ignore"):  # what is not finite is said below
            output = fn()
        if not isinstance(output, Tensor):
            raise GraphError(f"the function to check returned {type(output).__name__}", "return one Tensor")
        _finite(output.numpy(), "the output of the function to check", "choose arguments at which it is finite")
        self.output = output.numpy()
        self.gradients: dict[str, np.ndarray] = {}
        self.check_repeats()
        self.prepare(output, key)
        with np.errstate(all="ignore"):
            self.gradients = self.differentiate()
        for name, g in self.gradients.items():
            _finite(
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
        gradients = grad(self.fn(), list(self.leaves.values()), self.weights[0])
        return {name: g.numpy() for name, g in zip(self.leaves, gradients, strict=True)}

    def terms(self) -> np.ndarray:
        """Return the terms of s, with the leaves as they are now."""
        with no_grad():
            return np.ravel(self.fn().data * self.weights[0])

    # ---- the verdict ----

    def check(self, name: str, direction: np.ndarray, method: str, rtol: float | None, atol: float) -> Check:
        """Return the check of one leaf along ``direction``: the worst, if its entries are of very different sizes."""
        leaf = self.leaves[name].numpy()
        whole = float(np.abs(self.gradients[name] * direction).sum())
        parts = [_Part(self, name, direction * entries, size, self.gradients[name]) for entries, size in alike(leaf)]
        if method != "central" and not all(part.takes_complex(method) for part in parts):
            method = "central"
        checks = [part.judge(method, rtol, atol, whole) for part in parts]
        return max(checks, key=lambda c: (not c.passed, c.error))

    def moved(self, leaf: Tensor, step: np.ndarray) -> np.ndarray:
        """Return the terms of s with one leaf moved by ``step``."""
        with holding({leaf: np.asarray(leaf.data + step)}), np.errstate(all="ignore"):
            return self.terms()

    def locate(self, leaf: Tensor, check: Check) -> str:
        """Name the entry of the gradient that is farthest off (of 256 entries, if there are more)."""
        some = np.arange(leaf.size)
        if leaf.size > 256:
            some = np.unique(random_bits(Key(0), (256,)) % leaf.size)
        worst, text = -1.0, ""
        for entries, size in alike(leaf.numpy()):
            step = None
            for i in some[entries.reshape(-1)[some]]:
                unit = np.zeros(leaf.shape)
                unit.reshape(-1)[i] = 1.0
                part = _Part(self, check.name, unit, size, self.gradients[check.name])
                numeric = part.stepped if check.method == "complex" else None
                if check.method == "central":
                    step = part.best()[2] if step is None else step  # what is best for one is good for the others
                    numeric = part.values[step] if part.compute(step) else None
                numeric = math.nan if numeric is None else numeric
                off = abs(part.analytic - numeric)
                if not off <= worst:
                    index = tuple(int(j) for j in np.unravel_index(i, leaf.shape))
                    worst, text = off, f"worst entry {list(index)}: {part.analytic:.12g}, should be {numeric:.12g}"
        return text


class _Second(_First):
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
            firsts = grad(output, self.inner, self.seed, create_graph=True)
        except GraphError as error:  # shown without the engine's walk back, which is none of the reader's business
            raise error.with_traceback(None) from error.__cause__
        s: Any = sum((g * w).sum() for g, w in zip(firsts, self.weights, strict=True))
        if not s.requires_grad:
            return {name: np.zeros(x.shape) for name, x in self.leaves.items()}
        gradients = grad(s, list(self.leaves.values()))
        return {name: g.numpy() for name, g in zip(self.leaves, gradients, strict=True)}

    def terms(self) -> np.ndarray:
        """Return the terms of s, with the leaves and the cotangent as they are now."""
        firsts = grad(self.fn(), self.inner, self.seed.data)
        return np.concatenate([np.ravel(g.data * w) for g, w in zip(firsts, self.weights, strict=True)])


# ---- the verdict -----------------------------------------------------------------------------------------------------


class _Part(Derivative):
    """Entries of one leaf that move together: whether their gradient is right."""

    scalar: _First

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
        allowed = TOLERANCE[how, self.scalar.order] if rtol is None else rtol

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
        if 0.0 < excess <= ROUNDED * (usual := self.usual()):
            return result(numeric, usual)
        if may_be_zero and (usual := self.usual_if_zero(how, numeric, noise)):
            check = result(numeric, usual)
            if check.passed:
                return check
        if method == "auto" and self.is_analytic is None:
            return self.judge("central", rtol, atol, whole, may_be_zero=False)  # the complex step alone proves no fault
        if how == "complex":
            finest = TOLERANCE["central", self.scalar.order]
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

    def usual(self) -> float:
        """Return the size of what these entries change in s, over the distance on which they do.

        It is what a derivative usually is like. The distance is their own size or, where these entries are so small
        that the function hardly sees them, like exp(1e-12), up to ``NEAR``.

        What they change is seen at other arguments, because here a saturated function may change nothing.
        """
        changed = np.zeros(self.here.shape, bool)
        for scale in (1e-3, 1.0):
            moved = {
                x: np.asarray(scale * (np.abs(x.data).mean() or 1.0) * normal(Key(i, stream=0x0FF), x.shape))
                for i, x in enumerate(self.scalar.leaves.values())
            }
            try:
                with holding(moved):
                    steps = (0.0 * self.direction, scale * self.size * self.direction)
                    before, after = (self.scalar.moved(self.leaf, step) for step in steps)
                changed |= before != after  # NaN, too
            except (ArithmeticError, ValueError):  # the function refuses these arguments, or returns another shape
                changed[:] = True
        size, distance = float(np.abs(self.here).sum(where=changed)), self.size
        while distance < NEAR:
            try:
                further = self.scalar.moved(self.leaf, distance * self.direction)
            except (ArithmeticError, ValueError):  # the function refuses what lies so far away
                break
            if further.shape != changed.shape or not np.abs(further - self.here).sum(where=changed) < 0.1 * size:
                break
            distance *= 10.0
        return max(size, self.scalar.least) / distance

    def usual_if_zero(self, how: str, numeric: float, noise: float) -> float:
        """Return the size that a derivative usually has here if both derivatives are zero beside it, else 0.

        They are if rounding made them: they are small beside that of a function of this size with an argument of this
        size, and, if not 0, a change of the 6th digit of what goes in makes other numbers of them. A derivative that is
        only small keeps its first digits then.
        """
        try:
            around = float(np.abs(self.scalar.moved(self.leaf, self.size * self.direction)).sum())
        except (ArithmeticError, ValueError):  # the function refuses what lies so far away
            around = math.nan
        usual = max(self.scalar.size, around if math.isfinite(around) else 0.0) / self.size
        if max(self.terms, abs(numeric)) > ZERO * usual:
            return 0.0
        own, of_step = self.shaken(1e-6, how)
        made = self.terms <= DOUBT * own and abs(self.analytic - numeric) <= DOUBT * (own + of_step + noise)
        return usual if made else 0.0

    def shaken(self, by: float, how: str, excess: float = 0.0) -> tuple[float, float]:
        """Return how much the gradient's derivative, and the complex step's, change if all that goes in does ``by``.

        Of five changes the largest; of one, if that leaves no doubt about an ``excess``.
        """
        own = of_step = 0.0
        scalar, weights = self.scalar, self.scalar.weights
        for j in range(5):
            key = Key(j, stream=0x0B17)
            moved = {x: _nudged(x.data, by, key.child(i)) for i, x in enumerate(scalar.leaves.values())}
            scalar.weights = [_nudged(w, by, key.child(1000 + i)) for i, w in enumerate(weights)]
            direction = _nudged(self.direction, by, key.child(2000))
            with holding(moved):
                again = Derivative(scalar, self.name, direction, self.size, scalar.differentiate()[self.name])
                own = max(own, abs(again.analytic - self.analytic))
                if how == "complex" and again.stepped is not None and self.stepped is not None:
                    of_step = max(of_step, abs(again.stepped - self.stepped))
            scalar.weights = weights
            if excess > 1e3 * DOUBT * (own + of_step):
                break
        return own, of_step

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


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _nudged(x: np.ndarray, by: float, key: Key) -> np.ndarray:
    """Return ``x`` with a random relative change of each entry, some 2 · ``by``."""
    return np.asarray(x * (1.0 + 2.0 * by * normal(key, x.shape)))


def _finite(x: np.ndarray, what: str, remedy: str) -> None:
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


def _up(x: float) -> str:
    """Return a power of ten, not less than ``x``."""
    return f"1e{math.ceil(math.log10(x))}" if x > 0.0 else "0"
