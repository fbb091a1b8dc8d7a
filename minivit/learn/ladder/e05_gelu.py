"""Exercise 5: the exact GELU, and its gradient."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import Key
from minivit.learn.exercise import Asked, Exercise, Mistake, Sample, backward_of, with_cotangents
from minivit.ops.activation import gelu_cdf
from minivit.ops.samples import Draw


def samples(key: Key) -> list[Sample]:
    """Draw numbers of many shapes, and some far out."""
    r = Draw(key)
    return [
        ("a row of five", (r(5),)),
        ("one number", (r(1),)),
        ("two rows of three", (2.0 * r(2, 3),)),
        ("three axes", (r(3, 1, 4),)),
        ("from -40 to 40", (np.linspace(-40.0, 40.0, 33),)),
        ("all of it negative", (-r.positive(4, 4),)),
    ]


def forward(x: Any) -> Any:
    """Return x·Φ(x)."""
    return ops.gelu(x)


def gate(x: Any) -> Any:
    """Return Φ(x)."""
    return gelu_cdf(x, "none")


def density(x: Any) -> Any:
    """Return φ(x), as the engine's derivative of Φ."""
    return backward_of(gate, 1)(1.0, x)


FORWARD_MISTAKES = (
    Mistake(
        "the tanh formula",
        "This is the approximation with tanh, up to 5e-4 away from the function asked. Φ is to be exact, by erf.",
        lambda x: ops.gelu(x, "tanh"),
    ),
    Mistake(
        "the sigmoid formula",
        "This is x·sigmoid(1.702x), up to 0.02 away from the function asked. Φ is to be exact, by erf.",
        lambda x: x * ops.sigmoid(1.702 * x),
    ),
    Mistake(
        "erf of x itself",
        "erf is taken at x. Φ is wider than erf: look at the end of the integral after the substitution t = √2·s.",
        lambda x: x * (ops.erf(x) * 0.5 + 0.5),
    ),
    Mistake(
        "erf in the place of Φ",
        "x is multiplied by a gate from -1 to 1. A probability runs from 0 to 1: what is left of 0 is missing.",
        lambda x: x * (2.0 * gate(x) - 1.0),
    ),
    Mistake(
        "half of the gate",
        "The gate runs from -½ to ½: it is the integral from 0 to x. What is left of 0, which is ½, is missing.",
        lambda x: x * (gate(x) - 0.5),
    ),
    Mistake(
        "twice too large",
        "All is twice too large, as if the gate ran from 0 to 2. What is Φ(0)?",
        lambda x: 2.0 * forward(x),
    ),
    Mistake(
        "the gate alone",
        "This is Φ(x). GELU multiplies something by it.",
        gate,
    ),
)

BACKWARD_MISTAKES = (
    Mistake(
        "Φ held fixed",
        "This is the derivative of x·Φ with Φ taken as a number. The gate moves with x, too: the product rule has two "
        "terms.",
        lambda g, x: g * gate(x),
    ),
    Mistake(
        "g on one term only",
        "g multiplies Φ only, and not the other term. g belongs to the whole of gelu′: mind the brackets.",
        lambda g, x: g * gate(x) + x * density(x),
    ),
    Mistake(
        "x held fixed",
        "This is the derivative of x·Φ with the factor x taken as a number. The product rule has two terms.",
        lambda g, x: g * x * density(x),
    ),
    Mistake(
        "the derivative of Φ alone",
        "This is g·φ(x), what the gate's own derivative gives. The function is x·Φ(x): use the product rule.",
        lambda g, x: g * density(x),
    ),
    Mistake(
        "density without its x",
        "Both terms are there, but the second has lost a factor: in the product rule each factor is differentiated "
        "while the other one stays.",
        lambda g, x: g * (gate(x) + density(x)),
    ),
    Mistake(
        "density without its constant",
        "e^(-x²/2) is no density: its integral is not 1. Look at the definition of φ again.",
        lambda g, x: g * (gate(x) + x * density(x) * math.sqrt(2.0 * math.pi)),
    ),
    Mistake(
        "2π without its root",
        "The density's constant is 1/(2π), that of two normal variables together. Look at the definition of φ.",
        lambda g, x: g * (gate(x) + x * density(x) / math.sqrt(2.0 * math.pi)),
    ),
    Mistake(
        "inner derivative forgotten",
        "The second term is √2 too large. If you differentiate erf(x/√2), the chain rule wants the derivative of x/√2; "
        "or take Φ′ from its integral, without erf.",
        lambda g, x: g * (gate(x) + x * density(x) * math.sqrt(2.0)),
    ),
    Mistake(
        "exponent not halved",
        "The density falls too fast: its exponent is not that of φ.",
        lambda g, x: g * (gate(x) + x * density(x) * ops.exp(x * x * -0.5)),
    ),
    Mistake(
        "the tanh formula",
        "This is the derivative of the approximation with tanh. The exact one needs Φ and φ, nothing else.",
        backward_of(lambda x: ops.gelu(x, "tanh"), 1),
    ),
    Mistake(
        "g forgotten",
        "This is gelu′(x). What arrives from behind, g, is to be multiplied by it.",
        lambda g, x: backward_of(forward, 1)(np.ones_like(g), x),
    ),
)

EXERCISE = Exercise(
    number=5,
    slug="gelu",
    title="GELU, exact",
    asked=(
        Asked("forward", ("out",), forward, samples, FORWARD_MISTAKES),
        Asked("backward", ("dx",), backward_of(forward, 1), with_cotangents(samples, forward), BACKWARD_MISTAKES),
    ),
    hints=(
        "Write a function for Φ and one for φ first, and hold Φ against the three values in the text. forward is then "
        "one product, and backward needs both functions and nothing else.",
        "∫ φ(t) dt from 0 to x came out as (1/√π) ∫ e^(-s²) ds from 0 to x/√2. How much of erf(x/√2), with its factor "
        "2/√π before the same integral, is that? Then do not forget the ½ before it. For backward: (uv)′ = u′v + uv′.",
        "With u(x) = x and v(x) = Φ(x): u′ = 1, v′ = φ. Put the four pieces into the product rule, write φ with its "
        "exponent and its constant, and multiply the sum by g.",
    ),
)
