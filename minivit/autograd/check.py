"""Gradient checking: is the gradient that the engine computes the derivative of the function that it ran?

Every argument is moved along a random direction, and the change of the output is held against the gradient:
:mod:`minivit.autograd.orders` has what is differentiated, :mod:`minivit.autograd.derivative` how the change is found,
:mod:`minivit.autograd.judge` the verdict.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minivit.autograd.derivative import confirm_together
from minivit.autograd.judge import Check, judged_parts, locate, parts_of
from minivit.autograd.orders import FirstOrder, SecondOrder, check_finite
from minivit.autograd.tensor import Tensor, tensor
from minivit.backend import Key, is_array, is_floating, normal
from minivit.errors import ConfigError, DTypeError, GradientError, GraphError, UndecidedError

__all__ = ["Check", "GradientReport", "check_grads", "check_module", "judged"]

__tracebackhide__ = True  # as in orders.py


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
        if isinstance(data, float) or (is_array(data) and is_floating(data.dtype) and data.dtype.kind != "c"):
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
                f"(relative error {check.error:.1e}, allowed {check.tolerance:.0e}); {locate(problem, check)}",
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
) -> Iterator[tuple[FirstOrder, Tensor, Check]]:
    """Yield (what is differentiated, the argument, its check) for every order and argument, passed or not."""
    if method not in ("auto", "complex", "central") or order not in (1, 2):
        raise ConfigError(f"method={method!r}, order={order}", "method is auto, complex or central; order 1 or 2")
    for name, value in {"rtol": rtol, "atol": atol}.items():
        if value is not None and not 0.0 <= value < math.inf:
            raise ConfigError(f"{name}={value!r}", f"{name} is a number from 0 up, or None for the built-in tolerance")
    for name, leaf in leaves.items():
        check_finite(leaf.numpy(), f"the argument {name}", "check at finite numbers")
    key = Key(seed, stream=0xC4EC)
    for k in range(1, order + 1):
        problem = FirstOrder(fn, leaves, key) if k == 1 else SecondOrder(fn, leaves, key)
        parts = {
            name: parts_of(problem, name, normal(key.child(1000 + i), leaf.shape))
            for i, (name, leaf) in enumerate(problem.leaves.items())
        }
        if method != "central":
            confirm_together(list(itertools.chain(*parts.values())))
        for name, leaf in problem.leaves.items():
            try:
                check = judged_parts(parts[name], method, rtol, atol or 0.0)
            except UndecidedError:
                problem.check_repeats()
                raise
            yield problem, leaf, check
