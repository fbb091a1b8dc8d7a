"""Gradient checking: is the gradient that the engine computes the derivative of the function that it ran?

Every argument is moved along a random direction, and the change of the output is held against the gradient:
:mod:`minivit.autograd.orders` has what is differentiated, :mod:`minivit.autograd.derivative` how the change is found,
:mod:`minivit.autograd.judge` the verdict, :mod:`minivit.autograd.locate` the worst entry. Gradients written by hand in
NumPy are checked in the same way: :mod:`minivit.autograd.handwritten`.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import numpy as np

from minivit.autograd.derivative import confirm_together
from minivit.autograd.judge import Check, judged_parts, parts_of
from minivit.autograd.locate import locate
from minivit.autograd.orders import Derived, Scalar, check_finite
from minivit.autograd.tensor import Tensor, tensor
from minivit.backend import Key, is_array, is_floating, normal
from minivit.errors import ConfigError, DTypeError, GradientError, GraphError, NonFiniteError, UndecidedError

__all__ = ["Check", "GradientReport", "check_grads", "check_module", "judged"]

__tracebackhide__ = True  # as in orders.py

STREAM = 0xC4EC
"""The stream of the keys that directions and cotangents are drawn by."""


@dataclass
class GradientReport:
    """The results of a check. ``str(report)`` says in short what is right, and shows what is not; ``table()`` all."""

    checks: list[Check] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    """Names of the arguments to which no graph leads from the output, which does not depend on them."""
    frozen: list[str] = field(default_factory=list)
    """Names of a module's parameters that require no gradient, and have none to check."""

    @property
    def worst(self) -> Check:
        """The check that came nearest to its tolerance, or went farthest over it."""
        return max(self.checks, key=lambda c: np.inf if np.isnan(c.error) else c.error / max(c.tolerance, 5e-324))

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(c.passed for c in self.checks)

    def table(self) -> str:
        """Return a table with a row for every check."""
        return _table(self.checks)

    def __str__(self) -> str:
        if not self.passed:
            return _table([c for c in self.checks if not c.passed])
        worst, first = self.worst, [c for c in self.checks if c.order == 1]
        order = max(c.order for c in self.checks)
        lines = [
            f"{_listed([c.name for c in first])}: right{f' to order {order}' if order > 1 else ''}, "
            f"worst relative error {worst.error:.1e} ({worst.name}, order {worst.order}, {worst.method} step)"
        ]
        if self.unreached:
            lines.append(f"  the output does not depend on {_listed(self.unreached)}: nothing was checked there")
        if self.frozen:
            lines.append(f"  frozen, and not checked: {_listed(self.frozen)}")
        if hidden := [c.name for c in first if c.analytic == c.numeric == 0.0 and c.name not in self.unreached]:
            lines.append(f"  the gradient for {_listed(hidden)} is 0 throughout: cut off, or hidden behind zeros?")
        return "\n".join(lines)


def _table(checks: Sequence[Check]) -> str:
    width = max(len(c.name) for c in checks)
    head = f"{'argument':{width}}  order  method   relative error  tolerance"
    rows = [
        f"{c.name:{width}}  {c.order:5d}  {c.method:7}  {c.error:14.1e}  {c.tolerance:9.0e}"
        + ("" if c.passed else "  WRONG")
        for c in checks
    ]
    return "\n".join([head, *rows])


def _listed(names: Sequence[str]) -> str:
    """Return the names, or the first few of many."""
    return ", ".join(names) if len(names) <= 8 else f"{', '.join(names[:5])} and {len(names) - 5} more"


@dataclass(frozen=True)
class Settings:
    """How gradients are held against numerical ones: see :func:`check_grads`."""

    method: str = "auto"
    seed: int = 0
    rtol: float | None = None
    atol: float | None = None

    def __post_init__(self) -> None:
        if self.method not in ("auto", "complex", "central"):
            raise ConfigError(f"method={self.method!r}", "method is auto, complex or central")
        for name, value in {"rtol": self.rtol, "atol": self.atol}.items():
            if value is not None and not 0.0 <= value < math.inf:
                remedy = f"{name} is a number from 0 up, or None for the built-in tolerance"
                raise ConfigError(f"{name}={value!r}", remedy)


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
    gradient of the gradient, in the arguments and in the cotangent; ``order=3`` the gradient of that, in the directions
    of the second order too; and so on, without end, each order some three times as costly as the one below.

    ``method`` is ``"complex"``, ``"central"`` or ``"auto"``: the complex step, and the central difference where ``fn``
    turns out not to be analytic. A derivative along a random direction (standard normal, as is the cotangent) may be
    off by ``rtol·|derivative| + atol``. By default ``rtol`` is 1e-12 for the complex step and 1e-7 (from order 2:
    1e-6) for the central difference, and ``atol`` 0.

    Raises GradientError where a gradient is wrong, UndecidedError where rounding hides whether it is, NonFiniteError
    for NaN or infinity, ConfigError for a function that does not repeat itself, GraphError for a gradient that cannot
    be differentiated again.
    """
    settings = Settings(method, seed, rtol, atol)
    leaves: dict[str, Tensor] = {}
    values = listed(args, "check_grads")
    names = argument_names(fn, len(values))
    for i, a in enumerate(values):
        if is_checked(a):
            values[i] = leaves[names[i]] = leaf_of(a)
    if not leaves:
        raise GraphError("check_grads: no argument holds floating numbers", "pass float arrays")
    return passed(scalars(lambda: fn(*values), leaves, order, seed), settings)


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
    them: give them other values first. Settings and errors are those of :func:`check_grads`; GraphError also for
    parameters that the output does not depend on, which no training would ever change.
    """
    settings = Settings(method, seed, rtol, atol)
    parameters = dict(module.named_parameters())
    leaves = {name: p for name, p in parameters.items() if p.requires_grad}
    if not leaves:
        raise GraphError("check_module: no parameter requires a gradient", "unfreeze one: p.requires_grad = True")
    for name, p in leaves.items():
        if p.dtype != np.float64:
            raise DTypeError(f"check_module: {name} is {p.dtype}", "check in float64: module.to(np.float64)")
    report = passed(scalars(lambda: module(*inputs), leaves, order, seed), settings)
    report.frozen = [name for name in parameters if name not in leaves]
    if report.unreached:
        raise GraphError(
            f"check_module: the output does not depend on {len(report.unreached)} of {len(leaves)} parameters: "
            f"{_listed(report.unreached)}",
            "use them in the forward pass; if it is meant to be so, freeze them: p.requires_grad = False",
        )
    return report


def argument_names(fn: Callable[..., Any], count: int) -> list[str]:
    """Return the names of ``fn``'s first ``count`` arguments; "argument i" for those without."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # a function written in C may have no signature
        parameters = {}.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][:count]
    return names + [f"argument {i}" for i in range(len(names), count)]


def is_checked(argument: Any) -> bool:
    """Return whether an argument holds real floating numbers, whose gradient is checked."""
    data = argument.data if isinstance(argument, Tensor) else argument
    if isinstance(data, np.generic):
        data = np.asarray(data)
    return isinstance(data, float) or (is_array(data) and is_floating(data.dtype) and data.dtype.kind != "c")


def leaf_of(argument: Any) -> Tensor:
    """Return a leaf of an argument's numbers, as float64."""
    data = argument.data if isinstance(argument, Tensor) else argument
    if isinstance(data, np.matrix | np.ma.MaskedArray):
        raise DTypeError(f"an argument is a {type(data).__name__}, with arithmetic of its own", "pass a plain array")
    return tensor(np.array(data, np.float64), requires_grad=True)


def listed(args: Any, what: str) -> list[Any]:
    """Return the arguments as a list; raise ConfigError for an array in the place of a list of arrays."""
    if isinstance(args, np.ndarray | Tensor):
        raise ConfigError(f"{what}: args is an array, whose rows would be the arguments", "pass a list: [x]")
    return list(args)


# ---- one check -------------------------------------------------------------------------------------------------------


def passed(scalars: Iterable[Scalar], settings: Settings) -> GradientReport:
    """Return the report of checks that all passed; raise GradientError for those of an order that did not."""
    report = GradientReport()
    for scalar in scalars:
        checks: list[Check] = []
        try:
            for check in checks_of(scalar, settings):
                checks.append(check)
        except (UndecidedError, NonFiniteError):
            if all(c.passed for c in checks):
                raise
        if wrong := [c for c in checks if not c.passed]:
            scalar.check_repeats()  # blame nobody for a function that changes from call to call
            raise _wrong(scalar, wrong, [c.name for c in checks if c.passed])
        report.checks += checks
        report.unreached += scalar.unreached()
    return report


def _wrong(scalar: Scalar, wrong: list[Check], right: Sequence[str]) -> GradientError:
    """Return the error that tells of wrong gradients, the first of them in full; raise if only kinks make them so."""
    check, *others = wrong
    try:
        entry = locate(scalar, check)
    except UndecidedError:
        if not others:
            raise
        return _wrong(scalar, others, right)
    lines = [
        f"wrong gradient of order {check.order} for {check.name} {scalar.leaves[check.name].shape}: "
        f"relative error {check.error:.1e}, allowed {check.tolerance:.0e}",
        f"along a random direction it gives {check.analytic:.12g}, the {check.method} step {check.numeric:.12g}",
        *([entry] if entry else []),
        *scalar.hints(check.name),
    ]
    if others:
        lines.append(f"also wrong: {_listed([f'{c.name} ({c.error:.1e})' for c in others])}")
    if right:
        lines.append(f"right: {_listed(right)}")
    return GradientError("\n  ".join(lines), scalar.remedy)


def judged(fn: Callable[[], Tensor], leaves: Mapping[str, Tensor], order: int = 2, **settings: Any) -> Iterator[Check]:
    """Yield the check of every order and argument, passed or not."""
    how = Settings(**settings)
    return itertools.chain.from_iterable(checks_of(scalar, how) for scalar in scalars(fn, leaves, order, how.seed))


def scalars(fn: Callable[[], Tensor], leaves: Mapping[str, Tensor], order: int, seed: int) -> Iterator[Scalar]:
    """Yield what is differentiated at each order up to ``order``."""
    if isinstance(order, bool) or not isinstance(order, Integral) or order < 1:
        raise ConfigError(f"order={order!r}", "the order of a gradient is a whole number from 1 up")
    finite(leaves)
    scalar = Scalar(fn, leaves, Key(seed, STREAM))
    yield scalar
    for _ in range(1, order):
        scalar = Derived(scalar, Key(seed, STREAM))
        yield scalar


def finite(leaves: Mapping[str, Tensor]) -> None:
    """Raise NonFiniteError for arguments that are not finite."""
    for name, leaf in leaves.items():
        check_finite(leaf.numpy(), f"the argument {name}", "check at finite numbers")


def checks_of(scalar: Scalar, settings: Settings) -> Iterator[Check]:
    """Yield the check of every argument of one order, passed or not."""
    key = Key(settings.seed, STREAM)
    parts = {
        name: parts_of(scalar, name, normal(key.child(1000 + i), leaf.shape))
        for i, (name, leaf) in enumerate(scalar.leaves.items())
    }
    if settings.method != "central":
        confirm_together(list(itertools.chain(*parts.values())))
    for name in scalar.leaves:
        try:
            check = judged_parts(parts[name], settings.method, settings.rtol, settings.atol or 0.0)
        except UndecidedError:
            scalar.check_repeats()
            raise
        yield check
