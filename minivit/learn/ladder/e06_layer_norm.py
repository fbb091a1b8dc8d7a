"""Exercise 6: layer normalisation, and its gradients in x, weight and bias."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from minivit import ops
from minivit.autograd.op import raw
from minivit.backend import Key
from minivit.learn.exercise import Asked, Exercise, Mistake, Sample, backward_of, with_cotangents
from minivit.ops.samples import Draw


def samples(key: Key) -> list[Sample]:
    """Draw rows (…, D), weight and bias (D,), and eps."""
    r = Draw(key)
    equal = np.broadcast_to(r(3, 1), (3, 4)).copy()
    return [
        ("three rows of five", (r(3, 5), 1.0 + r(5), r(5), 1e-6)),
        ("one row, no leading axis", (r(7), 1.0 + r(7), r(7), 1e-6)),
        ("two leading axes", (2.0 * r(2, 3, 5), r(5), r(5), 1e-6)),
        ("a large eps", (r(4, 6), r(6), r(6), 0.5)),
        ("rows of one number", (r(3, 1), r(1), r(1), 1e-3)),
        ("rows of equal numbers", (equal, r(4), r(4), 1e-3)),
        ("rows around two million", (far_from_zero(r(2, 1, 8)), r(8), r(8), 1e-6)),
    ]


def far_from_zero(x: np.ndarray) -> np.ndarray:
    """Return rows (…, 8) around 2²¹, in eighths.

    Their means have no rounding, in whatever order they are added, nor have the means of their squares; the square of a
    mean always has: in eighths the row adds up to an odd number, whose square has a bit more than float64.
    """
    eighths = np.round(8.0 * x)
    eighths[..., 0] += (eighths.sum(axis=-1) + 1.0) % 2.0
    return 2.0**21 + eighths / 8.0


def forward(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """Return the normalised rows."""
    return ops.layer_norm(x, weight, bias, eps)


right = backward_of(forward, 3)


def composed(x: Any, weight: Any, bias: Any, eps: float, axis: Any = -1, hold: str = "") -> Any:
    """Return the rows normalised over ``axis``; the mean or the root that ``hold`` names is a constant going back."""
    middle = ops.mean(x, axis, True)
    root = ops.sqrt(ops.var(x, axis, True) + eps)
    return (x - (raw(middle) if "mean" in hold else middle)) / (raw(root) if "root" in hold else root) * weight + bias


def ways(g: Any, *args: Any) -> tuple[Any, Any, Any]:
    """Return what reaches x directly, through the mean, and through the root: they add up to dx."""
    direct, and_mean, and_root = [
        backward_of(partial(composed, hold=hold), 3)(g, *args)[0] for hold in ("mean root", "root", "mean")
    ]
    return direct, and_mean - direct, and_root - direct


def dx_from(combine: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    """Return a backward whose dx is the three ways combined in another manner."""
    return lambda g, *args: (combine(*ways(g, *args)), *right(g, *args)[1:])


def of_weight(wrong: Callable[..., Any]) -> Callable[..., Any]:
    """Return a backward whose dweight is Σ g · wrong(x, eps) over the rows."""

    def backward(g: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
        dx, _, dbias = right(g, x, weight, bias, eps)
        return dx, np.sum(g * wrong(x, eps), tuple(range(np.ndim(x) - 1))), dbias

    return backward


def by_root_alone(g: Any, x: Any, weight: Any, *rest: Any, of: Callable[[Any], Any] = np.ones_like) -> Any:
    """Return the gradients with ``of(x)`` in the place of x̂_i before the mean of dx̂_j·x̂_j."""
    direct, by_mean, _ = ways(g, x, weight, *rest)
    root = ops.sqrt(ops.var(x, -1, True) + rest[-1])
    through = of(x) * ops.mean(g * weight * forward(x, 1.0, 0.0, rest[-1]), -1, True) / root
    return direct + by_mean - through, *right(g, x, weight, *rest)[1:]


def dx_over_s(g: Any, x: Any, *rest: Any) -> Any:
    """Return the gradients with the term through s divided by s once more."""
    direct, by_mean, by_root = ways(g, x, *rest)
    return direct + by_mean + by_root / ops.sqrt(ops.var(x, -1, True) + rest[-1]), *right(g, x, *rest)[1:]


def no_weight(g: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """Return the gradients with g, not g·weight, as what reaches x̂."""
    return (right(g, x, np.ones_like(weight), bias, eps)[0], *right(g, x, weight, bias, eps)[1:])


def weight_in_one_place(g: Any, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """Return the gradients with g·weight in the first term of dx and g in the two others."""
    _, by_mean, by_root = ways(g, x, np.ones_like(weight), bias, eps)
    return (ways(g, x, weight, bias, eps)[0] + by_mean + by_root, *right(g, x, weight, bias, eps)[1:])


def first_axis_only(g: Any, x: Any, *rest: Any) -> Any:
    """Return the gradients with those of weight and bias summed over the first axis only."""
    x_hat = forward(x, 1.0, 0.0, rest[-1])
    return right(g, x, *rest)[0], np.sum(g * x_hat, 0), np.sum(g, 0)


def means_over_rows(g: Any, x: Any, weight: Any, *rest: Any) -> Any:
    """Return the gradients with those of weight and bias averaged over the rows."""
    dx, dweight, dbias = right(g, x, weight, *rest)
    rows = x.size // weight.size
    return dx, dweight / rows, dbias / rows


FORWARD_MISTAKES = (
    Mistake(
        "variance divided by D - 1",
        "The variance is divided by D - 1, the unbiased estimate from a sample. The row is all there is: look at ddof.",
        lambda x, weight, bias, eps: (
            (x - ops.mean(x, -1, True)) / ops.sqrt(ops.var(x, -1, True, 1) + eps) * weight + bias
        ),
    ),
    Mistake(
        "eps outside the root",
        "eps is added to the standard deviation. It belongs to what the root is taken of.",
        lambda x, weight, bias, eps: (
            (x - ops.mean(x, -1, True)) / (ops.sqrt(ops.var(x, -1, True)) + eps) * weight + bias
        ),
    ),
    Mistake(
        "eps forgotten",
        "eps is nowhere in it: a row of equal numbers is divided by 0, and all others are a little too large.",
        lambda x, weight, bias, eps: composed(x, weight, bias, 0.0),
    ),
    Mistake(
        "divided by the variance",
        "The row is divided by its variance. Its unit should go away: something is still to be done to the variance.",
        lambda x, weight, bias, eps: (x - ops.mean(x, -1, True)) / (ops.var(x, -1, True) + eps) * weight + bias,
    ),
    Mistake(
        "variance by E[x²] - μ²",
        "The variance is the difference of two large numbers that are almost equal: rows far from 0 lose its digits. "
        "Take it of the centred numbers.",
        lambda x, weight, bias, eps: (
            (x - ops.mean(x, -1, True))
            / ops.sqrt(ops.mean(x * x, -1, True) - ops.mean(x, -1, True) ** 2 + eps)
            * weight
            + bias
        ),
    ),
    Mistake(
        "mean not taken off",
        "The row is divided by its standard deviation, but its mean is still in it. What is the numerator of x̂?",
        lambda x, weight, bias, eps: x / ops.sqrt(ops.var(x, -1, True) + eps) * weight + bias,
    ),
    Mistake(
        "root mean square",
        "The row is divided by the root of its mean square, without its mean taken off: that is RMSNorm.",
        lambda x, weight, bias, eps: x / ops.sqrt(ops.mean(x * x, -1, True) + eps) * weight + bias,
    ),
    Mistake(
        "normalised over the first axis",
        "Mean and variance run along the first axis, over the examples. Each row, along the last axis, has its own.",
        lambda x, weight, bias, eps: composed(x, weight, bias, eps, axis=0),
    ),
    Mistake(
        "normalised over everything",
        "Mean and variance are those of the whole array. Each row has its own: look at axis= and keepdims=.",
        lambda x, weight, bias, eps: composed(x, weight, bias, eps, axis=None),
    ),
    Mistake(
        "weight and bias forgotten",
        "This is x̂. Two things happen to it before it is the output.",
        lambda x, weight, bias, eps: forward(x, np.ones_like(weight), np.zeros_like(bias), eps),
    ),
)

BACKWARD_MISTAKES = (
    Mistake(
        "mean held fixed",
        "In dx, what goes back through the mean μ is missing: a number x_i that grows takes the mean with it, and with "
        "it every x̂_j of the row. Look at δμ in δx̂_j.",
        dx_from(lambda direct, by_mean, by_root: direct + by_root),
    ),
    Mistake(
        "standard deviation held fixed",
        "In dx, what goes back through s is missing: a number x_i far from the mean makes s larger, and with it every "
        "x̂_j of the row smaller. Look at δs in δx̂_j.",
        dx_from(lambda direct, by_mean, by_root: direct + by_mean),
    ),
    Mistake(
        "mean and standard deviation held fixed",
        "dx has the first of its three terms only: μ and s are taken for constants, but are made of the row's numbers.",
        dx_from(lambda direct, by_mean, by_root: direct),
    ),
    Mistake(
        "sums in the place of means",
        "The terms of dx that go through μ and s are D times too large. Follow the 1/D in δμ and in δs.",
        dx_from(lambda direct, by_mean, by_root: direct + direct.shape[-1] * (by_mean + by_root)),
    ),
    Mistake(
        "sum in the term through s",
        "In dx, the term that goes through s is D times too large. Follow the 1/D in δs.",
        dx_from(lambda direct, by_mean, by_root: direct + by_mean + direct.shape[-1] * by_root),
    ),
    Mistake(
        "sum in the term through μ",
        "In dx, the term that goes through μ is D times too large. Follow the 1/D in δμ.",
        dx_from(lambda direct, by_mean, by_root: direct + direct.shape[-1] * by_mean + by_root),
    ),
    Mistake(
        "not divided by s",
        "dx is s times too large in each row. x̂ has s in its denominator, and every term of δx̂_j has it, too.",
        lambda g, x, weight, bias, eps: (
            right(g, x, weight, bias, eps)[0] * ops.sqrt(ops.var(x, -1, True) + eps),
            *right(g, x, weight, bias, eps)[1:],
        ),
    ),
    Mistake(
        "sign of the term through s",
        "In dx, the term that goes through s has the wrong sign. x̂ has s in its denominator: with which sign does δs "
        "stand in δx̂_j?",
        dx_from(lambda direct, by_mean, by_root: direct + by_mean - by_root),
    ),
    Mistake(
        "2 not cancelled",
        "In dx, the term that goes through s is twice too large. The root's derivative is 1/(2s): what is left of the "
        "2 from the squares?",
        dx_from(lambda direct, by_mean, by_root: direct + by_mean + 2.0 * by_root),
    ),
    Mistake(
        "x̂ left off the term through s",
        "In dx, the term that goes through s lacks its x̂_i: it is not one number for the whole row. Look at what δs "
        "is made of.",
        by_root_alone,
    ),
    Mistake(
        "x for x̂ in the term through s",
        "In dx, the term that goes through s has x_i where x̂_i belongs: look at δs once more.",
        lambda g, x, *rest: by_root_alone(g, x, *rest, of=lambda x: x),
    ),
    Mistake(
        "one s too many",
        "In dx, the term that goes through s is divided by s once more. (x_j - μ)/s is x̂_j: is that s counted twice?",
        dx_over_s,
    ),
    Mistake(
        "weight forgotten on the way to x̂",
        "dx is right for a weight of ones. What reaches x̂ is not g: x̂ is multiplied by something before it is the "
        "output.",
        no_weight,
    ),
    Mistake(
        "weight in the first term only",
        "In dx the first term has what reaches x̂, g·weight, but the two others have g. All three need the same.",
        weight_in_one_place,
    ),
    Mistake(
        "eps forgotten going back",
        "dx and dweight are made with s = √σ², without eps. Take the s that the forward divided by.",
        lambda g, x, weight, bias, eps: right(g, x, weight, bias, 0.0),
    ),
    Mistake(
        "variance divided by D - 1",
        "s or δs is made with D - 1. The forward divides by D, and so does everything that comes from it.",
        backward_of(
            lambda x, weight, bias, eps: (
                (x - ops.mean(x, -1, True)) / ops.sqrt(ops.var(x, -1, True, 1) + eps) * weight + bias
            ),
            3,
        ),
    ),
    Mistake(
        "dweight from x",
        "dweight is made with x. In the forward, weight multiplies something else.",
        of_weight(lambda x, eps: x),
    ),
    Mistake(
        "dweight from the centred x",
        "dweight is made with x - μ, which is not yet divided by s. In the forward, weight multiplies x̂.",
        of_weight(lambda x, eps: x - ops.mean(x, -1, True)),
    ),
    Mistake(
        "weight in dweight and dbias",
        "dweight or dbias is made with g·weight, which is what reaches x̂. out is x̂·weight + bias: what is its "
        "derivative in each of the two?",
        lambda g, x, weight, bias, eps: (
            right(g, x, weight, bias, eps)[0],
            *right(g * weight, x, weight, bias, eps)[1:],
        ),
    ),
    Mistake(
        "means over the rows",
        "dweight and dbias are averaged over the rows. What is used once in every row gets the sum of what comes back.",
        means_over_rows,
    ),
    Mistake(
        "summed over the first axis only",
        "dweight and dbias are summed over the first axis only. Each has the shape (D,), however many axes x has in "
        "front, and nothing is summed where it has none.",
        first_axis_only,
    ),
)

EXERCISE = Exercise(
    number=6,
    slug="layer_norm",
    title="LayerNorm",
    asked=(
        Asked("forward", ("out",), forward, samples, FORWARD_MISTAKES),
        Asked("backward", ("dx", "dweight", "dbias"), right, with_cotangents(samples, forward), BACKWARD_MISTAKES),
    ),
    hints=(
        "Write a helper that returns x̂ and s, keeping the last axis as length 1 where a mean is taken: backward needs "
        "both, too. dbias and dweight are one line each: a sum over all axes but the last.",
        "For dx: put δx̂_j = (δx_j - δμ - x̂_j δs)/s into δL = Σ_j dx̂_j δx̂_j and take the three parts for themselves. "
        "In the second, Σ_j dx̂_j δμ, the number δμ = (1/D) Σ_i δx_i does not depend on j and can go before the sum. "
        "So can δs in the third.",
        "The second part is then (1/D)(Σ_j dx̂_j) Σ_i δx_i, and the third (1/D)(Σ_j dx̂_j x̂_j) Σ_i x̂_i δx_i. The "
        "brackets with their 1/D are means over the row, of dx̂ and of dx̂·x̂. What stands before δx_i in all three "
        "parts, with their signs, divided by s, is dx_i.",
    ),
)
