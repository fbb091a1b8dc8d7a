"""Exercise 3: the softmax of every row, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minivit import ops
from minivit.backend import Key
from minivit.learn.exercise import Asked, Exercise, Mistake, Sample, backward_of, with_cotangents
from minivit.ops.samples import Draw


def samples(key: Key) -> list[Sample]:
    """Draw rows of logits (…, K)."""
    r = Draw(key)
    return [
        ("two rows of three", (np.round(r(2, 3), 2),)),
        ("one row, no leading axis", (r(5),)),
        ("square", (r(4, 4),)),
        ("two leading axes", (r(2, 3, 5),)),
        ("rows of one number", (r(3, 1),)),
        ("logits near 800, where e^x overflows", (800.0 + r(2, 5),)),
        ("logits near -800, where e^x is 0", (-800.0 + r(3, 4),)),
        ("one row near 800, the next near -800", (np.array([[800.0], [-800.0]]) + r(2, 3),)),
        ("rows that span 1000", (np.array([0.0, 0.0, 1000.0]) + r(2, 3),)),
        ("a row of ten, one of them near 3000", (np.where(np.arange(10) == 9, 3000.0, 0.0) + r(1, 10),)),
    ]


def forward(x: Any) -> Any:
    """Return the softmax over the last axis."""
    return ops.softmax(x)


def diagonal(g: Any, x: Any) -> Any:
    """Return the gradient with nothing but the Jacobian's diagonal."""
    p = ops.softmax(x)
    return g * p * (1.0 - p)


def from_p(bracket: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """Return a backward that is made of p and g."""
    return lambda g, x: bracket(ops.softmax(x), g)


def first_term(g: Any, x: Any) -> Any:
    """Return p ∘ g: the sum's own dependence on x is left out."""
    return g * ops.softmax(x)


def mean_taken(g: Any, x: Any) -> Any:
    """Return the gradient with the mean of g over the row in the place of its mean under p."""
    p = ops.softmax(x)
    return p * (g - ops.mean(g, -1, True))


def over_all(g: Any, x: Any) -> Any:
    """Return the gradient with the inner product taken over all rows at once."""
    p = ops.softmax(x)
    return p * (g - ops.sum(g * p))


def rows_merged(x: Any) -> Any:
    """Return the softmax over all numbers at once."""
    return ops.reshape(ops.softmax(ops.reshape(x, (-1,))), np.shape(x))


def unweighted(g: Any, x: Any) -> Any:
    """Return g - Σ g·p: what the outer p should multiply."""
    p = ops.softmax(x)
    return g - ops.sum(g * p, -1, True)


def sign_of_the_sum(g: Any, x: Any) -> Any:
    """Return the gradient with the sum added."""
    p = ops.softmax(x)
    return p * (g + ops.sum(g * p, -1, True))


def shifted_by(shift: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the softmax by e^(x - shift(x)): NaN where that overflows or all of a row is 0."""

    def softmax(x: Any) -> Any:
        e = np.exp(x - shift(x))
        return e / e.sum(axis=-1, keepdims=True)

    return softmax


no_shift = shifted_by(lambda x: 0.0)


EXERCISE = Exercise(
    number=3,
    slug="softmax",
    title="softmax",
    asked=(
        Asked(
            "forward",
            ("p",),
            right=forward,
            samples=samples,
            mistakes=(
                Mistake(
                    "overflow",
                    "e^x is infinite from x = 710 on, and 0 below -745. Adding one number to a whole row changes "
                    "nothing in the softmax: choose that number so that no exponent is above 0.",
                    no_shift,
                ),
                Mistake(
                    "one maximum for all rows",
                    "The maximum of all rows together is taken off. A row that lies far below it is 0 everywhere then, "
                    "and so is its sum: each row needs a number of its own.",
                    shifted_by(lambda x: x.max()),
                ),
                Mistake(
                    "mean taken off",
                    "The row's mean is taken off. In a row whose numbers lie far apart the largest exponent is still "
                    "far above 0: take off what makes it 0.",
                    shifted_by(lambda x: x.mean(axis=-1, keepdims=True)),
                ),
                Mistake(
                    "smallest taken off",
                    "The row's smallest number is taken off, so that all exponents are above 0: which number makes "
                    "sure that none is?",
                    shifted_by(lambda x: x.min(axis=-1, keepdims=True)),
                ),
                Mistake(
                    "wrong axis",
                    "The numbers add up to 1 along the first axis. Each row, along the last axis, is a distribution of "
                    "its own: look at axis= in your sum and your maximum.",
                    lambda x: ops.softmax(x, 0),
                ),
                Mistake(
                    "sum over everything",
                    "All numbers together add up to 1, not each row. A sum without axis= adds up all axes.",
                    rows_merged,
                ),
                Mistake(
                    "logarithm",
                    "These are the logarithms of the probabilities.",
                    lambda x: ops.log_softmax(x),
                ),
            ),
        ),
        Asked(
            "backward",
            ("dx",),
            right=backward_of(forward, 1),
            samples=with_cotangents(samples, forward),
            mistakes=(
                Mistake(
                    "only the diagonal",
                    "This is g times the diagonal of the Jacobian. x_j is in the denominator of every p_i of its row, "
                    "so the Jacobian is full: what do the p_i with i ≠ j add to dx_j?",
                    diagonal,
                ),
                Mistake(
                    "the denominator held fixed",
                    "The derivative of e^x_j in the numerator is there; that x_j is in the denominator, too, is not.",
                    first_term,
                ),
                Mistake(
                    "plain mean for weighted mean",
                    "What is taken off g is its plain mean over the row. The sum over i in the derivation has a factor "
                    "in each term that is not 1/K.",
                    mean_taken,
                ),
                Mistake(
                    "inner product over all rows",
                    "The sum runs over all rows at once. Rows know nothing of each other: it runs along the last axis, "
                    "and stays there as an axis of length 1.",
                    over_all,
                ),
                Mistake(
                    "sum down the columns",
                    "The sum runs along the first axis, over the rows. Rows know nothing of each other: it runs along "
                    "the last axis.",
                    from_p(lambda p, g: p * (g - ops.sum(g * p, 0, True))),
                ),
                Mistake(
                    "plain sum for weighted sum",
                    "What is taken off g is the sum of all g of the row. The sum over i in the derivation has another "
                    "factor in each term.",
                    from_p(lambda p, g: p * (g - ops.sum(g, -1, True))),
                ),
                Mistake(
                    "mean for the sum",
                    "A mean over the row is taken where the derivation has a sum: it is K times too small.",
                    from_p(lambda p, g: p * (g - ops.mean(g * p, -1, True))),
                ),
                Mistake(
                    "p left off the sum",
                    "The first term has its p_j, the sum has not: every entry of the Jacobian has the factor p_j, or "
                    "p_i, which is the same as it is symmetric. Mind the brackets.",
                    from_p(lambda p, g: p * g - ops.sum(g * p, -1, True)),
                ),
                Mistake(
                    "overflow going back",
                    "backward computes p once more, without the shift that forward makes: NaN. Call forward.",
                    lambda g, x: no_shift(x) * (g - ops.sum(g * no_shift(x), -1, True)),
                ),
                Mistake(
                    "the outer p forgotten",
                    "The bracket is right. One factor that every entry of the Jacobian has is missing before it.",
                    unweighted,
                ),
                Mistake(
                    "sign of the sum",
                    "The two terms are added. One of them comes from 1/Z: what is its derivative?",
                    sign_of_the_sum,
                ),
                Mistake(
                    "wrong axis",
                    "The gradient is that of a softmax along the first axis. Rows lie along the last one.",
                    lambda g, x: backward_of(lambda z: ops.softmax(z, 0), 1)(g, x),
                ),
            ),
        ),
    ),
    hints=(
        "Forward: subtract something from each row before exp, and keep the axis (keepdims=True) so that it "
        "broadcasts back. Backward: compute p first; everything is said in p and g, x itself is no longer needed.",
        "Write down ∂p_i/∂x_j for one row, once for i = j and once for i ≠ j, each in p alone. Both cases are one "
        "formula with [i = j]. Then put it into dx_j = Σ_i g_i ∂p_i/∂x_j.",
        "[i = j] in the sum picks one term out; the rest is p_j times a number that is the same for all j of the row. "
        "Compute that number once for each row. No (K, K) matrix is needed: two products, one sum, one difference.",
    ),
)
