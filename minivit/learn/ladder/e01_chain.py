"""Exercise 1: a chain of numbers in which two of them are used twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import Key
from minivit.learn.exercise import Asked, Exercise, Mistake, Sample, backward_of, fixed, with_cotangents
from minivit.ops.samples import Draw


def samples(key: Key) -> list[Sample]:
    """Draw x, w and b, Python numbers."""
    r = Draw(key)
    number = lambda: float(np.round(np.copysign(0.3 + np.abs(np.sin(r())), r()), 2))  # ±0.3 to ±1.3: 0 hides factors
    return [
        ("three numbers", (number(), number(), number())),
        ("three others", (number(), number(), number())),
        ("x and w below 0", (-abs(number()), -abs(number()), number())),
        ("small x and b", (0.1 * number(), number(), 0.1 * number())),
        ("a large x", (10.0 + number(), 0.1 * number(), number())),
        ("x = 0", (0.0, number(), number())),
        ("w = 0", (number(), 0.0, number())),
        ("u near 30, where tanh is flat", (30.0 + number(), 1.0, number())),
        ("u near -800, where e^(-u) overflows", (-800.0 + number(), 1.0, number())),
        ("u near 800, where e^u overflows", (800.0 + number(), 1.0, number())),
    ]


def forward(x: Any, w: Any, b: Any) -> Any:
    """Return y = v·(x + v) with v = tanh(w·x + b)."""
    v = ops.tanh(w * x + b)
    return v * (x + v)


def by_exponentials(up: float, down: float) -> Callable[..., float]:
    """Return the forward pass with tanh from e^(up·u) and e^(-down·u), which overflow."""

    def gives(x: float, w: float, b: float) -> float:
        u = w * np.float64(x) + b
        v = (np.exp(up * u) - np.exp(-down * u)) / (np.exp(up * u) + np.exp(-down * u))
        return v * (x + v)

    return gives


def x_inside_only(x: Any, w: Any, b: Any) -> Any:
    """Return y, without a gradient through the x beside v."""
    v = ops.tanh(w * x + b)
    return v * (fixed(x) + v)


def x_outside_only(x: Any, w: Any, b: Any) -> Any:
    """Return y, without a gradient through the x in u."""
    v = ops.tanh(w * fixed(x) + b)
    return v * (x + v)


def v_once(x: Any, w: Any, b: Any) -> Any:
    """Return y, without a gradient through the v in the bracket."""
    v = ops.tanh(w * x + b)
    return v * (x + fixed(v))


def v_plain(x: Any, w: Any, b: Any) -> Any:
    """Return y, without a gradient through its v²."""
    v = ops.tanh(w * x + b)
    return v * x + fixed(v * v)


def straight_through(x: Any, w: Any, b: Any) -> Any:
    """Return y, with 1 for the derivative of tanh."""
    u = w * x + b
    v = u + fixed(ops.tanh(fixed(u)) - fixed(u))
    return v * (x + v)


def with_slope(slope_of: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Return y, with another derivative of tanh, made of u and v."""

    def gives(x: Any, w: Any, b: Any) -> Any:
        u = w * x + b
        slope = fixed(slope_of(u, ops.tanh(u)))
        v = u * slope + fixed(ops.tanh(fixed(u)) - fixed(u) * slope)
        return v * (x + v)

    return gives


def other_dx(change: Callable[..., Any]) -> Callable[..., Any]:
    """Return a backward whose dx is ``change`` of what reaches x beside v and within u, and of g."""

    def gives(g: Any, x: Any, w: Any, b: Any) -> tuple[Any, ...]:
        _, dw, db = RIGHT(g, x, w, b)
        beside = backward_of(x_outside_only, 3)(g, x, w, b)[0]
        within = backward_of(x_inside_only, 3)(g, x, w, b)[0]
        return change(beside, within, g), dw, db

    return gives


def partners_exchanged(g: Any, x: Any, w: Any, b: Any) -> tuple[Any, ...]:
    """Return the gradients with the factor x in what goes from u to x, and w in what goes to w."""
    du = RIGHT(g, x, w, b)[2]
    return backward_of(x_outside_only, 3)(g, x, w, b)[0] + du * x, du * w, du


RIGHT = backward_of(forward, 3)

EXERCISE = Exercise(
    number=1,
    slug="chain",
    title="the chain rule, on single numbers",
    asked=(
        Asked(
            "forward",
            ("y",),
            right=lambda x, w, b: forward(np.asarray(x), w, b),
            samples=samples,
            mistakes=(
                Mistake(
                    "b forgotten",
                    "b does not enter: u has two terms.",
                    lambda x, w, b: forward(np.asarray(x), w, 0.0),
                ),
                Mistake(
                    "u for v",
                    "y is made of u where it should be made of v = tanh(u).",
                    lambda x, w, b: (w * x + b) * (x + w * x + b),
                ),
                Mistake(
                    "v not squared",
                    "The last term of y is v where it should be v·v: the bracket is multiplied out wrongly.",
                    lambda x, w, b: float(ops.tanh(np.asarray(w * x + b))) * (x + 1.0),
                ),
                Mistake(
                    "overflow",
                    "tanh is computed from e^u and e^(-u), which are infinite from 710 on: the result is NaN. NumPy "
                    "has a tanh that knows better.",
                    by_exponentials(1.0, 1.0),
                ),
                Mistake(
                    "overflow of e^(2u)",
                    "tanh is computed from e^(2u), which is infinite from u = 355 on: ∞/∞ is NaN. NumPy has a tanh "
                    "that knows better.",
                    by_exponentials(2.0, 0.0),
                ),
                Mistake(
                    "overflow of e^(-2u)",
                    "tanh is computed from e^(-2u), which is infinite below u = -355: ∞/∞ is NaN. NumPy has a tanh "
                    "that knows better.",
                    by_exponentials(0.0, 2.0),
                ),
            ),
        ),
        Asked(
            "backward",
            ("dx", "dw", "db"),
            right=RIGHT,
            samples=with_cotangents(samples, lambda x, w, b: forward(np.asarray(x), w, b)),
            mistakes=(
                Mistake(
                    "x beside v forgotten",
                    "dx has what comes through u only. x is used a second time: where? What comes back on several "
                    "paths is added.",
                    backward_of(x_inside_only, 3),
                ),
                Mistake(
                    "x within u forgotten",
                    "dx has what comes from the bracket only. x is used a second time, further inside. What comes back "
                    "on several paths is added.",
                    backward_of(x_outside_only, 3),
                ),
                Mistake(
                    "v used once",
                    "v stands in y twice, before the bracket and in it; your dv has one of these.",
                    backward_of(v_once, 3),
                ),
                Mistake(
                    "v² forgotten",
                    "dv is g·x, which is the derivative of v·x alone. y has another term with v in it.",
                    backward_of(v_plain, 3),
                ),
                Mistake(
                    "derivative of tanh forgotten",
                    "What arrives at v is passed on to u as it is. tanh has a slope, and only at u = 0 is it 1.",
                    backward_of(straight_through, 3),
                ),
                Mistake(
                    "slope in u",
                    "The slope of tanh is taken as 1 - u². Look again at what is squared in the derivation.",
                    backward_of(with_slope(lambda u, v: 1.0 - u * u), 3),
                ),
                Mistake(
                    "slope without its square",
                    "The slope of tanh is taken as 1 - v. Look again at what is squared in the derivation.",
                    backward_of(with_slope(lambda u, v: 1.0 - v), 3),
                ),
                Mistake(
                    "partners exchanged",
                    "What goes from u to x has the factor x, and what goes to w the factor w. What is the derivative "
                    "of w·x in x?",
                    partners_exchanged,
                ),
                Mistake(
                    "g forgotten",
                    "The result is ∂y/∂x, not ∂L/∂x: it does not depend on g. Start from what arrives, g = ∂L/∂y.",
                    lambda g, *args: RIGHT(np.ones_like(g), *args),
                ),
                Mistake(
                    "g on one path only",
                    "Of the two terms of dx the one that comes through u has no g. Every path begins at y, where g "
                    "arrives.",
                    other_dx(lambda beside, within, g: beside + within / g),
                ),
                Mistake(
                    "paths multiplied",
                    "dx is the product of what comes back on its two paths. Along a path factors are multiplied; paths "
                    "are added.",
                    other_dx(lambda beside, within, g: beside * within),
                ),
            ),
        ),
    ),
    hints=(
        "Give every intermediate its own line: u, v, s = x + v, y = v·s. Going back, go through these lines from the "
        "last to the first, and write for each number what arrives at it, beginning with dy = g.",
        "The line y = v·s sends g·s to v and g·v to s. The line s = x + v sends what arrived at s to x and to v, "
        "unchanged. So v receives twice before you go on to u: add both first.",
        "From v to u a factor: the slope of tanh, which the text writes in v. From u = w·x + b there are three edges, "
        "to w, to x and to b, and each gets what arrived at u times one local derivative. x has now received twice.",
    ),
)
