"""What a step of AdamW comes to when it is made wrongly: by minivit's own, of other settings or taken further."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minivit.nn.module import Parameter
from minivit.train.optimizer import AdamW

NEVER = 10**9
"""A step so late that nothing is left to correct: β to that power is 0."""


Step = Callable[..., tuple[Any, Any, Any]]


def step(p: Any, g: Any, m: Any, v: Any, t: int, *settings: float) -> tuple[Any, Any, Any]:
    """Return (p, m, v) after minivit's AdamW has made step number t with lr, beta1, beta2, eps and decay."""
    lr, beta1, beta2, eps, decay = settings
    parameter = Parameter(np.array(p, np.float64), decays=True)
    optimizer = AdamW([("p", parameter)], lr, (beta1, beta2), eps, decay)
    optimizer.load_state_dict({"steps": np.asarray(t - 1), "m/p": np.asarray(m), "v/p": np.asarray(v)})
    parameter.grad = np.array(g, np.float64)
    optimizer.step()
    state = optimizer.state_dict()
    return np.array(parameter.data), state["m/p"], state["v/p"]


def corrections(t: int, beta1: float, beta2: float) -> tuple[float, float]:
    """Return 1 - β₁ᵗ and √(1 - β₂ᵗ)."""
    return 1.0 - beta1**t, math.sqrt(1.0 - beta2**t)


def rescaled(args: tuple[Any, ...], of_step: float = 1.0, of_root: float = 1.0) -> tuple[Any, Any, Any]:
    """Return :func:`step` with ``of_step`` before m̂ and ``of_root`` before √v̂, and the decay as it is.

    a·m̂/(b·√v̂ + eps) is (a/b)·m̂/(√v̂ + eps/b).
    """
    *state, lr, beta1, beta2, eps, decay = args
    factor = of_step / of_root
    return step(*state, lr * factor, beta1, beta2, eps / of_root, decay / factor)


def uncorrected_m(*args: Any) -> tuple[Any, Any, Any]:
    """Step by m, not m̂."""
    return rescaled(args, of_step=corrections(args[4], *args[6:8])[0])


def uncorrected_v(*args: Any) -> tuple[Any, Any, Any]:
    """Step by v, not v̂."""
    return rescaled(args, of_root=corrections(args[4], *args[6:8])[1])


def other_corrections(change: Callable[[int, float, float], tuple[float, float]]) -> Step:
    """Return the step with ``change(t, β₁, β₂)``, two numbers, by which m and v are divided."""

    def gives(*args: Any) -> tuple[Any, Any, Any]:
        of_m, of_v = change(*args[4:5], *args[6:8])
        first, root = corrections(args[4], *args[6:8])
        return rescaled(args, first / of_m, root / math.sqrt(of_v))

    return gives


def other_numerator(of: Callable[[Any, Any, float], Any]) -> Step:
    """Return the step with ``of(g, old m, 1 - β₁ᵗ)`` in the place of m̂."""

    def gives(p: Any, g: Any, m: Any, v: Any, t: int, *settings: float) -> tuple[Any, Any, Any]:
        lr, _, _, eps, decay = settings
        first, root = corrections(t, *settings[1:3])
        _, *means = step(p, g, m, v, t, *settings)
        return (1.0 - lr * decay) * p - lr * of(g, m, first) / (np.sqrt(means[1]) / root + eps), *means

    return gives


def from_step_number(number: Callable[[int], int]) -> Step:
    """Return the step with other bias corrections: those of step ``number(t)``; of step 0 they are divisions by 0."""

    def gives(p: Any, g: Any, m: Any, v: Any, t: int, *settings: float) -> tuple[Any, Any, Any]:
        counted = number(t)
        new = step(p, g, m, v, max(counted, 1), *settings)
        return new if counted else (np.full_like(p, np.nan), *new[1:])

    return gives


def other_step(change: Callable[[Any, Any, Any, Any], Any]) -> Step:
    """Return the step with another way from (shrunk p, Adam's step, old p, settings) to the new p."""

    def gives(p: Any, g: Any, m: Any, v: Any, t: int, *settings: float) -> tuple[Any, Any, Any]:
        moved, *means = step(p, g, m, v, t, *settings)
        lr, _, beta2, eps, decay = settings
        shrunk = (1.0 - lr * decay) * p
        v_hat = means[1] / (1.0 - beta2**t)
        return change(shrunk, shrunk - moved, p, (v_hat, lr, eps, decay)), *means

    return gives


def coupled(p: Any, g: Any, m: Any, v: Any, t: int, *settings: float) -> tuple[Any, Any, Any]:
    """Add decay·p to the gradient."""
    return step(p, g + settings[-1] * p, m, v, t, *settings[:-1], 0.0)


def shares_exchanged(p: Any, g: Any, m: Any, v: Any, t: int, *settings: float) -> tuple[Any, Any, Any]:
    """Give the old means the share 1 - β."""
    lr, beta1, beta2, eps, decay = settings
    (a, b), (a2, b2) = corrections(t, 1.0 - beta1, 1.0 - beta2), corrections(t, beta1, beta2)
    return rescaled((p, g, m, v, t, lr, 1.0 - beta1, 1.0 - beta2, eps, decay), a / a2, b / b2)


def shares_forgotten(p: Any, g: Any, m: Any, v: Any, *settings: float) -> tuple[Any, Any, Any]:
    """Add g and g² whole."""
    _, _, beta1, beta2, _, _ = settings
    rest, rest2 = 1.0 - beta1, 1.0 - beta2
    p, m, v = rescaled((p, g, m * rest, v * rest2, *settings), 1.0 / rest, rest2**-0.5)
    return p, m / rest, v / rest2


def means_kept_corrected(p: Any, g: Any, m: Any, v: Any, t: int, *settings: float) -> tuple[Any, Any, Any]:
    """Return m̂ and v̂ in the place of m and v."""
    p, m, v = step(p, g, m, v, t, *settings)
    first, root = corrections(t, *settings[1:3])
    return p, m / first, v / root**2


def not_squared(of: Callable[[Any], Any]) -> Step:
    """Return the step with v made of ``of(g)`` in the place of g²: as m is made, with β₂."""

    def gives(p: Any, g: Any, m: Any, v: Any, t: int, *settings: float) -> tuple[Any, Any, Any]:
        lr, _, beta2, eps, decay = settings
        moved, m1, v1 = step(p, g, m, v, t, *settings)
        wrong = step(p, of(g), v, v, t, lr, beta2, beta2, eps, decay)[1]
        rest = (1.0 - beta2**t) ** -1.0
        shrunk, factor = (1.0 - lr * decay) * p, (np.sqrt(v1 * rest) + eps) / (np.sqrt(wrong * rest) + eps)
        return shrunk - (shrunk - moved) * factor, m1, wrong

    return gives
